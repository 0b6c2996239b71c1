// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which small blocks were accessed whole in each of the last two rounds.
//!
//! A temperature is slow to tell of a block that turns hot: it is a long mean. That all
//! pages of a block are accessed round after round tells sooner. It is kept for four
//! pages at a time, as a bit for each of two rounds: a 16th of a byte a page.

use std::ops::Range;

use crate::bitmap::{self, WORD_BITS};

use super::{HeatMap, IDLE_COUNT, MAX_TEMPERATURE, likely};

/// Pages of a block. A piece of `n` pages holds `(n - 3) / 4` whole blocks at least,
/// wherever it begins.
pub(crate) const BLOCK_PAGES: usize = 4;

/// When less than this is left of a temperature, what it was can not be told from it.
const LEAST_KEPT: f64 = 0.25;

/// Blocks that a word of a bitmap of pages stands for.
const WORD_BLOCKS: usize = WORD_BITS / BLOCK_PAGES;

/// The blocks of a slot, a number of 16 bits for each word of a bitmap of its pages.
#[derive(Clone, Debug)]
pub(super) struct Blocks {
    /// Accessed whole in the last round.
    once: Vec<u16>,
    /// And in the one before.
    twice: Vec<u16>,
}

impl Blocks {
    /// None was accessed yet.
    pub(super) fn new(pages: usize) -> Self {
        let words = bitmap::words_for(pages);
        Blocks { once: vec![0; words], twice: vec![0; words] }
    }

    /// Takes in a part of a round: the words `words` of a bitmap, which `accessed` has
    /// from its first word on; missing ones are zero. The number of pages accessed.
    pub(super) fn take(&mut self, words: Range<usize>, accessed: &[u64]) -> u64 {
        let (Some(once), Some(twice)) = (self.once.get_mut(words.clone()), self.twice.get_mut(words)) else {
            return 0;
        };
        let mut seen = 0;
        for (index, (once, twice)) in once.iter_mut().zip(twice).enumerate() {
            let word = bitmap::word(accessed, index);
            seen += u64::from(word.count_ones());
            let now = whole_blocks(word);
            *twice = *once & now;
            *once = now;
        }
        seen
    }

    /// Runs of neighbouring blocks that were accessed whole in both rounds, as pages.
    pub(super) fn runs(&self) -> impl Iterator<Item = Range<usize>> {
        let mut open: Option<Range<usize>> = None;
        let mut index = 0;
        let mut left = 0_u16;
        std::iter::from_fn(move || {
            loop {
                if left == 0 {
                    // Most words have none.
                    while self.twice.get(index) == Some(&0) {
                        index += 1;
                    }
                    let Some(blocks) = self.twice.get(index) else { return open.take() };
                    left = *blocks;
                    index += 1;
                    continue;
                }
                let first = left.trailing_zeros();
                let length = (left >> first).trailing_ones();
                left &= !(((1_u32 << length) - 1) << first) as u16;
                let start = ((index - 1) * WORD_BLOCKS + first as usize) * BLOCK_PAGES;
                let end = start + length as usize * BLOCK_PAGES;
                match &mut open {
                    Some(run) if run.end == start => run.end = end,
                    _ => {
                        if let Some(run) = open.replace(start..end) {
                            return Some(run);
                        }
                    }
                }
            }
        })
    }
}

/// A bit for each four of which all are set.
fn whole_blocks(word: u64) -> u16 {
    let mut bits = word & word >> 1;
    bits &= bits >> 2 & 0x1111_1111_1111_1111;
    // Halves the distance of the bits that are left, four times.
    bits = (bits | bits >> 3) & 0x0303_0303_0303_0303;
    bits = (bits | bits >> 6) & 0x000f_000f_000f_000f;
    bits = (bits | bits >> 12) & 0x0000_00ff_0000_00ff;
    (bits | bits >> 24) as u16
}

/// What the last two rounds tell beside the temperatures.
impl HeatMap {
    /// Pages that were accessed in the last round.
    pub(crate) fn seen(&self) -> u64 {
        self.seen
    }

    /// Runs of pages of which all were accessed in each of the last two rounds, in whole
    /// blocks of [`BLOCK_PAGES`].
    pub(crate) fn accessed_twice(&self) -> impl Iterator<Item = Range<usize>> {
        self.blocks.runs()
    }

    /// Whether the temperature of `page` lets it be that it was.
    pub(crate) fn may_be_accessed_twice(&self, page: usize) -> bool {
        let least = (1.0 - self.kept[0] * self.kept[1]) * f64::from(MAX_TEMPERATURE);
        // Each step rounds down, by less than two units of 14 bits.
        f64::from(self.temperature(page)) >= least - f64::from(4 * (IDLE_COUNT + 1))
    }

    /// The chance of an access in a round that a page of this temperature, which was
    /// accessed in both of the last two rounds, seemed to have before them; 1 if it tells
    /// no more.
    pub(crate) fn chance_before(&self, temperature: u16) -> f64 {
        let kept = self.kept[0] * self.kept[1];
        if kept < LEAST_KEPT {
            return 1.0;
        }
        let share = f64::from(temperature) / f64::from(MAX_TEMPERATURE);
        likely(((share - (1.0 - kept)) / kept).max(0.0), self.variance)
    }

    /// Forgets what was known of `pages` until two rounds ago, in which all of them were
    /// accessed: what is left of the past is all hot.
    pub(crate) fn turn_hot(&mut self, pages: Range<usize>) {
        let pages = pages.start..pages.end.min(self.pages);
        self.cells.get_mut(pages).unwrap_or_default().iter_mut().for_each(|cell| *cell |= MAX_TEMPERATURE);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::heat::HeatParams;

    /// Words that have runs, not noise only.
    fn words() -> impl Strategy<Value = Vec<u64>> {
        let word =
            prop_oneof![Just(0), Just(!0), any::<u64>(), any::<u64>().prop_map(|word| word | word << 3)];
        proptest::collection::vec(word, 0..6)
    }

    proptest! {
        #[test]
        fn runs_are_of_blocks_accessed_whole_twice(
            rounds in proptest::collection::vec(words(), 1..5), at in 0_usize..6,
        ) {
            const PAGES: usize = 6 * WORD_BITS;
            let mut blocks = Blocks::new(PAGES);
            for accessed in &rounds {
                // In parts, as harvests of large slots come.
                let at = at.min(accessed.len());
                let seen = blocks.take(0..at, &accessed[..at]) + blocks.take(at..6, &accessed[at..]);
                prop_assert_eq!(seen, bitmap::count(accessed));
            }
            let whole = |words: &[u64], block: usize| bitmap::all(words, block * 4..block * 4 + 4);
            let twice = |block: &usize| {
                rounds.len() > 1 && rounds[rounds.len() - 2..].iter().all(|words| whole(words, *block))
            };
            let expected: Vec<usize> = (0..PAGES / 4).filter(twice).collect();
            let runs: Vec<Range<usize>> = blocks.runs().collect();
            let found: Vec<usize> = runs.iter().flat_map(|run| run.start / 4..run.end / 4).collect();
            prop_assert_eq!(found, expected);
            prop_assert!(runs.windows(2).all(|pair| pair[0].end < pair[1].start), "a run that could be longer");
        }
    }

    proptest! {
        /// Whatever the rounds' length: also where some are put off.
        #[test]
        fn what_was_accessed_twice_had_the_chance_that_its_temperature_told(
            history in proptest::collection::vec(any::<bool>(), 40..80), ms in 50_u64..3000,
        ) {
            let params = HeatParams { half_life: Duration::from_secs(10), delay: Duration::ZERO };
            let round = Duration::from_millis(ms);
            let mut heat = HeatMap::new(1, params);
            for accessed in history {
                heat.step(&[u64::from(accessed)], round);
            }
            heat.settle();
            let before = likely(f64::from(heat.temperature(0)) / f64::from(MAX_TEMPERATURE), heat.variance());
            for _ in 0..2 {
                heat.step(&[1], round);
            }
            prop_assert!(heat.may_be_accessed_twice(0));
            let told = heat.chance_before(heat.temperature(0));
            prop_assert!((told - before).abs() < 0.02, "{} of {}", told, before);
            heat.turn_hot(0..1);
            prop_assert_eq!(heat.temperature(0), MAX_TEMPERATURE);
            prop_assert_eq!(heat.seen(), 1);
        }
    }
}
