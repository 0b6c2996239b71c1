// SPDX-License-Identifier: MIT OR Apache-2.0
//! What sampling costs a guest: the rate that was asked for, and never more
//! than twice that in any 100 ms.

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ept_virt_core::samples::{AccessSet, Sample, Sampling};

use super::Outcome;
use super::machine::{KvmCounter, Machine, Pages, SPREAD, Touch, round_program};
use super::sampling::{drain, expect_counted, while_running};

const WINDOW: Duration = Duration::from_millis(100);
/// Time to settle in.
const SETTLE: Duration = Duration::from_secs(2);
/// Time that is measured.
const MEASURE: Duration = Duration::from_secs(4);

/// The most samples in any window, over all windows that begin with a sample.
pub fn most_in_window(samples: &[Sample]) -> usize {
    let mut end = 0;
    let mut most = 0;
    for (start, first) in samples.iter().enumerate() {
        while end < samples.len() && samples[end].time < first.time + WINDOW {
            end += 1;
        }
        most = most.max(end - start);
    }
    most
}

/// The header's limit.
pub fn cap(freq_hz: u32) -> usize {
    (freq_hz as usize / 5).max(2)
}

/// Collects all samples for `how_long`, so that none is lost.
pub fn collect(sampling: &mut Sampling, how_long: Duration, samples: &mut Vec<Sample>) -> Result<()> {
    let start = Instant::now();
    while start.elapsed() < how_long {
        ensure!(sampling.read(samples, Duration::from_millis(50))?, "sampling ended by itself");
    }
    Ok(())
}

pub fn now() -> Result<Duration> {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)?;
    Ok(Duration::new(time.tv_sec() as u64, time.tv_nsec() as u32))
}

/// Settles within 10 % and stays under the limit, at rates far apart, and when
/// the rate changes.
pub fn settles() -> Result<Outcome> {
    let mut machine = Machine::standard()?;
    machine.load(&round_program(SPREAD, Touch::Write))?;
    machine.run_round()?;
    let mut sampling = Sampling::start(machine.observe()?, AccessSet::ALL, 10, 0)?;
    let (rounds, report) = while_running(&mut machine, || {
        let mut report = String::new();
        for freq_hz in [50, 500, 2000, 20] {
            sampling.set(AccessSet::ALL, freq_hz)?;
            // The windows of the rate before end within 100 ms.
            std::thread::sleep(WINDOW);
            drain(&mut sampling)?;
            let mut samples = Vec::new();
            collect(&mut sampling, SETTLE, &mut samples)?;
            let settled = now()?;
            collect(&mut sampling, MEASURE, &mut samples)?;
            let measured = now()? - settled;
            let count = samples.iter().filter(|sample| sample.time >= settled).count();
            let rate_hz = count as f64 / measured.as_secs_f64();
            let most = most_in_window(&samples);
            write!(report, "{freq_hz} Hz: {rate_hz:.1} Hz, {most} of {} in 100 ms; ", cap(freq_hz))?;
            ensure!(most <= cap(freq_hz), "{report}over the limit");
            ensure!(
                (rate_hz / f64::from(freq_hz) - 1.0).abs() <= 0.1,
                "{report}not within 10 %: {:?}",
                sampling.stats()?
            );
        }
        Ok(report)
    })?;
    let stats = sampling.stats()?;
    ensure!(stats.dropped == 0, "{stats:?}");
    expect_counted(&machine.memory, SPREAD, 1, rounds + 1)?;
    Ok(Outcome::Pass(format!("{report}{rounds} rounds of the guest")))
}

/// Most of the guest's pages are cold: the rate still comes, cold pages are
/// released, and when all turn hot at once the limit holds.
pub fn cold_pages() -> Result<Outcome> {
    const FREQ_HZ: u32 = 500;
    /// 4000 pages, a twentieth of which stays hot.
    const ALL_PAGES: Pages = Pages { base: 0x20_0000, stride: 0x3000, count: 4000 };
    const HOT: Pages = Pages { count: 200, ..ALL_PAGES };
    let mut machine = Machine::standard()?;
    machine.load(&round_program(ALL_PAGES, Touch::Write))?;
    machine.run_round()?;
    machine.load(&round_program(HOT, Touch::Write))?;
    let mut sampling = Sampling::start(machine.observe()?, AccessSet::ALL, FREQ_HZ, 0)?;
    let mut samples = Vec::new();
    let (hot_rounds, ()) =
        while_running(&mut machine, || collect(&mut sampling, SETTLE + MEASURE, &mut samples))?;
    let cold = sampling.stats()?;
    ensure!(cold.released > cold.samples, "cold pages are not released: {cold:?}");
    let settled = samples.first().context("no samples")?.time + SETTLE;
    let rate_hz =
        samples.iter().filter(|sample| sample.time >= settled).count() as f64 / MEASURE.as_secs_f64();

    machine.load(&round_program(ALL_PAGES, Touch::Write))?;
    let (rounds, ()) = while_running(&mut machine, || collect(&mut sampling, SETTLE, &mut samples))?;
    let most = most_in_window(&samples);
    ensure!(most <= cap(FREQ_HZ), "{most} samples in 100 ms, over {}", cap(FREQ_HZ));
    expect_counted(&machine.memory, HOT, 1, 1 + hot_rounds + rounds)?;

    // All that was armed was given back in full: afterwards nothing faults.
    std::thread::sleep(Duration::from_millis(300));
    sampling.set(AccessSet::default(), 0)?;
    let faults = KvmCounter::new(&machine, "pf_taken")?;
    let before = faults.count()?;
    machine.run_round()?;
    let after = faults.count()?;
    ensure!(after == before, "{} faults after sampling ended", after - before);
    expect_counted(&machine.memory, ALL_PAGES, 1, 1 + rounds)
        .or_else(|_| expect_counted(&machine.memory, HOT, 1, 2 + hot_rounds + rounds))?;
    Ok(Outcome::Pass(format!(
        "{rate_hz:.1} Hz of {FREQ_HZ} with 5 % hot, {} released; at most {most} of {} in 100 ms when all turned hot; no fault afterwards",
        cold.released,
        cap(FREQ_HZ)
    )))
}
