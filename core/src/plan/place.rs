// SPDX-License-Identifier: MIT OR Apache-2.0
//! On which tier each page of a memory slot lies, as far as is known.

use std::ops::Range;

use crate::bitmap::{self, PageSet};
use crate::sampler::Level;
use crate::units::PAGES_PER_2M;
use crate::wire::Place;

/// Place of every page of one memory slot.
///
/// A harvest tells the place of mapped pages only. A page that the kernel has
/// just moved is unmapped until the guest touches it again, so what was known
/// stays known until a harvest or a move says otherwise.
#[derive(Clone, Debug)]
pub struct PlaceMap {
    gfn_start: u64,
    pages: usize,
    resident: PageSet,
    /// A subset of `resident`.
    slow: PageSet,
    /// For each 2 MiB of guest-physical space that the slot touches: how it was
    /// mapped when it last was.
    levels: Vec<Level>,
}

/// Number of pages by place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PlaceCounts {
    /// [`Place::Fast`].
    pub fast: u64,
    /// [`Place::Slow`].
    pub slow: u64,
    /// [`Place::Absent`].
    pub absent: u64,
}

impl PlaceMap {
    /// A map of the slot of `pages` pages from `gfn_start` on; nothing is known.
    pub fn new(gfn_start: u64, pages: usize) -> Self {
        let first_unit = gfn_start / PAGES_PER_2M;
        let end_unit = (gfn_start + pages as u64).div_ceil(PAGES_PER_2M).max(first_unit);
        PlaceMap {
            gfn_start,
            pages,
            resident: PageSet::new(pages),
            slow: PageSet::new(pages),
            levels: vec![Level::None; (end_unit - first_unit) as usize],
        }
    }

    /// First guest frame number of the slot.
    pub fn gfn_start(&self) -> u64 {
        self.gfn_start
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Takes in a harvest of the whole slot; missing words are zero.
    pub fn observe(&mut self, mapped: &[u64], on_slow: &[u64], levels: &[Level]) {
        self.observe_part(0..self.pages, mapped, on_slow, levels);
    }

    /// Takes in a harvest of some pages of the slot, from a page on that begins a word
    /// of a bitmap to another, or to the slot's last.
    pub fn observe_part(&mut self, pages: Range<usize>, mapped: &[u64], on_slow: &[u64], levels: &[Level]) {
        let pages = pages.start..pages.end.min(self.pages);
        let words = pages.start / bitmap::WORD_BITS..bitmap::words_for(pages.end);
        let last = self.pages / bitmap::WORD_BITS;
        let tail = |index| if index == last { bitmap::tail_mask(self.pages) } else { !0 };
        let mapped = |index| bitmap::word(mapped, index - words.start) & tail(index);
        let on_slow = |index| bitmap::word(on_slow, index - words.start);
        self.slow.update(words.clone(), |index, slow| slow & !mapped(index) | on_slow(index) & mapped(index));
        self.resident.update(words.clone(), |index, resident| resident | mapped(index));
        let first = (self.gfn_start + pages.start as u64) / PAGES_PER_2M - self.gfn_start / PAGES_PER_2M;
        for (known, seen) in self.levels.iter_mut().skip(first as usize).zip(levels) {
            if *seen != Level::None {
                *known = *seen;
            }
        }
    }

    /// Takes in what a move, or a look at the VMM's pages, said about `pages`
    /// (indices in the slot).
    pub fn record(&mut self, pages: Range<usize>, place: Place) {
        let pages = pages.start..pages.end.min(self.pages);
        self.resident.fill(pages.clone(), place != Place::Absent);
        self.slow.fill(pages, place == Place::Slow);
    }

    /// Place of `page`.
    pub fn place(&self, page: usize) -> Place {
        match (self.resident.contains(page), self.slow.contains(page)) {
            (false, _) => Place::Absent,
            (true, false) => Place::Fast,
            (true, true) => Place::Slow,
        }
    }

    /// Number of pages by place.
    pub fn counts(&self) -> PlaceCounts {
        let (resident, slow) = (self.resident.count(), self.slow.count());
        PlaceCounts { fast: resident - slow, slow, absent: self.pages as u64 - resident }
    }

    /// Words of pages on the fast and on the slow tier, for 64 pages each.
    pub(crate) fn words(&self, index: usize) -> (u64, u64) {
        let (resident, slow) = (self.resident.word(index), self.slow.word(index));
        (resident & !slow, slow)
    }

    /// Whether any of `pages` lies on the slow tier.
    pub(crate) fn any_slow(&self, pages: Range<usize>) -> bool {
        self.slow.any(pages)
    }

    /// How the 2 MiB of guest-physical space around `page` are mapped, and the end of that
    /// part of the slot.
    pub(crate) fn level(&self, page: usize) -> (Level, usize) {
        let unit = PAGES_PER_2M as usize;
        let index = (page + (self.gfn_start % PAGES_PER_2M) as usize) / unit;
        let end = (index + 1) * unit - (self.gfn_start % PAGES_PER_2M) as usize;
        (self.levels.get(index).copied().unwrap_or(Level::None), end.min(self.pages))
    }

    /// The parts of the slot that lie in one 2 MiB of guest-physical space each,
    /// with how that is mapped. The first and the last may be shorter.
    pub(crate) fn regions(&self) -> impl Iterator<Item = (Range<usize>, Level)> + '_ {
        let unit = PAGES_PER_2M as usize;
        // Pages of the first 2 MiB that lie before the slot.
        let offset = (self.gfn_start % PAGES_PER_2M) as usize;
        self.levels.iter().enumerate().map(move |(index, level)| {
            let start = (index * unit).saturating_sub(offset);
            let end = ((index + 1) * unit - offset).min(self.pages);
            (start..end, *level)
        })
    }

    /// The one place of all `pages`, if they share one.
    pub(super) fn common_place(&self, pages: Range<usize>) -> Option<Place> {
        match (self.resident.any(pages.clone()), self.slow.any(pages.clone())) {
            (false, _) => Some(Place::Absent),
            (true, false) => self.resident.all(pages).then_some(Place::Fast),
            (true, true) => self.slow.all(pages).then_some(Place::Slow),
        }
    }
}
