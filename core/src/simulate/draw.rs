// SPDX-License-Identifier: MIT OR Apache-2.0
//! Random draws of accesses. A generator of xoshiro256++, whose numbers are the
//! same on every machine, so that a seed names a run.

use rand_distr::{Distribution, Poisson};
use rand_xoshiro::Xoshiro256PlusPlus;
use rand_xoshiro::rand_core::{Rng, SeedableRng};

use crate::bitmap::WORD_BITS;

/// Up to this mean a count is found by adding up probabilities, which is faster.
const SMALL_MEAN: f64 = 10.0;

/// Below this chance the gaps between set bits are drawn, and not the bits.
const RARE: f64 = 0.1;

/// Bits of a chance that decide about bits that are drawn 64 at a time.
const CHANCE_BITS: u32 = 24;

/// Draws for one guest.
#[derive(Clone, Debug)]
pub(super) struct Draws(Xoshiro256PlusPlus);

impl Draws {
    /// The draws of guest `index` of a run with this seed.
    pub(super) fn new(seed: u64, index: u64) -> Self {
        // Guests are far apart by the generator's own mixing of its seed.
        let mut mixed = Xoshiro256PlusPlus::seed_from_u64(seed);
        Draws(Xoshiro256PlusPlus::seed_from_u64(mixed.next_u64() ^ index))
    }

    /// A number from 0 up to, and without, 1.
    fn unit(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A number below `end`, which is above 0.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        // The bias is below end / 2^64.
        ((u128::from(self.0.next_u64()) * u128::from(end)) >> 64) as u64
    }

    /// The numbers below `count` in random order.
    pub(super) fn shuffled(&mut self, count: u32) -> Vec<u32> {
        let mut order: Vec<u32> = (0..count).collect();
        for last in (1..order.len()).rev() {
            let other = self.below(last as u64 + 1) as usize;
            order.swap(last, other);
        }
        order
    }

    /// How often something happens that happens `mean` times on average, each time
    /// independently (Poisson).
    pub(super) fn count(&mut self, mean: f64) -> u32 {
        if mean > SMALL_MEAN {
            // Means are finite and above zero here, which is all that is asked.
            return Poisson::new(mean).map_or(0, |poisson| poisson.sample(&mut self.0) as u32);
        }
        let mut left = self.unit();
        let mut chance = (-mean).exp();
        let mut count = 0;
        while left >= chance && chance > 0.0 {
            left -= chance;
            count += 1;
            chance *= mean / f64::from(count);
        }
        count
    }

    /// 64 bits of which each is set with the chance that something with this mean
    /// happens at all.
    pub(super) fn word(&mut self, mean: f64) -> u64 {
        let chance = -(-mean).exp_m1();
        if chance <= 0.0 {
            0
        } else if chance < RARE {
            self.rare_bits(mean)
        } else {
            self.bits(chance)
        }
    }

    /// The gap to the next set bit is exponential in the mean.
    fn rare_bits(&mut self, mean: f64) -> u64 {
        let mut word = 0;
        let mut at = 0;
        loop {
            let gap = -(1.0 - self.unit()).ln() / mean;
            // A page whose mean is all but zero is never reached.
            if gap >= (WORD_BITS - at) as f64 {
                return word;
            }
            at += gap as usize;
            word |= 1 << at;
            at += 1;
            if at == WORD_BITS {
                return word;
            }
        }
    }

    /// Compares 64 random numbers with `chance` at once, bit by bit.
    fn bits(&mut self, chance: f64) -> u64 {
        let whole = 1u64 << CHANCE_BITS;
        let threshold = (chance * whole as f64).round() as u64;
        if threshold >= whole {
            return !0;
        }
        (threshold.trailing_zeros().min(CHANCE_BITS)..CHANCE_BITS).fold(0, |word, bit| {
            let random = self.0.next_u64();
            if threshold >> bit & 1 == 1 { word | random } else { word & random }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_as_frequent_as_their_mean_says() {
        let mut draws = Draws::new(1, 0);
        for mean in [1e-4, 0.01, 0.09, 0.11, 0.5, 1.0, 3.0] {
            let words = 40_000;
            let set: u64 = (0..words).map(|_| u64::from(draws.word(mean).count_ones())).sum();
            let (total, chance) = (words as f64 * 64.0, 1.0 - (-mean).exp());
            // Five standard deviations.
            let slack = 5.0 * (total * chance * (1.0 - chance)).sqrt();
            assert!((set as f64 - total * chance).abs() < slack, "{mean}: {set} of {total}");
        }
        assert_eq!(draws.word(0.0), 0);
        assert_eq!(draws.word(100.0), !0);
    }

    #[test]
    fn counts_have_their_mean_and_its_spread() {
        let mut draws = Draws::new(2, 0);
        for mean in [0.0, 0.01, 1.0, 9.9, 10.1, 300.0] {
            let tries = 20_000;
            let counts: Vec<f64> = (0..tries).map(|_| f64::from(draws.count(mean))).collect();
            let found = counts.iter().sum::<f64>() / tries as f64;
            let spread = counts.iter().map(|count| (count - found).powi(2)).sum::<f64>() / tries as f64;
            let slack = 5.0 * (mean / tries as f64).sqrt();
            assert!((found - mean).abs() <= slack, "{mean}: {found}");
            assert!((spread - mean).abs() <= 0.1 * mean + slack, "{mean}: spread {spread}");
        }
    }

    #[test]
    fn a_shuffle_has_every_number_once() {
        let mut order = Draws::new(3, 1).shuffled(1000);
        assert_ne!(order, (0..1000).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..1000).collect::<Vec<_>>());
        assert_ne!(Draws::new(3, 1).below(1 << 40), Draws::new(3, 2).below(1 << 40));
    }
}
