// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whether the rate of sampling settles, at rates from 10 Hz to 50 kHz, with
//! guests that touch much, little, or a small part of what they have mapped.

use std::fmt::Write as _;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ept_virt_core::samples::{AccessSet, Sampling};

use super::Outcome;
use super::machine::{KvmCounter, Machine, Pages, SPREAD, Touch, round_program};
use super::sampling_rate::{cap, collect, most_in_window, now};
use super::spin::Crew;

/// What a guest does with the standard machine's memory.
struct Work {
    name: &'static str,
    /// Touched once before sampling begins, so that they are mapped.
    mapped: Pages,
    /// Touched without end by each vCPU.
    hot: Pages,
}

const ALL_PAGES: Pages = Pages { base: 0x20_0000, stride: 0x1000, count: 15800 };
const LITTLE: Work = Work { name: "200 pages, all hot", mapped: SPREAD, hot: SPREAD };
const MUCH: Work = Work { name: "15800 pages, all hot", mapped: ALL_PAGES, hot: ALL_PAGES };
/// Each 20th page is hot.
const COLD: Work = Work {
    name: "15800 pages, 790 hot",
    mapped: ALL_PAGES,
    hot: Pages { base: 0x20_0000, stride: 0x1_4000, count: 790 },
};

/// A rate, and for how long it settles and is measured.
struct Rate {
    freq_hz: u32,
    settle: Duration,
    measure: Duration,
}

const fn rate(freq_hz: u32, settle_ms: u64, measure_ms: u64) -> Rate {
    Rate { freq_hz, settle: Duration::from_millis(settle_ms), measure: Duration::from_millis(measure_ms) }
}

/// Rates for which a CPU of 50 million instructions a second is fast enough.
pub fn slow() -> Result<Outcome> {
    let rates = [rate(10, 2000, 4000), rate(100, 2000, 2000), rate(1000, 2000, 1000)];
    settle(&rates, &[(&LITTLE, 1), (&MUCH, 1), (&COLD, 1), (&MUCH, 2)])
}

/// Rates that take a CPU of 1000 million.
pub fn fast() -> Result<Outcome> {
    let rates = [rate(10_000, 300, 200), rate(50_000, 200, 200)];
    settle(&rates, &[(&LITTLE, 1), (&MUCH, 1), (&COLD, 1), (&MUCH, 2)])
}

fn settle(rates: &[Rate], works: &[(&Work, usize)]) -> Result<Outcome> {
    let (mut report, mut misses) = (String::new(), String::new());
    for (work, vcpus) in works {
        write!(report, "{}, {vcpus} vCPU:", work.name)?;
        let mut crew = crew(work, *vcpus)?;
        for rate in rates {
            let seen = measure(&mut crew, work, rate)?;
            write!(report, " {seen};")?;
            if !seen.good() {
                write!(misses, " {}, {vcpus} vCPU: {seen}, {};", work.name, seen.detail)?;
            }
        }
        report.push(' ');
    }
    ensure!(misses.is_empty(), "missed:{misses} all: {report}");
    Ok(Outcome::Pass(report))
}

fn crew(work: &Work, vcpus: usize) -> Result<Crew> {
    let mut machine = Machine::standard()?;
    machine.load(&round_program(work.mapped, Touch::Write))?;
    machine.run_round()?;
    Crew::new(machine, vcpus)
}

/// What was seen of one rate.
struct Seen {
    freq_hz: u32,
    rate_hz: f64,
    most: usize,
    dropped: u64,
    /// Faults that KVM counted for each sample.
    faults_per_sample: f64,
    /// Share of a CPU that the module's worker took.
    worker_percent: f64,
    detail: String,
}

impl Seen {
    fn good(&self) -> bool {
        let share = self.rate_hz / f64::from(self.freq_hz);
        // The worker takes half of a CPU and no more, as the header says.
        let at_its_end = share < 1.0 && self.worker_percent > 45.0;
        ((share - 1.0).abs() <= 0.1 || at_its_end) && self.most <= cap(self.freq_hz) && self.dropped == 0
    }
}

impl std::fmt::Display for Seen {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(
            f,
            "{} Hz: {:.1} Hz, {} of {} in 100 ms, {:.2} faults a sample, worker {:.1} %",
            self.freq_hz,
            self.rate_hz,
            self.most,
            cap(self.freq_hz),
            self.faults_per_sample,
            self.worker_percent
        )
    }
}

fn measure(crew: &mut Crew, work: &Work, rate: &Rate) -> Result<Seen> {
    crew.load_spin(work.hot, Touch::Write)?;
    let faults = KvmCounter::new(&crew.machine, "pf_taken")?;
    let session = crew.machine.observe()?;
    crew.while_spinning(|_| {
        let (faults_before, mut samples) = (faults.count()?, Vec::new());
        let mut sampling = Sampling::start(session, AccessSet::ALL, rate.freq_hz, 0)?;
        collect(&mut sampling, rate.settle, &mut samples)?;
        let (settled, worker_before) = (now()?, worker_time()?);
        collect(&mut sampling, rate.measure, &mut samples)?;
        let measured = now()? - settled;
        let worker = worker_time()? - worker_before;
        let (faults, stats) = (faults.count()? - faults_before, sampling.stats()?);
        let count = samples.iter().filter(|sample| sample.time >= settled).count();
        Ok(Seen {
            freq_hz: rate.freq_hz,
            rate_hz: count as f64 / measured.as_secs_f64(),
            most: most_in_window(&samples),
            dropped: stats.dropped,
            faults_per_sample: faults as f64 / stats.samples.max(1) as f64,
            worker_percent: 100.0 * worker.as_secs_f64() / measured.as_secs_f64(),
            detail: format!("{stats:?}"),
        })
    })
}

/// CPU time that the module's thread used so far.
fn worker_time() -> Result<Duration> {
    for entry in fs::read_dir("/proc").context("cannot read /proc")? {
        let folder = entry?.path();
        let name = fs::read_to_string(folder.join("comm")).unwrap_or_default();
        if name.starts_with("kes-sample/") {
            let schedstat = folder.join("schedstat");
            let text = fs::read_to_string(&schedstat)
                .with_context(|| format!("cannot read {}", schedstat.display()))?;
            let ns = text.split_whitespace().next().context("an empty schedstat")?;
            return Ok(Duration::from_nanos(ns.parse()?));
        }
    }
    anyhow::bail!("the module's thread does not run")
}
