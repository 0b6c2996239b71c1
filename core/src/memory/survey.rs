// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the memory lies that no table entry tells of: a page that was unmapped, and not
//! touched since, may be on any node. The host's kernel is asked, a few pages a round.

use super::GuestMemory;
use crate::bitmap;
use crate::units::PAGE_BYTES;
use crate::wire::Place;

/// A page whose place is asked of the host's kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AskedPage {
    /// Address in the VMM.
    pub hva: u64,
    pub(super) slot: usize,
    pub(super) page: usize,
}

impl GuestMemory {
    /// Whether the place of every page has been looked at once.
    pub fn surveyed(&self) -> bool {
        self.surveyed
    }

    /// Whether the last look at unmapped pages came to the end of the memory.
    pub fn survey_came_round(&self) -> bool {
        self.survey_at == (0, 0)
    }

    /// Forgets that the places were looked at: the tiers have changed.
    pub fn survey_again(&mut self) {
        self.surveyed = false;
        self.survey_at = (0, 0);
    }

    /// The next unmapped pages to look at, at most `limit`: those whose place the
    /// harvest can not tell, because the guest did not touch them since they were last
    /// unmapped. Fewer at the end of the memory; the call after that begins again.
    pub fn next_unmapped(&mut self, limit: usize) -> Vec<AskedPage> {
        let mut found = Vec::new();
        let (mut index, mut page) = self.survey_at;
        while let Some(slot) = self.slots.get(index) {
            let pages = slot.info.page_count as usize;
            while page < pages {
                // Whole words of mapped pages are the common case.
                if page % bitmap::WORD_BITS == 0 && slot.mapped.word(page / bitmap::WORD_BITS) == !0 {
                    page += bitmap::WORD_BITS;
                    continue;
                }
                if !slot.mapped.contains(page) {
                    if found.len() == limit {
                        self.survey_at = (index, page);
                        return found;
                    }
                    found.push(AskedPage {
                        hva: slot.info.hva + page as u64 * PAGE_BYTES,
                        slot: index,
                        page,
                    });
                }
                page += 1;
            }
            (index, page) = (index + 1, 0);
        }
        self.survey_at = (0, 0);
        found
    }

    /// Takes in where the pages of [`GuestMemory::next_unmapped`] lie. Those of which it
    /// was not told are looked at again.
    pub fn record_places(&mut self, pages: &[AskedPage], mut places: impl Iterator<Item = Place>) {
        for at in pages {
            let Some(place) = places.next() else {
                self.survey_at = (at.slot, at.page);
                return;
            };
            if let Some(slot) = self.slots.get_mut(at.slot) {
                slot.place.record(at.page..at.page + 1, place);
            }
        }
        // The search has come back to the start.
        self.surveyed |= self.survey_came_round();
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{harvest, info, params};
    use super::*;
    use crate::plan::PlaceCounts;

    #[test]
    fn surveys_every_unmapped_page_once_a_pass() {
        let mut memory = GuestMemory::new(params());
        memory.adopt(1, vec![info(0, 130), info(512, 3)]);
        let mapped: Vec<usize> = (0..128).collect();
        memory.observe(0, &harvest(&info(0, 130), &mapped), None);
        memory.observe(1, &harvest(&info(512, 3), &[1]), None);
        for _ in 0..2 {
            let mut gfns = Vec::new();
            loop {
                let pages = memory.next_unmapped(3);
                gfns.extend(pages.iter().map(|page| (page.hva - 0x7f00_0000_0000) / PAGE_BYTES));
                memory.record_places(&pages, pages.iter().map(|_| Place::Slow));
                if memory.survey_at == (0, 0) {
                    break;
                }
                assert!(pages.len() == 3);
            }
            assert_eq!(gfns, [128, 129, 512, 514]);
            assert!(memory.surveyed());
        }
        // Those that the kernel did not tell of are asked for again.
        memory.survey_again();
        for told in [0, 2] {
            let pages = memory.next_unmapped(3);
            memory.record_places(&pages, pages.iter().take(told).map(|_| Place::Slow));
        }
        let pages = memory.next_unmapped(3);
        assert_eq!((pages[0].page, pages.len(), memory.surveyed()), (0, 2, false));
        memory.record_places(&pages, pages.iter().map(|_| Place::Slow));
        assert!(memory.surveyed());
        assert_eq!(memory.places(), PlaceCounts { fast: 129, slow: 4, absent: 0 });
        // A new slot has to be looked at first.
        memory.adopt(2, vec![info(0, 130), info(512, 3), info(1024, 1)]);
        assert!(!memory.surveyed());
    }

    #[test]
    fn a_survey_without_slots_ends() {
        let mut memory = GuestMemory::new(params());
        assert_eq!(memory.next_unmapped(10), []);
        memory.record_places(&[], [].into_iter());
        assert!(memory.surveyed());
    }
}
