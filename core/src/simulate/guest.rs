// SPDX-License-Identifier: MIT OR Apache-2.0
//! One guest: what it accesses, where its pages really lie, and what the engine
//! makes of it.

use std::time::Duration;

use crate::bitmap;
use crate::budget::Claim;
use crate::plan::MoveUnit;
use crate::policy::Policy;
use crate::sampler::{Harvest, Level, MemSlot};
use crate::units::{Bytes, PAGES_PER_2M};
use crate::wire::Place;

use super::engine::Engine;
use super::oracle::{RateOracle, best_counts};
use super::workload::Workload;
use super::{Basis, Round, Served};

/// Where a guest's pages lie before anything has moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// In DRAM from the lowest address on until that is used up, as when the guest
    /// touches its memory in this order.
    FirstTouch,
    /// All in DRAM, also beyond what is granted.
    Fast,
    /// All on the slow tier.
    Slow,
}

/// How a guest is treated.
#[derive(Clone, Debug)]
pub struct GuestParams {
    /// The policy.
    pub policy: Policy,
    /// Time between harvests.
    pub interval: Duration,
    /// Where its pages lie at first.
    pub start: Start,
}

/// A guest that is made up, from address 0 on.
pub struct Guest {
    engine: Engine,
    workload: Workload,
    /// What the next harvest says; `on_slow` is the truth about places.
    harvest: Harvest,
    oracle: RateOracle,
    interval: Duration,
    /// DRAM that is granted now.
    granted: Bytes,
    now: Duration,
    rounds: u64,
}

impl Guest {
    /// A guest that has not run yet.
    pub fn new(params: GuestParams, workload: Workload) -> Self {
        let pages = workload.params().pages;
        let mut engine = Engine::new(params.policy, Duration::ZERO);
        let slot =
            MemSlot { gfn_start: 0, page_count: pages, hva: 0, id: 0, read_only: false, dirty_log: false };
        engine.adopt(1, vec![slot]);
        let mut harvest = Harvest::default();
        harvest.reset(0, pages);
        harvest.dirty = Vec::new();
        harvest.levels.fill(if workload.params().huge { Level::Huge2M } else { Level::Page4K });
        bitmap::fill(&mut harvest.mapped, 0..pages as usize, true);
        let granted = engine.policy_target();
        let fast = match params.start {
            Start::FirstTouch => granted.pages().min(pages),
            Start::Fast => pages,
            Start::Slow => 0,
        };
        let mut guest = Self {
            engine,
            harvest,
            oracle: RateOracle::new(workload.granule_pages(), Vec::new()),
            workload,
            interval: params.interval,
            granted,
            now: Duration::ZERO,
            rounds: 0,
        };
        guest.lay(fast);
        guest
    }

    /// Lets so many pages lie in DRAM, from the lowest address on, and no others.
    fn lay(&mut self, fast: u64) {
        let (pages, granule) = (self.workload.params().pages, self.workload.granule_pages());
        // A huge page lies on one tier.
        let fast = if self.workload.params().huge { fast - fast % PAGES_PER_2M } else { fast };
        bitmap::fill(&mut self.harvest.on_slow, 0..fast as usize, false);
        bitmap::fill(&mut self.harvest.on_slow, fast as usize..pages as usize, true);
        let chosen = (0..pages.div_ceil(granule)).map(|index| (index + 1) * granule <= fast).collect();
        self.oracle = RateOracle::new(granule, chosen);
    }

    /// Begins with no more than `dram` of its memory in DRAM, as there is no more for it.
    /// For guests that have not run yet.
    pub(super) fn begin_within(&mut self, dram: Bytes) {
        self.lay(self.fast().min(dram).pages());
        self.granted = self.granted.min(dram);
    }

    /// The guest's memory.
    pub fn memory(&self) -> Bytes {
        Bytes::of_pages(self.workload.params().pages)
    }

    /// What of it lies in DRAM.
    pub fn fast(&self) -> Bytes {
        Bytes::of_pages(self.workload.params().pages - bitmap::count(&self.harvest.on_slow))
    }

    /// DRAM that is granted now.
    pub fn granted(&self) -> Bytes {
        self.granted
    }

    /// What it claims of the host's DRAM.
    pub(super) fn claim(&self) -> Claim {
        self.engine.claim()
    }

    /// DRAM that the policy grants.
    pub fn policy_target(&self) -> Bytes {
        self.engine.policy_target()
    }

    /// Runs the guest for an interval, and plans what to move in the next, within
    /// what the policy grants.
    pub fn round(&mut self) -> Round {
        let round = self.run();
        let granted = self.policy_target();
        self.plan(granted, granted);
        round
    }

    /// Plans what to move in the next interval. No more than `granted` is to lie in
    /// DRAM, nor more than `reachable`, as there is no more room now.
    pub fn plan(&mut self, granted: Bytes, reachable: Bytes) {
        self.granted = granted;
        self.engine.plan(granted.min(reachable), self.interval);
    }

    /// Runs the guest for an interval, in which what was planned is moved.
    pub fn run(&mut self) -> Round {
        self.workload.run(self.interval, &mut self.harvest.accessed);
        let fast_before = self.fast().pages();
        let (counted_before, expected_before) = (self.counted_hits(), self.expected_hits());
        let end = self.now + self.interval;
        let (demoted_pages, promoted_pages) = self.carry_out(end);
        let (counted_after, expected_after) = (self.counted_hits(), self.expected_hits());
        let fast_pages = self.fast().pages();

        let best = self.granted.pages().max(fast_before).max(fast_pages);
        let (oracle_hits, oracle_moved_pages) = self.oracle.choose(self.workload.means(), best);
        let all = self.expected_all();
        let expected =
            Served { all, fast: (expected_before + expected_after) / 2.0, oracle: oracle_hits.min(all) };
        let counted = self.workload.counts().map(|counts| Served {
            all: counts.iter().map(|count| f64::from(*count)).sum(),
            fast: (counted_before + counted_after) / 2.0,
            oracle: best_counts(counts, best) as f64,
        });
        // The daemon's first round does not know since when bits were set.
        let elapsed = (self.rounds > 0).then_some(self.interval);
        self.engine.observe(0, &self.harvest, elapsed);
        self.engine.end_round(elapsed);
        self.now = end;
        self.rounds += 1;
        Round {
            end,
            interval: self.interval,
            served: counted.unwrap_or(expected),
            basis: if counted.is_some() { Basis::Counts } else { Basis::Rates },
            expected: Some(expected),
            demoted_pages,
            promoted_pages,
            oracle_moved_pages,
            fast_pages,
            target_pages: self.granted.pages(),
            accessed_pages: bitmap::count(&self.harvest.accessed),
        }
    }

    /// Moves what was planned, until `end`; pages demoted and promoted.
    fn carry_out(&mut self, end: Duration) -> (u64, u64) {
        let (mut demoted, mut promoted) = (0, 0);
        // No pages come up meanwhile, so that what was planned has room.
        for (MoveUnit { gfn, pages, .. }, target) in self.engine.moves(self.now, end, u64::MAX) {
            let start = gfn as usize;
            bitmap::fill(&mut self.harvest.on_slow, start..start + pages as usize, target == Place::Slow);
            let moved = if target == Place::Slow { &mut demoted } else { &mut promoted };
            *moved += u64::from(pages);
        }
        (demoted, promoted)
    }

    /// Of the accesses that were counted, those to DRAM.
    fn counted_hits(&self) -> f64 {
        let Some(counts) = self.workload.counts() else { return 0.0 };
        let hits = counts.chunks(bitmap::WORD_BITS).zip(&self.harvest.on_slow).map(|(counts, slow)| {
            let fast = |(bit, count): (usize, &u32)| if slow >> bit & 1 == 0 { u64::from(*count) } else { 0 };
            counts.iter().enumerate().map(fast).sum::<u64>()
        });
        hits.sum::<u64>() as f64
    }

    /// Expected accesses to DRAM.
    fn expected_hits(&self) -> f64 {
        self.expected(|pages| {
            let slow = bitmap::masks(pages.clone())
                .map(|(index, mask)| (bitmap::word(&self.harvest.on_slow, index) & mask).count_ones());
            pages.len() as f64 - f64::from(slow.sum::<u32>())
        })
    }

    /// Expected accesses to all pages.
    fn expected_all(&self) -> f64 {
        self.expected(|pages| pages.len() as f64)
    }

    fn expected(&self, count: impl Fn(std::ops::Range<usize>) -> f64) -> f64 {
        let (granule, pages) =
            (self.workload.granule_pages() as usize, self.workload.params().pages as usize);
        let each = self.workload.means().iter().enumerate().filter(|(_, mean)| **mean > 0.0);
        each.map(|(index, mean)| {
            let start = index * granule;
            f64::from(*mean) * count(start..(start + granule).min(pages))
        })
        .sum()
    }
}
