// SPDX-License-Identifier: MIT OR Apache-2.0
//! How much hotter a page must be than one that it drives out.

use crate::heat::{MAX_TEMPERATURE, likely};
use crate::units::Share;

/// Standard deviations between two pages that change places, in a domain that goes on
/// as before: what chance makes look better is not worth the move.
const SETTLED_SIGMAS: f64 = 2.0;

/// The same right after the start, or after the guest has turned to other pages, when
/// many pages lie wrong: waiting costs more than a few moves too many.
const SETTLING_SIGMAS: f64 = 0.5;

/// The same for what exchanges could win in all. Of a million pages, those that chance
/// favours most and least are five standard deviations of either apart.
const SURE_SIGMAS: f64 = 4.0;

/// What a temperature says, and how sure it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Estimate {
    pub(super) temperature: u16,
    /// [`crate::heat::HeatMap::variance`] of its map.
    pub(super) variance: f64,
}

impl Estimate {
    /// Variance of the temperature as a share of the scale.
    fn uncertainty(self) -> f64 {
        if self.variance <= 0.0 {
            return 0.0;
        }
        let share = f64::from(self.temperature) / f64::from(MAX_TEMPERATURE);
        let likely = likely(share, self.variance);
        likely * (1.0 - likely) * self.variance
    }
}

/// When pages change places.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gap {
    /// The policy's tolerance, in temperature units.
    least: f64,
    sigmas: f64,
}

impl Gap {
    pub(super) fn new(tolerance: Share, settling: bool) -> Self {
        let least = tolerance.of(u64::from(MAX_TEMPERATURE)) as f64;
        Gap { least, sigmas: if settling { SETTLING_SIGMAS } else { SETTLED_SIGMAS } }
    }

    /// What would be left if chance had no part in it.
    pub(super) fn sure(self) -> Self {
        Gap { sigmas: SURE_SIGMAS, ..self }
    }

    /// Whether `comes` is hotter than `goes` by enough.
    pub(super) fn lies_between(&self, goes: Estimate, comes: Estimate) -> bool {
        let difference = f64::from(comes.temperature) - f64::from(goes.temperature);
        if difference <= 0.0 || difference < self.least {
            return false;
        }
        let noise = (goes.uncertainty() + comes.uncertainty()).sqrt() * f64::from(MAX_TEMPERATURE);
        difference >= self.sigmas * noise
    }
}
