// SPDX-License-Identifier: MIT OR Apache-2.0
//! Dirty bits that a harvest clears, and data that depends on them.
//!
//! What the host writes back, to a disk or to swap, is what it knows to be dirty.
//! Memory of a tmpfs file is the hard case: the host's own page tables let it be
//! written without a fault, so up to Linux 6.12 the dirty bit of KVM's entry can be
//! all that there is. If a harvest cleared it and told nobody, the page would be
//! dropped as one that was never written. Memory of a disk is the plain case: there
//! the host watches the first write to each clean page itself.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use ept_virt_core::sampler::HarvestRequest;
use nix::kmod::{ModuleInitFlags, finit_module};

use super::Outcome;
use super::machine::{Machine, Memory, PAGE, Pages, Touch, expect_same, gfns, harvest, round_program};

/// The kernel's RAM disks: a disk as any other to who uses it.
const DISK_MODULE: &str = "/modules/brd.ko";
const DATA_DISK: &str = "/dev/ram0";
const SWAP_DISK: &str = "/dev/ram1";
const DISK_BYTES: usize = 16 << 20;

/// What the guest writes, side by side, and the memory that holds it.
const WRITTEN: Pages = Pages { base: 0x10_0000, stride: PAGE as u32, count: 1024 };
const BYTES: usize = 8 << 20;
const ROUNDS: u32 = 3;

const CLEAR_DIRTY: HarvestRequest = HarvestRequest {
    gfn_start: 0,
    gfn_count: (BYTES / PAGE) as u64,
    clear_accessed: true,
    clear_dirty: true,
    flush: true,
    keep_young: false,
};

/// What clears dirty bits loses no write.
pub fn dirty_writeback() -> Result<Outcome> {
    if !Path::new(DISK_MODULE).exists() {
        return Ok(Outcome::Skip(format!("{DISK_MODULE} is not there: no disk to write to")));
    }
    if !Path::new(SWAP_DISK).exists() {
        let words = CString::new(format!("rd_nr=2 rd_size={}", DISK_BYTES / 1024))?;
        finit_module(&File::open(DISK_MODULE)?, &words, ModuleInitFlags::empty())
            .with_context(|| format!("cannot load {DISK_MODULE}"))?;
    }
    let swapped = to_swap()?;
    let written = to_disk()?;
    Ok(Outcome::Pass(format!(
        "{ROUNDS} rounds each: {swapped} pages of tmpfs that only KVM knew to be dirty came back from swap, \
         {written} pages of a disk's memory are on it"
    )))
}

/// Swap on a RAM disk, as long as this lives.
struct Swap(CString);

impl Swap {
    fn on(disk: &str) -> Result<Swap> {
        // The header that mkswap writes: version 1, and the number of the last page.
        let mut header = vec![0_u8; PAGE];
        header[1024..1028].copy_from_slice(&1_u32.to_le_bytes());
        header[1028..1032].copy_from_slice(&((DISK_BYTES / PAGE - 1) as u32).to_le_bytes());
        header[PAGE - 10..].copy_from_slice(b"SWAPSPACE2");
        let file = OpenOptions::new().write(true).open(disk).with_context(|| format!("opening {disk}"))?;
        file.write_all_at(&header, 0)?;
        file.sync_all()?;
        let path = CString::new(disk)?;
        // SAFETY: a path that ends in zero; the disk is this test's own.
        let result = unsafe { libc::swapon(path.as_ptr(), 0) };
        ensure!(result == 0, "swapon {disk}: {}", io::Error::last_os_error());
        Ok(Swap(path))
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        // SAFETY: as in `on`. A failure shows when the next test turns it on.
        unsafe { libc::swapoff(self.0.as_ptr()) };
    }
}

/// A file of tmpfs, all of it a hole.
fn tmpfs_file() -> Result<File> {
    // SAFETY: a new file; its descriptor is taken over.
    let fd = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_CLOEXEC) };
    ensure!(fd >= 0, "memfd_create: {}", io::Error::last_os_error());
    // SAFETY: it was just made and is nobody else's.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(BYTES as u64)?;
    Ok(file)
}

/// The guest writes, a harvest clears the dirty bits, twice; then the pages go to
/// swap and come back.
fn to_swap() -> Result<u32> {
    let _swap = Swap::on(SWAP_DISK)?;
    for _ in 0..ROUNDS {
        let file = tmpfs_file()?;
        let memory = Memory::shared(&file, BYTES)?;
        // By reads alone: the host's entries are then writable, and clean.
        (0..BYTES).step_by(PAGE).for_each(|offset| _ = memory.read_u32(offset));
        let mut machine = Machine::new(memory)?;
        write_and_clear(&mut machine, Touch::Store)?;
        write_and_clear(&mut machine, Touch::Write)?;
        let (from, bytes) = (WRITTEN.base as usize, WRITTEN.count as usize * PAGE);
        machine.memory.advise(from, bytes, libc::MADV_PAGEOUT)?;
        let resident = machine.memory.resident(from, bytes)?;
        ensure!(resident < WRITTEN.count as usize / 10, "{resident} pages stayed in memory");
        expect_numbers("swap", 1, |offset| {
            let mut page = vec![0; PAGE];
            file.read_exact_at(&mut page, offset as u64)?;
            Ok(page)
        })?;
    }
    Ok(WRITTEN.count)
}

/// The guest writes to memory of a disk, which is written back, writes again, and a
/// harvest clears the dirty bits; then the disk itself is read.
fn to_disk() -> Result<u32> {
    let open = |flags| OpenOptions::new().read(true).write(true).custom_flags(flags).open(DATA_DISK);
    let (file, direct) = (open(0)?, open(libc::O_DIRECT)?);
    let mut machine = Machine::new(Memory::shared(&file, BYTES)?)?;
    write_and_clear(&mut machine, Touch::Store)?;
    for round in 1..=ROUNDS {
        file.sync_all()?;
        // That took KVM's entries away, so these are faults, and dirty bits anew.
        write_and_clear(&mut machine, Touch::Write)?;
        if round == ROUNDS {
            machine.set_slot(0, 0, &machine.memory, 0)?;
        }
        file.sync_all()?;
        expect_numbers("the disk", round, |offset| read_direct(&direct, offset))?;
    }
    Ok(WRITTEN.count)
}

/// One round of the guest, and a harvest that takes all dirty bits of it.
fn write_and_clear(machine: &mut Machine, touch: Touch) -> Result<()> {
    machine.load(&round_program(WRITTEN, touch))?;
    machine.run_round()?;
    let mut session = machine.observe()?;
    let seen = gfns(&harvest(&mut session, CLEAR_DIRTY)?.dirty, 0);
    let missing: Vec<_> = WRITTEN.gfns().difference(&seen).copied().collect();
    ensure!(missing.is_empty(), "written but not dirty: {missing:?}");
    let after =
        harvest(&mut session, HarvestRequest { clear_accessed: false, clear_dirty: false, ..CLEAR_DIRTY })?;
    expect_same("dirty after clearing", &gfns(&after.dirty, 0), &Default::default())
}

/// Compares every byte: the guest wrote its countdown to each page, and then added
/// one `added` times.
fn expect_numbers(whence: &str, added: u32, read: impl Fn(usize) -> Result<Vec<u8>>) -> Result<()> {
    let mut lost = Vec::new();
    for index in 0..WRITTEN.count {
        let offset = (WRITTEN.base + index * WRITTEN.stride) as usize;
        let mut want = vec![0; PAGE];
        want[..4].copy_from_slice(&(WRITTEN.count - index + added).to_le_bytes());
        if read(offset)? != want {
            lost.push(offset / PAGE);
        }
    }
    ensure!(
        lost.is_empty(),
        "{} of {} pages are not as the guest wrote them when read from {whence}: {:?}...",
        lost.len(),
        WRITTEN.count,
        &lost[..lost.len().min(8)]
    );
    Ok(())
}

/// What is on the disk: past the page cache.
fn read_direct(disk: &File, offset: usize) -> Result<Vec<u8>> {
    let buffer = Memory::small_pages(1)?;
    // SAFETY: the buffer is live, aligned to a page, and as long as is said.
    let got = unsafe {
        libc::pread(disk.as_raw_fd(), buffer.address() as *mut libc::c_void, PAGE, offset as libc::off_t)
    };
    ensure!(got == PAGE as isize, "reading {DATA_DISK} at {offset}: {}", io::Error::last_os_error());
    Ok((0..PAGE).step_by(4).flat_map(|at| buffer.read_u32(at).to_le_bytes()).collect())
}
