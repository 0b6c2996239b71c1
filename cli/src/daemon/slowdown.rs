// SPDX-License-Identifier: MIT OR Apache-2.0
//! The slow-down guard of one guest: what is known of a round, estimate, decision.

use std::time::Duration;

use ept_virt_core::memory::GuestMemory;
use ept_virt_core::policy::Policy;
use ept_virt_core::samples::AccessSet;
use ept_virt_core::slowdown::{Estimate, Guard, SlowSamples, estimate};
use ept_virt_core::topology::Latencies;
use ept_virt_core::units::Bytes;
use ept_virt_core::wire::SlowdownStatus;

use super::sampling::Round;

/// Tells the CPU time that a guest's vCPUs have had; `None` when that is not known.
pub type CpuTime = dyn FnMut() -> Option<Duration> + Send;

/// Watches how much a guest is slowed down.
pub struct Watch {
    cpu_time: Box<CpuTime>,
    /// At the last round.
    cpu_before: Option<Duration>,
    guard: Guard,
    last: Option<Estimate>,
}

impl Watch {
    /// Nothing is known yet.
    pub fn new(cpu_time: Box<CpuTime>) -> Self {
        Self { cpu_time, cpu_before: None, guard: Guard::default(), last: None }
    }

    /// Takes in a round of `interval` that ended at `now`.
    pub fn round(
        &mut self,
        policy: &Policy,
        latencies: Option<&Latencies>,
        memory: &GuestMemory,
        sampled: &Round,
        interval: Duration,
        now: Duration,
    ) {
        let (Some(limit), Some(latencies)) = (policy.dram.max_slowdown, latencies) else {
            // What was given for a limit goes with it.
            (self.guard, self.last, self.cpu_before) = (Guard::default(), None, None);
            return;
        };
        let cpu = (self.cpu_time)();
        let before = std::mem::replace(&mut self.cpu_before, cpu);
        // What the temperatures say changes from round to round then.
        let known = cpu.zip(before).filter(|_| !memory.is_settling());
        self.last = known.and_then(|(cpu, before)| {
            let samples = (policy.sampling.access == AccessSet::ALL).then(|| SlowSamples {
                slow: memory.count_slow(sampled.samples.iter().map(|sample| sample.gfn)),
                armed: sampled.stats.armed,
                hold: sampled.stats.hold,
            });
            let cpu = cpu.saturating_sub(before);
            estimate(&memory.slow_bits(), samples.as_ref(), interval, cpu, latencies.gap())
        });
        let (bytes, slowdown) = (memory.bytes(), self.last.map(|estimate| estimate.slowdown));
        let base = policy.dram_target(bytes).unwrap_or(bytes);
        let most = policy.dram_most(bytes).0.saturating_sub(base.0);
        self.guard.judge(slowdown, limit.of(10_000) as f64 / 10_000.0, most, bytes.0, now);
    }

    /// What the domain wants in DRAM, of which the policy grants `granted`.
    pub fn wanted(&self, granted: Bytes) -> Bytes {
        Bytes(granted.0.saturating_add(self.guard.extra_bytes()))
    }

    /// For people and programs.
    pub fn status(&self, policy: &Policy, latencies: Option<&Latencies>) -> Option<SlowdownStatus> {
        let (limit, latencies) = (policy.dram.max_slowdown?, latencies?);
        let percent = |part: f64| (part * 10_000.0).round() / 100.0;
        Some(SlowdownStatus {
            limit_percent: limit.of(10_000) as f64 / 100.0,
            estimate_percent: self.last.map(|last| percent(last.slowdown)),
            low_percent: self.last.map(|last| percent(last.low)),
            high_percent: self.last.and_then(|last| last.high).map(percent),
            confidence: self.last.map(|last| last.confidence.name().to_owned()),
            gap_ns: u64::try_from(latencies.gap().as_nanos()).unwrap_or(u64::MAX),
            gap_from: latencies.from.to_owned(),
            given_bytes: self.guard.extra_bytes(),
        })
    }
}
