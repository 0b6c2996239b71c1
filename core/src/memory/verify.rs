// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whether pages lie where the harvest says: some of them are drawn, and the host's
//! kernel is asked.

use crate::bitmap;
use crate::units::PAGE_BYTES;
use crate::wire::Place;

use super::{AskedPage, GuestMemory, Slot};

/// Words of a bitmap that are looked at for a page to draw.
const LONGEST_LOOK: usize = 1 << 10;

/// Numbers that look random, the same in each run: xorshift64 (Marsaglia, 2003).
pub(super) struct Random(u64);

impl Default for Random {
    fn default() -> Self {
        Self(1)
    }
}

impl Random {
    /// One below `bound`, which is not 0.
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound.max(1) as u64) as usize
    }
}

impl GuestMemory {
    /// Up to `limit` pages whose place the last harvest told, drawn anew each time from
    /// all of the memory.
    pub fn draw_mapped(&mut self, limit: usize) -> Vec<AskedPage> {
        let words_of = |slot: &Slot| bitmap::words_for(slot.info.page_count as usize);
        let words: usize = self.slots.iter().map(words_of).sum();
        let mut drawn = Vec::with_capacity(limit);
        for _ in 0..limit.min(words) {
            let mut word = self.random.below(words);
            let slot = self.slots.iter().position(|slot| {
                let is_here = word < words_of(slot);
                word -= if is_here { 0 } else { words_of(slot) };
                is_here
            });
            let Some((index, slot)) = slot.and_then(|index| Some((index, self.slots.get(index)?))) else {
                break;
            };
            // Little may be mapped: the first pages behind do as well.
            let mut rest =
                (word..words_of(slot)).take(LONGEST_LOOK).map(|word| (word, slot.mapped.word(word)));
            let Some((word, bits)) = rest.find(|(_, bits)| *bits != 0) else { continue };
            let nth = self.random.below(bits.count_ones() as usize);
            let bit = bitmap::ones(bits).nth(nth).unwrap_or_default();
            let page = word * bitmap::WORD_BITS + bit;
            drawn.push(AskedPage { hva: slot.info.hva + page as u64 * PAGE_BYTES, slot: index, page });
        }
        drawn
    }

    /// Compares where pages lie with what was known of them, and corrects that; the
    /// number of pages that lay on the other tier. Those without a node are none of them:
    /// a device's memory that the guest maps lies on no node, and others have just gone.
    pub fn verify_places(&mut self, pages: &[AskedPage], places: impl Iterator<Item = Place>) -> u64 {
        let mut wrong = 0;
        for (at, place) in pages.iter().zip(places) {
            let Some(slot) = self.slots.get_mut(at.slot) else { continue };
            if slot.place.place(at.page) != place {
                slot.place.record(at.page..at.page + 1, place);
                wrong += u64::from(place != Place::Absent);
            }
        }
        wrong
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{harvest, info, params};
    use super::*;

    #[test]
    fn places_are_verified_all_over_the_memory() {
        let mut memory = GuestMemory::new(params());
        assert_eq!(memory.draw_mapped(64), []);
        memory.adopt(1, vec![info(0, 70), info(512, 6400)]);
        memory.observe(0, &harvest(&info(0, 70), &[3]), None);
        memory.observe(1, &harvest(&info(512, 6400), &(0..6400).step_by(2).collect::<Vec<_>>()), None);
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..8000 {
            seen.extend(memory.draw_mapped(8).iter().map(|page| (page.hva - 0x7f00_0000_0000) / PAGE_BYTES));
        }
        // Every page that is mapped is drawn some time, and no other.
        let mapped: Vec<u64> = [3].into_iter().chain((512..512 + 6400).step_by(2)).collect();
        assert!(seen.iter().eq(&mapped), "{} of {}", seen.len(), mapped.len());
        let drawn = memory.draw_mapped(64);
        assert_eq!(drawn.len(), 64);
        assert_eq!(memory.verify_places(&drawn, drawn.iter().map(|_| Place::Fast)), 0);
        let elsewhere = |at: usize| if at == 7 { Place::Slow } else { Place::Fast };
        assert_eq!(memory.verify_places(&drawn, (0..64).map(elsewhere)), 1);
        assert_eq!(memory.places().slow, 1, "what was wrong is corrected");
        assert_eq!(memory.verify_places(&drawn[7..8], [Place::Slow].into_iter()), 0);
        let before = memory.places();
        assert_eq!(memory.verify_places(&drawn, std::iter::empty()), 0);
        assert_eq!(memory.places(), before, "nothing was told");
        assert_eq!(memory.verify_places(&drawn[8..9], [Place::Absent].into_iter()), 0);
        assert_eq!(memory.places().absent, before.absent + 1);
    }
}
