// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sampling: what is recorded of a guest that touches known pages in known ways.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ept_virt_core::sampler::{HarvestRequest, Level};
use ept_virt_core::samples::{Access, AccessSet, Sample, Sampling};

use super::Outcome;
use super::machine::{
    ALL_CLEAR, CODE_GFN, Machine, Memory, PAGE, Pages, RETURN, SPREAD, Touch, expect_same, gfns, harvest,
    round_program,
};

/// Often enough to see each of some hundred pages within a second or two.
pub const OFTEN_HZ: u32 = 2000;
/// A test that waits for samples gives up after this long.
const PATIENCE: Duration = Duration::from_secs(30);

/// Runs the guest round by round on a thread of its own while `observe` runs.
/// Returns how many rounds it did.
pub fn while_running<T>(machine: &mut Machine, observe: impl FnOnce() -> Result<T>) -> Result<(u32, T)> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let guest = scope.spawn(|| -> Result<u32> {
            let mut rounds = 0;
            while !stop.load(Ordering::Relaxed) {
                machine.run_round()?;
                rounds += 1;
            }
            Ok(rounds)
        });
        let observed = observe();
        stop.store(true, Ordering::Relaxed);
        let rounds = guest.join().map_err(|_| anyhow::anyhow!("the guest's thread panicked"))??;
        Ok((rounds, observed?))
    })
}

/// Fails unless each page counted `rounds` more than `before`.
pub fn expect_counted(memory: &Memory, pages: Pages, before: u32, rounds: u32) -> Result<()> {
    for gfn in pages.gfns() {
        let counted = memory.read_u32(gfn as usize * PAGE);
        ensure!(
            counted == before + rounds,
            "the guest lost data: page {gfn} counts {counted}, expected {before} + {rounds} rounds"
        );
    }
    Ok(())
}

/// Reads samples until those of `pages` are complete.
fn read_until_all(sampling: &mut Sampling, pages: &BTreeSet<u64>) -> Result<Vec<Sample>> {
    let (start, mut samples) = (Instant::now(), Vec::new());
    let mut missing = pages.clone();
    while !missing.is_empty() {
        let from = samples.len();
        ensure!(sampling.read(&mut samples, Duration::from_secs(1))?, "sampling ended by itself");
        for sample in &samples[from..] {
            missing.remove(&sample.gfn);
        }
        ensure!(
            start.elapsed() < PATIENCE,
            "{} of {} pages without a sample, {} samples; {:?}",
            missing.len(),
            pages.len(),
            samples.len(),
            sampling.stats()?
        );
    }
    Ok(samples)
}

/// How [`Touch::Write`] may look: as what it is, or as its first half.
const READ_AND_WRITE: &[Access] = &[Access::Read, Access::Write];

/// Fails unless the samples are those of a guest that touches its pages in one
/// way and executes the program's page.
fn expect_samples(samples: &[Sample], pages: &BTreeSet<u64>, access: &[Access], level: Level) -> Result<()> {
    for sample in samples {
        let want = if sample.gfn == CODE_GFN { &[Access::Exec] } else { access };
        ensure!(pages.contains(&sample.gfn) || sample.gfn == CODE_GFN, "an untouched page: {sample:?}");
        ensure!(want.contains(&sample.access), "expected {want:?}: {sample:?}");
        ensure!(sample.vcpu == 0 && !sample.page_walk, "one vCPU without paging: {sample:?}");
        ensure!(sample.level == level || sample.gfn == CODE_GFN, "expected {level:?}: {sample:?}");
    }
    ensure!(samples.is_sorted_by_key(|sample| sample.time), "the samples are not in order of time");
    Ok(())
}

/// Reads, writes and fetches are told apart, on exactly the touched pages.
pub fn types() -> Result<Outcome> {
    let mut machine = Machine::standard()?;
    let mut report = Vec::new();
    let pages = SPREAD.gfns();
    for (touch, access) in
        [(Touch::Read, Access::Read), (Touch::Store, Access::Write), (Touch::Exec, Access::Exec)]
    {
        if touch == Touch::Exec {
            pages.iter().for_each(|gfn| machine.memory.write(*gfn as usize * PAGE, &RETURN));
        }
        machine.load(&round_program(SPREAD, touch))?;
        machine.run_round()?;
        let mut sampling = Sampling::start(machine.observe()?, AccessSet::ALL, OFTEN_HZ, 0)?;
        let (_, samples) = while_running(&mut machine, || read_until_all(&mut sampling, &pages))?;
        expect_samples(&samples, &pages, &[access], Level::Page4K)?;
        if touch == Touch::Store {
            for (gfn, number) in pages.iter().zip((1..=SPREAD.count).rev()) {
                let stored = machine.memory.read_u32(*gfn as usize * PAGE);
                ensure!(stored == number, "the guest lost data: page {gfn} has {stored}, not {number}");
            }
        }
        ensure!(sampling.stats()?.unwanted == 0, "{:?}", sampling.stats()?);
        report.push(format!("{} of {access:?}", samples.len()));
    }
    Ok(Outcome::Pass(format!("samples {}, of each of 200 pages and no other", report.join(", "))))
}

/// Sampling writes alone costs reads nothing; asking for one type of several
/// leaves the others out.
pub fn chosen_types() -> Result<Outcome> {
    let mut machine = Machine::standard()?;
    let pages = SPREAD.gfns();
    // Mapped writable first: a read maps what it can as writable as well.
    machine.load(&round_program(SPREAD, Touch::Write))?;
    machine.run_round()?;
    let mut sampling = Sampling::start(machine.observe()?, AccessSet::WRITE, OFTEN_HZ, 0)?;

    machine.load(&round_program(SPREAD, Touch::Read))?;
    let (_, samples) = while_running(&mut machine, || {
        std::thread::sleep(Duration::from_millis(500));
        let mut samples = Vec::new();
        sampling.read(&mut samples, Duration::ZERO)?;
        Ok(samples)
    })?;
    let reads = sampling.stats()?;
    ensure!(samples.is_empty() && reads.unwanted == 0 && reads.armed > 100, "reads paid: {reads:?}");

    machine.load(&round_program(SPREAD, Touch::Write))?;
    let (rounds, samples) = while_running(&mut machine, || read_until_all(&mut sampling, &pages))?;
    ensure!(samples.iter().all(|sample| sample.access == Access::Write), "only writes were asked for");
    let seen: BTreeSet<u64> = samples.iter().map(|sample| sample.gfn).collect();
    expect_same("pages sampled for writes", &seen, &pages)?;
    expect_counted(&machine.memory, SPREAD, 1, 1 + rounds)?;

    let exec = AccessSet { exec: true, ..AccessSet::default() };
    sampling.set(exec, OFTEN_HZ)?;
    // What was recorded before the change stays.
    drain(&mut sampling)?;
    let (_, samples) = while_running(&mut machine, || {
        std::thread::sleep(Duration::from_millis(500));
        drain(&mut sampling)
    })?;
    expect_samples(&samples, &BTreeSet::new(), &[Access::Exec], Level::Page4K)?;
    let unwanted = sampling.stats()?.unwanted;
    ensure!(unwanted > 100, "{unwanted} writes paid for beside fetches");
    Ok(Outcome::Pass(format!(
        "0 samples and {} armed pages by reads, 200 pages by writes; {} fetches beside {unwanted} writes left out",
        reads.armed,
        samples.len()
    )))
}

/// All samples that are there.
pub fn drain(sampling: &mut Sampling) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    loop {
        let before = samples.len();
        if !sampling.read(&mut samples, Duration::ZERO)? || samples.len() == before {
            return Ok(samples);
        }
    }
}

/// Within a mapping of 2 MiB the exact page is recorded, and the mapping stays.
pub fn huge() -> Result<Outcome> {
    const HUGE: usize = 2 << 20;
    let memory = Memory::map(8 * HUGE, HUGE, 0)?;
    memory.advise(0, memory.bytes(), libc::MADV_HUGEPAGE)?;
    memory.populate();
    let mut machine = Machine::new(memory)?;
    // One page in each of six huge ones, each at another place.
    let pages = Pages { base: HUGE as u32 + 0x5000, stride: HUGE as u32 + 0x7000, count: 6 };
    machine.load(&round_program(pages, Touch::Write))?;
    machine.run_round()?;
    let mut session = machine.observe()?;
    let range = HarvestRequest { gfn_start: 512, gfn_count: 6 * 512, ..ALL_CLEAR };
    let levels = harvest(&mut session, range)?.levels;
    if levels != [Level::Huge2M; 6] {
        return Ok(Outcome::Skip(format!("the host gave no transparent huge pages: {levels:?}")));
    }
    let mut sampling = Sampling::start(machine.observe()?, AccessSet::ALL, 200, 0)?;
    let (rounds, samples) = while_running(&mut machine, || read_until_all(&mut sampling, &pages.gfns()))?;
    expect_samples(&samples, &pages.gfns(), READ_AND_WRITE, Level::Huge2M)?;
    expect_counted(&machine.memory, pages, 1, rounds + 1)?;
    drop(sampling);
    machine.run_round()?;
    let after = harvest(&mut session, range)?;
    ensure!(after.levels == [Level::Huge2M; 6], "the mappings were split: {:?}", after.levels);
    Ok(Outcome::Pass(format!("{} samples of 6 pages in 6 huge mappings, which stayed huge", samples.len())))
}

/// A harvest beside sampling sees what it sees alone, and the other way round.
pub fn beside_harvest() -> Result<Outcome> {
    const ROUNDS: u32 = 60;
    // It unmaps pages now and then, also between a round and its harvest.
    std::fs::write("/proc/sys/kernel/numa_balancing", "0").context("cannot turn off NUMA balancing")?;
    let mut machine = Machine::standard()?;
    machine.load(&round_program(SPREAD, Touch::Write))?;
    machine.run_round()?;
    let mut session = machine.observe()?;
    let mut sampling = Sampling::start(machine.observe()?, AccessSet::ALL, OFTEN_HZ, 0)?;
    let want = SPREAD.gfns_and_code();
    harvest(&mut session, ALL_CLEAR)?;
    for round in 1..=ROUNDS {
        std::thread::sleep(Duration::from_millis(5));
        machine.run_round()?;
        let seen = harvest(&mut session, HarvestRequest { clear_dirty: true, ..ALL_CLEAR })?;
        expect_same(&format!("accessed in round {round}"), &gfns(&seen.accessed, 0), &want)?;
        expect_same(&format!("mapped in round {round}"), &gfns(&seen.mapped, 0), &want)?;
        let unwritten: BTreeSet<u64> = SPREAD.gfns().difference(&gfns(&seen.dirty, 0)).copied().collect();
        ensure!(unwritten.is_empty(), "written but not dirty in round {round}: {unwritten:?}");
        let rest = harvest(&mut session, ALL_CLEAR)?;
        ensure!(rest.stats.accessed == 0, "{} pages accessed at rest", rest.stats.accessed);
    }
    let samples = drain(&mut sampling)?;
    expect_samples(&samples, &SPREAD.gfns(), READ_AND_WRITE, Level::Page4K)?;
    ensure!(samples.len() > 100, "{} samples", samples.len());
    expect_counted(&machine.memory, SPREAD, 1, ROUNDS + 1)?;
    Ok(Outcome::Pass(format!(
        "201 pages in each of {ROUNDS} harvests, 0 at rest, {} samples beside them",
        samples.len()
    )))
}
