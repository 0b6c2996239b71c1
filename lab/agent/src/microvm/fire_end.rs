// SPDX-License-Identifier: MIT OR Apache-2.0
//! Ends in the middle: of the VM's process, of the file, of the module itself.

use std::ffi::c_int;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ept_virt_core::sampler::{Harvest, KernelSampler, Sampler, SamplerError};
use ept_virt_core::samples::{AccessSet, Sampling};
use ept_virt_core::topology::NodeSet;
use ept_virt_core::uapi::{self, KesAttach, KesHarvest, KesSampleSet, KesSampleStats, number};
use nix::errno::Errno;
use nix::kmod::{DeleteModuleFlags, ModuleInitFlags, delete_module, finit_module};

use super::Outcome;
use super::arguments::{module_references, open};
use super::child::GuestProcess;
use super::leaks::no_worker_is_left;
use super::machine::{ALL_CLEAR, Memory, PAGES, harvest};
use super::pattern::Guest;
use super::random::Random;
use super::settings::patience;

/// How a loop over a session ended: right is only that the VM is gone.
fn until_gone(mut act: impl FnMut() -> std::result::Result<(), SamplerError>) -> Result<u64> {
    let (start, mut times) = (Instant::now(), 0);
    loop {
        match act() {
            Ok(()) => times += 1,
            Err(SamplerError::VmGone) => return Ok(times),
            Err(error) => return Err(error.into()),
        }
        ensure!(start.elapsed() < patience(Duration::from_secs(60)), "nobody said that the VM is gone");
    }
}

/// The VM's process is killed while others harvest it and sample it in a loop.
pub fn killed() -> Result<Outcome> {
    const ROUNDS: u64 = 12;
    let before = module_references()?;
    let mut random = Random::new(5, 0);
    let (mut harvests, mut sets, mut reads) = (0, 0, 0);
    for round in 0..ROUNDS {
        let mut victim = GuestProcess::start()?;
        let vm = victim.vm()?;
        let attach = || -> Result<KernelSampler> {
            let mut session = KernelSampler::open()?;
            session.attach(vm.as_fd())?;
            Ok(session)
        };
        let (mut harvesting, mut other) = (attach()?, attach()?);
        let mut sampling = Sampling::start(attach()?, AccessSet::ALL, 20_000, 0)?;
        std::thread::scope(|scope| -> Result<()> {
            let first = scope.spawn(|| until_gone(|| harvest_once(&mut harvesting)));
            let second = scope.spawn(|| until_gone(|| harvest_once(&mut other)));
            let third = scope.spawn(|| sample_until_gone(&mut sampling));
            std::thread::sleep(Duration::from_millis(random.below(60)));
            victim.kill()?;
            let panicked = |_| anyhow::anyhow!("a reader panicked");
            harvests += first.join().map_err(panicked)?? + second.join().map_err(panicked)??;
            let (more_sets, more_reads) = third.join().map_err(panicked)??;
            (sets, reads) = (sets + more_sets, reads + more_reads);
            Ok(())
        })
        .with_context(|| format!("round {round}"))?;
    }
    no_worker_is_left()?;
    let after = module_references()?;
    ensure!(after == before, "the module's references went from {before} to {after}");
    ensure!(harvests > 0 && sets > 0, "{harvests} harvests, {sets} sets");
    Ok(Outcome::Pass(format!("{ROUNDS} VMs killed amid {harvests} harvests, {sets} changes, {reads} reads")))
}

fn harvest_once(session: &mut KernelSampler) -> std::result::Result<(), SamplerError> {
    session.harvest(&ALL_CLEAR, &NodeSet::default(), &mut Harvest::default())
}

/// Changes, and reads of samples, until both say that the VM is gone.
fn sample_until_gone(sampling: &mut Sampling) -> Result<(u64, u64)> {
    let (mut turn, mut samples) = (0, Vec::new());
    let sets = until_gone(|| {
        turn += 1;
        let freq_hz = if turn % 5 == 0 { 0 } else { 20_000 };
        sampling.set(if turn % 2 == 0 { AccessSet::ALL } else { AccessSet::WRITE }, freq_hz)?;
        sampling.read(&mut samples, Duration::ZERO).map(|_| ())
    })?;
    let reads = samples.len() as u64;
    // It ends, either as the death or as the end of sampling before it.
    let start = Instant::now();
    while let Ok(true) = sampling.read(&mut samples, Duration::from_millis(100)) {
        ensure!(start.elapsed() < patience(Duration::from_secs(20)), "readers of a dead VM are not told");
    }
    Ok((sets, reads))
}

/// A descriptor's number, far from those that others get.
const SHARED_FD: RawFd = 700;

/// The errno of a call on whatever [`SHARED_FD`] is now.
fn shared_call<T>(request: u64, mut argument: T) -> c_int {
    // SAFETY: the argument is a structure of the size that `request` says.
    let result = unsafe { libc::ioctl(SHARED_FD, request, &raw mut argument) };
    if result == 0 { 0 } else { Errno::last_raw() }
}

/// Files are closed, and others take their numbers, while threads are in a call.
pub fn closed() -> Result<Outcome> {
    let before = module_references()?;
    let mut guest = Guest::start(Memory::small_pages(PAGES)?)?;
    let (stop, calls, reads) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let vm_fd = guest.machine.vm_fd().as_raw_fd();
    let times = std::thread::scope(|scope| {
        let callers: Vec<_> = (0..2)
            .map(|number| {
                let (stop, calls) = (&stop, &calls);
                scope.spawn(move || call_until(stop, calls, vm_fd, number))
            })
            .collect();
        let reader = scope.spawn(|| read_until(&stop, &reads));
        let times = close_and_open();
        stop.store(true, Ordering::Relaxed);
        let panicked = |_| anyhow::anyhow!("a thread panicked");
        for caller in callers {
            caller.join().map_err(panicked)??;
        }
        reader.join().map_err(panicked)??;
        times
    });
    // SAFETY: the number is this function's alone.
    unsafe { libc::close(SHARED_FD) };
    let times = times?;
    let rounds = guest.stop()?;
    let after = module_references()?;
    ensure!(after == before, "the module's references went from {before} to {after}");
    no_worker_is_left()?;
    let (calls, reads) = (calls.into_inner(), reads.into_inner());
    ensure!(calls > 0 && reads > 0, "{calls} calls, {reads} reads");
    Ok(Outcome::Pass(format!("closed {times} times amid {calls} calls and {reads} reads; {rounds} rounds")))
}

fn close_and_open() -> Result<u64> {
    let (start, mut times, mut random) = (Instant::now(), 0, Random::new(6, 0));
    while start.elapsed() < patience(Duration::from_secs(2)) {
        let file = open()?;
        // SAFETY: the number is this test's alone; what was open there closes.
        let copy = unsafe { libc::dup2(file.as_raw_fd(), SHARED_FD) };
        ensure!(copy == SHARED_FD, "dup2: {}", Errno::last());
        drop(file);
        std::thread::sleep(Duration::from_millis(random.below(25)));
        if random.once_in(3) {
            // SAFETY: as above.
            unsafe { libc::close(SHARED_FD) };
        }
        times += 1;
    }
    Ok(times)
}

fn call_until(stop: &AtomicBool, calls: &AtomicU64, vm_fd: RawFd, number: u64) -> Result<()> {
    let mut random = Random::new(7, number);
    let right = [0, libc::EBADF, libc::ENOTCONN, libc::EISCONN, libc::EBUSY];
    while !stop.load(Ordering::Relaxed) {
        let freq_hz = random.pick(&[0, 5000, 5000]);
        let errno = match random.below(8) {
            0 | 1 => shared_call(number::ATTACH, KesAttach { vm_fd, ..Default::default() }),
            2 => shared_call(number::DETACH, ()),
            3 | 4 => {
                let flags = uapi::HARVEST_CLEAR_ACCESSED | uapi::HARVEST_FLUSH;
                let request = KesHarvest { gfn_count: PAGES, flags, ..Default::default() };
                shared_call(number::HARVEST, request)
            }
            5 | 6 => {
                let request = KesSampleSet { access: uapi::ACCESS_READ, freq_hz, ..Default::default() };
                shared_call(number::SAMPLE_SET, request)
            }
            _ => shared_call(number::SAMPLE_STATS, KesSampleStats::default()),
        };
        ensure!(right.contains(&errno), "errno {errno}, expected one of {right:?}");
        calls.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

/// Blocking reads: the guest runs, so that samples end each.
fn read_until(stop: &AtomicBool, reads: &AtomicU64) -> Result<()> {
    let mut records = [0_u8; 240];
    let right = [libc::EBADF, libc::ENODATA];
    while !stop.load(Ordering::Relaxed) {
        // SAFETY: the buffer is as long as said.
        let got = unsafe { libc::read(SHARED_FD, records.as_mut_ptr().cast(), records.len()) };
        let errno = Errno::last_raw();
        ensure!(got > 0 || right.contains(&errno), "a read: errno {errno}, expected one of {right:?}");
        reads.fetch_add(u64::from(got > 0), Ordering::Relaxed);
    }
    Ok(())
}

const MODULE: &str = "/modules/kvm_ept_sample.ko";

fn unload() -> std::result::Result<(), Errno> {
    delete_module(c"kvm_ept_sample", DeleteModuleFlags::O_NONBLOCK)
}

fn load() -> Result<()> {
    let file = File::open(MODULE).with_context(|| format!("cannot open {MODULE}"))?;
    finit_module(&file, c"", ModuleInitFlags::empty()).context("cannot load the module again")
}

/// The module goes right after the last session closed, and comes again.
pub fn unloaded() -> Result<Outcome> {
    const TIMES: u64 = 20;
    if !Path::new(MODULE).exists() {
        return Ok(Outcome::Skip(format!("this host keeps no {MODULE}")));
    }
    let mut guest = Guest::start(Memory::small_pages(PAGES)?)?;
    let mut armed = 0;
    for time in 0..TIMES {
        let sampling = Sampling::start(guest.machine.observe()?, AccessSet::ALL, 20_000, 0)?;
        let mut session = guest.machine.observe()?;
        guest.wait_rounds(1)?;
        harvest(&mut session, ALL_CLEAR)?;
        armed += sampling.stats()?.armed;
        match unload() {
            Err(Errno::EAGAIN | Errno::EBUSY) => {}
            other => bail!("the module in use was removed: {other:?}"),
        }
        // A file that is open and not attached holds the module as well.
        let idle = open()?;
        drop(session);
        drop(sampling);
        ensure!(unload().is_err(), "the module was removed under an open file");
        drop(idle);
        unload().with_context(|| format!("removing the module right after the last close, time {time}"))?;
        ensure!(open().is_err(), "the file is still there");
        guest.wait_rounds(1)?;
        load()?;
        ensure!(uapi::get_info(&open()?)?.sessions == 0, "the module came with sessions");
    }
    let rounds = guest.stop()?;
    ensure!(armed > 0, "nothing was armed");
    Ok(Outcome::Pass(format!("removed {TIMES} times right after {armed} pages were armed; {rounds} rounds")))
}
