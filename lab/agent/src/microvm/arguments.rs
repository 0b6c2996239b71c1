// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every call with every wrong argument: the errno that the header documents,
//! and nothing changed by a call that was refused.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use ept_virt_core::uapi::{
    self, KesAttach, KesHarvest, KesInfo, KesMemslots, KesSampleSet, KesSampleStats, number,
};
use libc::{EFAULT, EINVAL, EISCONN, ENOTCONN, ENOTTY, ESRCH};

use super::Outcome;
use super::arguments_descriptors as descriptors;
use super::arguments_fields as fields;
use super::arguments_files as files;
use super::lifecycle::Victim;
use super::machine::{Machine, SPREAD, Touch, round_program};
use super::places::{Place, Places, bytes_of};

/// A call of the module.
#[derive(Clone, Copy)]
pub struct Call {
    pub name: &'static str,
    pub number: u64,
    /// Whether the module reads, and writes, the argument.
    pub reads: bool,
    pub writes: bool,
}

pub const INFO: Call = Call { name: "GET_INFO", number: number::GET_INFO, reads: false, writes: true };
pub const ATTACH: Call = Call { name: "ATTACH", number: number::ATTACH, reads: true, writes: false };
pub const DETACH: Call = Call { name: "DETACH", number: number::DETACH, reads: false, writes: false };
pub const MEMSLOTS: Call =
    Call { name: "GET_MEMSLOTS", number: number::GET_MEMSLOTS, reads: true, writes: true };
pub const HARVEST: Call = Call { name: "HARVEST", number: number::HARVEST, reads: true, writes: true };
pub const SET: Call = Call { name: "SAMPLE_SET", number: number::SAMPLE_SET, reads: true, writes: false };
pub const STATS: Call =
    Call { name: "SAMPLE_STATS", number: number::SAMPLE_STATS, reads: false, writes: true };

pub const CALLS: [Call; 7] = [INFO, ATTACH, DETACH, MEMSLOTS, HARVEST, SET, STATS];

/// What a session can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Fresh,
    Attached,
    /// Attached to a VM whose process has exited.
    Orphaned,
}

/// Sessions in each state, and what a refused call must leave as it is.
pub struct Bench {
    pub machine: Machine,
    pub fresh: File,
    pub attached: File,
    pub orphaned: File,
    /// The VM of `orphaned`.
    pub dead_vm: OwnedFd,
    pub places: Places,
    pub counted: u32,
}

pub fn open() -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(uapi::PROC_PATH)
        .with_context(|| format!("cannot open {}", uapi::PROC_PATH))
}

/// The module's references: one for each open file.
pub fn module_references() -> Result<i64> {
    let path = "/sys/module/kvm_ept_sample/refcnt";
    Ok(std::fs::read_to_string(path).with_context(|| format!("cannot read {path}"))?.trim().parse()?)
}

/// The errno of a call with any argument, 0 when it succeeds.
pub fn call(file: &File, number: u64, argument: u64) -> i32 {
    // SAFETY: the argument is a room of `Places`, which the kernel may fill, or
    // an address that it must refuse.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), number, argument) };
    if result == 0 { 0 } else { std::io::Error::last_os_error().raw_os_error().unwrap_or(-1) }
}

impl Bench {
    fn new(low: bool) -> Result<Bench> {
        let mut machine = Machine::standard()?;
        machine.load(&round_program(SPREAD, Touch::Write))?;
        machine.run_round()?;
        let (fresh, attached, orphaned) = (open()?, open()?, open()?);
        uapi::attach(&attached, machine.vm_fd())?;
        let mut victim = Victim::start()?;
        let dead_vm = victim.vm()?;
        uapi::attach(&orphaned, dead_vm.as_fd())?;
        victim.kill()?;
        Ok(Bench { machine, fresh, attached, orphaned, dead_vm, places: Places::new(low)?, counted: 0 })
    }

    pub fn session(&self, state: State) -> &File {
        match state {
            State::Fresh => &self.fresh,
            State::Attached => &self.attached,
            State::Orphaned => &self.orphaned,
        }
    }

    /// A call that must be refused, or succeed, with this errno, and when it is
    /// refused leave everything as it was.
    pub fn expect(&mut self, what: &str, state: State, number: u64, argument: u64, want: i32) -> Result<()> {
        let before = self.snapshot()?;
        let got = call(self.session(state), number, argument);
        ensure!(got == want, "{what} on a session that is {state:?}: errno {got}, expected {want}");
        if want != 0 {
            let after = self.snapshot()?;
            ensure!(before == after, "{what}: refused, but {before:?} became {after:?}");
        }
        self.counted += 1;
        Ok(())
    }

    /// As [`Bench::expect`], with a structure at a good place.
    pub fn expect_of<T: Copy>(
        &mut self,
        what: &str,
        state: State,
        number: u64,
        value: &T,
        want: i32,
    ) -> Result<()> {
        let argument = self.places.put(Place::Good, &bytes_of(value))?;
        self.expect(what, state, number, argument, want)
    }

    /// What can be seen of the state: who is attached, what sampling counted,
    /// which accessed bits are set.
    fn snapshot(&self) -> Result<String> {
        let info = uapi::get_info(&self.fresh)?;
        let fresh = uapi::sample_stats(&self.fresh).map_err(|error| error.raw_os_error());
        let peek = KesHarvest { gfn_count: super::machine::PAGES, ..Default::default() };
        let argument = std::cell::UnsafeCell::new(peek);
        let errno = call(&self.attached, number::HARVEST, argument.get() as u64);
        ensure!(errno == 0, "the attached session can not be asked any more: errno {errno}");
        let seen = argument.into_inner().stats;
        Ok(format!(
            "fresh: {fresh:?}, {} sessions, {} references, {:?}, {:?}, {} accessed, {} dirty, {} mapped",
            info.sessions,
            module_references()?,
            uapi::sample_stats(&self.attached)?,
            uapi::sample_stats(&self.orphaned)?,
            seen.accessed,
            seen.dirty,
            seen.mapped_4k
        ))
    }
}

/// A good argument of `call` for a session in `state`.
fn good(bench: &Bench, call: Call) -> Vec<u8> {
    match call.name {
        "GET_INFO" => bytes_of(&KesInfo::default()),
        "ATTACH" => bytes_of(&KesAttach { vm_fd: bench.machine.vm_fd().as_raw_fd(), ..Default::default() }),
        "GET_MEMSLOTS" => bytes_of(&KesMemslots::default()),
        "HARVEST" => bytes_of(&KesHarvest { gfn_count: 64, ..Default::default() }),
        "SAMPLE_SET" => bytes_of(&KesSampleSet::default()),
        "SAMPLE_STATS" => bytes_of(&KesSampleStats::default()),
        _ => Vec::new(),
    }
}

/// What a call with a good argument says, by the session's state.
fn errno_of_state(call: Call, state: State) -> i32 {
    match (call.name, state) {
        ("GET_INFO", _) | ("ATTACH", State::Fresh) => 0,
        ("ATTACH", _) => EISCONN,
        (_, State::Fresh) => ENOTCONN,
        ("GET_MEMSLOTS" | "HARVEST" | "SAMPLE_SET", State::Orphaned) => ESRCH,
        _ => 0,
    }
}

/// Every call, in every state, with its argument at every kind of address.
fn addresses(bench: &mut Bench) -> Result<()> {
    for call in CALLS.into_iter().filter(|call| call.name != "DETACH") {
        for state in [State::Fresh, State::Attached, State::Orphaned] {
            for place in Place::ALL {
                let content = good(bench, call);
                let argument = bench.places.put(place, &content)?;
                let (readable, writable) = (place.readable(), place.writable());
                let state_errno = errno_of_state(call, state);
                let want = match (call.reads, call.writes) {
                    // What is read is looked at first, what is only written last.
                    (true, true) if !writable => EFAULT,
                    (true, false) if !readable => EFAULT,
                    (false, true) if !writable && state_errno == 0 => EFAULT,
                    _ => state_errno,
                };
                let what = format!("{} with its argument {place:?}", call.name);
                bench.expect(&what, state, call.number, argument, want)?;
                if want == 0 && writable {
                    bench.places.get(place, content.len()).with_context(|| what)?;
                }
                if want == 0 && call.name == "ATTACH" {
                    bench.expect("DETACH", state, DETACH.number, 0, 0)?;
                }
            }
        }
    }
    // It takes no argument, and so looks at none.
    for argument in [0, 8, u64::MAX] {
        bench.expect("DETACH", State::Fresh, DETACH.number, argument, ENOTCONN)?;
    }
    Ok(())
}

/// Command numbers near those that exist: another size, direction or magic.
fn numbers(bench: &mut Bench) -> Result<()> {
    const SIZE: u64 = 0x3FFF << 16;
    let known = |number: u64| CALLS.iter().any(|call| call.number == number);
    let mut wrong = Vec::new();
    for call in CALLS {
        let size = call.number >> 16 & 0x3FFF;
        for other in [0, 1, size.wrapping_sub(1) & 0x3FFF, size + 1, size + 8, size * 2, 0x3FFF] {
            wrong.push(call.number & !SIZE | other << 16);
        }
        for direction in 0..4 {
            wrong.push(call.number & !(3 << 30) | direction << 30);
        }
        for magic in [0, b'k', 0xAE, 0xE6, 0xE8, 0xFF] {
            wrong.push(call.number & !0xFF00 | u64::from(magic) << 8);
        }
        // All other numbers of commands, with the sizes of this one.
        wrong.extend((0..=0xFF).map(|nr| call.number & !0xFF | nr));
        wrong.extend((0..32).map(|bit| call.number ^ 1 << bit));
    }
    wrong.extend([u64::from(u32::MAX), 0x5401 /* TCGETS */]);
    // The smallest numbers are commands of all files, as FIGETBSZ.
    for number in wrong.into_iter().filter(|number| !known(*number) && *number > 0xFF) {
        let argument = bench.places.put(Place::Good, &[0; 512])?;
        for state in [State::Fresh, State::Attached] {
            let got = call(bench.session(state), number, argument);
            ensure!(got == ENOTTY, "command {number:#x} on a session that is {state:?}: errno {got}");
            bench.counted += 1;
        }
    }
    Ok(())
}

/// All of them.
pub fn all() -> Result<Outcome> {
    let before = module_references()?;
    let mut bench = Bench::new(false)?;
    let mut report = Vec::new();
    type Table = (&'static str, fn(&mut Bench) -> Result<()>);
    let tables: [Table; 6] = [
        ("addresses", addresses),
        ("numbers", numbers),
        ("descriptors", descriptors::all),
        ("fields", fields::all),
        ("buffers", fields::buffers),
        ("system calls", files::all),
    ];
    for (name, table) in tables {
        let from = bench.counted;
        table(&mut bench).context(name)?;
        report.push(format!("{} {name}", bench.counted - from));
    }
    let Bench { machine, fresh, attached, orphaned, .. } = bench;
    drop((fresh, attached, orphaned, machine));
    let after = module_references()?;
    ensure!(after == before, "references of the module went from {before} to {after}");
    Ok(Outcome::Pass(format!("wrong calls refused, each with its errno: {}", report.join(", "))))
}

/// The errno of an ioctl by the entry for 32-bit programs, 0 when it succeeds;
/// none when this kernel has no such entry.
fn call_32(file: &File, number: u32, argument: u32) -> Option<i32> {
    const IOCTL_32: u32 = 54;
    let result: i32;
    // SAFETY: int 0x80 changes rax, and on some kernels r8 to r11; the argument
    // is as in `call`. rbx belongs to the compiler and is exchanged around it.
    unsafe {
        std::arch::asm!(
            "xchg rbx, {fd:r}",
            "int 0x80",
            "xchg rbx, {fd:r}",
            fd = inout(reg) u64::from(file.as_raw_fd() as u32) => _,
            inlateout("eax") IOCTL_32 => result,
            in("ecx") number,
            in("edx") argument,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    (result != -libc::ENOSYS).then_some(-result)
}

/// The same answers to 32-bit programs, which share the structures.
pub fn compat() -> Result<Outcome> {
    let mut bench = Bench::new(true)?;
    let mut counted = 0;
    for call in CALLS.into_iter().filter(|call| call.name != "DETACH") {
        for state in [State::Fresh, State::Attached, State::Orphaned] {
            for place in [Place::Good, Place::Unaligned, Place::Null, Place::Low, Place::Forbidden] {
                let content = good(&bench, call);
                let argument = bench.places.put(place, &content)?;
                let want = match errno_of_state(call, state) {
                    _ if call.reads && !place.readable() => EFAULT,
                    0 if !place.writable() => EFAULT,
                    state_errno => state_errno,
                };
                let Some(got) = call_32(bench.session(state), call.number as u32, argument as u32) else {
                    return Ok(Outcome::Skip("this kernel runs no 32-bit programs".into()));
                };
                ensure!(got == want, "{} {place:?} {state:?}: errno {got}, expected {want}", call.name);
                counted += 1;
                if want == 0 && call.name == "ATTACH" {
                    ensure!(call_32(bench.session(state), DETACH.number as u32, 0) == Some(0), "DETACH");
                }
            }
        }
    }
    let request = KesHarvest { gfn_count: 0, ..Default::default() };
    let argument = bench.places.put(Place::Good, &bytes_of(&request))?;
    let got = call_32(&bench.attached, HARVEST.number as u32, argument as u32);
    ensure!(got == Some(EINVAL), "a harvest of nothing: {got:?}");
    let argument = bench.places.put(Place::Good, &bytes_of(&KesInfo::default()))?;
    ensure!(call_32(&bench.attached, INFO.number as u32, argument as u32) == Some(0), "GET_INFO");
    let info: KesInfo = super::places::from_bytes(&bench.places.get(Place::Good, size_of::<KesInfo>())?);
    ensure!(info.abi_version == uapi::get_info(&bench.fresh)?.abi_version, "{info:?}");
    Ok(Outcome::Pass(format!("{counted} calls of 32-bit programs answered as those of 64-bit ones")))
}
