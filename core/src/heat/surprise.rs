// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whether what was accessed is what the temperatures had said.
//!
//! A temperature `t`, as a share of the scale, is also a forecast: the page is
//! accessed in the next round with a chance of `t`. While a guest goes on as
//! before, two sums are as large as the forecast says:
//!
//! * *lost*: the heat of pages that were not accessed, `sum t` over them;
//! * *come*: what pages that were accessed lacked in heat, `sum (1 - t)` over them.
//!
//! Both are expected to be `sum p (1 - p)` over all pages, with `p` the true chance.
//! The temperatures know `p` with an error of variance `v p (1 - p)`, with `v` from
//! [`super::HeatMap::variance`], which makes `sum t (1 - t)` too small by the factor
//! `1 - v`. When a guest turns from one set of pages to another, both sums grow by the
//! heat that went. A scan makes only the second one grow, an end of work only the
//! first one.

use std::ops::AddAssign;

/// Part of all heat that must go, and come elsewhere, beyond what chance would do.
const SHIFT_SHARE: f64 = 0.05;

/// How many standard deviations beyond chance that must be as well: in a guest of a
/// few pages chance does much.
const SHIFT_SIGMAS: f64 = 4.0;

/// Temperatures of a variance above this, of fewer than three rounds, forecast nothing.
const MOST_VARIANCE: f64 = 0.4;

/// The scale of the sums: a temperature's upper byte, at most.
const ONE: f64 = 255.0;

/// Sums over the cells before a step, in units of 1/255 of the scale.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sums {
    heat: u64,
    seen_heat: u64,
    squares: u64,
    seen: u64,
}

impl Sums {
    /// Adds those of some cells: all heat, that of the accessed ones, and the squares
    /// of all in units of 256/255^2; and how many were accessed.
    pub(super) fn add(&mut self, [heat, seen_heat, squares]: [u64; 3], seen: u32) {
        self.heat += heat;
        self.seen_heat += seen_heat;
        self.squares += squares;
        self.seen += u64::from(seen);
    }

    #[cfg(test)]
    pub(super) fn heat(&self) -> u64 {
        self.heat
    }

    #[cfg(test)]
    pub(super) fn seen_heat(&self) -> u64 {
        self.seen_heat
    }

    /// What they say of a round, before which temperatures had the variance `v`.
    pub(super) fn surprise(&self, variance: f64) -> Surprise {
        let heat = self.heat as f64 / ONE;
        if variance > MOST_VARIANCE {
            return Surprise { heat, ..Surprise::default() };
        }
        let seen_heat = self.seen_heat as f64 / ONE;
        let spread = heat - self.squares as f64 * 256.0 / (ONE * ONE);
        Surprise {
            heat,
            lost: heat - seen_heat,
            come: self.seen as f64 - seen_heat,
            expected: spread / (1.0 - variance),
        }
    }
}

impl AddAssign for Sums {
    fn add_assign(&mut self, other: Self) {
        let Sums { heat, seen_heat, squares, seen } = other;
        self.heat += heat;
        self.seen_heat += seen_heat;
        self.squares += squares;
        self.seen += seen;
    }
}

/// How a round differed from what was forecast, in pages of full heat. Those of
/// several slots add up.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Surprise {
    /// All heat before the round.
    pub heat: f64,
    /// Heat of pages that were not accessed.
    pub lost: f64,
    /// What pages that were accessed lacked.
    pub come: f64,
    /// What chance makes of either.
    pub expected: f64,
}

impl Surprise {
    /// With that of a later step of the same pages.
    pub(super) fn and(mut self, later: Surprise) -> Surprise {
        self += later;
        Surprise { heat: later.heat, ..self }
    }

    /// Whether the guest has turned to other pages.
    pub fn is_shift(&self) -> bool {
        let beyond = self.lost.min(self.come) - self.expected;
        let chance = SHIFT_SIGMAS * self.expected.max(1.0).sqrt();
        beyond > SHIFT_SHARE * self.heat + chance
    }
}

impl AddAssign for Surprise {
    fn add_assign(&mut self, other: Self) {
        self.heat += other.heat;
        self.lost += other.lost;
        self.come += other.come;
        self.expected += other.expected;
    }
}
