// SPDX-License-Identifier: MIT OR Apache-2.0
//! The units that may move: the coldest of the fast tier, the hottest of the
//! slow one, no more of either than a round can move.

use crate::bitmap::{self, WORD_BITS};
use crate::heat::Histogram;
use crate::sampler::Level;
use crate::units::{PAGE_BYTES, PAGES_PER_2M};
use crate::wire::Place;

use super::{MoveUnit, SlotView, worth_promoting};

/// A unit with what it is judged by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) unit: MoveUnit,
    pub(super) temperature: u16,
}

impl Candidate {
    pub(super) fn pages(&self) -> u64 {
        u64::from(self.unit.pages)
    }
}

/// What may move, in the order in which it should.
pub(super) struct Candidates {
    /// Idle units of the fast tier.
    pub(super) coldest_fast: Vec<Candidate>,
    /// Units of the slow tier that are worth promoting.
    pub(super) hottest_slow: Vec<Candidate>,
}

impl Candidates {
    /// At least `wanted` pages of each kind, or all there are. Two passes: the
    /// first counts pages by temperature, the second takes those beyond the
    /// threshold, so that only what is taken is sorted.
    pub(super) fn collect(slots: &[SlotView<'_>], wanted: u64) -> Self {
        let mut kinds = [Selection::default(), Selection::default()];
        if wanted == 0 {
            return Candidates { coldest_fast: Vec::new(), hottest_slow: Vec::new() };
        }
        for slot in slots {
            each_candidate(slot, |place, candidate| {
                kinds[usize::from(place == Place::Slow)]
                    .histogram
                    .add(candidate.temperature, candidate.pages());
            });
        }
        let (cold_from, colder) = kinds[0].histogram.coldest(wanted);
        kinds[0].threshold = cold_from;
        kinds[0].at_threshold = wanted.saturating_sub(colder);
        let (hot_from, hotter) = kinds[1].histogram.hottest(wanted);
        kinds[1].threshold = hot_from;
        kinds[1].at_threshold = wanted.saturating_sub(hotter);
        for slot in slots {
            each_candidate(slot, |place, candidate| match place {
                Place::Slow => kinds[1].offer(candidate, candidate.temperature > hot_from),
                _ => kinds[0].offer(candidate, candidate.temperature < cold_from),
            });
        }
        let [mut cold, mut hot] = kinds.map(|kind| kind.taken);
        // Stable: among equals the lower address goes first.
        cold.sort_by_key(|candidate| candidate.temperature);
        hot.sort_by_key(|candidate| std::cmp::Reverse(candidate.temperature));
        Candidates { coldest_fast: cold, hottest_slow: hot }
    }
}

/// One kind of candidate while it is collected.
#[derive(Default)]
struct Selection {
    histogram: Histogram,
    threshold: u16,
    /// Pages still to be taken of those that are exactly at the threshold.
    at_threshold: u64,
    taken: Vec<Candidate>,
}

impl Selection {
    fn offer(&mut self, candidate: Candidate, beyond: bool) {
        if beyond {
            self.taken.push(candidate);
        } else if candidate.temperature == self.threshold && self.at_threshold > 0 {
            self.at_threshold = self.at_threshold.saturating_sub(candidate.pages());
            self.taken.push(candidate);
        }
    }
}

/// Calls `visit` for each unit of `slot` that may move, in order of address.
fn each_candidate(slot: &SlotView<'_>, mut visit: impl FnMut(Place, Candidate)) {
    let mut offer = |place: Place, page: usize, pages: u32| {
        let range = page..page + pages as usize;
        let (temperature, idle) = slot.heat.unit(range);
        let may_move = match place {
            Place::Fast => idle,
            Place::Slow => worth_promoting(temperature),
            Place::Absent => false,
        };
        if may_move {
            let gfn = slot.place.gfn_start() + page as u64;
            let unit = MoveUnit { gfn, hva: slot.hva + page as u64 * PAGE_BYTES, pages };
            visit(place, Candidate { unit, temperature });
        }
    };
    for (pages, level) in slot.place.regions() {
        // A page of 1 GiB can not move in parts.
        if level == Level::Huge1G {
            continue;
        }
        let whole = level == Level::Huge2M && pages.len() as u64 == PAGES_PER_2M;
        match slot.place.common_place(pages.clone()) {
            Some(place) if whole => {
                if !bitmap::any(slot.held, pages.clone()) {
                    offer(place, pages.start, PAGES_PER_2M as u32);
                }
                continue;
            }
            _ => {}
        }
        let mut page = pages.start;
        while page < pages.end {
            let index = page / WORD_BITS;
            let end = ((index + 1) * WORD_BITS).min(pages.end);
            let (fast, slow) = slot.place.words(index);
            let free = !bitmap::word(slot.held, index);
            for bit in bitmap::ones((fast | slow) & free) {
                let at = index * WORD_BITS + bit;
                if at >= page && at < end {
                    let place = if slow >> bit & 1 == 1 { Place::Slow } else { Place::Fast };
                    offer(place, at, 1);
                }
            }
            page = end;
        }
    }
}
