// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest among the others of the host: what it claims of what all share, and what
//! it was granted.

use std::time::Duration;

use ept_virt_core::budget::{Claim, Grant};
use ept_virt_core::pace::Limits;
use ept_virt_core::policy::HostLimits;
use ept_virt_core::units::Bytes;
use ept_virt_core::wire::BudgetStatus;
use ept_virt_core::working_set::WorkingSet;

use super::super::budget::Seat;
use super::super::state::lock;
use super::Guest;

/// Shortest time between the starts of two rounds, whatever a policy says.
pub const SHORTEST_INTERVAL: Duration = Duration::from_millis(10);

/// What a guest has of what all share.
#[derive(Default)]
pub(super) struct Share {
    /// Among the other domains; without one the host is this domain's alone.
    seat: Option<Seat>,
    grant: Option<Grant>,
    working_set: WorkingSet,
}

impl Share {
    /// What the guest may have in DRAM beside the others.
    pub(super) fn granted(&self) -> Option<Bytes> {
        self.grant.map(|grant| grant.bytes)
    }

    /// Most to move at once, in bytes.
    pub(super) fn burst_bytes(&self) -> u64 {
        self.seat.as_ref().map_or(u64::MAX, Seat::burst_bytes)
    }

    /// Goes on with heat from before this daemon.
    pub(super) fn recall(&mut self, half_life: Duration) {
        self.working_set.recall(half_life);
    }
}

impl Guest {
    /// Shares the host with those that have seats beside `seat`.
    pub fn sit(&mut self, seat: Seat) {
        self.share.seat = Some(seat);
    }

    /// Takes in what looks used at the end of a round.
    pub(super) fn observe_use(&mut self, used: Bytes, elapsed: Duration) {
        self.share.working_set.observe(used, elapsed, self.orders.policy.half_life);
    }

    /// Says what the guest holds and uses, and hears what it may have beside the
    /// other domains. Not before the place of all pages is known.
    pub fn claim(&mut self, now: Duration) {
        let Some(seat) = &self.share.seat else { return };
        let memory = lock(&self.memory);
        if !memory.surveyed() {
            return;
        }
        let policy = &self.orders.policy;
        let used = self.share.working_set.bytes(policy.half_life);
        let movable = self.orders.place()
            && !self.orders.suspended
            && !memory.mostly_logged()
            && self.forbidden_until.is_none_or(|until| now >= until);
        let claim = Claim::of(policy, &memory, used, self.dram_target(memory.bytes()), movable);
        drop(memory);
        self.share.grant = seat.claim(&self.orders.tiers.fast, claim, now);
    }

    /// Lets the others know what the guest holds, with each move: free memory shows it
    /// at once, and what is counted twice or not at all others would have to give or get.
    pub(super) fn tell_held(&self) {
        if let Some(seat) = &self.share.seat {
            seat.holds(Bytes::of_pages(lock(&self.memory).places().fast));
        }
    }

    /// The guest's part in the host's DRAM.
    pub fn budget_status(&self) -> Option<BudgetStatus> {
        let grant = self.share.grant?;
        let used = self.share.working_set.bytes(self.orders.policy.half_life);
        Some(BudgetStatus {
            grant_bytes: grant.bytes.0,
            fair_bytes: grant.fair.0,
            working_set_bytes: used.map(|bytes| bytes.0),
            grant_reason: grant.why.explanation().to_owned(),
        })
    }

    /// What bounds the interval between rounds.
    pub fn pace_limits(&self) -> Limits {
        let policy = &self.orders.policy;
        let memory = lock(&self.memory).bytes();
        let granted = self.share.granted().unwrap_or(memory);
        let dram = self.dram_target(memory).unwrap_or(memory).min(granted);
        Limits {
            memory,
            dram: self.orders.place().then_some(dram),
            half_life: policy.half_life,
            bandwidth: policy.migration.bandwidth,
            cpu: self.share.seat.as_ref().map_or(HostLimits::default().cpu, Seat::cpu),
            asked: policy.sampling.interval.map(|asked| asked.max(SHORTEST_INTERVAL)),
            // What is accessed outside of a window keeps no page from being idle, and samples
            // are of all the time.
            windows: self.orders.place()
                && policy.sampling.flush
                && policy.migration.delay.is_zero()
                && self.sampling().is_none(),
        }
    }

    /// Takes bytes out of the domain's own bandwidth and the host's, or out of neither.
    pub(super) fn take(&mut self, bytes: u64, now: Duration) -> Result<(), Option<Duration>> {
        match self.bucket.wait_for(bytes, now) {
            Some(Duration::ZERO) => {}
            wait => return Err(wait),
        }
        self.share.seat.as_ref().map_or(Ok(()), |seat| seat.take(bytes, now))?;
        self.bucket.take(bytes, now)
    }

    /// Takes bytes that have moved unasked out of both: what follows waits for them.
    pub(super) fn charge(&mut self, bytes: u64, now: Duration) {
        self.bucket.charge(bytes, now);
        if let Some(seat) = &self.share.seat {
            seat.charge(bytes, now);
        }
    }
}
