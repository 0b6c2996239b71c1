// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which pages of a slot moved in the last rounds, so that none goes to and fro.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use crate::bitmap;

/// How many rounds are looked back.
pub const LOOKBACK_ROUNDS: usize = 5;

/// Pages that moved in each of the last rounds, or turned hot. It takes as much memory as
/// there were such, and next to nothing without.
#[derive(Clone, Debug)]
pub struct Recent {
    /// Newest first; words of a bitmap by their index.
    rounds: VecDeque<BTreeMap<usize, u64>>,
}

impl Default for Recent {
    fn default() -> Self {
        Recent { rounds: VecDeque::from([BTreeMap::new()]) }
    }
}

impl Recent {
    /// Begins a round: what moved [`LOOKBACK_ROUNDS`] rounds ago is forgotten.
    pub fn next_round(&mut self) {
        self.rounds.truncate(LOOKBACK_ROUNDS - 1);
        self.rounds.push_front(BTreeMap::new());
    }

    /// Notes that `pages` moved in this round, or turned hot.
    pub fn record(&mut self, pages: Range<usize>) {
        if let Some(round) = self.rounds.front_mut() {
            for (index, mask) in bitmap::masks(pages) {
                *round.entry(index).or_insert(0) |= mask;
            }
        }
    }

    /// Whether nothing did.
    pub fn is_empty(&self) -> bool {
        self.rounds.iter().all(BTreeMap::is_empty)
    }

    /// The pages of word `index` that did in `times` rounds at least: 1 or 2.
    pub fn moved(&self, index: usize, times: Times) -> u64 {
        let words = self.rounds.iter().map(|round| round.get(&index).copied().unwrap_or(0));
        let (once, twice) = words.fold((0, 0), |(once, twice), word| (once | word, twice | once & word));
        match times {
            Times::Once => once,
            Times::Twice => twice,
        }
    }
}

/// In how many rounds a page moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Times {
    /// In one or more.
    Once,
    /// In two or more.
    Twice,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moves_are_known_for_five_rounds() {
        let mut recent = Recent::default();
        recent.record(60..70);
        recent.next_round();
        recent.record(65..66);
        assert_eq!(recent.moved(0, Times::Once), 0xf << 60);
        assert_eq!(recent.moved(1, Times::Once), 0x3f);
        assert_eq!((recent.moved(0, Times::Twice), recent.moved(1, Times::Twice)), (0, 2));
        for _ in 0..LOOKBACK_ROUNDS - 1 {
            assert_eq!(recent.moved(1, Times::Once) & 2, 2);
            recent.next_round();
        }
        assert_eq!((recent.moved(0, Times::Once), recent.moved(1, Times::Once)), (0, 2));
        recent.next_round();
        assert!(recent.is_empty());
    }
}
