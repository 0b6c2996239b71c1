// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who may observe, and what nobody gets to see: addresses of the kernel, and
//! memory of another VM.

use std::fs::{self, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ept_virt_core::uapi::{
    self, KesAttach, KesHarvest, KesInfo, KesMemslot, KesMemslots, KesSample, KesSampleStats, number,
};

use super::Outcome;
use super::arguments::{call, open};
use super::machine::{Machine, Memory, PAGE, PAGES, SPREAD, Touch, gfns, round_program};
use super::places::{FILL, Place, Places, bytes_of, from_bytes};
use super::sampling::while_running;
use crate::kernel_log::has_kernel_address;

const NOBODY: libc::uid_t = 65534;

/// Runs `f` on a thread without any right of root's.
pub fn as_nobody<T: Send>(f: impl FnOnce() -> T + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: the raw calls change the ids of this thread alone, which
            // ends below; glibc's wrappers would change the whole process.
            let dropped = unsafe {
                libc::syscall(libc::SYS_setresgid, NOBODY, NOBODY, NOBODY)
                    | libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY)
            };
            ensure!(dropped == 0, "cannot become nobody: {}", std::io::Error::last_os_error());
            Ok(f())
        });
        thread.join().map_err(|_| anyhow::anyhow!("the thread panicked"))?
    })
}

/// Files of the module that an administrator, and nobody else, may open. Those
/// of debugfs are behind a folder that only root may enter.
fn files() -> Vec<&'static str> {
    ["/proc/kvm_ept_sample", "/proc/kvm_ept_sample_stats"]
        .into_iter()
        .filter(|path| Path::new(path).exists())
        .collect()
}

/// Nobody can open the files; a session that he is handed attaches to nothing.
pub fn unprivileged() -> Result<Outcome> {
    let paths = files();
    ensure!(paths.contains(&uapi::PROC_PATH), "{} is missing", uapi::PROC_PATH);
    for path in &paths {
        let mode = fs::metadata(path)?;
        ensure!(mode.permissions().mode() & 0o077 == 0, "{path} has mode {:o}", mode.mode());
        ensure!(mode.uid() == 0 && mode.gid() == 0, "{path} belongs to {}:{}", mode.uid(), mode.gid());
        for (read, write) in [(true, false), (false, true), (true, true)] {
            let opened = as_nobody(|| OpenOptions::new().read(read).write(write).open(path).map(|_| ()))?;
            let errno = opened.err().and_then(|error| error.raw_os_error());
            ensure!(errno == Some(libc::EACCES), "nobody opened {path}: errno {errno:?}");
        }
    }
    let debug = fs::metadata("/sys/kernel/debug").context("debugfs is not mounted")?;
    ensure!(debug.permissions().mode() & 0o077 == 0, "debugfs has mode {:o}", debug.mode());

    let machine = Machine::standard()?;
    let session = open()?;
    let request = KesAttach { vm_fd: machine.vm_fd().as_raw_fd(), ..Default::default() };
    let mut errnos = Vec::new();
    // Rights count at the call, not at the opening.
    for flags in [0, 1] {
        let mut request = KesAttach { flags, ..request };
        errnos.push(as_nobody(|| super::abi::errno(&session, number::ATTACH, &mut request))?);
    }
    ensure!(errnos == [libc::EPERM; 2], "ATTACH by nobody: errnos {errnos:?}, expected EPERM");
    ensure!(uapi::sample_stats(&session).is_err(), "nobody attached");
    // What is attached may be handed on, as an open file may.
    uapi::attach(&session, machine.vm_fd())?;
    let seen = as_nobody(|| uapi::get_memslots(&session).map(|(_, slots)| slots.len()))?;
    ensure!(seen.as_ref().is_ok_and(|slots| *slots == 1), "an attached session, handed on: {seen:?}");
    Ok(Outcome::Pass(format!("EACCES for {}, EPERM for ATTACH", paths.join(", "))))
}

/// Fails when one of the words is an address of the kernel. All fields of 64 bits
/// are aligned: elsewhere two halves of user addresses may look like one.
fn expect_no_address(what: &str, bytes: &[u8]) -> Result<()> {
    for (index, window) in bytes.chunks_exact(8).enumerate() {
        let word = u64::from_ne_bytes(window.try_into()?);
        // Canonical and in the upper half, but for small negative numbers.
        let is_address = word >> 47 == (1 << 17) - 1 && word < u64::MAX - (1 << 20);
        ensure!(!is_address, "{what}: {word:#x} in word {index}");
    }
    Ok(())
}

/// A call whose result is all written, with no address and no rest of the stack.
fn output<T: Copy>(
    places: &mut Places,
    file: &std::fs::File,
    what: &str,
    number: u64,
    input: &T,
) -> Result<T> {
    let bytes = size_of::<T>();
    let pointer = places.put(Place::Good, &bytes_of(input))?;
    let errno = call(file, number, pointer);
    ensure!(errno == 0, "{what}: errno {errno}");
    let got = places.get(Place::Good, bytes)?;
    expect_no_address(what, &got)?;
    Ok(from_bytes(&got))
}

/// Nothing that the module hands out holds an address of the kernel, or bytes
/// that it did not mean.
pub fn no_addresses() -> Result<Outcome> {
    let mut machine = Machine::standard()?;
    machine.load(&round_program(SPREAD, Touch::Write))?;
    machine.run_round()?;
    let (file, mut places) = (open()?, Places::new(false)?);
    uapi::attach(&file, machine.vm_fd())?;
    uapi::sample_set(&file, uapi::ACCESS_READ | uapi::ACCESS_WRITE | uapi::ACCESS_EXEC, 2000, 0)?;
    let records = while_running(&mut machine, || {
        let mut records = vec![KesSample::default(); 100];
        let count = uapi::read_samples(&file, &mut records)?;
        Ok(records[..count].to_vec())
    })?;
    ensure!(!records.1.is_empty(), "no samples");
    for record in &records.1 {
        expect_no_address("a record", &bytes_of(record))?;
        ensure!(record.reserved == 0 && record.gfn < PAGES, "{record:?}");
    }
    let filled: KesSampleStats = from_bytes(&[FILL; size_of::<KesSampleStats>()]);
    let stats = output(&mut places, &file, "SAMPLE_STATS", number::SAMPLE_STATS, &filled)?;
    ensure!(stats.reserved == [0; 4], "{stats:?}");
    let filled: KesInfo = from_bytes(&[FILL; size_of::<KesInfo>()]);
    let info = output(&mut places, &file, "GET_INFO", number::GET_INFO, &filled)?;
    ensure!(info.reserved == [0; 5], "{info:?}");

    let mut slots = [FILL; 4 * size_of::<KesMemslot>()];
    let request = KesMemslots { slots: slots.as_mut_ptr() as u64, capacity: 4, ..Default::default() };
    output(&mut places, &file, "GET_MEMSLOTS", number::GET_MEMSLOTS, &request)?;
    expect_no_address("the slots", &slots[..size_of::<KesMemslot>()])?;
    ensure!(slots[size_of::<KesMemslot>()..].iter().all(|byte| *byte == FILL), "more than one slot");

    let mut bits = vec![0x1111_1111_1111_1111_u64; 4 * (PAGES / 64) as usize];
    let words = (PAGES / 64) as usize;
    let mut levels = [FILL; (PAGES / 512) as usize];
    let pointer = |part: usize| bits.as_ptr() as u64 + (part * words * 8) as u64;
    let request = KesHarvest {
        gfn_count: PAGES,
        accessed: pointer(0),
        dirty: pointer(1),
        mapped: pointer(2),
        on_nodes: pointer(3),
        levels: levels.as_mut_ptr() as u64,
        nodes: [u64::MAX; 16].as_ptr() as u64,
        nodes_bits: 1024,
        ..Default::default()
    };
    output(&mut places, &file, "HARVEST", number::HARVEST, &request)?;
    // Volatile: the kernel wrote behind the compiler's back.
    for (part, word) in (0..bits.len()).map(|i| (i / words, unsafe_read(&bits, i))) {
        ensure!(word != 0x1111_1111_1111_1111, "bitmap {part} was not written");
    }
    ensure!(levels.iter().all(|level| *level <= uapi::LEVEL_1G), "{levels:?}");
    bits.clear();
    let texts = texts_are_clean()?;
    Ok(Outcome::Pass(format!("{} records, 4 structures, {words} words each, {texts} texts", records.1.len())))
}

fn unsafe_read(bits: &[u64], index: usize) -> u64 {
    // SAFETY: a reference to an element that exists.
    unsafe { std::ptr::from_ref(&bits[index]).read_volatile() }
}

/// The module's own text files.
fn texts_are_clean() -> Result<u32> {
    let mut texts = 0;
    let mut folders = vec!["/sys/module/kvm_ept_sample/parameters".into()];
    let debug = Path::new("/sys/kernel/debug/kvm_ept_sample");
    folders.push(debug.to_path_buf());
    let mut paths: Vec<_> = ["/proc/kvm_ept_sample_stats".into()].to_vec();
    for folder in folders {
        for entry in fs::read_dir(folder).into_iter().flatten() {
            paths.push(entry?.path());
        }
    }
    for path in paths.into_iter().filter(|path| path.is_file()) {
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        ensure!(!has_kernel_address(&text), "{} shows a kernel address: {text}", path.display());
        texts += 1;
    }
    Ok(texts)
}

/// Each session shows the VM that it was attached to, and no other, whatever
/// the descriptor stands for later.
pub fn own_vm_only() -> Result<Outcome> {
    let mut small = Machine::new(Memory::small_pages(1024)?)?;
    let mut large = Machine::standard()?;
    large.load(&round_program(SPREAD, Touch::Write))?;
    let pages = super::machine::Pages { base: 0x10_0000, stride: PAGE as u32, count: 5 };
    small.load(&round_program(pages, Touch::Write))?;
    let session = open()?;
    // The number is the small VM's at the call, and the large one's afterwards.
    let number = 900;
    duplicate_to(small.vm_fd().as_raw_fd(), number)?;
    let mut request = KesAttach { vm_fd: number, ..Default::default() };
    ensure!(super::abi::errno(&session, number::ATTACH, &mut request) == 0, "ATTACH");
    duplicate_to(large.vm_fd().as_raw_fd(), number)?;
    small.run_round()?;
    large.run_round()?;
    let (_, slots) = uapi::get_memslots(&session)?;
    ensure!(slots.len() == 1 && slots[0].page_count == 1024, "{slots:?}");
    let mut bits = vec![0_u64; (PAGES / 64) as usize];
    let buffers = uapi::HarvestBuffers {
        accessed: &mut bits,
        dirty: &mut [],
        mapped: &mut [],
        on_nodes: &mut [],
        levels: &mut [],
        nodes: &[],
    };
    uapi::harvest(&session, 0, PAGES, 0, buffers)?;
    super::machine::expect_same("pages of the small VM", &gfns(&bits, 0), &pages.gfns_and_code())?;
    uapi::sample_set(&session, uapi::ACCESS_WRITE, 2000, 0)?;
    std::thread::sleep(Duration::from_millis(100));
    while_running(&mut large, || {
        std::thread::sleep(Duration::from_millis(300));
        Ok(())
    })?;
    let stats = uapi::sample_stats(&session)?;
    ensure!(stats.samples + stats.unwanted == 0, "samples of another VM: {stats:?}");
    // SAFETY: a descriptor that this function made and nobody else knows.
    unsafe { libc::close(number) };
    Ok(Outcome::Pass("6 pages of the VM it was attached to, none of the one that took its number".into()))
}

fn duplicate_to(fd: i32, number: i32) -> Result<()> {
    // SAFETY: puts a copy of a descriptor of ours at a number that only the
    // caller uses.
    let result = unsafe { libc::dup2(fd, number) };
    ensure!(result == number, "dup2: {}", std::io::Error::last_os_error());
    Ok(())
}
