// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a guest pays for being observed, by its own time-stamp counter: for a
//! sample, for a flush, and of its work as a whole.
//!
//! On the Intel host with one CPU a tick is an instruction, of the guest or of
//! the host. With several, which take turns of some instructions, it is the mean
//! of what they did, and one at rest counts as 16 instructions a turn. Caches,
//! and translations that are lost, cost nothing there.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ept_virt_core::sampler::Sampler;
use ept_virt_core::samples::{AccessSet, Sampling};
use ept_virt_core::uapi::{self, HarvestBuffers};

use super::Outcome;
use super::cost::ticks;
use super::machine::{
    ALL_CLEAR, Machine, Memory, PAGE, Pages, RETURN, SPREAD, Touch, harvest, round_program,
};
use super::sampling_rate::{collect, now};
use super::spin::{Crew, Log, gap_program, pin_to, rounds, timing_program};

/// Below what the programs go over, above their code.
const LOG: Log = Log { address: 0x10_0000, entries: 400 };
/// An access that takes this many ticks left the guest.
const EXIT: u32 = 300;
/// Where KVM is patched a sample may cost a third of what the cheapest cost with the
/// stock KVM of the same kernel line, in the same run of the bench.
const STOCK_6_12: u32 = 3529;
const STOCK_7_3: u32 = 3887;
/// The page that vCPUs read when the cost of a flush is measured, below their logs.
const FLUSHED: u32 = 0xFF;
const PATIENCE: Duration = Duration::from_secs(60);
const HUGE: usize = 2 << 20;
/// One page in each of six huge ones.
const SIX: Pages = Pages { base: HUGE as u32 + 0x5000, stride: HUGE as u32 + 0x7000, count: 6 };

/// The middle one, and the one above nine of ten.
struct Spread {
    median: u32,
    ninth: u32,
}

fn spread(mut values: Vec<u32>) -> Result<Spread> {
    ensure!(!values.is_empty(), "nothing was measured");
    values.sort_unstable();
    Ok(Spread { median: values[values.len() / 2], ninth: values[values.len() * 9 / 10] })
}

/// Ticks of the guest from an access that faults to the instruction after it,
/// by kind of access and size of mapping.
pub fn of_a_sample() -> Result<Outcome> {
    let small = Crew::new(Machine::standard()?, 1)?;
    let memory = Memory::map(8 * HUGE, HUGE, 0)?;
    memory.advise(0, memory.bytes(), libc::MADV_HUGEPAGE)?;
    memory.populate();
    let huge = Crew::new(Machine::new(memory)?, 1)?;
    let patched = huge.machine.observe()?.info().patched_kvm;
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("which kernel this is")?;
    let limit = if release.starts_with("7.3.") { STOCK_7_3 } else { STOCK_6_12 } / 3;
    let kvm = if patched { "patched" } else { "stock" };
    let mut report = format!("{kvm} KVM, ticks more than without a fault, median (nine of ten below):");
    for (size, mut crew, pages) in [("4K", small, SPREAD), ("2M", huge, SIX)] {
        for gfn in pages.gfns() {
            crew.machine.memory.write(gfn as usize * PAGE, &RETURN);
        }
        crew.machine.load(&round_program(pages, Touch::Exec))?;
        crew.machine.run_round()?;
        for (name, touch, access) in [
            ("read", Touch::Read, AccessSet::ALL),
            ("fetch", Touch::Exec, AccessSet::ALL),
            ("write", Touch::Store, AccessSet::ALL),
            ("write, writing alone revoked", Touch::Store, AccessSet::WRITE),
        ] {
            let without = accesses(&mut crew, pages, touch, 1, || {
                std::thread::sleep(Duration::from_millis(20));
                Ok(())
            })?;
            let mut sampling = Sampling::start(crew.machine.observe()?, access, 2000, 0)?;
            let mut samples = Vec::new();
            // A reader that waits for each of them.
            let with = accesses(&mut crew, pages, touch, EXIT, || {
                sampling.read(&mut samples, Duration::from_millis(50)).map(|_| ()).map_err(Into::into)
            })?;
            ensure!(!samples.is_empty(), "no samples");
            let more = with.median - without.median;
            ensure!(!patched || more <= limit, "{size} {name}: {more}, limit {limit}");
            write!(report, " {size} {name} {more} ({});", with.ninth - without.median)?;
        }
    }
    Ok(Outcome::Pass(report))
}

/// Fills the log with ticks of accesses that took at least `from`.
fn accesses(
    crew: &mut Crew,
    pages: Pages,
    touch: Touch,
    from: u32,
    mut wait: impl FnMut() -> Result<()>,
) -> Result<Spread> {
    LOG.clear(&crew.machine.memory);
    crew.load(0, &timing_program(pages, touch, LOG, from)?)?;
    let values = crew.while_spinning(|memory| {
        let start = Instant::now();
        while LOG.read(memory).len() < LOG.entries as usize {
            if start.elapsed() > PATIENCE {
                bail!("{} of {} accesses were slow", LOG.read(memory).len(), LOG.entries);
            }
            wait()?;
        }
        Ok(LOG.read(memory))
    })?;
    spread(values)
}

/// Ticks of a flush, for who asks for it and for each of as many vCPUs as there
/// are CPUs after the first. No CPU is at rest, which would count as work.
pub fn of_a_flush() -> Result<Outcome> {
    let vcpus = std::thread::available_parallelism()?.get() - 1;
    let mut crew = Crew::new(Machine::standard()?, vcpus)?;
    let logs: Vec<Log> =
        (0..vcpus as u32).map(|id| Log { address: LOG.address + (id << 16), entries: 16000 }).collect();
    for (vcpu, log) in logs.iter().enumerate() {
        crew.load(vcpu, &gap_program(FLUSHED * PAGE as u32, *log, EXIT))?;
    }
    let session = File::options().read(true).write(true).open(uapi::PROC_PATH)?;
    uapi::attach(&session, crew.machine.vm_fd())?;
    let (calls, gaps) = crew.while_spinning(|memory| {
        pin_to(0)?;
        // The vCPUs begin their logs, which KVM maps.
        Calls::measure(&session)?;
        logs.iter().for_each(|log| log.clear(memory));
        let calls = Calls::measure(&session)?;
        // What the vCPUs wrote since, from where their logs went on.
        Ok((calls, logs.iter().map(|log| log.read_all(memory)).collect::<Vec<_>>()))
    })?;
    for gaps in &gaps {
        let often = calls.flushes * 9 / 10..=calls.flushes * 5 / 4;
        ensure!(
            often.contains(&gaps.len()),
            "{} flushes interrupted a vCPU {} times: {gaps:?}",
            calls.flushes,
            gaps.len()
        );
    }
    let counts: Vec<usize> = gaps.iter().map(Vec::len).collect();
    let (without, with, gaps) = (spread(calls.without)?, spread(calls.with)?, spread(gaps.concat())?);
    Ok(Outcome::Pass(format!(
        "ticks of a flush, median (nine of ten below): {vcpus} vCPUs: caller {} ({}) above {} of the same \
         call without, vCPU {} ({}), interrupted {counts:?} times by {} flushes",
        with.median.saturating_sub(without.median),
        with.ninth.saturating_sub(without.median),
        without.median,
        gaps.median,
        gaps.ninth,
        calls.flushes
    )))
}

/// Ticks of harvests of one page that the guest reads without end, each of which
/// found its accessed bit and cleared it.
struct Calls {
    without: Vec<u32>,
    with: Vec<u32>,
    /// Of all calls, also of those that are in neither.
    flushes: usize,
}

impl Calls {
    /// In turns a call that clears and flushes, one that clears alone, and one
    /// that lets the guest set the bit again.
    fn measure(session: &File) -> Result<Calls> {
        const TURNS: usize = 50;
        const PAUSE: u64 = 50_000;
        let mut calls = Calls { without: Vec::new(), with: Vec::new(), flushes: 0 };
        for call in 0..3 * TURNS {
            let flags = if call % 3 == 1 { 0 } else { uapi::HARVEST_FLUSH };
            let (spent, stats) = Calls::one(session, flags)?;
            calls.flushes += stats.flushes as usize;
            match (stats.accessed, stats.flushes) {
                (1, 0) => calls.without.push(spent),
                (1, 1) => calls.with.push(spent),
                _ => {}
            }
            // For the vCPUs to go on.
            let start = ticks();
            while ticks() - start < PAUSE {
                std::hint::spin_loop();
            }
        }
        let enough = TURNS * 9 / 10;
        ensure!(
            calls.without.len() >= enough && calls.with.len() >= enough,
            "of {TURNS} turns {} cleared and {} cleared and flushed, {} flushed in all",
            calls.without.len(),
            calls.with.len(),
            calls.flushes
        );
        Ok(calls)
    }

    fn one(session: &File, flags: u32) -> Result<(u32, uapi::KesHarvestStats)> {
        let mut accessed = [0_u64];
        let buffers = HarvestBuffers {
            accessed: &mut accessed,
            dirty: &mut [],
            mapped: &mut [],
            on_nodes: &mut [],
            levels: &mut [],
            nodes: &[],
        };
        let flags = flags | uapi::HARVEST_CLEAR_ACCESSED;
        let before = ticks();
        let result = uapi::harvest(session, u64::from(FLUSHED), 1, flags, buffers).context("harvest")?;
        Ok(((ticks() - before) as u32, result.stats))
    }
}

/// How much of its work a guest still does: going over 16 MiB without end. What
/// the host's CPU does in place of resting makes the guest look faster.
pub fn of_the_whole() -> Result<Outcome> {
    const SIXTEEN_MIB: Pages = Pages { base: 0x20_0000, stride: 0x1000, count: 4096 };
    /// For the rate of sampling.
    const SETTLE: Duration = Duration::from_millis(300);
    /// Instructions for each page, and to begin a round: see `machine::program`.
    const ROUND: f64 = 4.0 * SIXTEEN_MIB.count as f64 + 4.0;
    let mut machine = Machine::standard()?;
    machine.load(&round_program(SIXTEEN_MIB, Touch::Write))?;
    machine.run_round()?;
    let mut crew = Crew::new(machine, 1)?;
    crew.load_spin(SIXTEEN_MIB, Touch::Write)?;
    let mut harvester = crew.machine.observe()?;
    let mut sampling = Sampling::start(crew.machine.observe()?, AccessSet::ALL, 10, 0)?;
    sampling.set(AccessSet::default(), 0)?;
    let report = crew.while_spinning(|memory| {
        // Instructions a second, and when the measurement began and how long it took.
        let speed = |what: &mut dyn FnMut() -> Result<()>| -> Result<(f64, Duration, Duration)> {
            let (start, before) = (now()?, rounds(memory, 0));
            what()?;
            let (end, after) = (now()?, rounds(memory, 0));
            Ok((f64::from(after - before) * ROUND / (end - start).as_secs_f64(), start, end - start))
        };
        let pause = |ms| {
            std::thread::sleep(Duration::from_millis(ms));
            Ok(())
        };
        pause(50)?;
        let (alone, ..) = speed(&mut || pause(300))?;
        let mut report = format!("{:.1} million instructions a second alone", alone / 1e6);
        let (harvested, ..) = speed(&mut || {
            let seen = harvest(&mut harvester, ALL_CLEAR)?.stats;
            ensure!(seen.accessed >= u64::from(SIXTEEN_MIB.count) && seen.flushes == 1, "{seen:?}");
            pause(1000)
        })?;
        write!(report, "; a harvest with flush a second: {:.4}", harvested / alone)?;
        for (freq_hz, ms) in [(100, 500), (1000, 300), (10_000, 200)] {
            sampling.set(AccessSet::ALL, freq_hz)?;
            let mut samples = Vec::new();
            collect(&mut sampling, SETTLE, &mut samples)?;
            let (sampled, start, took) =
                speed(&mut || collect(&mut sampling, Duration::from_millis(ms), &mut samples))?;
            let count = samples.iter().filter(|sample| sample.time >= start).count();
            let seen_hz = count as f64 / took.as_secs_f64();
            write!(report, "; {freq_hz} Hz, of which came {seen_hz:.0}: {:.4}", sampled / alone)?;
            ensure!((seen_hz / f64::from(freq_hz) - 1.0).abs() < 0.2, "{report}");
        }
        sampling.set(AccessSet::default(), 0)?;
        pause(50)?;
        let (again, ..) = speed(&mut || pause(200))?;
        write!(report, "; alone again: {:.4}", again / alone)?;
        ensure!((again / alone - 1.0).abs() < 0.001, "{report}");
        Ok(report)
    })?;
    Ok(Outcome::Pass(format!("the guest's own {report} of that")))
}
