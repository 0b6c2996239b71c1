// SPDX-License-Identifier: MIT OR Apache-2.0
//! What samples tell of a guest's memory, and what is asked of it for the slow-down
//! guard.

use crate::bitmap;
use crate::sampler::Level;
use crate::slowdown::SlowBits;
use crate::units::PAGES_PER_2M;
use crate::wire::Place;

use super::GuestMemory;

impl GuestMemory {
    /// What bits tell of accesses to the slow tier. A huge page counts as one.
    pub fn slow_bits(&self) -> SlowBits {
        let mut bits = SlowBits::default();
        for slot in &self.slots {
            for (pages, level) in slot.place.regions() {
                let is_huge = matches!(level, Level::Huge2M | Level::Huge1G);
                for (index, mask) in bitmap::masks(pages.clone()) {
                    let (fast, slow) = slot.place.words(index);
                    let mapped = slot.mapped.word(index) & mask;
                    if is_huge && mapped != 0 {
                        bits.all_mappings += 1;
                        if slow & mapped != 0 {
                            bits.mappings += 1;
                            bits.add(slot.heat.unit(pages.clone()).0);
                        }
                        break;
                    }
                    bits.all_mappings += u64::from(((fast | slow) & mapped).count_ones());
                    bits.mappings += u64::from((slow & mapped).count_ones());
                    // Most of it is cold.
                    let block = index * bitmap::WORD_BITS..(index + 1) * bitmap::WORD_BITS;
                    if slow & mapped != 0 && slot.heat.extremes(block).1 > 0 {
                        let pages = bitmap::ones(slow & mapped).map(|bit| index * bitmap::WORD_BITS + bit);
                        pages.for_each(|page| bits.add(slot.heat.temperature(page)));
                    }
                }
            }
        }
        bits
    }

    /// How many of these frames lie on the slow tier.
    pub fn count_slow(&self, frames: impl Iterator<Item = u64>) -> u64 {
        let is_slow = |gfn: &u64| {
            let after = self.slots.partition_point(|slot| slot.info.gfn_start <= *gfn);
            let slot = after.checked_sub(1).and_then(|index| self.slots.get(index));
            slot.is_some_and(|slot| slot.place.place((gfn - slot.info.gfn_start) as usize) == Place::Slow)
        };
        frames.filter(is_slow).count() as u64
    }

    /// Takes in what was sampled since the last round, before the harvest of this one:
    /// a page, the size of its mapping, and how much the access weighs.
    pub fn weigh(&mut self, samples: impl Iterator<Item = (u64, Level, u32)>) {
        for (gfn, level, weight) in samples {
            let after = self.slots.partition_point(|slot| slot.info.gfn_start <= gfn);
            let slot = after.checked_sub(1).and_then(|index| self.slots.get_mut(index));
            // Of a slot that was never harvested nothing counts yet.
            let Some(slot) = slot.filter(|slot| slot.observed) else { continue };
            let pages = match level {
                Level::None | Level::Page4K => 1,
                Level::Huge2M => PAGES_PER_2M,
                Level::Huge1G => PAGES_PER_2M * PAGES_PER_2M,
            };
            let (first, end) = (slot.info.gfn_start, slot.info.gfn_start + slot.info.page_count);
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
        assert_eq!(memory.slow_bits(), SlowBits { accesses: 0.0, mappings: 13, all_mappings: 513 });
        memory.observe(0, &seen, Some(Duration::from_secs(1)));
        let mut expected = SlowBits { mappings: 13, all_mappings: 513, ..SlowBits::default() };
        let heat = memory.views()[0].heat;
        (0..8).for_each(|_| expected.add(heat.temperature(505)));
        let found = memory.slow_bits();
        assert!((found.accesses - expected.accesses).abs() < 1e-9 && found.accesses > 0.0);
        assert_eq!((found.mappings, found.all_mappings), (13, 513));
        assert_eq!(memory.count_slow([499, 500, 1023, 1024, 9999].into_iter()), 2);
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
