// SPDX-License-Identifier: MIT OR Apache-2.0
//! One step of many cells: the loop that touches all of a guest's heat.
//!
//! It has no branch that depends on a page, so that it runs in vectors and as fast
//! as memory lets it, whatever was accessed. It is built twice, for any x86-64 and
//! for those with AVX2.

use crate::bitmap::{self, WORD_BITS};

use super::{IDLE_COUNT, MAX_TEMPERATURE, surprise::Sums};

/// Cells that share a part of a bitmap's word as long as a cell.
const LANES: usize = 16;

/// The bit of each of these.
const LANE_BITS: [u16; LANES] = {
    let mut bits = [0; LANES];
    let mut lane = 0;
    while lane < LANES {
        bits[lane] = 1 << lane;
        lane += 1;
    }
    bits
};

/// One step of all cells: constants of the inner loop.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    /// 2^16 times the part of the temperature that is kept.
    keep: u16,
    /// What an access adds, a whole number of temperature units.
    gain: u16,
    /// How far the idle counts go down.
    countdown: u16,
}

impl Step {
    /// A step that keeps `keep` of each temperature, from 0 to 1.
    pub(super) fn new(keep: f64, countdown: u16) -> Self {
        let keep = (keep * 65536.0).min(65535.0) as u16;
        // What is not kept of the maximum, so that the maximum stays the maximum.
        let gain = MAX_TEMPERATURE - decayed(MAX_TEMPERATURE, keep);
        Step { keep, gain, countdown }
    }

    /// What an access adds to a temperature.
    pub(super) fn gain(self) -> u16 {
        self.gain
    }

    /// Steps `cells`, 64 for each word of `accessed`, of which the last may be cut short
    /// by `tail`. Missing words are zero.
    pub(super) fn apply(self, cells: &mut [u16], accessed: &[u64], tail: u64) -> Sums {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has what the function is built for.
            return unsafe { self.apply_avx2(cells, accessed, tail) };
        }
        self.apply_all(cells, accessed, tail)
    }

    /// # Safety
    ///
    /// The processor must have AVX2.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    unsafe fn apply_avx2(self, cells: &mut [u16], accessed: &[u64], tail: u64) -> Sums {
        self.apply_all(cells, accessed, tail)
    }

    #[inline(always)]
    fn apply_all(self, cells: &mut [u16], accessed: &[u64], tail: u64) -> Sums {
        let mut sums = Sums::default();
        let last = (cells.len() / WORD_BITS).saturating_sub(1);
        for (chunk, blocks) in cells.chunks_mut(Lanes::BLOCKS * WORD_BITS).enumerate() {
            let (mut lanes, mut seen) = (Lanes::default(), 0);
            for (index, block) in blocks.chunks_exact_mut(WORD_BITS).enumerate() {
                let index = chunk * Lanes::BLOCKS + index;
                let mask = if index == last { tail } else { !0 };
                let word = bitmap::word(accessed, index) & mask;
                seen += word.count_ones();
                self.apply_block(block, word, &mut lanes);
            }
            sums.add(lanes.sums(), seen);
        }
        sums
    }

    #[inline(always)]
    fn apply_block(self, block: &mut [u16], accessed: u64, lanes: &mut Lanes) {
        // One for each lane, of which the compiler must not know that they are equal: it
        // would widen the one, and then all products.
        let keep = std::hint::black_box([self.keep; LANES]);
        for (part, cells) in block.chunks_exact_mut(LANES).enumerate() {
            // An array, of which the compiler knows that no index is out of it.
            let Some(cells) = cells.first_chunk_mut::<LANES>() else { continue };
            let bits = (accessed >> (part * LANES)) as u16;
            for lane in 0..LANES {
                let cell = cells[lane];
                let seen = if bits & LANE_BITS[lane] == LANE_BITS[lane] { !0 } else { 0 };
                lanes.add(lane, cell, seen);
                let temperature = decayed(cell, keep[lane]) + (self.gain & seen);
                let count = (cell & IDLE_COUNT).saturating_sub(self.countdown) | (IDLE_COUNT & seen);
                cells[lane] = temperature | count;
            }
        }
    }
}

/// Sums of a few blocks, apart for each lane: in 16 bits, as wide as a cell.
#[derive(Default)]
struct Lanes {
    heat: [u16; LANES],
    seen_heat: [u16; LANES],
    squares: [u16; LANES],
}

impl Lanes {
    /// Blocks that fit: 4 cells of each for a lane, of 255 at most.
    const BLOCKS: usize = 64;

    /// Takes in a cell before its step. The upper byte is enough to be surprised by.
    #[inline(always)]
    fn add(&mut self, lane: usize, cell: u16, seen: u16) {
        let heat = cell >> 8;
        self.heat[lane] = self.heat[lane].wrapping_add(heat);
        self.seen_heat[lane] = self.seen_heat[lane].wrapping_add(heat & seen);
        // To the nearest 256th; 255 squared, and half of one, fit 16 bits.
        self.squares[lane] = self.squares[lane].wrapping_add((heat * heat + 128) >> 8);
    }

    /// All lanes' heat, heat that was accessed, and squares.
    fn sums(&self) -> [u64; 3] {
        [&self.heat, &self.seen_heat, &self.squares].map(|lanes| lanes.iter().copied().map(u64::from).sum())
    }
}

/// The upper half of a 16-bit product, an instruction for a vector of cells.
fn decayed(cell: u16, keep: u16) -> u16 {
    ((u32::from(cell & MAX_TEMPERATURE) * u32::from(keep)) >> 16) as u16 & MAX_TEMPERATURE
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Whatever is built for which processor, a page is stepped as one alone would be.
        #[test]
        fn vectors_do_what_single_cells_do(
            cells in proptest::collection::vec(any::<u16>(), 3 * WORD_BITS),
            accessed in proptest::collection::vec(any::<u64>(), 0..4),
            tail in any::<u64>(), keep in 0.0..1.0, countdown in 0_u16..4,
        ) {
            let step = Step::new(keep, countdown);
            let mut stepped = cells.clone();
            let sums = step.apply(&mut stepped, &accessed, tail);
            let mut plain = cells.clone();
            let plain_sums = step.apply_all(&mut plain, &accessed, tail);
            prop_assert_eq!(&stepped, &plain);
            prop_assert_eq!(sums, plain_sums);
            let (mut heat, mut seen_heat) = (0_u64, 0_u64);
            for (page, (before, after)) in cells.iter().zip(stepped).enumerate() {
                let word = bitmap::word(&accessed, page / WORD_BITS) & if page < 2 * WORD_BITS { !0 } else { tail };
                let seen = word >> (page % WORD_BITS) & 1 == 1;
                let gain = if seen { step.gain } else { 0 };
                let count = if seen { IDLE_COUNT } else { (before & IDLE_COUNT).saturating_sub(countdown) };
                prop_assert_eq!(after, (decayed(*before, step.keep) + gain) | count);
                heat += u64::from(before >> 8);
                seen_heat += if seen { u64::from(before >> 8) } else { 0 };
            }
            prop_assert_eq!((sums.heat(), sums.seen_heat()), (heat, seen_heat));
        }
    }
}
