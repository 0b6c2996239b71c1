// SPDX-License-Identifier: MIT OR Apache-2.0
//! The interface of 2019: what is refused, and to whom.

use std::fs;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use ept_virt_core::uapi::{self, KesAttach, KesSampleSet, number};

use super::Outcome;
use super::abi::{errno, expect};
use super::abi_2019::{DEINIT, GET_MEMSLOTS, GetMemslots, INIT, Memslot, Owner, Program, SET_FREQ, SET_PROT};
use super::machine::{ALL, Machine, Memory, PAGE, SPREAD, Touch, harvest, round_program};

const CAP_SYS_ADMIN: u32 = 21;
const YAMA: &str = "/proc/sys/kernel/yama/ptrace_scope";

/// Wrong calls, each with its errno.
pub fn refusals() -> Result<Outcome> {
    let program = Program::start()?;
    let me = u64::from(std::process::id());
    for command in [SET_PROT, SET_FREQ, GET_MEMSLOTS, DEINIT] {
        expect(&format!("{command} before INIT"), program.call(command, 0), libc::ENOTCONN)?;
    }
    expect("INIT of a process without a VM", program.call(INIT, me), libc::ENODEV)?;
    let kthreadd = 2;
    expect("INIT of a kernel thread", program.call(INIT, kthreadd), libc::ENODEV)?;
    for pid in [0, -1_i32, i32::MIN, (1 << 22) - 1] {
        expect(&format!("INIT of pid {pid}"), program.call(INIT, pid as u64), libc::ESRCH)?;
    }
    let mut zombie = Command::new("/proc/self/exe").arg("microvm-owner").arg("end").spawn()?;
    wait_until_zombie(zombie.id())?;
    expect("INIT of a zombie", program.call(INIT, u64::from(zombie.id())), libc::ESRCH)?;
    zombie.wait()?;

    let machine = Machine::standard()?;
    let session = Program::start()?;
    uapi::attach(&session.0, machine.vm_fd())?;
    expect("INIT of an attached session", session.call(INIT, me), libc::EISCONN)?;
    expect("SET_FREQ of an attached session", session.call(SET_FREQ, 1), libc::ENOTCONN)?;

    program.must(INIT, me)?;
    expect("a second INIT", program.call(INIT, me), libc::EISCONN)?;
    expect("an unknown type", program.call(SET_PROT, 8), libc::EINVAL)?;
    expect("all types and more", program.call(SET_PROT, u64::MAX), libc::EINVAL)?;
    uapi::sample_set(&session.0, uapi::ACCESS_READ, 10, 0)?;
    expect("a second sampler", program.call(SET_FREQ, 10), libc::EBUSY)?;
    uapi::sample_set(&session.0, 0, 0, 0)?;
    program.must(SET_FREQ, 10)?;
    today_on_2019(&program, &machine)?;
    memslots(&program, &machine)?;
    reads(program, machine)?;
    Ok(Outcome::Pass("every wrong call refused with its errno, both interfaces apart".into()))
}

fn wait_until_zombie(pid: u32) -> Result<()> {
    for _ in 0..500 {
        if fs::read_to_string(format!("/proc/{pid}/stat"))?.contains(") Z ") {
            return Ok(());
        }
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    anyhow::bail!("process {pid} did not end")
}

/// Calls of today on a session that INIT bound.
fn today_on_2019(program: &Program, machine: &Machine) -> Result<()> {
    let file = &program.0;
    let mut attach = KesAttach { vm_fd: machine.vm.as_raw_fd(), ..Default::default() };
    expect("KES_ATTACH", errno(file, number::ATTACH, &mut attach), libc::EISCONN)?;
    expect("KES_DETACH", errno(file, number::DETACH, std::ptr::null_mut::<u8>()), libc::EBUSY)?;
    let mut set = KesSampleSet::default();
    expect("KES_SAMPLE_SET", errno(file, number::SAMPLE_SET, &mut set), libc::EBUSY)?;
    ensure!(uapi::get_memslots(file)?.1.len() == 1, "KES_GET_MEMSLOTS");
    ensure!(uapi::sample_stats(file)?.freq_hz == 10, "KES_SAMPLE_STATS, or a refused call changed something");
    Ok(())
}

/// GET_MEMSLOTS with too little room, with none, with pointers to nowhere, and for
/// 32-bit programs.
fn memslots(program: &Program, machine: &Machine) -> Result<()> {
    let extra = Memory::small_pages(2)?;
    machine.set_slot(2, 0x3000_0000, &extra, PAGE)?;
    machine.set_slot(1, 0x2000_0000, &extra, 2 * PAGE)?;
    let all = program.memslots(64)?;
    let shown: Vec<_> = all.iter().map(|slot| (slot.gpa, slot.page_count)).collect();
    ensure!(shown == [(0, 16384), (0x2000_0000, 2), (0x3000_0000, 1)], "{all:x?}");
    for room in 0..=4 {
        let some = program.memslots(room)?;
        ensure!(some == all[..room.min(3)], "with room for {room}: {some:x?}");
    }
    expect("no pointer", program.call(GET_MEMSLOTS, 0), libc::EFAULT)?;
    expect("a pointer to nowhere", program.call(GET_MEMSLOTS, 8), libc::EFAULT)?;
    let get = |memslots: usize, capacity| {
        let mut request = GetMemslots { memslots: memslots as *mut Memslot, capacity, count: 77 };
        (program.call(GET_MEMSLOTS, &raw mut request as u64), request.count)
    };
    ensure!(get(8, 3) == (libc::EFAULT, 77), "slots to nowhere: {:?}", get(8, 3));
    ensure!(get(0xffff_8880_0000_0000, 3).0 == libc::EFAULT, "slots to the kernel");
    let mut plenty = [Memslot::default(); 3];
    let got = get(plenty.as_mut_ptr() as usize, usize::MAX);
    ensure!(got == (0, 3) && plenty[..] == all[..], "with room without end: {got:?}");

    expect("GET_MEMSLOTS of a 32-bit program", call_32(program, GET_MEMSLOTS, 8), libc::ENOTTY)?;
    expect("SET_PROT of a 32-bit program", call_32(program, SET_PROT, 2), 0)?;
    expect("SET_FREQ of a 32-bit program", call_32(program, SET_FREQ, 1000), 0)?;
    ensure!(uapi::sample_stats(&program.0)?.freq_hz == 1000, "a 32-bit program's frequency was not set");
    machine.set_slot(1, 0, &extra, 0)?;
    machine.set_slot(2, 0, &extra, 0)
}

/// The call as a 32-bit program makes it.
fn call_32(program: &Program, command: u64, argument: u32) -> i32 {
    let mut result: i64 = 54;
    // SAFETY: ioctl is number 54 there; it changes nothing but rax and, on some
    // kernels, r8 to r11. rbx is the compiler's own and is put back.
    unsafe {
        std::arch::asm!(
            "xchg rbx, {fd}",
            "int 0x80",
            "xchg rbx, {fd}",
            fd = inout(reg) u64::from(program.0.as_raw_fd() as u32) => _,
            inout("rax") result,
            in("rcx") command,
            in("rdx") u64::from(argument),
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    // It is 32 bits wide; of an error, the negative.
    -(result as i32)
}

/// Reads of too little, to nowhere, with nothing there, and with samples there.
fn reads(program: Program, mut machine: Machine) -> Result<()> {
    let fd = program.0.as_raw_fd();
    // SAFETY: the kernel must refuse the address, or write nothing to it.
    let read = |bytes| unsafe { libc::read(fd, 8 as *mut libc::c_void, bytes) };
    program.must(SET_PROT, 7)?;
    program.drain()?;
    ensure!(read(64) == 0, "nothing to read, to nowhere");
    machine.load(&round_program(SPREAD, Touch::Store))?;
    machine.run_round()?;
    while uapi::sample_stats(&program.0)?.unread == 0 {
        machine.run_round()?;
    }
    ensure!(read(3) == 0, "room for no sample");
    let unread = uapi::sample_stats(&program.0)?.unread;
    ensure!(read(64) == -1, "samples to nowhere");
    expect("samples to nowhere", std::io::Error::last_os_error().raw_os_error().unwrap_or(0), libc::EFAULT)?;
    let left = program.drain()?.len();
    ensure!(left == unread as usize, "{left} of {unread} samples after a read that failed");
    let mut today = machine.observe()?;
    ensure!(harvest(&mut today, ALL)?.stats.accessed >= 200, "a harvest beside it");
    Ok(())
}

/// Who may have INIT: what the kernel says of tracing, and CAP_SYS_ADMIN.
pub fn rights() -> Result<Outcome> {
    let program = Program::start()?;
    let equal = Owner::start(&["idle"])?;
    let poor = Owner::start(&["idle", "poor"])?;
    let hidden = Owner::start(&["idle", "poor", "hidden"])?;
    let init = |owner: &Owner| {
        let got = program.call(INIT, owner.pid());
        program.call(DEINIT, 0);
        got
    };
    for (what, owner) in [("equal", &equal), ("poor", &poor), ("hidden", &hidden)] {
        expect(&format!("INIT of the {what} process by one with all rights"), init(owner), 0)?;
    }
    let without_id = as_other(|| {
        // SAFETY: the raw call changes the ids of this thread alone, which ends
        // soon; glibc's wrapper would change the whole process.
        let done = unsafe { libc::syscall(libc::SYS_setresuid, 65534, 65534, 65534) };
        ensure!(done == 0, "cannot become another user");
        Ok([init(&poor), 0, 0])
    })?;
    expect("INIT without CAP_SYS_ADMIN", without_id[0], libc::EPERM)?;

    // With CAP_SYS_ADMIN alone, the same user's processes can be traced, unless
    // they have more rights or hide.
    let admin = || {
        keep_capabilities(&[CAP_SYS_ADMIN])?;
        Ok([init(&equal), init(&poor), init(&hidden)])
    };
    let got = as_other(admin)?;
    ensure!(got == [libc::EACCES, 0, libc::EACCES], "INIT with CAP_SYS_ADMIN alone: {got:?}");
    let yama = Path::new(YAMA).exists();
    if yama {
        let before = fs::read_to_string(YAMA)?;
        fs::write(YAMA, "2").context("cannot tell Yama to let administrators trace only")?;
        let got = as_other(admin);
        fs::write(YAMA, before.trim())?;
        ensure!(got? == [libc::EACCES; 3], "INIT against Yama");
    }
    Ok(Outcome::Pass(format!(
        "all by root, none by another user; with CAP_SYS_ADMIN alone as tracing is allowed{}",
        if yama { ", by Yama too" } else { " (there is no Yama here)" }
    )))
}

/// Runs `calls` on a thread of its own, which may give up its rights.
fn as_other(calls: impl FnOnce() -> Result<[i32; 3]> + Send) -> Result<[i32; 3]> {
    std::thread::scope(|scope| {
        scope.spawn(calls).join().map_err(|_| anyhow::anyhow!("the thread without rights panicked"))?
    })
}

/// Leaves this thread these capabilities and no other.
pub fn keep_capabilities(kept: &[u32]) -> Result<()> {
    /// As capset(2) describes it, version 3.
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    let mask: u64 = kept.iter().map(|number| 1_u64 << number).sum();
    let (low, high) = (mask as u32, (mask >> 32) as u32);
    let mut header = Header { version: 0x2008_0522, pid: 0 };
    // Effective, permitted, inheritable; the low halves first.
    let data = [low, low, 0, high, high, 0];
    // SAFETY: both structures are live and of the size of this version.
    let done = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) };
    ensure!(done == 0, "capset: {}", std::io::Error::last_os_error());
    Ok(())
}
