// SPDX-License-Identifier: MIT OR Apache-2.0
//! Numbers that look random and repeat from a seed (SplitMix64: Steele, Lea,
//! Flood, "Fast splittable pseudorandom number generators", 2014).

#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The stream number `stream` of `seed`.
    pub fn new(seed: u64, stream: u64) -> Random {
        let mut random = Random(seed ^ stream.wrapping_mul(0xD6E8_FEB8_6659_FD93));
        random.next();
        random
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Below `end`, which is above zero.
    pub fn below(&mut self, end: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(end)) >> 64) as u64
    }

    /// True once in `times`.
    pub fn once_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// A number of any size: each bit length is as likely.
    pub fn wild(&mut self) -> u64 {
        let bits = self.below(65);
        if bits == 0 { 0 } else { self.next() >> (64 - bits) }
    }
}

#[cfg(test)]
mod tests {
    use super::Random;

    #[test]
    fn repeats_and_stays_in_bounds() {
        let (mut a, mut b) = (Random::new(7, 1), Random::new(7, 1));
        let mut other = Random::new(7, 2);
        assert!((0..100).all(|_| a.next() == b.next()));
        assert_ne!(a.next(), other.next());
        assert!((0..1000).all(|_| a.below(3) < 3));
        assert!((0..3).all(|n| (0..1000).any(|_| a.below(3) == n)));
    }
}
