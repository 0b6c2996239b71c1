// SPDX-License-Identifier: MIT OR Apache-2.0
//! The units that may move: the coldest of the fast tier, the hottest of the
//! slow one, little more of either than a round can move.
//!
//! One pass over the cells. What can not be among the best so far is passed
//! over 64 pages at a time, which for most of a guest is all there is to do.

use std::ops::Range;

use crate::bitmap::{self, WORD_BITS};
use crate::heat::{COLD_BELOW, Histogram, MAX_TEMPERATURE, Summaries};
use crate::sampler::Level;
use crate::units::{PAGE_BYTES, PAGES_PER_2M};
use crate::wire::Place;

use super::gap::Estimate;
use super::joined::Region;
use super::potential::Potential;
use super::{MoveUnit, SlotView, Times};

/// A unit with what it is judged by.
#[derive(Clone, Copy, Debug)]
pub(super) struct Candidate {
    pub(super) unit: MoveUnit,
    pub(super) estimate: Estimate,
    /// It turned hot a few rounds ago.
    pub(super) turned: bool,
}

impl Candidate {
    pub(super) fn pages(&self) -> u64 {
        u64::from(self.unit.pages)
    }
}

/// What may move, in the order in which it should; equals by address.
pub(super) struct Candidates {
    /// Idle units of the fast tier.
    pub(super) coldest_fast: Vec<Candidate>,
    /// Units of the slow tier that are not cold.
    pub(super) hottest_slow: Vec<Candidate>,
    /// All units of both kinds.
    pub(super) potential: Potential,
}

impl Candidates {
    /// At least `wanted` pages of each kind, or all there are. What moved lately as
    /// often as `banned` says stays.
    pub(super) fn collect(slots: &[SlotView<'_>], wanted: u64, banned: Times) -> Self {
        let pages = slots.iter().map(|slot| slot.place.pages() as u64).sum();
        let mut survey = Survey {
            banned,
            potential: Potential::new(pages),
            summaries: Summaries::new(),
            any_turned: false,
            fast: Selection::new(wanted, u32::from(MAX_TEMPERATURE) + 1),
            slow: Selection::new(wanted, u32::from(distance_from_top(COLD_BELOW)) + 1),
        };
        for slot in slots {
            survey.summaries = Summaries::new();
            survey.any_turned = !slot.turned.is_empty();
            slot.regions().for_each(|region| survey.region(slot, region));
        }
        Candidates {
            coldest_fast: survey.fast.finish(),
            hottest_slow: survey.slow.finish(),
            potential: survey.potential,
        }
    }
}

/// The page that bit `bit` of word `index` stands for.
fn page_at(index: usize, bit: usize) -> Range<usize> {
    let page = index * WORD_BITS + bit;
    page..page + 1
}

/// The key of hot pages: the lowest is the hottest.
fn distance_from_top(temperature: u16) -> u16 {
    (MAX_TEMPERATURE - temperature).max(TURNED + 4)
}

/// The key of pages that turned hot, before all others. Others differ by four.
const TURNED: u16 = 0;

struct Survey {
    banned: Times,
    potential: Potential,
    /// Of the slot that is being searched.
    summaries: Summaries,
    /// Whether anything of it turned hot.
    any_turned: bool,
    fast: Selection,
    slow: Selection,
}

impl Survey {
    /// Offers what may move of a region, in order of address.
    fn region(&mut self, slot: &SlotView<'_>, region: Region) {
        let Region { pages, level, joined } = region;
        // A page of 1 GiB can not move in parts.
        if level == Level::Huge1G {
            return;
        }
        if joined {
            self.joined(slot, pages);
            return;
        }
        let whole = level == Level::Huge2M && pages.len() as u64 == PAGES_PER_2M;
        if let Some(place) = slot.place.common_place(pages.clone()).filter(|_| whole) {
            let mut masks = bitmap::masks(pages.clone());
            if masks.all(|(index, mask)| mask & self.stays(slot, index) == 0) {
                self.whole(slot, place, pages);
            }
            return;
        }
        for (index, mask) in bitmap::masks(pages) {
            self.block(slot, index, mask);
        }
    }

    /// Offers what the host keeps in one page, though the guest's tables map its parts.
    /// Where no unit can be all of it, as some are absent or known to lie elsewhere, each
    /// page is offered, but judged as all are.
    fn joined(&mut self, slot: &SlotView<'_>, pages: Range<usize>) {
        let stays = bitmap::masks(pages.clone()).any(|(index, mask)| mask & self.stays(slot, index) != 0);
        // The rest of a shorter one lies in another slot, or is none of the guest's.
        if stays || pages.len() as u64 != PAGES_PER_2M {
            return;
        }
        if let Some(place) = slot.place.common_place(pages.clone()) {
            self.whole(slot, place, pages);
            return;
        }
        for (index, mask) in bitmap::masks(pages.clone()) {
            let (fast, slow) = slot.place.words(index);
            for (place, word) in [(Place::Fast, fast & mask), (Place::Slow, slow & mask)] {
                bitmap::ones(word).for_each(|bit| self.part(slot, place, page_at(index, bit), pages.clone()));
            }
        }
    }

    /// The pages of a block of 64 that are not to be moved.
    fn stays(&self, slot: &SlotView<'_>, index: usize) -> u64 {
        bitmap::word(slot.held, index) | slot.recent.moved(index, self.banned)
    }

    /// Offers a whole huge page.
    fn whole(&mut self, slot: &SlotView<'_>, place: Place, pages: Range<usize>) {
        if self.potential.samples(pages.start / PAGES_PER_2M as usize) {
            self.sample(slot, place, pages.clone());
        }
        self.unit(slot, place, pages);
    }

    fn sample(&mut self, slot: &SlotView<'_>, place: Place, pages: Range<usize>) {
        let count = pages.len() as u64;
        match (place, slot.heat.unit(pages)) {
            (Place::Fast, (temperature, true)) => self.potential.add_fast(temperature, count),
            (Place::Slow, (temperature, _)) => self.potential.add_slow(temperature, count),
            _ => {}
        }
    }

    /// Offers the pages of a block of 64 that are in `mask`.
    fn block(&mut self, slot: &SlotView<'_>, index: usize, mask: u64) {
        let (fast, slow) = slot.place.words(index);
        if self.potential.samples(index) {
            let may = mask & !self.stays(slot, index);
            for (place, word) in [(Place::Fast, fast & may), (Place::Slow, slow & may)] {
                bitmap::ones(word).for_each(|bit| self.sample(slot, place, page_at(index, bit)));
            }
        }
        if fast & mask != 0
            && self.summaries.coldest_idle(slot.heat, index).is_some_and(|key| self.fast.wants(key))
        {
            let may = fast & mask & !self.stays(slot, index);
            bitmap::ones(may).for_each(|bit| self.unit(slot, Place::Fast, page_at(index, bit)));
        }
        if slow & mask == 0 {
            return;
        }
        let turned = self.turned(slot, index) & mask != 0;
        let key = if turned { TURNED } else { distance_from_top(self.summaries.hottest(slot.heat, index)) };
        if self.slow.wants(key) {
            let may = slow & mask & !self.stays(slot, index);
            bitmap::ones(may).for_each(|bit| self.unit(slot, Place::Slow, page_at(index, bit)));
        }
    }

    /// The pages of a block of 64 that turned hot.
    fn turned(&self, slot: &SlotView<'_>, index: usize) -> u64 {
        if self.any_turned { slot.turned.moved(index, Times::Once) } else { 0 }
    }

    fn unit(&mut self, slot: &SlotView<'_>, place: Place, pages: Range<usize>) {
        self.part(slot, place, pages.clone(), pages);
    }

    /// Offers `pages`, which are judged as `all` are.
    fn part(&mut self, slot: &SlotView<'_>, place: Place, pages: Range<usize>, all: Range<usize>) {
        let (temperature, idle) = slot.heat.unit(all.clone());
        let turned = bitmap::masks(all).any(|(index, mask)| self.turned(slot, index) & mask != 0);
        let (selection, key) = match place {
            Place::Fast if idle => (&mut self.fast, temperature),
            Place::Slow if turned => (&mut self.slow, TURNED),
            Place::Slow => (&mut self.slow, distance_from_top(temperature)),
            _ => return,
        };
        if selection.wants(key) {
            let unit = MoveUnit {
                gfn: slot.place.gfn_start() + pages.start as u64,
                hva: slot.hva + pages.start as u64 * PAGE_BYTES,
                pages: pages.len() as u32,
            };
            let estimate = Estimate { temperature, variance: slot.heat.variance() };
            selection.take(key, Candidate { unit, estimate, turned });
        }
    }
}

/// The units with the lowest keys of all that were offered.
struct Selection {
    /// Pages wanted.
    wanted: u64,
    /// Keys from here on are not wanted any more.
    bound: u32,
    /// Pages of `taken` by key.
    histogram: Histogram,
    pages: u64,
    taken: Vec<(u16, Candidate)>,
}

impl Selection {
    /// Pages taken beyond twice what is wanted before the surplus is dropped.
    const SLACK: u64 = 1 << 15;

    fn new(wanted: u64, bound: u32) -> Self {
        let bound = if wanted == 0 { 0 } else { bound };
        Selection { wanted, bound, histogram: Histogram::default(), pages: 0, taken: Vec::new() }
    }

    fn wants(&self, key: u16) -> bool {
        u32::from(key) < self.bound
    }

    fn take(&mut self, key: u16, candidate: Candidate) {
        self.histogram.add(key, candidate.pages());
        self.pages += candidate.pages();
        self.taken.push((key, candidate));
        if self.pages > self.wanted.saturating_mul(2).saturating_add(Self::SLACK) {
            self.drop_surplus();
        }
    }

    /// Keeps the lowest keys until there is enough, of equals those that came
    /// first; later ones must be lower.
    fn drop_surplus(&mut self) {
        let Some((threshold, below)) = self.histogram.lowest(self.wanted) else { return };
        let mut missing = self.wanted - below;
        let Selection { histogram, pages, .. } = self;
        self.taken.retain(|(key, candidate)| {
            let keep = *key < threshold || *key == threshold && missing > 0;
            if *key == threshold {
                missing = missing.saturating_sub(candidate.pages());
            }
            if !keep {
                histogram.remove(*key, candidate.pages());
                *pages -= candidate.pages();
            }
            keep
        });
        self.bound = threshold.into();
    }

    fn finish(mut self) -> Vec<Candidate> {
        self.drop_surplus();
        // Stable, so that equals stay in order of address.
        self.taken.sort_by_key(|(key, _)| *key);
        self.taken.into_iter().map(|(_, candidate)| candidate).collect()
    }
}
