// SPDX-License-Identifier: MIT OR Apache-2.0
//! What exchanging pages could win in all, whatever a single round can move.

use super::gap::{Estimate, Gap};

/// Pages of a sample that are enough.
const SAMPLE_PAGES: u64 = 1 << 17;

/// Temperatures differ in their upper 8 bits here.
const BINS: usize = 256;

/// Pages of a sample by temperature.
#[derive(Clone, Debug)]
pub(super) struct Potential {
    /// One block of 64 pages of this many is in the sample.
    stride: usize,
    /// Those of the fast tier that may go.
    fast: [u64; BINS],
    /// Those of the slow tier.
    slow: [u64; BINS],
}

impl Potential {
    /// For a domain of `pages` pages.
    pub(super) fn new(pages: u64) -> Self {
        // Odd, so that it falls in step with no power of two.
        let stride = (pages / SAMPLE_PAGES).max(1) | 1;
        Potential { stride: stride as usize, fast: [0; BINS], slow: [0; BINS] }
    }

    /// Whether the block, or the huge page, with this number is in the sample.
    pub(super) fn samples(&self, number: usize) -> bool {
        number % self.stride == 0
    }

    /// Takes in pages of the sample that may leave the fast tier.
    pub(super) fn add_fast(&mut self, temperature: u16, pages: u64) {
        self.fast[usize::from(temperature >> 8)] += pages;
    }

    /// Takes in pages of the sample that lie on the slow tier.
    pub(super) fn add_slow(&mut self, temperature: u16, pages: u64) {
        self.slow[usize::from(temperature >> 8)] += pages;
    }

    /// Heat that the fast tier would gain in all, in pages of the highest temperature,
    /// if the hottest of the slow tier changed places with the coldest of the fast one
    /// as long as `gap` lies between them. The temperatures have this `variance`.
    pub(super) fn gain(mut self, gap: Gap, variance: f64) -> f64 {
        let estimate = |bin: usize| Estimate { temperature: (bin << 8) as u16, variance };
        let (mut cold, mut hot) = (0, BINS - 1);
        let mut gain = 0.0;
        while cold < hot && gap.lies_between(estimate(cold), estimate(hot)) {
            let pages = self.fast[cold].min(self.slow[hot]);
            gain += pages as f64 * (hot - cold) as f64 / (BINS - 1) as f64;
            self.fast[cold] -= pages;
            self.slow[hot] -= pages;
            // The one that is used up; both, if both are.
            if self.fast[cold] == 0 {
                cold += 1;
            }
            if self.slow[hot] == 0 {
                hot -= 1;
            }
        }
        gain * self.stride as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::Share;

    #[test]
    fn the_hottest_change_places_with_the_coldest() {
        let gap = Gap::new(Share::from_percent(50), false);
        let mut potential = Potential::new(1000);
        potential.add_fast(0, 10);
        potential.add_fast(0x8000, 100);
        potential.add_slow(0xff00, 30);
        potential.add_slow(0x8000, 100);
        // 10 by all of the scale; the others are too near.
        assert_eq!(potential.clone().gain(gap, 0.0), 10.0);
        potential.add_slow(0xff00, 1);
        potential.add_fast(0, 100);
        // 31 by all of it, 79 of the next 100 by half.
        let gained = potential.gain(gap, 0.0);
        assert!((gained - (31.0 + 79.0 * 128.0 / 255.0)).abs() < 1e-9, "{gained}");
    }

    #[test]
    fn a_sample_stands_for_the_whole() {
        let mut potential = Potential::new(100 * SAMPLE_PAGES);
        let blocks = (0..6464).filter(|block| potential.samples(*block)).count();
        assert_eq!(blocks, 64);
        potential.add_fast(0, 64);
        potential.add_slow(0xff00, 64);
        assert_eq!(potential.gain(Gap::new(Share::from_percent(10), true), 0.1), 6464.0);
    }
}
