// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a guest pays for being observed, by its own time-stamp counter: for a
//! sample, for a flush, and of its work as a whole.
//!
//! On the Intel host a tick is an instruction of one CPU, of the guest or of the
//! host; with several CPUs the counter stands still for some dozen instructions
//! at a time. Caches, and translations that are lost, cost nothing there.

use std::fmt::Write as _;
use std::fs::File;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
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
/// So is a guest that did nothing for this long: with several CPUs emulated in
/// turns, the counter goes on between two instructions.
const INTERRUPTED: u32 = 1000;
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
    let mut report = String::from("ticks more than without a fault, median (nine of ten below):");
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
            write!(
                report,
                " {size} {name} {} ({});",
                with.median - without.median,
                with.ninth - without.median
            )?;
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

/// Ticks of a flush, for who asks for it and for each vCPU.
pub fn of_a_flush() -> Result<Outcome> {
    let mut report = String::from("ticks of a flush, median (nine of ten below):");
    let cpus = std::thread::available_parallelism()?.get();
    for vcpus in [1, 4] {
        let mut crew = Crew::new(Machine::standard()?, vcpus)?;
        let logs: Vec<Log> =
            (0..vcpus as u32).map(|id| Log { address: LOG.address + (id << 16), entries: 16000 }).collect();
        for (vcpu, log) in logs.iter().enumerate() {
            crew.load(vcpu, &gap_program(*log, INTERRUPTED))?;
        }
        let session = File::options().read(true).write(true).open(uapi::PROC_PATH)?;
        uapi::attach(&session, crew.machine.vm_fd())?;
        let (without, with, gaps) = crew.while_spinning(|memory| {
            pin_to(0)?;
            let without = calls(&session, 0)?;
            logs.iter().for_each(|log| log.clear(memory));
            let with = calls(&session, uapi::HARVEST_FLUSH)?;
            // What the vCPUs wrote since it began, from where their logs went on.
            let gaps: Vec<u32> = logs.iter().flat_map(|log| log.read_all(memory)).collect();
            Ok((without, with, gaps))
        })?;
        let gap_count = gaps.len();
        let (without, with, gaps) = (spread(without)?, spread(with)?, spread(gaps)?);
        write!(
            report,
            " {vcpus} vCPU on {} CPUs: caller {} ({}) above {} of the same call without, vCPU {} ({}, {gap_count} times);",
            vcpus.min(cpus - 1),
            with.median.saturating_sub(without.median),
            with.ninth.saturating_sub(without.median),
            without.median,
            gaps.median,
            gaps.ninth
        )?;
    }
    Ok(Outcome::Pass(report))
}

/// Ticks of harvests of one page, which clear it: the first of the first log, to
/// which the guest writes when a flush has interrupted it.
fn calls(session: &File, flags: u32) -> Result<Vec<u32>> {
    const CALLS: usize = 50;
    let mut spent = Vec::new();
    for _ in 0..CALLS {
        let mut accessed = [0_u64];
        let buffers = HarvestBuffers {
            accessed: &mut accessed,
            dirty: &mut [],
            mapped: &mut [],
            on_nodes: &mut [],
            levels: &mut [],
            nodes: &[],
        };
        let before = ticks();
        let result = uapi::harvest(
            session,
            u64::from(LOG.address) / PAGE as u64,
            1,
            flags | uapi::HARVEST_CLEAR_ACCESSED,
            buffers,
        )
        .context("harvest")?;
        let after = ticks();
        if flags == 0 || result.stats.flushes == 1 {
            spent.push((after - before) as u32);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    ensure!(spent.len() >= CALLS / 5, "{} of {CALLS} calls flushed: {spent:?}", spent.len());
    Ok(spent)
}

/// How much of its work a guest still does: going over 16 MiB without end.
pub fn of_the_whole() -> Result<Outcome> {
    const SIXTEEN_MIB: Pages = Pages { base: 0x20_0000, stride: 0x1000, count: 4096 };
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
        let speed = |what: &mut dyn FnMut() -> Result<()>| -> Result<f64> {
            std::thread::sleep(Duration::from_millis(50));
            let (start, before) = (now()?, rounds(memory, 0));
            what()?;
            let (end, after) = (now()?, rounds(memory, 0));
            Ok(f64::from(after - before) * ROUND / (end - start).as_secs_f64())
        };
        let pause = |ms| {
            std::thread::sleep(Duration::from_millis(ms));
            Ok(())
        };
        let alone = speed(&mut || pause(300))?;
        let mut report = format!("{:.1} million instructions a second alone", alone / 1e6);
        let harvested = speed(&mut || {
            harvest(&mut harvester, ALL_CLEAR)?;
            pause(1000)
        })?;
        write!(report, "; a harvest with flush a second: {:.4}", harvested / alone)?;
        for (freq_hz, ms) in [(100, 500), (1000, 300), (10_000, 200)] {
            sampling.set(AccessSet::ALL, freq_hz)?;
            let mut samples = Vec::new();
            let sampled = speed(&mut || collect(&mut sampling, Duration::from_millis(ms), &mut samples))?;
            write!(report, "; {freq_hz} Hz: {:.4}", sampled / alone)?;
        }
        sampling.set(AccessSet::default(), 0)?;
        let again = speed(&mut || pause(200))?;
        write!(report, "; alone again: {:.4}", again / alone)?;
        Ok(report)
    })?;
    Ok(Outcome::Pass(format!("the guest's own {report} of that")))
}
