// SPDX-License-Identifier: MIT OR Apache-2.0
//! What placement would do: guests that are made up, or that were recorded, under
//! the same heat, plan and bandwidth as the daemon's.
//!
//! # A round
//!
//! 1. The guest runs for an interval. What it accesses then is served by where its
//!    pages lie.
//! 2. Meanwhile the plan of the round before is carried out, as fast as the
//!    policy's bandwidth allows. What was moved is taken to have moved at an even
//!    pace: accesses are served half as before, and half as after.
//! 3. The accessed bits are harvested, and the next plan is made.
//!
//! As in the daemon, the first harvest says where pages lie, but not when they
//! were accessed, so that the first plan knows nothing of heat.
//!
//! # The host's DRAM
//!
//! Where a host has less DRAM than its guests may have ([`Host::with_dram`]), each
//! round ends with the claims of all guests, and the plan of each is for what it is
//! granted, as in the daemon. As there, what others have not yet given back is no room.
//!
//! # The oracle
//!
//! It has the best K pages of each interval in DRAM from the interval's beginning
//! on, where K is what the guest is granted, or what lies there if that is more. It
//! knows what no harvest tells: each page's mean rate ([`Round::expected`]), or even
//! the counts that were drawn, by hindsight ([`Round::served`]). The moves that
//! are counted against it are those of the oracle of rates; nobody could follow the
//! dice.
//!
//! # What counts
//!
//! Up to 4 GiB each page's accesses are drawn and counted. Larger guests, whose bits
//! alone are drawn, are judged by the expected counts, rate times time, which are
//! exact. A recording has no more than bits: [`Round::served`] then counts pages
//! accessed, however often they were.

mod dram;
mod draw;
mod engine;
mod guest;
mod host;
mod oracle;
mod replay;
mod summary;
mod workload;

use std::time::Duration;

pub use guest::{Guest, GuestParams, Start};
pub use host::{Domain, Host};
pub use replay::Replay;
pub use summary::{SETTLED, Summary, Tiers};
pub use workload::{MOST_COUNTED_PAGES, Pattern, Workload, WorkloadParams};

/// Accesses, and who would have served them from DRAM.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Served {
    /// All accesses.
    pub all: f64,
    /// Those to pages in DRAM.
    pub fast: f64,
    /// Those that the oracle serves from DRAM.
    pub oracle: f64,
}

impl Served {
    /// Adds what was served elsewhere or later.
    pub fn add(&mut self, other: &Served) {
        self.all += other.all;
        self.fast += other.fast;
        self.oracle += other.oracle;
    }

    /// Share of accesses served from DRAM; `None` without accesses.
    pub fn hit_ratio(&self) -> Option<f64> {
        ratio(self.fast, self.all)
    }

    /// The same of the oracle.
    pub fn oracle_hit_ratio(&self) -> Option<f64> {
        ratio(self.oracle, self.all)
    }

    /// How much of what the oracle reaches was reached.
    pub fn of_oracle(&self) -> Option<f64> {
        ratio(self.fast, self.oracle)
    }
}

fn ratio(part: f64, whole: f64) -> Option<f64> {
    (whole > 0.0).then(|| part / whole)
}

/// What [`Round::served`] counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Basis {
    /// Accesses, as they were drawn.
    Counts,
    /// Accesses, as their rates say.
    Rates,
    /// Pages accessed, once each.
    Bits,
}

/// One round of one guest.
#[derive(Clone, Debug, PartialEq)]
pub struct Round {
    /// When it ended, since the first began.
    pub end: Duration,
    /// How long it took.
    pub interval: Duration,
    /// Who served what; see `basis`.
    pub served: Served,
    /// What `served` counts.
    pub basis: Basis,
    /// The same by the mean rates, where they are known.
    pub expected: Option<Served>,
    /// Pages that went to the slow tier.
    pub demoted_pages: u64,
    /// Pages that came to DRAM.
    pub promoted_pages: u64,
    /// Pages that the oracle had to move, both directions together.
    pub oracle_moved_pages: u64,
    /// Pages in DRAM at the end.
    pub fast_pages: u64,
    /// Pages of DRAM that the policy, or the host's budget, granted for the round.
    pub target_pages: u64,
    /// Pages whose accessed bit was set.
    pub accessed_pages: u64,
}

impl Round {
    /// Pages that moved, both directions together.
    pub fn moved_pages(&self) -> u64 {
        self.demoted_pages + self.promoted_pages
    }

    /// What is best known: by the rates where there are some.
    pub fn best_known(&self) -> &Served {
        self.expected.as_ref().unwrap_or(&self.served)
    }
}
