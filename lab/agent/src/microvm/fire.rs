// SPDX-License-Identifier: MIT OR Apache-2.0
//! Everything at once: a guest that checks its memory, a host that moves, drops,
//! splits and collapses it, a VMM that changes slots and logs, one reader that
//! harvests and one that samples.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ept_virt_core::sampler::{HarvestRequest, KernelSampler};
use ept_virt_core::samples::{AccessSet, Sampling};

use super::Outcome;
use super::disturb::{Disturbance, Disturbed};
use super::machine::{ALL_CLEAR, Memory, PAGE, PAGES, harvest};
use super::pattern::{Guest, MAX_VCPUS};
use super::random::Random;
use super::sampling::drain;
use super::settings::{number, patience};

const HUGE: usize = 2 << 20;
/// For each kind of memory.
const FOR: Duration = Duration::from_secs(5);

/// Small pages from the start; what is collapsed becomes huge.
pub fn small_pages() -> Result<Outcome> {
    under_fire(Memory::small_pages(PAGES)?, &Disturbance::ALL)
}

/// Transparent huge pages from the start.
pub fn huge_pages() -> Result<Outcome> {
    let memory = Memory::map(PAGES as usize * PAGE, HUGE, 0)?;
    memory.advise(0, memory.bytes(), libc::MADV_HUGEPAGE)?;
    under_fire(memory, &Disturbance::ALL)
}

/// A file of hugetlbfs, as libvirt gives it to guests.
pub fn hugetlb() -> Result<Outcome> {
    const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
    let bytes = PAGES as usize * PAGE;
    // Some more than the guest needs: pages are dropped and made anew.
    let enough = bytes / HUGE + 4;
    if std::fs::write(POOL, enough.to_string()).is_err() {
        return Ok(Outcome::Skip("this kernel has no hugetlbfs".into()));
    }
    let got: usize = std::fs::read_to_string(POOL)?.trim().parse()?;
    if got < enough {
        std::fs::write(POOL, "0")?;
        return Ok(Outcome::Skip(format!("the host gave {got} pages of hugetlbfs, not {enough}")));
    }
    let outcome = Memory::hugetlb_file(bytes).and_then(|memory| {
        under_fire(
            memory,
            &[
                Disturbance::AddVcpu,
                Disturbance::Slot,
                Disturbance::MainSlot,
                Disturbance::DirtyLog,
                Disturbance::TakeLog,
                Disturbance::Protect,
            ],
        )
    });
    std::fs::write(POOL, "0").with_context(|| format!("cannot write to {POOL}"))?;
    outcome
}

fn under_fire(memory: Memory, disturbances: &[Disturbance]) -> Result<Outcome> {
    let mut disturbed = Disturbed::new(Guest::start(memory)?)?;
    disturbed.guest.wait_rounds(1)?;
    let mut harvesting = disturbed.guest.machine.observe()?;
    let mut sampling = Sampling::start(disturbed.guest.machine.observe()?, AccessSet::ALL, 2000, 0)?;
    let (stop, harvests, samples) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let disturbed_times = std::thread::scope(|scope| {
        let harvester = scope.spawn(|| harvest_until(&stop, &mut harvesting, &harvests));
        let sampler = scope.spawn(|| sample_until(&stop, &mut sampling, &samples));
        let times = disturb_for(&mut disturbed, disturbances);
        stop.store(true, Ordering::Relaxed);
        let panicked = |_| anyhow::anyhow!("a reader panicked");
        harvester.join().map_err(panicked)?.context("the harvester")?;
        sampler.join().map_err(panicked)?.context("the sampler")?;
        times
    });
    let vcpus = disturbed.guest.vcpus();
    drop((harvesting, sampling));
    // What the guest saw explains what the rest of us did.
    let rounds = disturbed.stop().and_then(|rounds| disturbed_times.map(|times| (rounds, times)));
    let (rounds, (times, merged)) = rounds?;
    ensure!(vcpus == MAX_VCPUS, "{vcpus} vCPUs at the end");
    let (harvests, samples) = (harvests.into_inner(), samples.into_inner());
    ensure!(harvests > 0 && samples > 0, "{harvests} harvests, {samples} samples");
    Ok(Outcome::Pass(format!(
        "{rounds} rounds of 8 vCPUs without a wrong byte, disturbed {times} times, {merged} pages merged at \
         once, {harvests} harvests, {samples} samples"
    )))
}

fn harvest_until(stop: &AtomicBool, session: &mut KernelSampler, count: &AtomicU64) -> Result<()> {
    let mut random = Random::new(2, 0);
    while !stop.load(Ordering::Relaxed) {
        let request = HarvestRequest {
            clear_accessed: !random.once_in(4),
            clear_dirty: random.once_in(2),
            flush: random.once_in(2),
            keep_young: random.once_in(2),
            ..ALL_CLEAR
        };
        harvest(session, request)?;
        count.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(random.below(8)));
    }
    Ok(())
}

fn sample_until(stop: &AtomicBool, sampling: &mut Sampling, count: &AtomicU64) -> Result<()> {
    let mut random = Random::new(3, 0);
    while !stop.load(Ordering::Relaxed) {
        for (access, freq_hz) in [(AccessSet::ALL, 5000), (AccessSet::WRITE, 1000), (AccessSet::ALL, 0)] {
            sampling.set(access, freq_hz)?;
            std::thread::sleep(Duration::from_millis(random.below(60)));
            count.fetch_add(drain(sampling)?.len() as u64, Ordering::Relaxed);
            let stats = sampling.stats()?;
            let sum = stats.samples + stats.dropped + stats.unwanted + stats.released;
            ensure!(stats.armed == sum + u64::from(stats.armed_now), "the counts do not add up: {stats:?}");
        }
    }
    Ok(())
}

/// One disturbance after the other, each followed by rounds of all vCPUs.
fn disturb_for(disturbed: &mut Disturbed, disturbances: &[Disturbance]) -> Result<(u64, u64)> {
    let mut random = Random::new(number("fuzz_seed")?.unwrap_or(1), 4);
    let (start, mut times, mut merged) = (Instant::now(), 0, 0);
    // Each once, and all vCPUs, however slow the host is.
    let mut first: Vec<Disturbance> = disturbances.to_vec();
    if disturbances.contains(&Disturbance::Merge) {
        // As long as most pages are those of vCPUs that do not run yet.
        first.splice(0..0, [Disturbance::Merge; 16]);
    }
    first.extend([Disturbance::AddVcpu; MAX_VCPUS]);
    while (times as usize) < first.len() || start.elapsed() < patience(FOR) {
        let how = first.get(times as usize).copied().unwrap_or_else(|| random.pick(disturbances));
        disturbed.apply(how).with_context(|| format!("disturbance {times}"))?;
        disturbed.guest.wait_rounds(1).with_context(|| format!("after disturbance {times}, {how:?}"))?;
        merged = merged.max(disturbed.merged());
        times += 1;
    }
    Ok((times, merged))
}
