// SPDX-License-Identifier: MIT OR Apache-2.0
//! The one place where the simulator calls what the daemon runs: heat, place, claims of
//! DRAM, plan and bandwidth. `cli/src/daemon/guest.rs` does the same with a real guest.

use std::time::Duration;

use crate::budget::Claim;
use crate::heat::Span;
use crate::memory::GuestMemory;
use crate::migrate::{MoveOutcome, TokenBucket, unit_bytes};
use crate::plan::{MoveUnit, quota_pages};
use crate::policy::Policy;
use crate::sampler::{Harvest, MemSlot};
use crate::units::Bytes;
use crate::wire::Place;
use crate::working_set::WorkingSet;

/// What the daemon keeps of a guest.
pub(super) struct Engine {
    memory: GuestMemory,
    policy: Policy,
    bucket: TokenBucket,
    working_set: WorkingSet,
    /// Of the plan that holds: to the slow tier, then to the fast one.
    demote: Vec<MoveUnit>,
    promote: Vec<MoveUnit>,
}

impl Engine {
    pub(super) fn new(policy: Policy, now: Duration) -> Self {
        Self {
            memory: GuestMemory::new(policy.heat_params()),
            bucket: TokenBucket::new(policy.migration.bandwidth.0, now),
            policy,
            working_set: WorkingSet::default(),
            demote: Vec::new(),
            promote: Vec::new(),
        }
    }

    /// Takes in the guest's slots; a plan for others is void.
    pub(super) fn adopt(&mut self, generation: u64, slots: Vec<MemSlot>) {
        self.memory.adopt(generation, slots);
        self.demote.clear();
        self.promote.clear();
    }

    /// Takes in a harvest of the slot `index`; without `elapsed` it tells only
    /// where pages lie.
    pub(super) fn observe(&mut self, index: usize, harvest: &Harvest, elapsed: Option<Duration>) {
        self.memory.observe(index, harvest, elapsed);
    }

    /// Ends a round, when all slots were taken in.
    pub(super) fn end_round(&mut self, elapsed: Option<Duration>) {
        self.memory.end_round(elapsed.map(Span::from));
        if let Some(elapsed) = elapsed {
            self.working_set.observe(self.memory.classes().used(), elapsed, self.policy.half_life);
        }
    }

    /// What the policy grants of DRAM; all of the memory without a limit.
    pub(super) fn policy_target(&self) -> Bytes {
        let memory = self.memory.bytes();
        self.policy.dram_target(memory).unwrap_or(memory)
    }

    /// What the guest claims of the host's DRAM.
    pub(super) fn claim(&self) -> Claim {
        let used = self.working_set.bytes(self.policy.half_life);
        Claim::of(&self.policy, &self.memory, used, self.policy.dram_target(self.memory.bytes()), true)
    }

    /// Plans what to move in the next `interval`.
    pub(super) fn plan(&mut self, target: Bytes, interval: Duration) {
        let quota_pages = quota_pages(self.policy.migration.bandwidth, interval);
        let plan = self.memory.plan(Some(target), self.policy.migration.tolerance, quota_pages);
        self.memory.accept(&plan, quota_pages);
        (self.demote, self.promote) = (plan.demote, plan.promote);
    }

    /// The units that move from `now` until `end`, as the bandwidth allows, and as DRAM
    /// has room for `room_pages` more than lie there now; with the tier that they go to.
    /// What is left is void.
    pub(super) fn moves(
        &mut self,
        mut now: Duration,
        end: Duration,
        mut room_pages: u64,
    ) -> Vec<(MoveUnit, Place)> {
        let demote = std::mem::take(&mut self.demote).into_iter().map(|unit| (unit, Place::Slow));
        let promote = std::mem::take(&mut self.promote).into_iter().map(|unit| (unit, Place::Fast));
        let mut moved = Vec::new();
        for (unit, target) in demote.chain(promote) {
            let pages = u64::from(unit.pages);
            let room = match target {
                Place::Fast => room_pages.checked_sub(pages),
                _ => Some(room_pages.saturating_add(pages)),
            };
            // The kernel would find no room: others took it meanwhile.
            let Some(room) = room else { break };
            match self.bucket.take(unit_bytes(&unit), now) {
                Ok(()) => {}
                Err(None) => break,
                Err(Some(wait)) => {
                    now = now.saturating_add(wait);
                    if now >= end || self.bucket.take(unit_bytes(&unit), now).is_err() {
                        break;
                    }
                }
            }
            room_pages = room;
            moved.push((unit, target));
        }
        for target in [Place::Slow, Place::Fast] {
            let units = moved.iter().filter(|(_, place)| *place == target).map(|(unit, _)| (*unit, Ok(())));
            self.memory.record_moves(&MoveOutcome { units: units.collect() }, target, now);
        }
        moved
    }
}
