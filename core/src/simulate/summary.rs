// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a whole run comes to: hit ratios, moves, slowdown, money.

use std::time::Duration;

use super::{Round, Served};
use crate::units::Bytes;

/// How much of what the oracle reaches counts as reached.
pub const SETTLED: f64 = 0.98;

/// What the tiers are like.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tiers {
    /// Nanoseconds of an access to DRAM that no cache serves.
    pub fast_ns: f64,
    /// The same of the slow tier.
    pub slow_ns: f64,
    /// Price of a GiB of DRAM, in whatever money.
    pub fast_per_gib: f64,
    /// The same of the slow tier.
    pub slow_per_gib: f64,
}

impl Tiers {
    /// Mean time of an access, against that with DRAM alone: 1 is no slower. The guest
    /// as a whole slows down less, as it also computes and has caches.
    pub fn slowdown(&self, hit_ratio: f64) -> f64 {
        (hit_ratio * self.fast_ns + (1.0 - hit_ratio) * self.slow_ns) / self.fast_ns
    }

    /// Money saved when `slow` of memory is bought as slow tier, and not as DRAM.
    pub fn saved(&self, slow: Bytes) -> f64 {
        const GIB: f64 = (1u64 << 30) as f64;
        slow.0 as f64 / GIB * (self.fast_per_gib - self.slow_per_gib)
    }
}

/// What a run comes to. *Late* is the second half of its rounds, when a guest that
/// does the same all the time should have settled.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Summary {
    /// Rounds.
    pub rounds: u64,
    /// Time that they stand for.
    pub time: Duration,
    /// Over all rounds; by rates where they are known, see [`Round::best_known`].
    pub served: Served,
    /// Over the late rounds.
    pub late: Served,
    /// The first round in which [`SETTLED`] of the oracle's hits were reached.
    pub settled_round: Option<u64>,
    /// Pages moved, both directions together.
    pub moved_pages: u64,
    /// Pages that the oracle moved.
    pub oracle_moved_pages: u64,
    /// Pages moved in late rounds.
    pub late_moved_pages: u64,
    /// Pages that the oracle moved in late rounds.
    pub late_oracle_moved_pages: u64,
    /// Time of the late rounds.
    pub late_time: Duration,
    /// Most pages in DRAM at the end of a late round, and not fewer than granted.
    pub dram_pages: u64,
}

impl Summary {
    /// Sums up a run.
    pub fn of(rounds: &[Round]) -> Self {
        let mut summary = Summary { rounds: rounds.len() as u64, ..Summary::default() };
        let late_from = rounds.len() / 2;
        for (index, round) in rounds.iter().enumerate() {
            let served = round.best_known();
            summary.time += round.interval;
            summary.served.add(served);
            summary.moved_pages += round.moved_pages();
            summary.oracle_moved_pages += round.oracle_moved_pages;
            if summary.settled_round.is_none() && served.of_oracle().is_some_and(|part| part >= SETTLED) {
                summary.settled_round = Some(index as u64 + 1);
            }
            if index >= late_from {
                summary.late.add(served);
                summary.late_moved_pages += round.moved_pages();
                summary.late_oracle_moved_pages += round.oracle_moved_pages;
                summary.late_time += round.interval;
                summary.dram_pages = summary.dram_pages.max(round.fast_pages).max(round.target_pages);
            }
        }
        summary
    }

    /// Part of `memory` that moved in a minute of the late rounds; `None` without time.
    pub fn moved_in_a_minute(&self, memory: Bytes) -> Option<f64> {
        let minutes = self.late_time.as_secs_f64() / 60.0;
        (minutes > 0.0 && memory.pages() > 0)
            .then(|| self.late_moved_pages as f64 / memory.pages() as f64 / minutes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simulate::Basis;

    #[test]
    fn money_and_time_follow_from_prices_and_latencies() {
        let tiers = Tiers { fast_ns: 100.0, slow_ns: 300.0, fast_per_gib: 4.0, slow_per_gib: 1.0 };
        assert_eq!(tiers.slowdown(1.0), 1.0);
        assert_eq!(tiers.slowdown(0.9), 1.2);
        assert_eq!(tiers.saved(Bytes(3 << 29)), 4.5);
    }

    #[test]
    fn the_late_half_is_told_apart() {
        let round = |hits: f64, moved| Round {
            end: Duration::ZERO,
            interval: Duration::from_secs(30),
            served: Served { all: 100.0, fast: hits, oracle: 90.0 },
            basis: Basis::Counts,
            expected: None,
            demoted_pages: moved,
            promoted_pages: moved,
            oracle_moved_pages: 1,
            fast_pages: 40 + moved,
            target_pages: 50,
            accessed_pages: 0,
        };
        let summary =
            Summary::of(&[round(0.0, 20), round(45.0, 5), round(80.0, 3), round(90.0, 2), round(90.0, 0)]);
        assert_eq!((summary.rounds, summary.settled_round), (5, Some(4)));
        assert_eq!((summary.moved_pages, summary.late_moved_pages), (60, 10));
        assert_eq!(summary.late.hit_ratio(), Some(260.0 / 300.0));
        assert_eq!(summary.served.of_oracle(), Some(305.0 / 450.0));
        assert_eq!(summary.dram_pages, 50);
        assert_eq!(summary.moved_in_a_minute(Bytes::of_pages(1000)), Some(10.0 / 1000.0 / 1.5));
        assert_eq!(Summary::of(&[]).moved_in_a_minute(Bytes(4096)), None);
    }
}
