// SPDX-License-Identifier: MIT OR Apache-2.0
//! Several VMs, and several sessions on each, at once.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ept_virt_core::sampler::{KernelSampler, SamplerError};
use ept_virt_core::samples::{AccessSet, Sample, Sampling};

use super::Outcome;
use super::machine::{
    ALL, ALL_CLEAR, CODE_GFN, Machine, Pages, SPREAD, Touch, expect_same, gfns, harvest, round_program,
};
use super::sampling::{OFTEN_HZ, drain, expect_counted};

/// Each VM is seen by so many sessions that only read, besides one that clears
/// and one that samples.
const READERS: usize = 3;
const ROUNDS: u32 = 15;
/// So many samples of each VM, at least.
const SAMPLES: usize = 50;
const PATIENCE: Duration = Duration::from_secs(30);

/// None of them is a page of [`SPREAD`].
const OTHER: Pages = Pages { base: 0x21_0000, stride: 0x6_0000, count: 120 };

/// A guest, and all that observes it.
struct Observed {
    machine: Machine,
    pages: Pages,
    readers: Vec<KernelSampler>,
    clearer: KernelSampler,
    sampling: Sampling,
}

impl Observed {
    fn start(pages: Pages) -> Result<Observed> {
        let mut machine = Machine::with_resident(pages)?;
        machine.load(&round_program(pages, Touch::Write))?;
        machine.run_round()?;
        let readers = (0..READERS).map(|_| machine.observe()).collect::<Result<Vec<_>>>()?;
        let mut clearer = machine.observe()?;
        harvest(&mut clearer, ALL_CLEAR)?;
        let sampling = Sampling::start(machine.observe()?, AccessSet::ALL, OFTEN_HZ, 0)?;
        let second = Sampling::start(machine.observe()?, AccessSet::ALL, OFTEN_HZ, 0);
        ensure!(matches!(second, Err(SamplerError::Busy)), "a second sampler of one VM: {second:?}");
        Ok(Observed { machine, pages, readers, clearer, sampling })
    }

    /// One round, and what all sessions see of it, the readers at the same time.
    fn round(&mut self) -> Result<()> {
        self.machine.run_round()?;
        let want = self.pages.gfns_and_code();
        std::thread::scope(|scope| -> Result<()> {
            let readers: Vec<_> =
                self.readers.iter_mut().map(|reader| scope.spawn(move || harvest(reader, ALL))).collect();
            for reader in readers {
                let seen = reader.join().map_err(|_| anyhow::anyhow!("a reader panicked"))??;
                expect_same("accessed, as a reader sees it", &gfns(&seen.accessed, 0), &want)?;
            }
            Ok(())
        })?;
        let seen = harvest(&mut self.clearer, ALL_CLEAR)?;
        expect_same("accessed, as seen and cleared", &gfns(&seen.accessed, 0), &want)?;
        let rest = harvest(&mut self.readers[0], ALL)?;
        ensure!(rest.stats.accessed == 0, "{} pages accessed at rest", rest.stats.accessed);
        Ok(())
    }

    /// At least [`ROUNDS`], and until there are [`SAMPLES`].
    fn observe(&mut self) -> Result<Vec<Sample>> {
        let (start, mut samples, mut rounds) = (Instant::now(), Vec::new(), 0);
        while rounds < ROUNDS || samples.len() < SAMPLES {
            self.round().with_context(|| format!("round {rounds}"))?;
            rounds += 1;
            // Time for the sampler to arm pages.
            std::thread::sleep(Duration::from_millis(3));
            samples.extend(drain(&mut self.sampling)?);
            ensure!(start.elapsed() < PATIENCE, "{} samples in {rounds} rounds", samples.len());
        }
        // One round was before.
        expect_counted(&self.machine.memory, self.pages, 1, rounds + 1)?;
        Ok(samples)
    }
}

/// Two VMs run at the same time; each is sampled, harvested and cleared, and
/// read by several sessions. All see exactly their own VM.
pub fn vms_and_sessions() -> Result<Outcome> {
    // It unmaps pages now and then, also between a round and its harvest.
    std::fs::write("/proc/sys/kernel/numa_balancing", "0").context("cannot turn off NUMA balancing")?;
    let mut vms = [Observed::start(SPREAD)?, Observed::start(OTHER)?];
    let samples = std::thread::scope(|scope| -> Result<Vec<Vec<Sample>>> {
        let observers: Vec<_> = vms.iter_mut().map(|vm| scope.spawn(|| vm.observe())).collect();
        let join = |observer: std::thread::ScopedJoinHandle<'_, Result<Vec<Sample>>>| {
            observer.join().map_err(|_| anyhow::anyhow!("an observer panicked"))?
        };
        observers.into_iter().map(join).collect()
    })?;
    for (vm, samples) in vms.iter().zip(&samples) {
        let pages: BTreeSet<u64> = vm.pages.gfns();
        let other = samples.iter().find(|sample| !pages.contains(&sample.gfn) && sample.gfn != CODE_GFN);
        ensure!(other.is_none(), "a page of the other VM? {other:?}");
    }
    Ok(Outcome::Pass(format!(
        "2 VMs with {} sessions each, {ROUNDS} rounds or more: 201 and 121 pages in each, {} and {} samples",
        READERS + 2,
        samples[0].len(),
        samples[1].len()
    )))
}
