// SPDX-License-Identifier: MIT OR Apache-2.0
//! The calls of sampling: how reads wait, what is counted, what is refused.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use ept_virt_core::sampler::SamplerError;
use ept_virt_core::samples::{AccessSet, Sampling};
use ept_virt_core::uapi::{self, KesSample, KesSampleSet, number};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Outcome;
use super::abi::{errno, expect};
use super::lifecycle::Victim;
use super::machine::{Machine, SPREAD, Touch, round_program};
use super::sampling::{OFTEN_HZ, drain, expect_counted, while_running};

fn open(flags: i32) -> Result<File> {
    Ok(OpenOptions::new().read(true).write(true).custom_flags(flags).open(uapi::PROC_PATH)?)
}

/// The errno of a read of up to `count` records, 0 when it succeeds.
fn read_errno(file: &File, count: usize) -> i32 {
    match uapi::read_samples(file, &mut vec![KesSample::default(); count]) {
        Ok(_) => 0,
        Err(error) => error.raw_os_error().unwrap_or(-1),
    }
}

fn events(file: &File) -> Result<PollFlags> {
    let mut wait = [PollFd::new(file.as_fd(), PollFlags::POLLIN)];
    poll(&mut wait, PollTimeout::ZERO)?;
    Ok(wait[0].revents().unwrap_or(PollFlags::empty()))
}

/// A machine that did one round of writes.
fn machine() -> Result<Machine> {
    let mut machine = Machine::standard()?;
    machine.load(&round_program(SPREAD, Touch::Write))?;
    machine.run_round()?;
    Ok(machine)
}

/// Runs until something is so, for at least a round. A single round is short: it may be
/// over while the worker arms other pages.
fn rounds_until(machine: &mut Machine, is_so: impl Fn() -> Result<bool>) -> Result<()> {
    const LIMIT: Duration = Duration::from_secs(5);
    let start = Instant::now();
    loop {
        machine.run_round()?;
        if is_so()? {
            return Ok(());
        }
        ensure!(start.elapsed() < LIMIT, "the guest ran for {LIMIT:?}, and nothing came of it");
    }
}

/// Blocking and not, and poll: before, during and after sampling.
pub fn reads() -> Result<Outcome> {
    let mut machine = machine()?;
    let (waits, asks) = (open(0)?, open(libc::O_NONBLOCK)?);
    for file in [&waits, &asks] {
        expect("a read before attach", read_errno(file, 1), libc::ENODATA)?;
        uapi::attach(file, machine.vm_fd())?;
        expect("a read without sampling", read_errno(file, 1), libc::ENODATA)?;
        expect("a read of no record", read_errno(file, 0), libc::EINVAL)?;
        ensure!(events(file)? == PollFlags::POLLHUP, "{:?} without sampling", events(file)?);
    }
    uapi::sample_set(&asks, uapi::ACCESS_WRITE, OFTEN_HZ, 0)?;
    expect("a read that would wait", read_errno(&asks, 1), libc::EAGAIN)?;
    ensure!(events(&asks)?.is_empty(), "{:?} without samples", events(&asks)?);
    std::thread::sleep(Duration::from_millis(50));
    rounds_until(&mut machine, || Ok(!events(&asks)?.is_empty()))?;
    ensure!(events(&asks)? == PollFlags::POLLIN, "{:?} with samples", events(&asks)?);
    expect("a read of a sample", read_errno(&asks, 1), 0)?;
    uapi::sample_set(&asks, 0, 0, 0)?;
    let left = PollFlags::POLLIN | PollFlags::POLLHUP;
    ensure!(events(&asks)? == left, "{:?} with samples left over", events(&asks)?);
    expect("a read of samples left over", read_errno(&asks, OFTEN_HZ as usize), 0)?;
    expect("a read when all is read", read_errno(&asks, 1), libc::ENODATA)?;

    // A reader waits for a guest that rests, until it runs.
    uapi::sample_set(&waits, uapi::ACCESS_WRITE, OFTEN_HZ, 0)?;
    let start = Instant::now();
    let waited = std::thread::scope(|scope| -> Result<Duration> {
        let reader = scope.spawn(|| (read_errno(&waits, 64), start.elapsed()));
        std::thread::sleep(Duration::from_millis(200));
        let waits_still = !reader.is_finished();
        let ran = rounds_until(&mut machine, || Ok(reader.is_finished()));
        if !reader.is_finished() {
            // Lets go of a reader that would keep this thread for good.
            uapi::sample_set(&waits, 0, 0, 0)?;
        }
        let (errno, waited) = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))?;
        ran?;
        ensure!(waits_still, "a blocking read did not wait");
        expect("a blocking read", errno, 0)?;
        Ok(waited)
    })?;
    ensure!(waited >= Duration::from_millis(200), "waited {waited:?} only");
    // Or until another thread ends sampling.
    while read_errno_nonblocking(&waits)? == 0 {}
    std::thread::scope(|scope| -> Result<()> {
        let reader = scope.spawn(|| read_errno(&waits, 64));
        std::thread::sleep(Duration::from_millis(100));
        uapi::sample_set(&waits, 0, 0, 0)?;
        let errno = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))?;
        expect("a blocking read when sampling ends", errno, libc::ENODATA)
    })?;
    Ok(Outcome::Pass(format!(
        "EAGAIN, ENODATA, POLLIN and POLLHUP each at its time; a reader waited {waited:?}"
    )))
}

/// Empties a blocking file without blocking.
fn read_errno_nonblocking(file: &File) -> Result<i32> {
    if events(file)?.contains(PollFlags::POLLIN) { Ok(read_errno(file, 64)) } else { Ok(libc::EAGAIN) }
}

/// Samples that nobody reads are counted, and the guest does not wait.
pub fn overflow() -> Result<Outcome> {
    let mut machine = machine()?;
    let mut sampling = Sampling::start(machine.observe()?, AccessSet::ALL, OFTEN_HZ, 30)?;
    let (rounds, ()) = while_running(&mut machine, || {
        let start = Instant::now();
        while sampling.stats()?.dropped < 500 && start.elapsed() < Duration::from_secs(10) {
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    })?;
    sampling.set(AccessSet::default(), 0)?;
    let stats = sampling.stats()?;
    ensure!(stats.samples == 32 && stats.dropped >= 500, "{stats:?}");
    ensure!(
        stats.armed == stats.samples + stats.dropped + stats.unwanted + stats.released
            && stats.armed_now == 0,
        "the counts do not add up: {stats:?}"
    );
    let read = drain(&mut sampling)?.len();
    ensure!(read == 32, "{read} samples in a ring of 32");
    expect_counted(&machine.memory, SPREAD, 1, rounds + 1)?;
    Ok(Outcome::Pass(format!("32 samples kept, {} dropped and counted", stats.dropped)))
}

/// One sampler for each VM, and wrong arguments.
pub fn refusals() -> Result<Outcome> {
    let machine = machine()?;
    let file = open(0)?;
    let good = KesSampleSet { access: uapi::ACCESS_READ, freq_hz: 10, ..Default::default() };
    let set = |request: KesSampleSet| errno(&file, number::SAMPLE_SET, &mut { request });
    expect("sampling before attach", set(good), libc::ENOTCONN)?;
    let nowhere = 8 as *mut u8;
    expect("statistics before attach", errno(&file, number::SAMPLE_STATS, nowhere), libc::ENOTCONN)?;
    uapi::attach(&file, machine.vm_fd())?;
    let wrong = [
        ("no access", KesSampleSet { access: 0, ..good }),
        ("an unknown access", KesSampleSet { access: 8, ..good }),
        ("too often", KesSampleSet { freq_hz: uapi::MAX_FREQ_HZ + 1, ..good }),
        ("too many records", KesSampleSet { ring_records: uapi::MAX_RING_RECORDS + 1, ..good }),
        ("an unknown flag", KesSampleSet { flags: 1, ..good }),
        ("a reserved field", KesSampleSet { reserved: [0, 0, 1], ..good }),
        ("a reserved field with no rate", KesSampleSet { reserved: [1, 0, 0], ..Default::default() }),
    ];
    for (what, request) in wrong {
        expect(what, set(request), libc::EINVAL)?;
    }
    expect("sampling from nowhere", errno(&file, number::SAMPLE_SET, nowhere), libc::EFAULT)?;
    expect("statistics to nowhere", errno(&file, number::SAMPLE_STATS, nowhere), libc::EFAULT)?;
    expect("stopping what does not run", set(KesSampleSet::default()), 0)?;
    expect("the most there is", set(KesSampleSet { freq_hz: uapi::MAX_FREQ_HZ, ..good }), 0)?;
    expect("another ring while it runs", set(KesSampleSet { ring_records: 1 << 15, ..good }), libc::EINVAL)?;
    ensure!(uapi::sample_stats(&file)?.freq_hz == uapi::MAX_FREQ_HZ, "a refused call changed the rate");

    let second = Sampling::start(machine.observe()?, AccessSet::ALL, 10, 0);
    ensure!(matches!(second, Err(SamplerError::Busy)), "a second sampler of one VM: {second:?}");
    let other = self::machine()?;
    let third = Sampling::start(other.observe()?, AccessSet::ALL, 10, 0)?;
    ensure!(third.stats()?.dropped == 0, "another VM");
    uapi::sample_set(&file, 0, 0, 0)?;
    Sampling::start(machine.observe()?, AccessSet::ALL, 10, 0)?;
    Ok(Outcome::Pass(format!("{} wrong calls refused, a second sampler with EBUSY", wrong.len() + 5)))
}

/// Fails unless a sampler is told that its VM is gone, after what there was to read
/// and at each other call.
pub fn expect_gone(sampling: &mut Sampling) -> Result<()> {
    let (start, mut samples) = (Instant::now(), Vec::new());
    let told = loop {
        match sampling.read(&mut samples, Duration::from_secs(5)) {
            Ok(true) if start.elapsed() < Duration::from_secs(10) => {}
            other => break other,
        }
    };
    ensure!(matches!(told, Err(SamplerError::VmGone)), "samples of what is gone: {told:?}");
    let set = sampling.set(AccessSet::ALL, 10);
    ensure!(matches!(set, Err(SamplerError::VmGone)), "sampling what is gone: {set:?}");
    Ok(())
}

/// The VM's process is killed while its pages are armed: readers are told.
pub fn vm_exit() -> Result<Outcome> {
    let mut victim = Victim::start()?;
    let mut sampling = Sampling::start(victim.observe()?, AccessSet::ALL, OFTEN_HZ, 0)?;
    std::thread::sleep(Duration::from_millis(100));
    let armed = sampling.stats()?.armed;
    ensure!(armed > 0, "nothing was armed");
    victim.kill()?;
    let start = Instant::now();
    expect_gone(&mut sampling)?;
    drop(sampling);
    Ok(Outcome::Pass(format!("{armed} armed, then ESRCH after {:?}", start.elapsed())))
}
