// SPDX-License-Identifier: MIT OR Apache-2.0
//! What sampling must never do: lose a write of the guest, or hide one from
//! those who log writes.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ept_virt_core::samples::{AccessSet, Sampling};

use super::Outcome;
use super::machine::{ALL_CLEAR, Machine, PAGE, SPREAD, Touch, gfns, harvest, round_program};
use super::sampling::{OFTEN_HZ, drain, expect_counted, while_running};

/// Fails unless KVM's log of slot 0, which this empties, has all of [`SPREAD`].
fn expect_logged(machine: &Machine, when: &str) -> Result<()> {
    let log = machine.vm.get_dirty_log(0, machine.memory.bytes()).context("KVM_GET_DIRTY_LOG")?;
    let lost: BTreeSet<u64> = SPREAD.gfns().difference(&gfns(&log, 0)).copied().collect();
    ensure!(lost.is_empty(), "{} writes are not in the log {when}: {lost:?}", lost.len());
    Ok(())
}

/// Dirty logging begins while pages are armed, and they are released while it is
/// on: every write is in the log.
pub fn dirty_log() -> Result<Outcome> {
    const CYCLES: u64 = 12;
    let mut report = Vec::new();
    for access in [AccessSet::ALL, AccessSet::WRITE] {
        let mut machine = Machine::standard()?;
        machine.load(&round_program(SPREAD, Touch::Write))?;
        machine.run_round()?;
        let sampling = Sampling::start(machine.observe()?, access, OFTEN_HZ, 0)?;
        let (mut rounds, mut armed_at_start) = (1, 0);
        for cycle in 0..CYCLES {
            // The guest rests: what is armed stays so until it is released. Each
            // cycle looks at another moment of that.
            std::thread::sleep(Duration::from_millis(10 + cycle % 7 * 3));
            armed_at_start += sampling.stats()?.armed_now;
            machine.log_dirty(true)?;
            for pause_ms in [0, 1, 15, 120] {
                std::thread::sleep(Duration::from_millis(pause_ms));
                machine.run_round()?;
                rounds += 1;
                expect_logged(&machine, &format!("in cycle {cycle}, {pause_ms} ms after the last"))?;
            }
            machine.log_dirty(false)?;
            machine.run_round()?;
            rounds += 1;
        }
        expect_counted(&machine.memory, SPREAD, 1, rounds)?;
        let stats = sampling.stats()?;
        ensure!(armed_at_start > 0 && stats.released > 0, "nothing was tested: {stats:?}");
        report.push(format!(
            "{} samples, {} released, {armed_at_start} armed when the log began",
            stats.samples, stats.released
        ));
    }
    Ok(Outcome::Pass(format!(
        "no write missing in {} logs: {}; writes alone: {}",
        2 * 4 * CYCLES,
        report[0],
        report[1]
    )))
}

/// A guest whose memory is dropped and whose slot comes and goes, beside
/// sampling that changes all the time and a reader that harvests.
pub fn churn() -> Result<Outcome> {
    const FOR: Duration = Duration::from_secs(3);
    let taint_before = std::fs::read_to_string("/proc/sys/kernel/tainted")?;
    let mut machine = Machine::standard()?;
    machine.load(&round_program(SPREAD, Touch::Write))?;
    machine.run_round()?;
    let mut sampling = Sampling::start(machine.observe()?, AccessSet::ALL, OFTEN_HZ, 0)?;
    let mut session = machine.observe()?;
    let (stop, harvests) = (AtomicBool::new(false), AtomicU64::new(0));
    let (rounds, samples) = std::thread::scope(|scope| -> Result<(u64, usize)> {
        let reader = scope.spawn(|| -> Result<()> {
            while !stop.load(Ordering::Relaxed) {
                harvest(&mut session, ALL_CLEAR)?;
                harvests.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(3));
            }
            Ok(())
        });
        let changer = scope.spawn(|| -> Result<usize> {
            let mut samples = 0;
            while !stop.load(Ordering::Relaxed) {
                for (access, freq_hz) in
                    [(AccessSet::ALL, 5000), (AccessSet::WRITE, 1000), (AccessSet::ALL, 0)]
                {
                    sampling.set(access, freq_hz)?;
                    std::thread::sleep(Duration::from_millis(40));
                    samples += drain(&mut sampling)?.len();
                }
            }
            Ok(samples)
        });
        let rounds = churn_rounds(&mut machine, FOR);
        stop.store(true, Ordering::Relaxed);
        reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
        let samples = changer.join().map_err(|_| anyhow::anyhow!("the sampling thread panicked"))??;
        Ok((rounds?, samples))
    })?;
    let taint = std::fs::read_to_string("/proc/sys/kernel/tainted")?;
    ensure!(taint == taint_before, "the kernel's taint went from {taint_before} to {taint}: see its log");
    ensure!(samples > 0, "no samples");
    Ok(Outcome::Pass(format!(
        "{rounds} rounds of the guest without a lost write, {samples} samples, {} harvests",
        harvests.into_inner()
    )))
}

/// As the churn of the harvest, and each drop of the memory restarts the count.
fn churn_rounds(machine: &mut Machine, how_long: Duration) -> Result<u64> {
    let (start, mut rounds) = (Instant::now(), 0);
    let (mut before, mut since) = (2, 0);
    while start.elapsed() < how_long {
        machine.run_round()?;
        rounds += 1;
        since += 1;
        if rounds % 3 == 0 {
            expect_counted(&machine.memory, SPREAD, before, since)?;
            // All but the program's own 2 MiB.
            let bytes = machine.memory.bytes() - 512 * PAGE;
            machine.memory.advise(512 * PAGE, bytes, libc::MADV_DONTNEED)?;
            (before, since) = (0, 0);
        }
        if rounds % 7 == 0 {
            machine.set_slot(0, 0, &machine.memory, 0)?;
            machine.set_slot(0, 0, &machine.memory, machine.memory.bytes())?;
        }
    }
    Ok(rounds)
}

/// Sampling ends in each way there is while pages are armed, and begins again:
/// the guest goes on.
pub fn end() -> Result<Outcome> {
    const TIMES: u32 = 15;
    let mut machine = Machine::standard()?;
    machine.load(&round_program(SPREAD, Touch::Write))?;
    machine.run_round()?;
    let (mut rounds, mut armed) = (1, 0);
    for time in 0..TIMES {
        let sampling = Sampling::start(machine.observe()?, AccessSet::ALL, 20_000, 0)?;
        // The guest rests, so that much is armed; then it runs into the end.
        std::thread::sleep(Duration::from_millis(25));
        armed += sampling.stats()?.armed_now;
        let (more, ()) = while_running(&mut machine, || {
            std::thread::sleep(Duration::from_millis(u64::from(time % 4)));
            match time % 3 {
                0 => drop(sampling),
                1 => {
                    sampling.set(AccessSet::default(), 0)?;
                    let stats = sampling.stats()?;
                    ensure!(stats.armed_now == 0, "still armed: {stats:?}");
                }
                _ => {
                    sampling.set(AccessSet::WRITE, 100)?;
                    sampling.detach()?;
                }
            }
            Ok(())
        })?;
        rounds += more;
    }
    machine.run_round()?;
    expect_counted(&machine.memory, SPREAD, 1, rounds + 1)?;
    ensure!(armed > 0, "nothing was armed when sampling ended");
    Ok(Outcome::Pass(format!(
        "ended {TIMES} times by close, stop and detach with {armed} pages armed; {rounds} rounds, no write lost"
    )))
}
