// SPDX-License-Identifier: MIT OR Apache-2.0
//! The one place where the simulator calls what the daemon runs: heat, place, claims of
//! DRAM, plan and bandwidth. `cli/src/daemon/guest.rs` does the same with a real guest.

use std::time::Duration;

use crate::budget::Claim;
use crate::heat::Span;
use crate::memory::GuestMemory;
use crate::migrate::{MoveOutcome, Moves, TokenBucket, unit_bytes};
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
    /// Of the plan that holds.
    moves: Moves,
}

impl Engine {
    pub(super) fn new(policy: Policy, now: Duration) -> Self {
        Self {
            memory: GuestMemory::new(policy.heat_params()),
            bucket: TokenBucket::new(policy.migration.bandwidth.0, now),
            policy,
            working_set: WorkingSet::default(),
            moves: Moves::default(),
        }
    }

    /// Takes in the guest's slots; a plan for others is void.
    pub(super) fn adopt(&mut self, generation: u64, slots: Vec<MemSlot>) {
        self.memory.adopt(generation, slots);
        self.moves = Moves::default();
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
        self.moves = Moves::new(plan);
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
        let (mut moves, mut moved) = (std::mem::take(&mut self.moves), Vec::new());
        loop {
            let (target, units) = moves.slice(self.bucket.burst_bytes());
            let bytes = units.iter().map(unit_bytes).sum();
            let room = match target {
                Place::Fast => room_pages.checked_sub(Bytes(bytes).pages()),
                _ => Some(room_pages.saturating_add(Bytes(bytes).pages())),
            };
            // The kernel would find no room: others took it meanwhile.
            let Some(room) = room.filter(|_| !units.is_empty()) else { return moved };
            if let Err(wait) = self.bucket.take(bytes, now) {
                now = now.saturating_add(wait.unwrap_or(Duration::MAX));
                if now >= end || self.bucket.take(bytes, now).is_err() {
                    return moved;
                }
            }
            room_pages = room;
            moved.extend(units.iter().map(|unit| (*unit, target)));
            let units = units.iter().map(|unit| (*unit, Ok(()))).collect();
            let outcome = MoveOutcome { units, ..MoveOutcome::default() };
            self.memory.record_moves(&outcome, target, now);
            moves.done(target, outcome.units.len(), bytes);
        }
    }
}
