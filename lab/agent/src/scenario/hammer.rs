// SPDX-License-Identifier: MIT OR Apache-2.0
//! The module at work on a guest without pause, from two sessions: harvests that
//! clear and flush, round after round, and sampling of all kinds of access.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use ept_virt_core::process::{Process, find_vm_fd};
use ept_virt_core::sampler::{Harvest, HarvestRequest, KernelSampler, Level, MemSlot, Sampler, SamplerError};
use ept_virt_core::samples::{AccessSet, Sampling};
use ept_virt_core::topology::NodeSet;

use super::host;

/// Faults a second that the guest pays for.
const FREQ_HZ: u32 = 300;

/// Between rounds, so that the one emulated processor is also the guest's.
const REST: Duration = Duration::from_millis(20);

/// How often the kinds of access that are sampled change.
const TURN: Duration = Duration::from_millis(700);

/// For a session to see that its VM is gone.
const END_TIMEOUT: Duration = Duration::from_secs(20);

/// What was done so far.
#[derive(Default)]
struct Work {
    rounds: AtomicU64,
    accessed: AtomicU64,
    samples: AtomicU64,
    logged_rounds: AtomicU64,
    /// A bit for each vCPU that was sampled, by its number.
    vcpus: AtomicU64,
}

/// The work at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Harvests of the whole guest.
    pub rounds: u64,
    /// Pages that they found accessed.
    pub accessed: u64,
    /// Samples.
    pub samples: u64,
    /// Harvests that saw a slot under dirty logging.
    pub logged_rounds: u64,
}

/// How a thread's session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Stopped,
    VmGone,
}

/// Both sessions and their threads; stopped when dropped.
pub struct Hammer {
    stop: Arc<AtomicBool>,
    work: Arc<Work>,
    threads: Vec<JoinHandle<Result<End>>>,
}

impl Hammer {
    /// Attaches both sessions to a QEMU process and begins.
    pub fn start(pid: i32) -> Result<Self> {
        let (harvester, sampler) = (attach(pid)?, attach(pid)?);
        let stop = Arc::new(AtomicBool::new(false));
        let work = Arc::new(Work::default());
        let sampling = Sampling::start(sampler, AccessSet::ALL, FREQ_HZ, 0).context("starting to sample")?;
        let threads = vec![
            spawn(&stop, &work, move |stop, work| harvest_on(harvester, stop, work)),
            spawn(&stop, &work, move |stop, work| sample_on(sampling, stop, work)),
        ];
        Ok(Self { stop, work, threads })
    }

    /// What was done so far.
    pub fn seen(&self) -> Seen {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Seen {
            rounds: get(&self.work.rounds),
            accessed: get(&self.work.accessed),
            samples: get(&self.work.samples),
            logged_rounds: get(&self.work.logged_rounds),
        }
    }

    /// Waits until some harvests and samples more have seen accesses; an error
    /// if a session ended instead.
    pub fn wait_seen(&self) -> Result<Seen> {
        let before = self.seen();
        host::wait_until("harvests and samples see accesses", END_TIMEOUT, || {
            self.check_running()?;
            let now = self.seen();
            Ok(now.rounds >= before.rounds + 3
                && now.accessed > before.accessed
                && now.samples >= before.samples + 20)
        })
        .with_context(|| format!("{before:?}, now {:?}", self.seen()))?;
        Ok(self.seen())
    }

    /// Waits for some more harvests, whatever they see.
    pub fn wait_rounds(&self, count: u64) -> Result<Seen> {
        let before = self.seen().rounds;
        host::wait_until("some more harvests", END_TIMEOUT, || {
            self.check_running()?;
            Ok(self.seen().rounds >= before + count)
        })?;
        Ok(self.seen())
    }

    /// How many vCPUs were sampled.
    pub fn vcpus(&self) -> u32 {
        self.work.vcpus.load(Ordering::Relaxed).count_ones()
    }

    /// Fails if a session has ended.
    pub fn check_running(&self) -> Result<()> {
        ensure!(!self.threads.iter().any(JoinHandle::is_finished), "a session ended by itself");
        Ok(())
    }

    /// Ends both sessions; an error unless they ran until now.
    pub fn stop(mut self) -> Result<Seen> {
        self.stop.store(true, Ordering::Relaxed);
        self.join(End::Stopped)
    }

    /// Waits until both sessions have been told that the VM is gone.
    pub fn wait_gone(mut self) -> Result<Seen> {
        host::wait_until("both sessions see that the VM is gone", END_TIMEOUT, || {
            Ok(self.threads.iter().all(JoinHandle::is_finished))
        })?;
        self.join(End::VmGone)
    }

    fn join(&mut self, wanted: End) -> Result<Seen> {
        for thread in self.threads.drain(..) {
            let end = thread.join().map_err(|_| anyhow!("a session's thread panicked"))??;
            ensure!(end == wanted, "a session ended with {end:?}, {wanted:?} was expected");
        }
        Ok(self.seen())
    }
}

impl Drop for Hammer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// A session for a QEMU process's VM.
pub fn attach(pid: i32) -> Result<KernelSampler> {
    let process = Process::open(pid)?;
    let mut sampler = KernelSampler::open()?;
    sampler.attach(find_vm_fd(&process)?.as_fd())?;
    Ok(sampler)
}

/// The slot that holds most of the guest's memory.
pub fn largest_slot(sampler: &mut KernelSampler) -> Result<MemSlot> {
    let slots = sampler.memslots()?.1;
    slots.into_iter().max_by_key(|slot| slot.page_count).context("the guest has no memory")
}

/// How many of a slot's units of 2 MiB are mapped by small and by huge pages.
pub fn levels(sampler: &mut KernelSampler, slot: &MemSlot) -> Result<(usize, usize)> {
    let request =
        HarvestRequest { gfn_start: slot.gfn_start, gfn_count: slot.page_count, ..HarvestRequest::default() };
    let mut seen = Harvest::default();
    sampler.harvest(&request, &NodeSet::default(), &mut seen)?;
    let count = |wanted: Level| seen.levels.iter().filter(|level| **level == wanted).count();
    Ok((count(Level::Page4K), count(Level::Huge2M)))
}

fn spawn(
    stop: &Arc<AtomicBool>,
    work: &Arc<Work>,
    body: impl FnOnce(&AtomicBool, &Work) -> Result<End, SamplerError> + Send + 'static,
) -> JoinHandle<Result<End>> {
    let (stop, work) = (Arc::clone(stop), Arc::clone(work));
    thread::spawn(move || match body(&stop, &work) {
        Ok(end) => Ok(end),
        Err(SamplerError::VmGone) => Ok(End::VmGone),
        Err(error) => Err(error.into()),
    })
}

/// Harvests with every combination of clearing and flushing in turn.
fn harvest_on(mut sampler: KernelSampler, stop: &AtomicBool, work: &Work) -> Result<End, SamplerError> {
    let can_clear_dirty = sampler.info().clear_dirty;
    let slow = NodeSet::default();
    let mut harvest = Harvest::default();
    for round in 0_u64.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let (_, slots) = sampler.memslots()?;
        for slot in &slots {
            let request = HarvestRequest {
                gfn_start: slot.gfn_start,
                gfn_count: slot.page_count,
                clear_accessed: true,
                clear_dirty: can_clear_dirty && !slot.read_only && round % 2 == 0,
                flush: round % 4 < 2,
                keep_young: round % 8 < 4,
            };
            sampler.harvest(&request, &slow, &mut harvest)?;
            work.accessed.fetch_add(harvest.stats.accessed, Ordering::Relaxed);
        }
        if slots.iter().any(|slot| slot.dirty_log) {
            work.logged_rounds.fetch_add(1, Ordering::Relaxed);
        }
        work.rounds.fetch_add(1, Ordering::Relaxed);
        thread::sleep(REST);
    }
    Ok(End::Stopped)
}

/// Samples all accesses and writes alone in turn.
fn sample_on(mut sampling: Sampling, stop: &AtomicBool, work: &Work) -> Result<End, SamplerError> {
    let mut samples = Vec::new();
    let mut turned = Instant::now();
    let mut writes = false;
    while !stop.load(Ordering::Relaxed) {
        samples.clear();
        sampling.read(&mut samples, REST)?;
        work.samples.fetch_add(samples.len() as u64, Ordering::Relaxed);
        let vcpus = samples.iter().fold(0, |bits, sample| bits | 1 << (sample.vcpu % 64));
        work.vcpus.fetch_or(vcpus, Ordering::Relaxed);
        if turned.elapsed() > TURN {
            turned = Instant::now();
            writes = !writes;
            sampling.set(if writes { AccessSet::WRITE } else { AccessSet::ALL }, FREQ_HZ)?;
        }
    }
    let stats = sampling.stats()?;
    let ended = stats.samples + stats.dropped + stats.unwanted + stats.released;
    if stats.armed != ended + u64::from(stats.armed_now) {
        return Err(SamplerError::Unsupported("the sampler's counts do not add up"));
    }
    Ok(End::Stopped)
}
