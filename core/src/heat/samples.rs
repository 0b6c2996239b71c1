// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sampled accesses in the heat: a page that was sampled in a round counts with the
//! weight of the access, in place of the 1 that an accessed bit counts.
//!
//! With a weight `w` an access adds `w` times what a bit adds, up to the top of the
//! scale; with 0 it heats nothing, and the page cools as if it had not been accessed.
//! Of several samples of a page the highest weight counts. A page of which nothing was
//! sampled, as are most, counts by its bit.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

use crate::bitmap::{self, WORD_BITS};

use super::{HeatMap, IDLE_COUNT, MAX_TEMPERATURE};

/// Samples with more weight than a bit that are kept until the next step: in some 3 MiB.
/// At 50 kHz, and a half-life of 4 minutes, a step comes as soon.
pub(super) const MOST_RAISED: usize = 1 << 16;

/// The pages that were sampled, with their weights.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Sampled {
    /// From first page to end and weight; none overlap.
    weights: BTreeMap<usize, (usize, u32)>,
}

impl Sampled {
    /// Takes in a sample. Pages that can not be told apart, as those of a huge page,
    /// are one; where two such overlap, they are one as well.
    fn add(&mut self, pages: Range<usize>, weight: u32) {
        let (mut joined, mut weight) = (pages, weight);
        let overlaps = |pages: &Range<usize>, found: (&usize, &(usize, u32))| found.1.0 > pages.start;
        while let Some(found) = self.weights.range(..joined.end).next_back().filter(|f| overlaps(&joined, *f))
        {
            let (start, (end, other)) = (*found.0, *found.1);
            self.weights.remove(&start);
            joined = joined.start.min(start)..joined.end.max(end);
            weight = weight.max(other);
        }
        if !joined.is_empty() {
            self.weights.insert(joined.start, (joined.end, weight));
        }
    }

    fn iter(&self) -> impl Iterator<Item = (Range<usize>, u32)> {
        self.weights.iter().map(|(start, (end, weight))| (*start..*end, *weight))
    }

    /// Those that begin in `pages`, and one that reaches into them: no more is looked at,
    /// so that all parts of a round together look at each sample once or twice.
    fn within(&self, pages: Range<usize>) -> impl Iterator<Item = (Range<usize>, u32)> {
        let before = self.weights.range(..pages.start).next_back();
        let start = before.map_or(pages.start, |(start, _)| *start);
        let found =
            self.weights.range(start..pages.end).map(|(start, (end, weight))| (*start..*end, *weight));
        found.filter(move |(sampled, _)| sampled.end > pages.start)
    }

    /// What of `accessed`, which has the words `words` of a bitmap, heats: a sampled page
    /// does if it has weight.
    pub(super) fn heating<'a>(&self, accessed: &'a [u64], words: Range<usize>) -> Cow<'a, [u64]> {
        if self.weights.is_empty() {
            return Cow::Borrowed(accessed);
        }
        let mut heating: Vec<u64> = (0..words.len()).map(|index| bitmap::word(accessed, index)).collect();
        let first = words.start * WORD_BITS;
        for (pages, weight) in self.within(first..words.end * WORD_BITS) {
            // What lies behind the words is left out.
            bitmap::fill(&mut heating, pages.start.saturating_sub(first)..pages.end - first, weight > 0);
        }
        Cow::Owned(heating)
    }

    /// Heats pages that were heated by `gain` as for a bit up to their weights.
    pub(super) fn raise(&self, cells: &mut [u16], gain: u16) {
        for (pages, weight) in self.iter() {
            let more = u32::from(gain).saturating_mul(weight.saturating_sub(1));
            let end = pages.end.min(cells.len());
            for cell in cells.get_mut(pages.start..end).unwrap_or_default() {
                let temperature = u32::from(*cell & MAX_TEMPERATURE).saturating_add(more);
                // In both, the lowest two bits are zero.
                *cell = temperature.min(MAX_TEMPERATURE.into()) as u16 | *cell & IDLE_COUNT;
            }
        }
    }
}

impl HeatMap {
    /// Takes in that one of `pages`, indices that share a mapping, was sampled in the
    /// round that the next [`HeatMap::step`] ends.
    pub fn weigh(&mut self, pages: Range<usize>, weight: u32) {
        self.sampled.add(pages.start..pages.end.min(self.pages), weight);
    }

    /// Ends a round: its bits were taken in, and what counts more does with the next step,
    /// or as its bit when there is too much of it.
    pub(super) fn end_samples(&mut self) {
        for (pages, weight) in std::mem::take(&mut self.sampled).iter().filter(|(_, weight)| *weight > 1) {
            if self.raised.weights.len() < MOST_RAISED {
                self.raised.add(pages, weight);
            } else {
                self.unweighed += 1;
            }
        }
    }

    /// Samples that counted as a bit although they weigh more: only so many are kept until
    /// the next step, and where the half-life is long, steps are seldom.
    pub fn unweighed(&self) -> u64 {
        self.unweighed
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::heat::HeatParams;

    const PAGES: usize = 200;
    const ROUND: Duration = Duration::from_secs(1);

    fn map() -> HeatMap {
        HeatMap::new(PAGES, HeatParams { half_life: Duration::from_secs(20), delay: Duration::from_secs(4) })
    }

    fn bits(pages: &[usize]) -> Vec<u64> {
        let mut words = vec![0; bitmap::words_for(PAGES)];
        pages.iter().for_each(|page| bitmap::fill(&mut words, *page..*page + 1, true));
        words
    }

    /// A past in which pages were accessed now and then.
    fn warm() -> HeatMap {
        let mut heat = map();
        for round in 0..60 {
            heat.step(&bits(if round % 10 == 0 { &[1, 2, 3, 4] } else { &[] }), ROUND);
        }
        heat
    }

    #[test]
    fn weights_take_the_place_of_the_bit_s() {
        let before = warm();
        let step = |weight: Option<u32>| {
            let mut heat = before.clone();
            if let Some(weight) = weight {
                heat.weigh(1..2, weight);
            }
            heat.step(&bits(&[1]), ROUND);
            (heat.temperature(1), heat.is_idle(1))
        };
        let idle = {
            let mut heat = before.clone();
            heat.step(&[], ROUND);
            heat.temperature(1)
        };
        let gain = step(None).0 - idle;
        assert!(gain > 0);
        assert_eq!(step(Some(1)), step(None));
        assert_eq!(step(Some(0)).0, idle);
        assert_eq!(step(Some(3)).0, idle + 3 * gain);
        assert_eq!(step(Some(100)).0, MAX_TEMPERATURE);
    }

    #[test]
    fn what_has_no_weight_does_not_keep_a_page_from_being_idle() {
        let mut heat = map();
        for _ in 0..10 {
            heat.weigh(1..2, 0);
            heat.step(&bits(&[1, 2]), ROUND);
        }
        assert!(heat.is_idle(1) && !heat.is_idle(2));
        // Nor is it forgotten that later accesses count.
        heat.step(&bits(&[1]), ROUND);
        assert!(!heat.is_idle(1));
    }

    #[test]
    fn rounds_that_are_put_off_keep_their_weights() {
        let tick = Duration::from_millis(2);
        let step = |weights: &[Option<u32>]| {
            let mut heat = warm();
            for weight in weights {
                if let Some(weight) = weight {
                    heat.weigh(1..2, *weight);
                }
                heat.step(&bits(&[1]), tick);
            }
            heat.settle();
            heat.temperature(1)
        };
        let plain = step(&[None, None]);
        assert!(step(&[Some(5), None]) > plain);
        assert_eq!(step(&[Some(5), Some(0)]), step(&[Some(5), None]));
        assert!(step(&[Some(0), Some(0)]) < plain);
        assert_eq!(step(&[Some(0), None]), plain);
    }

    #[test]
    fn samples_are_bounded_between_steps() {
        let pages = MOST_RAISED + 1000;
        let params = HeatParams { half_life: ROUND * 100_000, delay: ROUND * 4 };
        let mut heat = HeatMap::new(pages, params);
        heat.step(&[], ROUND * 1_000_000);
        for round in 0..4 {
            (0..pages).filter(|page| page % 4 == round).for_each(|page| heat.weigh(page..page + 1, 1000));
            heat.step(&vec![!0; bitmap::words_for(pages)], ROUND);
            assert!(heat.raised.weights.len() <= MOST_RAISED);
        }
        assert_eq!(heat.unweighed(), 1000, "those that came last");
        heat.settle();
        let hot = (0..pages).filter(|page| heat.temperature(*page) > heat.temperature(pages - 1)).count();
        assert_eq!(hot, MOST_RAISED, "the others count by their bits");
    }

    proptest! {
        #[test]
        fn a_part_of_a_round_sees_the_samples_that_reach_into_it(
            samples in proptest::collection::vec((0..PAGES, 1..80usize, 0_u32..3), 0..20),
            words in (0..4usize, 0..4usize).prop_map(|(a, b)| a.min(b)..a.max(b) + 1),
        ) {
            let mut sampled = Sampled::default();
            samples.iter().for_each(|(start, pages, weight)| sampled.add(*start..start + pages, *weight));
            let pages = words.start * WORD_BITS..words.end * WORD_BITS;
            let reaches = |range: &Range<usize>| range.start < pages.end && range.end > pages.start;
            let expected: Vec<_> = sampled.iter().filter(|(range, _)| reaches(range)).collect();
            prop_assert_eq!(sampled.within(pages.clone()).collect::<Vec<_>>(), expected);
        }

        #[test]
        fn the_highest_weight_of_a_page_counts_and_others_are_as_they_were(
            accessed in proptest::collection::vec(any::<u64>(), 0..5),
            samples in proptest::collection::vec((0..PAGES, 0_u32..100), 0..30),
        ) {
            let mut heat = warm();
            let (mut plain, mut with_none) = (heat.clone(), heat.clone());
            let mut highest = BTreeMap::new();
            for (page, weight) in samples {
                heat.weigh(page..page + 1, weight);
                let known = highest.entry(page).or_insert(weight);
                *known = weight.max(*known);
            }
            // In parts, as harvests of large slots come.
            let mut round = heat.begin(ROUND.into());
            heat.part(&mut round, 0..1, accessed.get(..1).unwrap_or_default());
            heat.part(&mut round, 1..usize::MAX, accessed.get(1..).unwrap_or_default());
            heat.end(round);
            with_none.step(&[], ROUND);
            let mut all = accessed.clone();
            all.resize(bitmap::words_for(PAGES), 0);
            bitmap::fill(&mut all, 0..PAGES, true);
            plain.step(&all, ROUND);
            for page in 0..PAGES {
                let (cold, hot) = (u32::from(with_none.temperature(page)), u32::from(plain.temperature(page)));
                let weight = highest.get(&page).copied().unwrap_or(u32::from(bitmap::get(&accessed, page)));
                let expected = (cold + (hot - cold) * weight).min(MAX_TEMPERATURE.into());
                prop_assert_eq!(u32::from(heat.temperature(page)), expected, "page {}", page);
            }
        }

        #[test]
        fn overlapping_samples_are_one(ranges in proptest::collection::vec((0..PAGES, 1..80usize, 0_u32..9), 1..20)) {
            let mut sampled = Sampled::default();
            for (start, pages, weight) in &ranges {
                sampled.add(*start..start + pages, *weight);
            }
            let found: Vec<_> = sampled.iter().collect();
            prop_assert!(found.windows(2).all(|pair| pair[0].0.end <= pair[1].0.start));
            for (start, pages, weight) in &ranges {
                let holds = |(range, most): &(Range<usize>, u32)| range.start <= *start && start + pages <= range.end && most >= weight;
                prop_assert!(found.iter().any(holds));
            }
            let highest = ranges.iter().map(|(.., weight)| *weight).max();
            prop_assert_eq!(found.iter().map(|(_, weight)| *weight).max(), highest);
        }
    }
}
