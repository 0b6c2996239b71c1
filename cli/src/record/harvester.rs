// SPDX-License-Identifier: MIT OR Apache-2.0
//! Harvests of a domain that nobody else observes, to be recorded.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use ept_virt_core::process::Process;
use ept_virt_core::record::{Frame, FrameSlot, Header};
use ept_virt_core::sampler::{Harvest, HarvestRequest, KernelSampler, Sampler, SamplerError};
use ept_virt_core::topology::{NodeSet, Tiers, reclaims};

use crate::attach::{Attached, attach_running};
use crate::daemon::header;
use crate::failure::Failure;

/// A session of our own.
pub struct Harvester {
    process: Process,
    sampler: KernelSampler,
    slow: NodeSet,
    /// The host takes memory away by what it sees accessed.
    keep_young: bool,
    interval: Duration,
    began: Instant,
    next: Instant,
    harvest: Harvest,
}

impl Harvester {
    /// Attaches to a running domain.
    pub fn attach(uri: &str, wanted: &str, interval: Duration) -> Result<(Self, Header), Failure> {
        let (domain, Attached { process, sampler }) = attach_running(uri, wanted)?;
        let sys = Path::new("/sys");
        let tiers = Tiers::detect(sys)
            .map_err(|error| Failure::unreachable(format!("the host's memory is not known: {error}")))?;
        let now = Instant::now();
        let harvester = Self {
            process,
            sampler,
            slow: tiers.slow,
            keep_young: reclaims(Path::new("/proc"), sys),
            interval,
            began: now,
            next: now,
            harvest: Harvest::default(),
        };
        Ok((harvester, header(&domain.name, &domain.uuid)))
    }

    /// The next round, at its time; `None` when the guest has ended, or at `end`.
    pub fn round(&mut self, end: Option<Instant>) -> Result<Option<Frame>, Failure> {
        thread::sleep(self.next.min(end.unwrap_or(self.next)).saturating_duration_since(Instant::now()));
        if !self.process.is_alive() || end.is_some_and(|end| Instant::now() >= end) {
            return Ok(None);
        }
        // Rounds that could not be held in time are left out, not caught up with.
        self.next = (self.next + self.interval).max(Instant::now());
        match self.harvest() {
            Ok(frame) => Ok(Some(frame)),
            Err(SamplerError::VmGone) => Ok(None),
            Err(error) => Err(Failure::refused(error.to_string())),
        }
    }

    fn harvest(&mut self) -> Result<Frame, SamplerError> {
        let mut frame = Frame { time: self.began.elapsed(), slots: Vec::new() };
        let mut infos = self.sampler.memslots()?.1;
        infos.retain(|info| !info.read_only);
        for (index, info) in infos.iter().enumerate() {
            let request = HarvestRequest {
                gfn_start: info.gfn_start,
                gfn_count: info.page_count,
                clear_accessed: true,
                clear_dirty: false,
                // One flush, at the end, serves the whole VM.
                flush: index + 1 == infos.len(),
                keep_young: self.keep_young,
            };
            self.sampler.harvest(&request, &self.slow, &mut self.harvest)?;
            let mut slot = FrameSlot::new(info);
            slot.extend(&self.harvest);
            frame.slots.push(slot);
        }
        Ok(frame)
    }
}
