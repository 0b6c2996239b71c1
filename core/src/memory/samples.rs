// SPDX-License-Identifier: MIT OR Apache-2.0
//! What samples tell of a guest's memory, and what is asked of it for the slow-down
//! guard.

use std::ops::Range;

use crate::bitmap;
use crate::sampler::Level;
use crate::slowdown::SlowBits;
use crate::units::PAGES_PER_2M;
use crate::wire::Place;

use super::GuestMemory;

/// Pages of a mapping of 1 GiB.
const PAGES_PER_1G: u64 = PAGES_PER_2M * PAGES_PER_2M;

impl GuestMemory {
    /// What bits tell of accesses to the slow tier. A huge page counts as one.
    pub fn slow_bits(&self) -> SlowBits {
        let mut bits = SlowBits::default();
        for slot in &self.slots {
            let step = slot.heat.mean_step();
            for (pages, level) in slot.place.regions() {
                // The rest of a page of 1 GiB: it counted where it begins, or the slot does.
                let begins =
                    |page: usize| page == 0 || (slot.info.gfn_start + page as u64) % PAGES_PER_1G == 0;
                if level == Level::Huge1G && !begins(pages.start) {
                    continue;
                }
                let is_huge = matches!(level, Level::Huge2M | Level::Huge1G);
                for (index, mask) in bitmap::masks(pages.clone()) {
                    let (fast, slow) = slot.place.words(index);
                    let mapped = slot.mapped.word(index) & mask;
                    if is_huge && mapped != 0 {
                        bits.all_mappings += 1;
                        if slow & mapped != 0 {
                            bits.mappings += 1;
                            bits.add(slot.heat.unit(pages.clone()).0, step);
                        }
                        break;
                    }
                    bits.all_mappings += u64::from(((fast | slow) & mapped).count_ones());
                    bits.mappings += u64::from((slow & mapped).count_ones());
                    // Most of it is cold.
                    let block = index * bitmap::WORD_BITS..(index + 1) * bitmap::WORD_BITS;
                    if slow & mapped != 0 && slot.heat.extremes(block).1 > 0 {
                        let pages = bitmap::ones(slow & mapped).map(|bit| index * bitmap::WORD_BITS + bit);
                        pages.for_each(|page| bits.add(slot.heat.temperature(page), step));
                    }
                }
            }
        }
        bits
    }

    /// How many of these frames lie on the slow tier.
    pub fn count_slow(&self, frames: impl Iterator<Item = u64>) -> u64 {
        let is_slow = |gfn: &u64| {
            let slot = self.slot_from(*gfn).and_then(|index| self.slots.get(index));
            slot.is_some_and(|slot| slot.place.place((gfn - slot.info.gfn_start) as usize) == Place::Slow)
        };
        frames.filter(is_slow).count() as u64
    }

    /// Samples that counted as a bit although they weigh more: see
    /// [`HeatMap::unweighed`](crate::heat::HeatMap::unweighed).
    pub fn unweighed(&self) -> u64 {
        self.slots.iter().map(|slot| slot.heat.unweighed()).sum()
    }

    /// Takes in what was sampled since the last round, before the harvest of this one:
    /// a page, the size of its mapping, and how much the access weighs.
    pub fn weigh(&mut self, samples: impl Iterator<Item = (u64, Level, u32)>) {
        for (gfn, level, weight) in samples {
            let slot = self.slot_from(gfn).and_then(|index| self.slots.get_mut(index));
            // Of a slot that was never harvested nothing counts yet.
            let Some(slot) = slot.filter(|slot| slot.observed) else { continue };
            let pages = match level {
                Level::None | Level::Page4K => 1,
                Level::Huge2M => PAGES_PER_2M,
                Level::Huge1G => PAGES_PER_1G,
            };
            let Range { start: first, end } = slot.info.frames();
            if gfn < end {
                let mapping = gfn / pages * pages;
                let start = mapping.max(first) - first;
                slot.heat.weigh(start as usize..((mapping + pages).min(end) - first) as usize, weight);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::tests::{harvest, info, params};
    use super::*;
    use crate::heat::HeatParams;

    #[test]
    fn the_slow_tier_is_told_by_mappings() {
        let mut memory = GuestMemory::new(params());
        memory.adopt(1, vec![info(0, 1024)]);
        let mut seen = harvest(&info(0, 1024), &[]);
        seen.mapped.fill(!0);
        bitmap::fill(&mut seen.on_slow, 500..1024, true);
        seen.levels = vec![Level::Page4K, Level::Huge2M];
        bitmap::fill(&mut seen.accessed, 505..1024, true);
        memory.observe(0, &seen, None);
        assert_eq!(memory.slow_bits(), SlowBits { accesses_per_s: 0.0, mappings: 13, all_mappings: 513 });
        memory.observe(0, &seen, Some(Duration::from_secs(1)));
        let mut expected = SlowBits { mappings: 13, all_mappings: 513, ..SlowBits::default() };
        let heat = memory.views()[0].heat;
        (0..8).for_each(|_| expected.add(heat.temperature(505), heat.mean_step()));
        let found = memory.slow_bits();
        assert!((found.accesses_per_s - expected.accesses_per_s).abs() < 1e-9 && found.accesses_per_s > 0.0);
        assert_eq!((found.mappings, found.all_mappings), (13, 513));
        assert_eq!(memory.count_slow([499, 500, 1023, 1024, 9999].into_iter()), 2);
    }

    #[test]
    fn a_page_of_1_gib_counts_once() {
        let mut memory = GuestMemory::new(params());
        // Half of one, a whole one, and 4 MiB in small pages.
        let slot = info(PAGES_PER_1G / 2, PAGES_PER_1G * 3 / 2 + 1024);
        memory.adopt(1, vec![slot]);
        let mut seen = harvest(&slot, &[]);
        seen.mapped.fill(!0);
        seen.on_slow.fill(!0);
        seen.accessed.fill(!0);
        seen.levels.fill(Level::Huge1G);
        seen.levels[768..].fill(Level::Page4K);
        memory.observe(0, &seen, None);
        memory.observe(0, &seen, Some(Duration::from_secs(1)));
        let found = memory.slow_bits();
        assert_eq!((found.mappings, found.all_mappings), (1026, 1026));
        let mut expected = SlowBits::default();
        let heat = memory.views()[0].heat;
        (0..1026).for_each(|_| expected.add(heat.temperature(0), heat.mean_step()));
        assert!((found.accesses_per_s - expected.accesses_per_s).abs() < 1e-6);
    }

    /// Each page is accessed at random times, once in two seconds.
    #[test]
    fn accesses_per_second_are_the_same_however_short_rounds_are() {
        const PAGES: u64 = 1024;
        let half_life = Duration::from_secs(60);
        for round_ms in [20, 100, 340, 1000] {
            let (mut memory, mut random) = (GuestMemory::new(HeatParams { half_life, ..params() }), 1_u64);
            memory.adopt(1, vec![info(0, PAGES)]);
            let dt = Duration::from_millis(round_ms);
            let chance = 1.0 - (-0.5 * dt.as_secs_f64()).exp();
            for round in 0..60_000 / round_ms {
                let mut seen = harvest(&info(0, PAGES), &[]);
                seen.mapped.fill(!0);
                seen.on_slow.fill(!0);
                seen.levels.fill(Level::Page4K);
                for page in 0..PAGES as usize {
                    random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let is_accessed = ((random >> 11) as f64) < chance * (1_u64 << 53) as f64;
                    bitmap::fill(&mut seen.accessed, page..page + 1, is_accessed);
                }
                memory.observe(0, &seen, (round > 0).then_some(dt));
            }
            // Temperatures round down, the more the shorter steps are.
            let part = memory.slow_bits().accesses_per_s / (PAGES as f64 / 2.0);
            assert!((0.8..1.05).contains(&part), "{part} of the truth in rounds of {round_ms} ms");
        }
    }

    #[test]
    fn samples_weigh_for_all_of_their_mapping() {
        let mut memory = GuestMemory::new(params());
        memory.adopt(1, vec![info(700, 1000)]);
        let round = |memory: &mut GuestMemory| {
            let mut seen = harvest(&info(700, 1000), &[]);
            bitmap::fill(&mut seen.accessed, 0..1000, true);
            memory.observe(0, &seen, Some(Duration::from_millis(100)));
        };
        // What comes before the first harvest is of a time that does not count.
        memory.weigh([(701, Level::Page4K, 0)].into_iter());
        round(&mut memory);
        round(&mut memory);
        let ignored = [(1, Level::Page4K, 0), (5000, Level::Page4K, 0)];
        let samples = [(702, Level::Page4K, 0), (1100, Level::Huge2M, 0)];
        memory.weigh(samples.into_iter().chain(ignored));
        round(&mut memory);
        let heat = memory.views()[0].heat;
        let cold: Vec<u64> =
            (700..1700).filter(|gfn| heat.temperature((gfn - 700) as usize) < heat.temperature(1)).collect();
        // The mapping of 2 MiB goes from 1024 to 1536.
        assert!(cold.iter().copied().eq([702].into_iter().chain(1024..1536)), "{cold:?}");
    }
}
