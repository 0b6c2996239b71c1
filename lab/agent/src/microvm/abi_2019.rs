// SPDX-License-Identifier: MIT OR Apache-2.0
//! The interface of 2019, as the programs of that time use it: plain numbers, their
//! own structures, reads that return at once. What is used here of the module's
//! interface is written down here, and nothing of it is shared with the library.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ept_virt_core::process::{Process, find_vm_fd};
use ept_virt_core::sampler::{KernelSampler, Sampler};
use ept_virt_core::uapi;

use super::Outcome;
use super::abi::expect;
use super::arguments::module_references;
use super::machine::{CODE_GFN, Machine, PAGE, RETURN, SPREAD, Touch, expect_same, round_program};
use super::sampling::while_running;

pub const INIT: u64 = 1200;
pub const SET_PROT: u64 = 1201;
pub const SET_FREQ: u64 = 1202;
pub const GET_MEMSLOTS: u64 = 1203;
pub const DEINIT: u64 = 1204;

const READ: u32 = 1;
const WRITE: u32 = 2;
const EXEC: u32 = 4;

/// Often enough to see each of some hundred pages within a second or two.
const HZ: u64 = 2000;
/// A test that waits for samples gives up after this long.
const PATIENCE: Duration = Duration::from_secs(30);

#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memslot {
    pub gpa: u64,
    pub hva: u64,
    pub page_count: usize,
}

#[repr(C)]
pub struct GetMemslots {
    pub memslots: *mut Memslot,
    pub capacity: usize,
    pub count: usize,
}

/// One sample: the page, and x, w and r as the bits 4, 2 and 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Old {
    pub gfn: u64,
    pub xwr: u32,
}

/// What such a program has open.
pub struct Program(pub File);

impl Program {
    pub fn start() -> Result<Program> {
        Ok(Program(OpenOptions::new().read(true).write(true).open("/proc/kvm_ept_sample")?))
    }

    /// The errno of a call, 0 when it succeeds.
    pub fn call(&self, command: u64, argument: u64) -> i32 {
        // SAFETY: an argument that is a pointer is one to a live GetMemslots, or
        // an address that the kernel must refuse.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), command, argument) };
        if result == 0 { 0 } else { std::io::Error::last_os_error().raw_os_error().unwrap_or(-1) }
    }

    /// As [`Program::call`], which must succeed.
    pub fn must(&self, command: u64, argument: u64) -> Result<()> {
        expect(&format!("ioctl {command} {argument}"), self.call(command, argument), 0)
    }

    /// The samples of one read, as many as fit 128.
    pub fn read(&self) -> Result<Vec<Old>> {
        let mut bytes = [0_u8; 4 * 128];
        // SAFETY: the buffer is live and as long as is said.
        let got = unsafe { libc::read(self.0.as_raw_fd(), bytes.as_mut_ptr().cast(), bytes.len()) };
        ensure!(got >= 0, "read: {}", std::io::Error::last_os_error());
        ensure!(got % 4 == 0, "read returned {got} bytes, not whole samples");
        let words =
            bytes[..got as usize].chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        Ok(words.map(|word| Old { gfn: u64::from(word & 0x1FFF_FFFF), xwr: word >> 29 }).collect())
    }

    /// Reads until there is nothing more; what is still running adds little.
    pub fn drain(&self) -> Result<Vec<Old>> {
        let mut samples = Vec::new();
        loop {
            let some = self.read()?;
            if some.is_empty() {
                return Ok(samples);
            }
            samples.extend(some);
        }
    }

    /// Reads, resting when there is nothing, until there is a sample of each page.
    fn read_until(&self, pages: &BTreeSet<u64>) -> Result<Vec<Old>> {
        let (start, mut samples, mut missing) = (Instant::now(), Vec::new(), pages.clone());
        while !missing.is_empty() {
            let some = self.read()?;
            if some.is_empty() {
                std::thread::sleep(Duration::from_millis(10));
            }
            some.iter().for_each(|sample| _ = missing.remove(&sample.gfn));
            samples.extend(some);
            ensure!(
                start.elapsed() < PATIENCE,
                "{} of {} pages without a sample, {} samples",
                missing.len(),
                pages.len(),
                samples.len()
            );
        }
        Ok(samples)
    }

    /// The first `capacity` slots.
    pub fn memslots(&self, capacity: usize) -> Result<Vec<Memslot>> {
        const UNTOUCHED: Memslot = Memslot { gpa: 1, hva: 1, page_count: 1 };
        let mut slots = vec![UNTOUCHED; capacity + 1];
        let mut request = GetMemslots { memslots: slots.as_mut_ptr(), capacity, count: 77 };
        self.must(GET_MEMSLOTS, &raw mut request as u64)?;
        ensure!(request.count <= capacity, "{} slots in room for {capacity}", request.count);
        ensure!(slots[request.count..].iter().all(|slot| *slot == UNTOUCHED), "written past the count");
        slots.truncate(request.count);
        Ok(slots)
    }
}

/// A process with a VM. Kills and reaps on drop.
pub struct Owner(Child);

impl Owner {
    /// Starts it, with the words that [`owner`] knows, and waits until it is ready.
    pub fn start(words: &[&str]) -> Result<Owner> {
        let mut command = Command::new("/proc/self/exe");
        let mut child = command.arg("microvm-owner").args(words).stdout(Stdio::piped()).spawn()?;
        let mut output = child.stdout.take().context("no pipe")?;
        let owner = Owner(child);
        let mut ready = [0; 6];
        std::io::Read::read_exact(&mut output, &mut ready).context("the VM's process did not get ready")?;
        Ok(owner)
    }

    pub fn pid(&self) -> u64 {
        u64::from(self.0.id())
    }

    pub fn kill(&mut self) -> Result<()> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // It may have ended already; then there is nothing left to do.
        let _ = self.kill();
    }
}

/// The process behind [`Owner`]: "busy" stores to its pages for ever, "idle" rests.
/// "poor" has no capabilities, "hidden" can not be dumped. "end" is there no more.
pub fn owner(words: &[&str]) -> Result<()> {
    if words.contains(&"end") {
        return Ok(());
    }
    let mut machine = Machine::standard()?;
    machine.load(&round_program(SPREAD, Touch::Store))?;
    machine.run_round()?;
    if words.contains(&"poor") {
        super::abi_2019_rights::keep_capabilities(&[])?;
    }
    if words.contains(&"hidden") {
        // SAFETY: this process's own setting.
        ensure!(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0) } == 0, "cannot hide from tracing");
    }
    println!("ready");
    while words.contains(&"busy") {
        machine.run_round()?;
    }
    std::thread::sleep(Duration::from_secs(600));
    Ok(())
}

/// Whether a thread of the module samples somewhere.
fn sampling_somewhere() -> Result<bool> {
    for entry in std::fs::read_dir("/proc")? {
        // A process may end while its name is read.
        let name = std::fs::read_to_string(entry?.path().join("comm")).unwrap_or_default();
        if name.starts_with("kes-sample") {
            return Ok(true);
        }
    }
    Ok(false)
}

/// This process's own VM: reads, writes and fetches, each asked for alone, on
/// exactly the touched pages.
pub fn types() -> Result<Outcome> {
    let mut machine = Machine::standard()?;
    let (pages, mut report) = (SPREAD.gfns(), Vec::new());
    for (touch, xwr) in [(Touch::Read, READ), (Touch::Store, WRITE), (Touch::Exec, EXEC)] {
        if touch == Touch::Exec {
            pages.iter().for_each(|gfn| machine.memory.write(*gfn as usize * PAGE, &RETURN));
        }
        machine.load(&round_program(SPREAD, touch))?;
        machine.run_round()?;
        let program = Program::start()?;
        program.must(INIT, u64::from(std::process::id()))?;
        program.must(SET_PROT, u64::from(xwr))?;
        program.must(SET_FREQ, HZ)?;
        let (_, samples) = while_running(&mut machine, || program.read_until(&pages))?;
        expect_samples(&samples, xwr, xwr == EXEC)?;
        report.push(format!("{} with xwr={xwr:03b}", samples.len()));
    }
    Ok(Outcome::Pass(format!("samples {}, of each of 200 pages and no other", report.join(", "))))
}

/// Fails unless each sample is of a touched page, of type `xwr`; or, with `code`, of
/// the program's page.
fn expect_samples(samples: &[Old], xwr: u32, code: bool) -> Result<()> {
    let pages = SPREAD.gfns();
    for sample in samples {
        let of_code = code && *sample == Old { gfn: CODE_GFN, xwr: EXEC };
        ensure!(of_code || (pages.contains(&sample.gfn) && sample.xwr == xwr), "not touched so: {sample:?}");
    }
    Ok(())
}

/// Another process's VM, from INIT to DEINIT and to the end of the process, with
/// everything changed on the way.
pub fn life() -> Result<Outcome> {
    let before = module_references()?;
    let mut owner = Owner::start(&["busy"])?;
    let program = Program::start()?;
    program.must(INIT, owner.pid())?;
    ensure!(module_references()? == before + 1, "the module is not held");
    ensure!(program.read()?.is_empty(), "samples without a frequency");
    compare_memslots(&program, &owner)?;

    // All types without being asked, then each alone, in a row.
    program.must(SET_FREQ, HZ)?;
    let pages = SPREAD.gfns_and_code();
    let all = program.read_until(&pages)?;
    expect_samples(&all, WRITE, true)?;
    expect_same("pages", &all.iter().map(|sample| sample.gfn).collect(), &pages)?;
    change_types(&program)?;
    change_frequency(&program)?;

    program.must(DEINIT, 0)?;
    ensure!(module_references()? == before + 1 && !sampling_somewhere()?, "DEINIT left something running");
    ensure!(program.read()?.is_empty(), "samples after DEINIT");
    expect("a frequency after DEINIT", program.call(SET_FREQ, HZ), libc::ENOTCONN)?;
    // Again, and ended by closing the file.
    program.must(INIT, owner.pid())?;
    program.must(SET_FREQ, HZ)?;
    program.read_until(&SPREAD.gfns())?;
    drop(program);
    ensure!(module_references()? == before && !sampling_somewhere()?, "closing left something running");

    let program = Program::start()?;
    program.must(INIT, owner.pid())?;
    program.must(SET_FREQ, HZ)?;
    program.read_until(&SPREAD.gfns())?;
    owner.kill()?;
    program.drain()?;
    ensure!(program.read()?.is_empty(), "samples of a process that is gone");
    expect("a type when the process is gone", program.call(SET_PROT, 1), libc::ESRCH)?;
    program.must(DEINIT, 0)?;
    drop(program);
    ensure!(module_references()? == before, "a session left a reference");
    Ok(Outcome::Pass(format!(
        "{} samples of 201 pages of another process; types and frequencies changed; DEINIT and close ended all",
        all.len()
    )))
}

/// Types are changed while sampling runs: nothing else is recorded any more.
fn change_types(program: &Program) -> Result<()> {
    let change = |xwr: u32| -> Result<()> {
        program.must(SET_PROT, u64::from(xwr))?;
        // What was recorded before the change stays.
        program.drain().map(drop)
    };
    let for_a_while = || {
        std::thread::sleep(Duration::from_millis(300));
        program.drain()
    };
    // One page of 201 is fetched from: its turn comes when it comes.
    change(EXEC)?;
    let mut fetches = program.read_until(&BTreeSet::from([CODE_GFN]))?;
    fetches.extend(for_a_while()?);
    let other = fetches.iter().find(|sample| **sample != Old { gfn: CODE_GFN, xwr: EXEC });
    ensure!(other.is_none(), "a sample that is no fetch: {other:?}");
    change(READ)?;
    let reads = for_a_while()?;
    ensure!(reads.is_empty(), "a guest that does not read was seen to: {:?}", reads.first());
    change(0)?;
    let none = for_a_while()?;
    ensure!(none.is_empty() && !sampling_somewhere()?, "sampled without a type: {:?}", none.first());
    // The frequency was not forgotten.
    change(WRITE)?;
    expect_samples(&program.read_until(&SPREAD.gfns())?, WRITE, false)
}

/// Frequencies are changed while sampling runs; the statistics say what is in force.
fn change_frequency(program: &Program) -> Result<()> {
    for (asked, set) in [(100, 100), (5000, 5000), (1_000_000, 50_000), (HZ, HZ as u32)] {
        program.must(SET_FREQ, asked)?;
        let stats = uapi::sample_stats(&program.0)?;
        ensure!(stats.freq_hz == set, "asked for {asked} Hz, set {} Hz", stats.freq_hz);
    }
    program.must(SET_FREQ, 0)?;
    program.drain()?;
    std::thread::sleep(Duration::from_millis(100));
    ensure!(program.read()?.is_empty() && !sampling_somewhere()?, "sampled at 0 Hz");
    program.must(SET_FREQ, HZ)?;
    expect_samples(&program.read_until(&SPREAD.gfns())?, WRITE, false)
}

/// The slots are those that the interface of today names.
fn compare_memslots(program: &Program, owner: &Owner) -> Result<()> {
    let vm = find_vm_fd(&Process::open(owner.pid() as i32)?)?;
    let mut today = KernelSampler::open()?;
    today.attach(std::os::fd::AsFd::as_fd(&vm))?;
    let (_, slots) = today.memslots()?;
    let want: Vec<Memslot> = slots
        .iter()
        .map(|slot| Memslot {
            gpa: slot.gfn_start * PAGE as u64,
            hva: slot.hva,
            page_count: slot.page_count as usize,
        })
        .collect();
    let got = program.memslots(64)?;
    ensure!(!want.is_empty() && got == want, "slots {got:?}, expected {want:?}");
    Ok(())
}
