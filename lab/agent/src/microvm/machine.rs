// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest of a few instructions, its memory, and a session that observes it.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::ptr::NonNull;

use anyhow::{Context, Result, bail, ensure};
use ept_virt_core::sampler::{Harvest, HarvestRequest, KernelSampler, Sampler};
use ept_virt_core::topology::NodeSet;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

pub const PAGE: usize = 4096;
/// Guest memory of the standard machine: 64 MiB.
pub const PAGES: u64 = 16384;
/// The page that holds the program, and its counter.
pub const CODE_GFN: u64 = 1;
/// Offset of the spinning program's counter in the code page.
pub const COUNTER: usize = 0x800;
/// A program writes to this port when it has gone over its pages once.
const ROUND_PORT: u16 = 0x10;

/// Anonymous memory of this process, unmapped on drop.
pub struct Memory {
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping belongs to this value alone; it is only read and written
// through raw pointers by volatile accesses, which any thread may do.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps `bytes`, starting at a multiple of `align` (a power of two).
    /// `flags` are added to those of a private anonymous mapping.
    pub fn map(bytes: usize, align: usize, flags: i32) -> Result<Memory> {
        // hugetlb mappings are aligned by the kernel; others get room to cut.
        let room = if flags & libc::MAP_HUGETLB != 0 { bytes } else { bytes + align };
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                room,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error()).with_context(|| format!("cannot map {bytes} bytes"));
        }
        let start = (base as usize).next_multiple_of(align);
        ensure!(start + bytes <= base as usize + room, "the mapping is not aligned to {align}");
        let start = NonNull::new(start as *mut u8).context("mapped at zero")?;
        Ok(Memory { start, bytes })
    }

    /// As [`Memory::map`], in pages of 4 KiB only.
    pub fn small_pages(pages: u64) -> Result<Memory> {
        let memory = Memory::map(pages as usize * PAGE, PAGE, 0)?;
        memory.advise(0, memory.bytes, libc::MADV_NOHUGEPAGE)?;
        Ok(memory)
    }

    /// Maps the first `bytes` of `file`, shared: what is written is the file's.
    pub fn shared(file: &fs::File, bytes: usize) -> Result<Memory> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice; it keeps the file.
        let start = unsafe {
            libc::mmap(std::ptr::null_mut(), bytes, protection, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        if start == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error())
                .with_context(|| format!("cannot map {bytes} bytes of a file"));
        }
        let start = NonNull::new(start.cast()).context("mapped at zero")?;
        Ok(Memory { start, bytes })
    }

    /// How many pages of a range are in memory.
    pub fn resident(&self, offset: usize, bytes: usize) -> Result<usize> {
        ensure!(offset + bytes <= self.bytes, "outside the mapping");
        let mut pages = vec![0_u8; bytes.div_ceil(PAGE)];
        // SAFETY: the range lies within this value's own mapping, and there is a
        // byte for each of its pages.
        let result =
            unsafe { libc::mincore(self.start.as_ptr().add(offset).cast(), bytes, pages.as_mut_ptr()) };
        ensure!(result == 0, "mincore: {}", std::io::Error::last_os_error());
        Ok(pages.iter().filter(|page| *page & 1 == 1).count())
    }

    /// A file of hugetlbfs with pages of 2 MiB, mapped shared.
    pub fn hugetlb_file(bytes: usize) -> Result<Memory> {
        // SAFETY: makes a file without a name; the kernel only reads the text.
        let file = unsafe { libc::memfd_create(c"guest".as_ptr(), libc::MFD_HUGETLB) };
        ensure!(file >= 0, "memfd_create: {}", std::io::Error::last_os_error());
        // SAFETY: the descriptor was just made and is closed here alone; the
        // mapping is a new one at an address of the kernel's choice.
        let base = unsafe {
            let rights = libc::PROT_READ | libc::PROT_WRITE;
            let sized = libc::ftruncate(file, bytes as i64);
            let base = libc::mmap(std::ptr::null_mut(), bytes, rights, libc::MAP_SHARED, file, 0);
            libc::close(file);
            if sized == 0 { base } else { libc::MAP_FAILED }
        };
        ensure!(base != libc::MAP_FAILED, "mapping hugetlbfs: {}", std::io::Error::last_os_error());
        Ok(Memory { start: NonNull::new(base.cast()).context("mapped at zero")?, bytes })
    }

    pub fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub fn advise(&self, offset: usize, bytes: usize, advice: i32) -> Result<()> {
        ensure!(offset + bytes <= self.bytes, "outside the mapping");
        // SAFETY: the range lies within this value's own mapping; the advices
        // used here change how it is backed, or drop its contents.
        let result = unsafe { libc::madvise(self.start.as_ptr().add(offset).cast(), bytes, advice) };
        if result != 0 {
            return Err(std::io::Error::last_os_error()).with_context(|| format!("madvise {advice}"));
        }
        Ok(())
    }

    pub fn protect(&self, offset: usize, bytes: usize, rights: i32) -> Result<()> {
        ensure!(offset + bytes <= self.bytes, "outside the mapping");
        // SAFETY: the range lies within this value's own mapping; whoever takes a
        // right away gives it back before the memory is used.
        let result = unsafe { libc::mprotect(self.start.as_ptr().add(offset).cast(), bytes, rights) };
        if result != 0 {
            return Err(std::io::Error::last_os_error()).context("mprotect");
        }
        Ok(())
    }

    pub fn write(&self, offset: usize, data: &[u8]) {
        assert!(offset + data.len() <= self.bytes);
        for (index, byte) in data.iter().enumerate() {
            // SAFETY: within the mapping, as asserted.
            unsafe { self.start.as_ptr().add(offset + index).write_volatile(*byte) };
        }
    }

    pub fn write_u32(&self, offset: usize, word: u32) {
        assert!(offset % 4 == 0 && offset + 4 <= self.bytes);
        // SAFETY: aligned and within the mapping, as asserted.
        unsafe { self.start.as_ptr().add(offset).cast::<u32>().write_volatile(word) };
    }

    pub fn read_u32(&self, offset: usize) -> u32 {
        assert!(offset % 4 == 0 && offset + 4 <= self.bytes);
        // SAFETY: aligned and within the mapping, as asserted.
        unsafe { self.start.as_ptr().add(offset).cast::<u32>().read_volatile() }
    }

    /// Makes every page resident.
    pub fn populate(&self) {
        for offset in (0..self.bytes).step_by(PAGE) {
            self.write(offset, &[1]);
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: this value's own mapping; nothing borrows from it.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.bytes) };
    }
}

/// What a program does with each of its pages.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Touch {
    Read,
    /// Adds one to its first word. An emulated CPU reads, then writes.
    Write,
    /// Writes its number, counted down to 1, without reading.
    Store,
    /// Jumps there; the page must begin with [`RETURN`].
    Exec,
}

/// What a page must begin with to be executed: `jmp ebx`.
pub const RETURN: [u8; 2] = [0xFF, 0xE3];

/// The pages that a program goes over: `count` from guest-physical `base` on.
#[derive(Clone, Copy)]
pub struct Pages {
    pub base: u32,
    pub stride: u32,
    pub count: u32,
}

/// 200 pages of the standard machine, no two in one 64-page word of a bitmap.
pub const SPREAD: Pages = Pages { base: 0x20_0000, stride: 0x4_0000, count: 200 };

impl Pages {
    pub fn gfns(&self) -> BTreeSet<u64> {
        (0..self.count).map(|i| u64::from(self.base + i * self.stride) / PAGE as u64).collect()
    }

    /// With the page of the program, which it fetches.
    pub fn gfns_and_code(&self) -> BTreeSet<u64> {
        let mut gfns = self.gfns();
        gfns.insert(CODE_GFN);
        gfns
    }
}

/// Flat 32-bit code that goes over `pages`, then does `tail`, then starts again.
pub fn program(pages: Pages, touch: Touch, tail: &[u8]) -> Vec<u8> {
    let mut code = vec![0xBF]; // mov edi, base
    code.extend(pages.base.to_le_bytes());
    code.push(0xB9); // mov ecx, count
    code.extend(pages.count.to_le_bytes());
    let next = code.len();
    match touch {
        Touch::Read => code.extend([0x8B, 0x07]),  // mov eax, [edi]
        Touch::Write => code.extend([0xFF, 0x07]), // inc dword [edi]
        Touch::Store => code.extend([0x89, 0x0F]), // mov [edi], ecx
        Touch::Exec => {
            let back = CODE_GFN as usize * PAGE + code.len() + 7;
            code.push(0xBB); // mov ebx, back
            code.extend((back as u32).to_le_bytes());
            code.extend([0xFF, 0xE7]); // jmp edi
        }
    }
    code.extend([0x81, 0xC7]); // add edi, stride
    code.extend(pages.stride.to_le_bytes());
    code.push(0x49); // dec ecx
    code.extend([0x75, jump(code.len() + 2, next)]); // jnz next
    code.extend(tail);
    code.extend([0xEB, jump(code.len() + 2, 0)]); // jmp start
    code
}

/// Displacement of a short jump whose next instruction is at `from`.
pub fn jump(from: usize, to: usize) -> u8 {
    (to as isize - from as isize) as i8 as u8
}

/// A program that leaves the guest after each round.
pub fn round_program(pages: Pages, touch: Touch) -> Vec<u8> {
    program(pages, touch, &[0xE6, ROUND_PORT as u8]) // out port, al
}

/// A program that never leaves the guest and counts its rounds at [`COUNTER`].
pub fn spin_program(pages: Pages) -> Vec<u8> {
    let mut tail = vec![0xFF, 0x05]; // inc dword [counter]
    tail.extend(((CODE_GFN as usize * PAGE + COUNTER) as u32).to_le_bytes());
    program(pages, Touch::Write, &tail)
}

/// A VM with one vCPU and its memory.
pub struct Machine {
    // Before the memory: the VM must not outlive what it maps.
    pub vcpu: VcpuFd,
    pub vm: VmFd,
    pub memory: Memory,
}

impl Machine {
    /// The standard machine: one slot of [`PAGES`] small pages at 0, of which those of
    /// [`SPREAD`] and the program's are resident.
    pub fn standard() -> Result<Machine> {
        Machine::with_resident(SPREAD)
    }

    /// The same with other pages, each of which begins with 1. To fill the whole slot
    /// takes an emulated CPU longer than most tests do, and KVM maps what the guest
    /// touches, no more.
    pub fn with_resident(pages: Pages) -> Result<Machine> {
        let memory = Memory::small_pages(PAGES)?;
        for gfn in pages.gfns_and_code() {
            memory.write(gfn as usize * PAGE, &[1]);
        }
        Machine::new(memory)
    }

    /// A machine whose slot 0 is `memory`, at guest-physical 0.
    pub fn new(memory: Memory) -> Result<Machine> {
        let kvm = Kvm::new().context("cannot open /dev/kvm")?;
        let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
        // Intel's real mode wants it; it also makes KVM add slots of its own.
        vm.set_tss_address(0xFFFB_D000).context("KVM_SET_TSS_ADDR")?;
        let vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
        let machine = Machine { vcpu, vm, memory };
        machine.set_slot(0, 0, &machine.memory, machine.memory.bytes())?;
        Ok(machine)
    }

    /// Makes, or with `bytes` = 0 removes, a memory slot.
    pub fn set_slot(&self, slot: u32, guest_phys_addr: u64, memory: &Memory, bytes: usize) -> Result<()> {
        self.set_slot_flags(slot, guest_phys_addr, memory, bytes, 0)
    }

    /// Turns KVM's logging of writes to slot 0 on or off.
    pub fn log_dirty(&self, on: bool) -> Result<()> {
        let flags = if on { kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        self.set_slot_flags(0, 0, &self.memory, self.memory.bytes(), flags)
    }

    fn set_slot_flags(
        &self,
        slot: u32,
        guest_phys_addr: u64,
        memory: &Memory,
        bytes: usize,
        flags: u32,
    ) -> Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr,
            memory_size: bytes as u64,
            userspace_addr: memory.address(),
        };
        // SAFETY: the memory is a mapping of this process that lives as long as
        // the VM: a field of this machine, or a value that its caller keeps.
        unsafe { self.vm.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")
    }

    /// Puts the vCPU before `code`; see [`begin_at`].
    pub fn load(&mut self, code: &[u8]) -> Result<()> {
        self.memory.write(CODE_GFN as usize * PAGE, code);
        begin_at(&self.vcpu, CODE_GFN)
    }

    /// Runs until the program of [`round_program`] ends a round.
    pub fn run_round(&mut self) -> Result<()> {
        for _ in 0..1000 {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(ROUND_PORT, _)) => return Ok(()),
                Ok(other) => bail!("the guest left with {other:?}"),
                Err(error) if error.errno() == libc::EINTR => {}
                Err(error) => return Err(error).context("KVM_RUN"),
            }
        }
        bail!("the guest was interrupted a thousand times and did not end a round")
    }

    /// A session of the module, attached to this VM.
    pub fn observe(&self) -> Result<KernelSampler> {
        let mut sampler = KernelSampler::open()?;
        sampler.attach(self.vm_fd())?;
        Ok(sampler)
    }

    pub fn vm_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the VM's descriptor stays open while `self` is borrowed.
        unsafe { BorrowedFd::borrow_raw(self.vm.as_raw_fd()) }
    }
}

/// Puts a vCPU at the start of page `gfn`; see [`enter_protected_mode`].
pub fn begin_at(vcpu: &VcpuFd, gfn: u64) -> Result<()> {
    enter_protected_mode(vcpu, kvm_regs { rip: gfn * PAGE as u64, ..Default::default() })
}

/// Gives a vCPU `regs` but for the flags, in protected mode with flat segments
/// and without paging, so that it touches no page tables.
pub fn enter_protected_mode(vcpu: &VcpuFd, regs: kvm_regs) -> Result<()> {
    let mut sregs = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    let flat = kvm_segment {
        limit: u32::MAX,
        selector: 0x10,
        type_: 3,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment { selector: 8, type_: 11, ..flat };
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = flat;
    }
    sregs.cr0 |= 1;
    vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")?;
    let regs = kvm_regs { rflags: 0x202, ..regs };
    vcpu.set_regs(&regs).context("KVM_SET_REGS")
}

/// One of KVM's own counts of a VM's events, from debugfs.
pub struct KvmCounter(PathBuf);

impl KvmCounter {
    /// The count that KVM calls `name`.
    pub fn new(machine: &Machine, name: &str) -> Result<KvmCounter> {
        let vm = format!("{}-{}", std::process::id(), machine.vm.as_raw_fd());
        let path = PathBuf::from("/sys/kernel/debug/kvm").join(vm).join(name);
        ensure!(path.exists(), "{} is missing: mount debugfs", path.display());
        Ok(KvmCounter(path))
    }

    pub fn count(&self) -> Result<u64> {
        Ok(fs::read_to_string(&self.0)?.trim().parse()?)
    }
}

/// A harvest of all of a standard machine's memory.
pub const ALL: HarvestRequest = HarvestRequest {
    gfn_start: 0,
    gfn_count: PAGES,
    clear_accessed: false,
    clear_dirty: false,
    flush: false,
    keep_young: false,
};

/// As [`ALL`], clearing the accessed bits, with a flush.
pub const ALL_CLEAR: HarvestRequest = HarvestRequest { clear_accessed: true, flush: true, ..ALL };

pub fn harvest(sampler: &mut KernelSampler, request: HarvestRequest) -> Result<Harvest> {
    let mut out = Harvest::default();
    sampler.harvest(&request, &NodeSet::default(), &mut out)?;
    Ok(out)
}

/// Fails unless ranges where 64 bits end are harvested, and hold nothing.
pub fn expect_nothing_last(sampler: &mut KernelSampler) -> Result<()> {
    for (gfn_start, gfn_count) in [(u64::MAX - 511, 10), (u64::MAX - 511, 511), (u64::MAX - 1500, 1500)] {
        let seen = harvest(sampler, HarvestRequest { gfn_start, gfn_count, ..ALL_CLEAR })?;
        let found = seen.mapped.iter().chain(&seen.accessed).any(|word| *word != 0);
        ensure!(!found, "something is among {gfn_count} pages from {gfn_start:#x} on");
    }
    Ok(())
}

/// The GFNs whose bits are set in a bitmap that starts at `gfn_start`.
pub fn gfns(bitmap: &[u64], gfn_start: u64) -> BTreeSet<u64> {
    (0..bitmap.len() * 64)
        .filter(|i| bitmap[i / 64] >> (i % 64) & 1 == 1)
        .map(|i| gfn_start + i as u64)
        .collect()
}

/// Fails, naming some of the pages, unless both sets are the same.
pub fn expect_same(what: &str, got: &BTreeSet<u64>, want: &BTreeSet<u64>) -> Result<()> {
    let some = |a: &BTreeSet<u64>, b: &BTreeSet<u64>| a.difference(b).take(8).copied().collect::<Vec<_>>();
    ensure!(
        got == want,
        "{what}: {} pages, expected {}; missing GFNs {:?}..., too many {:?}...",
        got.len(),
        want.len(),
        some(want, got),
        some(got, want)
    );
    Ok(())
}
