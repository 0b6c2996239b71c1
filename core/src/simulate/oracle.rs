// SPDX-License-Identifier: MIT OR Apache-2.0
//! What nobody can beat: the pages that will be accessed most in an interval, in
//! DRAM from its beginning on.

use crate::bitmap;

/// The oracle that knows how often each page is accessed on average, but not the
/// dice. It moves as little as it can: of equals it keeps what it has.
#[derive(Clone, Debug)]
pub(super) struct RateOracle {
    granule_pages: u64,
    /// By granule.
    chosen: Vec<bool>,
    order: Vec<u32>,
    /// For which means and how many granules it has chosen.
    known: Option<(Vec<f32>, usize)>,
}

impl RateOracle {
    /// Begins with the granules that lie in DRAM.
    pub(super) fn new(granule_pages: u64, chosen: Vec<bool>) -> Self {
        let order = (0..chosen.len() as u32).collect();
        Self { granule_pages, chosen, order, known: None }
    }

    /// Chooses the best `pages` pages by the mean accesses of each granule's pages;
    /// returns the accesses that they get, and the pages that had to move for it,
    /// both directions together.
    pub(super) fn choose(&mut self, means: &[f32], pages: u64) -> (f64, u64) {
        let whole = ((pages / self.granule_pages) as usize).min(means.len());
        let moved = match &self.known {
            Some((known, count)) if *count == whole && known == means => 0,
            _ => self.change(means, whole),
        };
        (self.hits(means, pages), moved)
    }

    fn change(&mut self, means: &[f32], whole: usize) -> u64 {
        let chosen = &self.chosen;
        let better = |a: &u32, b: &u32| {
            let key = |index: &u32| (means[*index as usize], chosen[*index as usize]);
            let ((a_mean, a_chosen), (b_mean, b_chosen)) = (key(a), key(b));
            b_mean.total_cmp(&a_mean).then(b_chosen.cmp(&a_chosen)).then(a.cmp(b))
        };
        if whole < self.order.len() {
            self.order.select_nth_unstable_by(whole, better);
        }
        let mut next = vec![false; self.chosen.len()];
        self.order[..whole].iter().for_each(|index| next[*index as usize] = true);
        let changed = next.iter().zip(&self.chosen).filter(|(next, before)| next != before).count();
        self.chosen = next;
        self.known = Some((means.to_vec(), whole));
        changed as u64 * self.granule_pages
    }

    /// Accesses that the best `pages` pages get: whole granules and a part of the next.
    fn hits(&self, means: &[f32], pages: u64) -> f64 {
        let chosen = means.iter().zip(&self.chosen).filter(|(_, chosen)| **chosen);
        let whole: f64 = chosen.map(|(mean, _)| f64::from(*mean)).sum();
        let rest = means.iter().zip(&self.chosen).filter(|(_, chosen)| !**chosen);
        let best = rest.map(|(mean, _)| *mean).fold(0.0, f32::max);
        whole * self.granule_pages as f64 + f64::from(best) * (pages % self.granule_pages) as f64
    }
}

/// Accesses that the best `pages` pages got, by hindsight.
pub(super) fn best_counts(counts: &[u32], pages: u64) -> u64 {
    let sum = |counts: &[u32]| counts.iter().map(|count| u64::from(*count)).sum();
    let pages = usize::try_from(pages).unwrap_or(usize::MAX);
    if pages >= counts.len() {
        return sum(counts);
    }
    let mut counts = counts.to_vec();
    counts.select_nth_unstable_by(pages, |a, b| b.cmp(a));
    sum(&counts[..pages])
}

/// The oracle that knows which pages will be accessed, and nothing of how often. What
/// it brings drives out pages that are not accessed now, those at the lowest addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct BitChoice {
    /// Accessed pages that it brings to DRAM.
    come: u64,
    /// Pages that it drives out for them.
    go: u64,
    /// Accessed pages that it has in DRAM then.
    pub(super) hits: u64,
}

impl BitChoice {
    /// What to do about all slots together; each gives the bitmap of pages accessed,
    /// and the one of pages that the oracle has in DRAM.
    pub(super) fn new<'a>(slots: impl Iterator<Item = (&'a [u64], &'a [u64])>, pages: u64) -> Self {
        let (mut kept, mut missing, mut idle) = (0, 0, 0);
        for (accessed, chosen) in slots {
            for (accessed, chosen) in accessed.iter().zip(chosen) {
                kept += u64::from((accessed & chosen).count_ones());
                missing += u64::from((accessed & !chosen).count_ones());
                idle += u64::from((!accessed & chosen).count_ones());
            }
        }
        let come = missing.min(pages.saturating_sub(kept));
        let go = (kept + idle + come).saturating_sub(pages).min(idle);
        BitChoice { come, go, hits: kept + come }
    }

    /// Does it in the next slot; `fresh` are pages that were not there before, and
    /// need no move to come. Returns the pages moved.
    pub(super) fn apply(&mut self, accessed: &[u64], fresh: &[u64], chosen: &mut [u64]) -> u64 {
        let mut moved = 0;
        for (index, chosen) in chosen.iter_mut().enumerate() {
            let (accessed, fresh) = (bitmap::word(accessed, index), bitmap::word(fresh, index));
            let come = lowest(accessed & !*chosen, &mut self.come);
            let go = lowest(!accessed & *chosen, &mut self.go);
            moved += u64::from((come & !fresh).count_ones() + go.count_ones());
            *chosen = (*chosen | come) & !go;
        }
        moved
    }
}

/// The lowest bits of a word, as many as are left, which it takes away.
pub(super) fn lowest(word: u64, left: &mut u64) -> u64 {
    let count = u64::from(word.count_ones());
    if count <= *left {
        *left -= count;
        return word;
    }
    let some = bitmap::ones(word).take(*left as usize).fold(0, |some, bit| some | 1 << bit);
    *left = 0;
    some
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn nothing_chosen_is_worse_than_what_was_left(
            means in proptest::collection::vec(0u8..20, 1..200), pages in 0u64..250, had in any::<u64>(),
        ) {
            let means: Vec<f32> = means.iter().map(|mean| f32::from(*mean)).collect();
            let chosen = (0..means.len()).map(|index| had >> (index % 64) & 1 == 1).collect();
            let mut oracle = RateOracle::new(1, chosen);
            let (hits, _) = oracle.choose(&means, pages);
            let mut sorted = means.clone();
            sorted.sort_by(|a, b| b.total_cmp(a));
            let best: f32 = sorted.iter().take(pages as usize).sum();
            prop_assert_eq!(hits as f32, best);
            prop_assert_eq!(oracle.choose(&means, pages), (hits, 0));
            let counts: Vec<u32> = means.iter().map(|mean| *mean as u32).collect();
            prop_assert_eq!(best_counts(&counts, pages) as f64, hits);
        }

        #[test]
        fn granules_count_in_part(pages in 0u64..40) {
            let mut oracle = RateOracle::new(8, vec![false; 4]);
            let (hits, moved) = oracle.choose(&[1.0, 4.0, 2.0, 3.0], pages);
            let best: u64 = [4, 3, 2, 1].iter().flat_map(|mean| [*mean; 8]).take(pages as usize).sum();
            prop_assert_eq!(hits, best as f64);
            prop_assert_eq!(moved, (pages / 8).min(4) * 8);
        }
    }

    proptest! {
        #[test]
        fn bits_that_are_set_are_in_dram_as_far_as_there_is_room(
            rounds in proptest::collection::vec(proptest::array::uniform3(any::<u64>()), 1..8),
            pages in 0u64..200,
        ) {
            let mut chosen = [0; 3];
            let mut before: u64 = 0;
            for accessed in rounds {
                let mut choice = BitChoice::new([(&accessed[..], &chosen[..])].into_iter(), pages);
                let hits = choice.hits;
                let moved = choice.apply(&accessed, &[], &mut chosen);
                let all = bitmap::count(&accessed);
                let held = accessed.iter().zip(&chosen).map(|(a, b)| u64::from((a & b).count_ones()));
                prop_assert_eq!(held.sum::<u64>(), hits);
                prop_assert_eq!(hits, all.min(pages));
                let now = bitmap::count(&chosen);
                prop_assert!(now <= pages && now >= before.min(now) && moved <= 2 * hits);
                before = now;
            }
        }
    }

    #[test]
    fn equals_stay_where_they_are() {
        let mut oracle = RateOracle::new(1, vec![false, true, false, true]);
        assert_eq!(oracle.choose(&[1.0; 4], 2), (2.0, 0));
        assert_eq!(oracle.choose(&[1.0, 1.0, 5.0, 1.0], 2), (6.0, 2));
    }
}
