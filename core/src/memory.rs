// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is known of a guest's memory: heat and place of every page.

mod excluded;
mod holds;
mod joined;
mod samples;
mod staying;
mod survey;
mod turned;
mod verify;

use std::ops::Range;
use std::time::Duration;

use crate::bitmap::{self, PageSet};
use crate::heat::store::SlotRange;
use crate::heat::{self, ClassCounts, HeatMap, HeatParams, Round, Span, Surprise};
use crate::migrate::{MoveOutcome, Refused};
use crate::plan::{self, Joined, MoveUnit, PlaceCounts, PlaceMap, Plan, PlanInput, Recent, SlotView, Times};
use crate::policy::Excluded;
use crate::sampler::{Harvest, MemSlot};
use crate::units::{Bytes, PAGES_PER_2M, Share};
use crate::wire::Place;

use holds::Holds;
pub use holds::SHORTEST_HOLD;
pub use staying::Staying;
pub use survey::AskedPage;
use turned::Turned;
use verify::Random;

/// Rounds after the start, or after the guest turned to other pages, in which it
/// settles: see [`PlanInput::settling`]. In the simulator zipf comes to 97 % of the best
/// within five, and to 98 % within ten of them; more only move more.
const SETTLING_ROUNDS: u32 = 8;

/// Part of the memory that may move in a minute for little gain, both directions
/// together: 1/1200.
const TRICKLE_PER_MINUTE: f64 = 1.0 / 1200.0;

/// A part of the time in which a guest was watched, from which on less is a new look:
/// windows that follow the guest change by less.
const CLOSER: u32 = 4;

/// Minutes for which that is saved up, so that seldom rounds lose none of it.
const TRICKLE_MINUTES: f64 = 10.0;

/// A read-write memory slot.
struct Slot {
    info: MemSlot,
    heat: HeatMap,
    place: PlaceMap,
    /// As the last harvest saw it.
    mapped: PageSet,
    /// Pages that are not planned.
    holds: Holds,
    recent: Recent,
    /// What turned hot a few rounds ago.
    turned: Recent,
    /// What the host moves in pieces of 2 MiB, whatever the guest's tables say.
    joined: Joined,
    /// The round that is being taken in.
    round: Option<Round>,
    /// All its heat, in pages of the highest temperature, as last known.
    warmth: f64,
    /// It was harvested before, by this daemon or the one whose heat came back.
    observed: bool,
}

impl Slot {
    fn new(info: MemSlot, params: HeatParams) -> Self {
        let pages = info.page_count as usize;
        let mut slot = Self {
            info,
            heat: HeatMap::new(pages, params),
            place: PlaceMap::new(info.gfn_start, pages),
            mapped: PageSet::new(pages),
            holds: Holds::new(pages),
            recent: Recent::default(),
            turned: Recent::default(),
            joined: Joined::default(),
            round: None,
            warmth: 0.0,
            observed: false,
        };
        slot.holds.set_logged(info.dirty_log);
        slot
    }

    fn view(&self) -> SlotView<'_> {
        let Self { info, heat, place, holds, recent, turned, joined, .. } = self;
        SlotView { hva: info.hva, heat, place, held: holds.held(), recent, turned, joined }
    }

    /// The pages of a word of a bitmap that are not to be moved now.
    fn stays(&self, word: usize) -> u64 {
        bitmap::word(self.holds.held(), word) | self.recent.moved(word, Times::Once)
    }

    fn covers(&self, other: &MemSlot) -> bool {
        let key = |slot: &MemSlot| (slot.gfn_start, slot.page_count, slot.hva);
        key(&self.info) == key(other)
    }
}

/// A guest's memory: its read-write memory slots.
pub struct GuestMemory {
    params: HeatParams,
    generation: Option<u64>,
    slots: Vec<Slot>,
    /// Slots that the guest can only read: never placed, but they share the VMM's memory
    /// with others.
    read_only: Vec<MemSlot>,
    excluded: Excluded,
    random: Random,
    /// Where the survey of unmapped pages goes on: slot and page.
    survey_at: (usize, usize),
    surveyed: bool,
    /// Of the round that is being taken in.
    surprise: Surprise,
    /// Rounds since the start, or since the guest turned to other pages.
    settled_for: u32,
    /// Pages that may move for little gain.
    trickle: f64,
    /// The variance of temperatures by which all was put right last.
    passed_at: f64,
    turned: Turned,
}

impl GuestMemory {
    /// Nothing is known yet.
    pub fn new(params: HeatParams) -> Self {
        Self {
            params,
            generation: None,
            slots: Vec::new(),
            read_only: Vec::new(),
            excluded: Excluded::default(),
            random: Random::default(),
            survey_at: (0, 0),
            surveyed: false,
            surprise: Surprise::default(),
            settled_for: 0,
            trickle: 0.0,
            passed_at: f64::INFINITY,
            turned: Turned::default(),
        }
    }

    /// Goes on with other parameters.
    pub fn set_params(&mut self, params: HeatParams) {
        if self.params != params {
            self.params = params;
            self.slots.iter_mut().for_each(|slot| slot.heat.set_params(params));
        }
    }

    /// Leaves this memory where it is, and no other for good.
    pub fn exclude(&mut self, excluded: &Excluded) {
        if self.excluded != *excluded {
            self.excluded.clone_from(excluded);
            self.hold_excluded();
        }
    }

    /// All slots, those that can only be read too.
    fn infos(&self) -> impl Iterator<Item = &MemSlot> {
        self.slots.iter().map(|slot| &slot.info).chain(&self.read_only)
    }

    /// Holds for good what is excluded and what moves with it, in all slots.
    fn hold_excluded(&mut self) {
        let blocks = excluded::blocks(self.infos(), &self.excluded.frames);
        for slot in &mut self.slots {
            slot.holds.exclude(excluded::pages_in(&slot.info, &blocks));
        }
    }

    /// Memory that is excluded, and what can not be moved without it.
    pub fn excluded_bytes(&self) -> Bytes {
        Bytes::of_pages(self.slots.iter().map(|slot| slot.holds.excluded_pages()).sum())
    }

    /// Frames that are excluded and of which none is memory.
    pub fn excluded_in_vain(&self) -> impl Iterator<Item = &Range<u64>> {
        let is_memory = |frames: &&Range<u64>| {
            let mut slots = self.infos().map(MemSlot::frames);
            slots.any(|own| own.start < frames.end && frames.start < own.end)
        };
        self.excluded.frames.iter().filter(move |frames| !is_memory(frames))
    }

    /// Takes in the guest's slots. What is known of slots that are still the
    /// same is kept. False if nothing has changed.
    pub fn adopt(&mut self, generation: u64, infos: Vec<MemSlot>) -> bool {
        let earlier = self.generation.replace(generation);
        if earlier == Some(generation) {
            return false;
        }
        let mut before = std::mem::take(&mut self.slots);
        let (read_only, infos): (Vec<_>, Vec<_>) = infos.into_iter().partition(|info| info.read_only);
        self.read_only = read_only;
        for info in infos {
            let slot = match before.iter().position(|slot| slot.covers(&info)) {
                Some(index) => {
                    let mut slot = before.swap_remove(index);
                    slot.info = info;
                    slot.holds.set_logged(info.dirty_log);
                    slot
                }
                None => {
                    self.surveyed = false;
                    let mut slot = Slot::new(info, self.params);
                    // Where a device that was plugged in lies is told a moment later.
                    if self.excluded.by_device && earlier.is_some() {
                        slot.holds.await_device();
                    }
                    slot
                }
            };
            self.slots.push(slot);
        }
        self.slots.sort_by_key(|slot| slot.info.gfn_start);
        // A slot that came or went may share 2 MiB with one that stayed.
        self.hold_excluded();
        self.survey_at = (0, 0);
        true
    }

    /// The slots, by index.
    pub fn slots(&self) -> impl Iterator<Item = (usize, &MemSlot)> {
        self.slots.iter().map(|slot| &slot.info).enumerate()
    }

    /// Size of all slots.
    pub fn bytes(&self) -> Bytes {
        Bytes::of_pages(self.slots.iter().map(|slot| slot.info.page_count).sum())
    }

    /// Whether most of the memory is being dirty-logged, as during a live
    /// migration. A display logs its video memory only.
    pub fn mostly_logged(&self) -> bool {
        let logged = self.slots.iter().filter(|slot| slot.info.dirty_log);
        Bytes::of_pages(logged.map(|slot| slot.info.page_count).sum()) > Bytes(self.bytes().0 / 2)
    }

    /// For plans and pictures.
    pub fn views(&self) -> Vec<SlotView<'_>> {
        self.slots.iter().map(Slot::view).collect()
    }

    /// Takes in the harvest of the whole slot `index`: see [`GuestMemory::observe_part`].
    pub fn observe(&mut self, index: usize, harvest: &Harvest, elapsed: Option<Duration>) {
        let pages = self.slots.get(index).map_or(0, |slot| slot.info.page_count as usize);
        self.observe_part(index, 0..pages, harvest, elapsed.map(Span::from));
    }

    /// Takes in the harvest of some pages of the slot `index`, from one on that begins a
    /// word of a bitmap. The parts of a slot come in order, none is left out. Without
    /// `span`, as in the first round, a harvest says where pages lie but not when
    /// they were accessed. Nor does the first one of a slot: its bits may be from long
    /// ago.
    pub fn observe_part(&mut self, index: usize, pages: Range<usize>, harvest: &Harvest, span: Option<Span>) {
        let Some(slot) = self.slots.get_mut(index) else { return };
        let words = pages.start / bitmap::WORD_BITS..bitmap::words_for(pages.end);
        slot.place.observe_part(pages.clone(), &harvest.mapped, &harvest.on_slow, &harvest.levels);
        slot.mapped.update(words.clone(), |word, _| bitmap::word(&harvest.mapped, word - words.start));
        if pages.start == 0 {
            slot.round = span.filter(|_| slot.observed).map(|span| slot.heat.begin(span));
        }
        if let Some(round) = &mut slot.round {
            slot.heat.part(round, words, &harvest.accessed);
        }
        if pages.end >= slot.heat.pages() {
            slot.observed = true;
            if let Some(round) = slot.round.take() {
                let surprise = slot.heat.end(round);
                self.surprise += surprise;
                slot.warmth = if surprise.heat > 0.0 { surprise.heat } else { slot.warmth };
            }
        }
    }

    /// Ends a round, after all slots were taken in. Without `span` it does not count for
    /// the heat.
    pub fn end_round(&mut self, span: Option<Span>) {
        // Of all slots, also of those whose temperatures are stepped later.
        let heat = self.heat();
        let surprise = Surprise { heat, ..std::mem::take(&mut self.surprise) };
        for slot in &mut self.slots {
            slot.recent.next_round();
            slot.turned.next_round();
        }
        let Some(span) = span else { return };
        let pages = self.bytes().pages() as f64;
        let minutes = span.elapsed.as_secs_f64() / 60.0;
        let seen: u64 = self.slots.iter().map(|slot| slot.heat.seen()).sum();
        self.turned.take(pages, seen as f64, heat, minutes);
        let gained = pages * TRICKLE_PER_MINUTE * minutes;
        // Enough for a huge page to come and one to go, in the end.
        let most = (pages * TRICKLE_PER_MINUTE * TRICKLE_MINUTES).max(2.0 * PAGES_PER_2M as f64);
        self.trickle = (self.trickle + gained).min(most);
        self.settled_for = self.settled_for.saturating_add(1);
        if surprise.is_shift() || self.is_much_closer(span) {
            self.slots.iter_mut().for_each(|slot| slot.heat.restart());
            self.settled_for = 0;
        } else if !self.is_settling() {
            for run in self.turned.find(&self.slots) {
                let slot = &mut self.slots[run.slot];
                slot.heat.turn_hot(run.pages.clone());
                slot.turned.record(run.pages);
            }
        }
    }

    /// Whether the guest is watched for a much shorter time than what temperatures are
    /// made of. In that almost all was accessed, so they tell nothing.
    fn is_much_closer(&self, span: Span) -> bool {
        let step = heat::most_pages(self.slots.iter().map(|slot| &slot.heat)).map(HeatMap::mean_step);
        span.watched < span.elapsed && step.is_some_and(|step| step > span.watched * CLOSER)
    }

    /// Whether much of what is known is new.
    pub fn is_settling(&self) -> bool {
        self.settled_for <= SETTLING_ROUNDS
    }

    /// All heat, in pages of the highest temperature.
    fn heat(&self) -> f64 {
        self.slots.iter().map(|slot| slot.warmth).sum()
    }

    /// How uncertain most temperatures are.
    fn variance(&self) -> f64 {
        heat::most_pages(self.slots.iter().map(|slot| &slot.heat)).map_or(0.0, HeatMap::variance)
    }

    /// What to move: see [`PlanInput`]. A plan that is carried out is to be told to
    /// [`GuestMemory::accept`].
    pub fn plan(&self, dram_target: Option<Bytes>, gap: Share, quota_pages: u64) -> Plan {
        plan::plan(&PlanInput {
            slots: &self.views(),
            dram_target,
            gap,
            quota_pages,
            settling: self.is_settling(),
            heat: self.heat(),
            trickle_pages: if self.passes() { u64::MAX } else { self.trickle as u64 },
        })
    }

    /// Whether all that lies wrong is to be put right: knowing twice as much, also what
    /// does so by little.
    fn passes(&self) -> bool {
        self.is_settling() || self.variance() * 2.0 <= self.passed_at
    }

    /// Takes note that all of `plan`, which had this quota, is carried out.
    pub fn accept(&mut self, plan: &Plan, quota_pages: u64) {
        if !self.passes() {
            self.trickle -= plan.trickled_pages as f64;
        } else if self.is_settling() || plan.pages() < quota_pages / 2 {
            // Of what a round could not move, the next one moves more.
            self.passed_at = self.variance();
        }
    }

    /// Takes in heat from before this daemon; the number of slots that it is of.
    pub fn recall(&mut self, heat: Vec<(SlotRange, Vec<u16>)>) -> usize {
        let mut found = 0;
        for (range, cells) in heat {
            if let Some(slot) = self.slots.iter_mut().find(|slot| SlotRange::from(&slot.info) == range) {
                slot.heat = HeatMap::from_cells(slot.info.page_count as usize, self.params, cells);
                slot.observed = true;
                found += 1;
                self.settled_for = SETTLING_ROUNDS + 1;
            }
        }
        found
    }

    /// Readies all heat for [`GuestMemory::copy_cells`], and lists the slots.
    pub fn settle(&mut self) -> Vec<SlotRange> {
        for slot in &mut self.slots {
            self.surprise += slot.heat.settle();
        }
        self.slots.iter().map(|slot| SlotRange::from(&slot.info)).collect()
    }

    /// Copies the heat of some pages, as far as the slot goes; whether it is
    /// still there.
    pub fn copy_cells(&self, range: &SlotRange, pages: Range<usize>, out: &mut Vec<u16>) -> bool {
        out.clear();
        let Some(slot) = self.slots.iter().find(|slot| SlotRange::from(&slot.info) == *range) else {
            return false;
        };
        let cells = slot.heat.cells();
        let end = pages.end.min(cells.len());
        out.extend_from_slice(cells.get(pages.start..end).unwrap_or_default());
        true
    }

    /// Pages by place.
    pub fn places(&self) -> PlaceCounts {
        self.slots.iter().map(|slot| slot.place.counts()).fold(PlaceCounts::default(), |sum, slot| {
            PlaceCounts {
                fast: sum.fast + slot.fast,
                slow: sum.slow + slot.slow,
                absent: sum.absent + slot.absent,
            }
        })
    }

    /// Pages by class.
    pub fn classes(&self) -> ClassCounts {
        self.slots.iter().map(|slot| slot.heat.class_counts()).fold(ClassCounts::default(), |sum, slot| {
            ClassCounts { hot: sum.hot + slot.hot, warm: sum.warm + slot.warm, cold: sum.cold + slot.cold }
        })
    }

    /// Takes in what became, at `now`, of units that were to go to the tier `target`.
    pub fn record_moves(&mut self, outcome: &MoveOutcome, target: Place, now: Duration) {
        for (unit, result) in &outcome.units {
            let Some((slot, pages)) = self.locate(unit) else { continue };
            match result {
                Ok(()) => {
                    slot.place.record(pages.clone(), target);
                    slot.recent.record(pages);
                }
                Err(Refused::AlreadyThere) => slot.place.record(pages, target),
                Err(Refused::NotPresent) => slot.place.record(pages, Place::Absent),
                // What is wrong with the node, or with our rights, is not the page's. A
                // pool of hugetlbfs that is used up keeps only such pages from moving.
                Err(Refused::NodeFull | Refused::NotPermitted) => {}
                Err(_) => slot.holds.refuse(pages, now),
            }
        }
        self.record_along(outcome, target);
    }

    /// Lets pages be planned again that were refused, when they were held for long
    /// enough at `now`: [`SHORTEST_HOLD`] at first.
    pub fn release_held(&mut self, now: Duration) {
        self.slots.iter_mut().for_each(|slot| slot.holds.release(now));
    }

    /// The last slot that begins at a frame or before it; the frame may lie behind it.
    fn slot_from(&self, gfn: u64) -> Option<usize> {
        self.slots.partition_point(|slot| slot.info.gfn_start <= gfn).checked_sub(1)
    }

    fn locate(&mut self, unit: &MoveUnit) -> Option<(&mut Slot, Range<usize>)> {
        let index = self.slot_from(unit.gfn)?;
        let slot = self.slots.get_mut(index)?;
        let start = (unit.gfn - slot.info.gfn_start) as usize;
        Some((slot, start..start + unit.pages as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sampler::Level;
    use crate::units::PAGE_BYTES;

    pub(super) fn params() -> HeatParams {
        HeatParams { half_life: Duration::from_secs(1), delay: Duration::from_secs(1) }
    }

    pub(super) fn info(gfn_start: u64, page_count: u64) -> MemSlot {
        let hva = 0x7f00_0000_0000 + gfn_start * PAGE_BYTES;
        MemSlot { gfn_start, page_count, hva, id: 0, read_only: false, dirty_log: false }
    }

    pub(super) fn harvest(slot: &MemSlot, mapped: &[usize]) -> Harvest {
        let mut harvest = Harvest::default();
        harvest.reset(slot.gfn_start, slot.page_count);
        for page in mapped {
            bitmap::fill(&mut harvest.mapped, *page..*page + 1, true);
        }
        harvest
    }

    fn unit(gfn: u64) -> MoveUnit {
        MoveUnit { gfn, hva: 0x7f00_0000_0000 + gfn * PAGE_BYTES, pages: 1 }
    }

    #[test]
    fn keeps_what_is_known_of_unchanged_slots() {
        let mut memory = GuestMemory::new(params());
        let rom = MemSlot { read_only: true, ..info(300, 10) };
        memory.adopt(1, vec![info(0, 100), rom, info(512, 200)]);
        assert_eq!(memory.bytes(), Bytes::of_pages(300));
        memory.observe(0, &harvest(&info(0, 100), &[5]), None);
        memory.observe(1, &harvest(&info(512, 200), &[7, 8]), None);
        assert_eq!(memory.places(), PlaceCounts { fast: 3, slow: 0, absent: 297 });
        // The same generation: nothing to do.
        memory.adopt(1, Vec::new());
        assert_eq!(memory.slots().count(), 2);
        memory.adopt(2, vec![info(512, 200), info(1024, 64)]);
        assert_eq!(memory.places(), PlaceCounts { fast: 2, slow: 0, absent: 262 });
        let starts: Vec<u64> = memory.slots().map(|(_, slot)| slot.gfn_start).collect();
        assert_eq!(starts, [512, 1024]);
    }

    #[test]
    fn a_harvest_in_parts_is_as_one_at_once() {
        let slot = info(300, 9000);
        let seen = |first: u64, pages: u64| {
            let mut harvest = Harvest::default();
            harvest.reset(slot.gfn_start + first, pages);
            for page in 0..pages as usize {
                let index = first as usize + page;
                bitmap::fill(&mut harvest.mapped, page..page + 1, index % 7 != 3);
                bitmap::fill(&mut harvest.on_slow, page..page + 1, index % 5 == 0 && index % 7 != 3);
                bitmap::fill(&mut harvest.accessed, page..page + 1, index % 7 == 1);
            }
            for (index, level) in harvest.levels.iter_mut().enumerate() {
                let region = (slot.gfn_start + first) / 512 + index as u64;
                *level = if region % 2 == 0 { Level::Page4K } else { Level::Huge2M };
            }
            harvest
        };
        let mut whole = GuestMemory::new(params());
        whole.adopt(1, vec![slot]);
        let mut parts = GuestMemory::new(params());
        parts.adopt(1, vec![slot]);
        for elapsed in [None, Some(Duration::from_millis(1)), Some(Duration::from_secs(1))] {
            whole.observe(0, &seen(0, 9000), elapsed);
            for start in [0, 4096, 8192] {
                let pages = start..(start + 4096).min(9000);
                let harvest = seen(start as u64, pages.len() as u64);
                parts.observe_part(0, pages, &harvest, elapsed.map(Span::from));
            }
            assert!(whole.views()[0].heat.cells() == parts.views()[0].heat.cells());
            assert_eq!(whole.surprise, parts.surprise);
            let runs = |memory: &GuestMemory| plan::map_runs(&memory.views(), usize::MAX);
            assert!(runs(&whole) == runs(&parts));
            assert!(whole.next_unmapped(usize::MAX) == parts.next_unmapped(usize::MAX));
            assert_eq!(whole.places(), parts.places());
        }
    }

    #[test]
    fn refused_pages_are_held_for_a_while() {
        let mut memory = GuestMemory::new(params());
        memory.adopt(1, vec![info(0, 64), info(512, 64)]);
        let units = vec![
            (unit(1), Ok(())),
            (unit(2), Err(Refused::Busy)),
            (unit(3), Err(Refused::NodeFull)),
            (unit(4), Err(Refused::HugetlbFull)),
            (unit(512), Err(Refused::NotPresent)),
            (unit(513), Err(Refused::AlreadyThere)),
        ];
        memory.record_moves(&MoveOutcome { units, ..MoveOutcome::default() }, Place::Slow, Duration::ZERO);
        assert_eq!(memory.places(), PlaceCounts { fast: 0, slow: 2, absent: 126 });
        assert_eq!(memory.views()[0].held, [1 << 2 | 1 << 4]);
        assert_eq!(memory.views()[1].held, [0]);
        memory.release_held(SHORTEST_HOLD - Duration::from_secs(1));
        assert_eq!(memory.views()[0].held, [1 << 2 | 1 << 4]);
        memory.release_held(SHORTEST_HOLD);
        assert_eq!(memory.views()[0].held, [0]);
    }

    #[test]
    fn excluded_memory_is_held_for_good_in_slots_that_come_later_too() {
        let mut memory = GuestMemory::new(params());
        memory.adopt(1, vec![info(0, 1024)]);
        let mut excluded = Excluded { frames: vec![600..601, 4096..4100, 9000..9001], ..Excluded::default() };
        memory.exclude(&excluded);
        assert_eq!(memory.excluded_bytes(), Bytes::of_pages(512), "what moves with the page stays as well");
        let in_vain: Vec<_> = memory.excluded_in_vain().cloned().collect();
        assert_eq!(in_vain, [4096..4100, 9000..9001]);
        memory.release_held(SHORTEST_HOLD * 100);
        assert!(bitmap::all(memory.views()[0].held, 512..1024));
        assert!(!bitmap::any(memory.views()[0].held, 0..512));
        memory.adopt(2, vec![info(0, 1024), info(4096, 512)]);
        assert_eq!(memory.excluded_bytes(), Bytes::of_pages(1024));
        assert_eq!(memory.excluded_in_vain().count(), 1);
        // A slot that may be an excluded device waits until it is known.
        excluded.by_device = true;
        memory.exclude(&excluded);
        memory.adopt(3, vec![info(0, 1024), info(8192, 512)]);
        assert!(bitmap::all(memory.views()[1].held, 0..512));
        memory.release_held(Duration::ZERO);
        memory.release_held(SHORTEST_HOLD);
        assert!(!bitmap::any(memory.views()[1].held, 0..512));
        memory.exclude(&Excluded::default());
        assert_eq!(memory.excluded_bytes(), Bytes(0));
        assert!(!bitmap::any(memory.views()[0].held, 0..1024));
    }

    #[test]
    fn excluded_memory_does_not_move_with_what_another_slot_has_of_its_huge_page() {
        let mut memory = GuestMemory::new(params());
        memory.exclude(&Excluded { frames: std::iter::once(0xc0..0xe0).collect(), ..Excluded::default() });
        let (low, rest) = (info(0, 0xa0), info(0x100, 0x300));
        memory.adopt(1, vec![low, rest]);
        assert_eq!(memory.excluded_bytes(), Bytes(0));
        // A ROM is written over the excluded frames, in the VMM's memory between both.
        let rom = MemSlot { read_only: true, ..info(0xc0, 0x20) };
        memory.adopt(2, vec![low, rom, rest]);
        assert!(bitmap::all(memory.views()[0].held, 0..0xa0));
        assert!(bitmap::all(memory.views()[1].held, 0..0x100));
        assert!(!bitmap::any(memory.views()[1].held, 0x100..0x300));
        memory.adopt(3, vec![low, rest]);
        assert_eq!(memory.excluded_bytes(), Bytes(0));
    }

    #[test]
    fn slots_under_dirty_logging_are_held() {
        let mut memory = GuestMemory::new(params());
        let logged = MemSlot { dirty_log: true, ..info(512, 64) };
        memory.adopt(1, vec![info(0, 128), logged]);
        assert!(!memory.mostly_logged());
        assert_eq!(memory.views()[1].held, [!0]);
        memory.release_held(SHORTEST_HOLD);
        assert_eq!(memory.views()[1].held, [!0]);
        memory.adopt(2, vec![info(0, 128), info(512, 64)]);
        assert_eq!(memory.views()[1].held, [0]);
        memory.adopt(3, vec![MemSlot { dirty_log: true, ..info(0, 128) }, info(512, 64)]);
        assert!(memory.mostly_logged());
    }
}
