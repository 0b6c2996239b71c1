// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest that was recorded: its accessed bits under another placement.
//!
//! The recording tells which pages there were and which were accessed, round by
//! round. Where they lay then is not used: a page lies where the simulation puts it
//! when it is first seen, and where it moves it.

use std::time::Duration;

use crate::bitmap;
use crate::budget::Claim;
use crate::record::{Frame, FrameSlot};
use crate::sampler::{Harvest, Level, MemSlot};
use crate::units::{Bytes, PAGE_BYTES, PAGES_PER_2M};
use crate::wire::Place;

use super::engine::Engine;
use super::guest::{GuestParams, Start};
use super::oracle::BitChoice;
use super::{Basis, Round, Served};

/// A slot of the guest.
struct Slot {
    gfn_start: u64,
    page_count: u64,
    /// `mapped` is what was ever seen, `on_slow` the truth about places.
    harvest: Harvest,
    /// Of these, new in this round.
    fresh: Vec<u64>,
    /// What the oracle has in DRAM.
    chosen: Vec<u64>,
}

/// A guest that was recorded.
pub struct Replay {
    engine: Engine,
    start: Start,
    slots: Vec<Slot>,
    generation: u64,
    granted: Bytes,
    /// DRAM that there is for it, with what lies there.
    reachable: Bytes,
    began: Option<Duration>,
    /// End of the last round, on the recording's clock.
    last: Option<Duration>,
}

impl Replay {
    /// A guest of which nothing is known yet. Its rounds are as long as they were
    /// recorded.
    pub fn new(params: &GuestParams) -> Self {
        Self {
            engine: Engine::new(params.policy.clone(), Duration::ZERO),
            start: params.start,
            slots: Vec::new(),
            generation: 0,
            granted: Bytes(0),
            reachable: Bytes(u64::MAX),
            began: None,
            last: None,
        }
    }

    /// Size of all slots.
    pub fn memory(&self) -> Bytes {
        Bytes::of_pages(self.slots.iter().map(|slot| slot.page_count).sum())
    }

    /// DRAM that the policy grants.
    pub fn policy_target(&self) -> Bytes {
        self.engine.policy_target()
    }

    /// What of it lies in DRAM.
    pub fn fast(&self) -> Bytes {
        Bytes::of_pages(self.fast_pages())
    }

    /// DRAM that is granted now.
    pub fn granted(&self) -> Bytes {
        self.granted
    }

    /// What it claims of the host's DRAM.
    pub(super) fn claim(&self) -> Claim {
        self.engine.claim()
    }

    /// No more of it can lie in DRAM from now on than `dram`, whatever comes up.
    pub(super) fn set_reachable(&mut self, dram: Bytes) {
        self.reachable = dram;
    }

    /// Plans what to move in an interval as long as `interval`. No more than `granted`
    /// is to lie in DRAM, nor more than `reachable`, as there is no more room now.
    pub fn plan(&mut self, granted: Bytes, reachable: Bytes, interval: Duration) {
        self.granted = granted;
        self.engine.plan(granted.min(reachable), interval);
    }

    /// Takes in a recorded round, in which what was planned is moved. In the first
    /// nothing was served: its bits are from no one knows when.
    pub fn run(&mut self, frame: Frame) -> Round {
        let time = self.last.map_or(frame.time, |last| last.max(frame.time));
        let began = *self.began.get_or_insert(time);
        let before = self.last.replace(time);
        let interval = time.saturating_sub(before.unwrap_or(time));
        self.adopt(&frame.slots);
        if before.is_none() {
            self.granted = self.policy_target().min(self.reachable);
        }
        self.see(frame.slots);
        let (fast_before, hits_before) = (self.fast_pages(), self.hits());
        let (demoted_pages, promoted_pages) = self.carry_out(before.unwrap_or(time), time);
        let fast_pages = self.fast_pages();
        let best = self.granted.pages().max(fast_before).max(fast_pages);
        let (oracle, oracle_moved_pages) = self.ask_oracle(best);
        let accessed_pages = self.slots.iter().map(|slot| bitmap::count(&slot.harvest.accessed)).sum();
        let served = match before {
            None => Served::default(),
            Some(_) => Served {
                all: accessed_pages as f64,
                fast: (hits_before + self.hits()) as f64 / 2.0,
                oracle: oracle as f64,
            },
        };
        let elapsed = before.map(|_| interval);
        for (index, slot) in self.slots.iter().enumerate() {
            self.engine.observe(index, &slot.harvest, elapsed);
        }
        self.engine.end_round(elapsed);
        Round {
            end: time.saturating_sub(began),
            interval,
            served,
            basis: Basis::Bits,
            expected: None,
            demoted_pages,
            promoted_pages,
            oracle_moved_pages,
            fast_pages,
            target_pages: self.granted.pages(),
            accessed_pages,
        }
    }

    /// Takes in which slots there are.
    fn adopt(&mut self, frames: &[FrameSlot]) {
        let key = |slot: &Slot| (slot.gfn_start, slot.page_count);
        let same = |frames: &[FrameSlot]| {
            frames.iter().map(|frame| (frame.gfn_start, frame.page_count)).eq(self.slots.iter().map(key))
        };
        if self.generation > 0 && same(frames) {
            return;
        }
        let mut before = std::mem::take(&mut self.slots);
        for frame in frames {
            let known = before.iter().position(|slot| key(slot) == (frame.gfn_start, frame.page_count));
            self.slots.push(match known {
                Some(index) => before.swap_remove(index),
                None => Slot::new(frame),
            });
        }
        self.generation += 1;
        let info = |slot: &Slot| MemSlot {
            gfn_start: slot.gfn_start,
            page_count: slot.page_count,
            // One for each page, as a VMM would have.
            hva: slot.gfn_start.wrapping_mul(PAGE_BYTES),
            id: 0,
            read_only: false,
            dirty_log: false,
        };
        self.engine.adopt(self.generation, self.slots.iter().map(info).collect());
    }

    /// Takes in what was harvested; pages that come up are placed.
    fn see(&mut self, frames: Vec<FrameSlot>) {
        let most = match self.start {
            Start::FirstTouch => self.granted.pages(),
            Start::Fast => u64::MAX,
            Start::Slow => 0,
        };
        let mut room = most.min(self.reachable.pages()).saturating_sub(self.fast_pages());
        for (slot, frame) in self.slots.iter_mut().zip(frames) {
            slot.see(frame, &mut room);
        }
    }

    fn fast_pages(&self) -> u64 {
        self.slots
            .iter()
            .map(|slot| bitmap::count(&slot.harvest.mapped) - bitmap::count(&slot.harvest.on_slow))
            .sum()
    }

    /// Accessed pages in DRAM.
    fn hits(&self) -> u64 {
        let hits = |slot: &Slot| {
            let words = slot.harvest.accessed.iter().zip(&slot.harvest.on_slow);
            words.map(|(accessed, slow)| u64::from((accessed & !slow).count_ones())).sum::<u64>()
        };
        self.slots.iter().map(hits).sum()
    }

    fn carry_out(&mut self, now: Duration, end: Duration) -> (u64, u64) {
        let (mut demoted, mut promoted) = (0, 0);
        // Pages that came up may have taken the room.
        let room_pages = self.reachable.pages().saturating_sub(self.fast_pages());
        for (unit, target) in self.engine.moves(now, end, room_pages) {
            let holds =
                |slot: &&mut Slot| (slot.gfn_start..slot.gfn_start + slot.page_count).contains(&unit.gfn);
            let Some(slot) = self.slots.iter_mut().find(holds) else { continue };
            let start = (unit.gfn - slot.gfn_start) as usize;
            let pages = start..start + unit.pages as usize;
            bitmap::fill(&mut slot.harvest.on_slow, pages, target == Place::Slow);
            let moved = if target == Place::Slow { &mut demoted } else { &mut promoted };
            *moved += u64::from(unit.pages);
        }
        (demoted, promoted)
    }

    /// Accessed pages that the oracle has in DRAM, and pages that it moved.
    fn ask_oracle(&mut self, pages: u64) -> (u64, u64) {
        let maps = self.slots.iter().map(|slot| (&slot.harvest.accessed[..], &slot.chosen[..]));
        let mut choice = BitChoice::new(maps, pages);
        let hits = choice.hits;
        let moved = self
            .slots
            .iter_mut()
            .map(|slot| choice.apply(&slot.harvest.accessed, &slot.fresh, &mut slot.chosen));
        (hits, moved.sum())
    }
}

impl Slot {
    fn new(frame: &FrameSlot) -> Self {
        let mut harvest = Harvest::default();
        harvest.reset(frame.gfn_start, frame.page_count);
        harvest.dirty = Vec::new();
        let words = bitmap::words_for(frame.page_count as usize);
        Self {
            gfn_start: frame.gfn_start,
            page_count: frame.page_count,
            harvest,
            fresh: vec![0; words],
            chosen: vec![0; words],
        }
    }

    /// Pages that come up lie in DRAM as long as there is room, and on the slow tier
    /// from then on; a huge page on one of them.
    fn see(&mut self, frame: FrameSlot, room: &mut u64) {
        // What a nested guest accesses is not mapped, but there.
        let seen = frame.mapped.iter().zip(&frame.accessed).map(|(mapped, accessed)| mapped | accessed);
        for ((fresh, known), seen) in self.fresh.iter_mut().zip(&mut self.harvest.mapped).zip(seen) {
            *fresh = seen & !*known;
            *known |= seen;
        }
        self.harvest.accessed = frame.accessed;
        self.harvest.levels = frame.levels;
        let first_unit = self.gfn_start / PAGES_PER_2M;
        for (unit, level) in self.harvest.levels.iter().enumerate() {
            let start = ((first_unit + unit as u64) * PAGES_PER_2M).saturating_sub(self.gfn_start) as usize;
            let end = ((first_unit + unit as u64 + 1) * PAGES_PER_2M - self.gfn_start).min(self.page_count);
            let pages = start..end as usize;
            if !bitmap::any(&self.fresh, pages.clone()) {
                continue;
            }
            let whole = matches!(level, Level::Huge2M | Level::Huge1G);
            let count = bitmap::masks(pages.clone())
                .map(|(index, mask)| u64::from((bitmap::word(&self.fresh, index) & mask).count_ones()))
                .sum::<u64>();
            let fits = if whole && count > *room { 0 } else { count.min(*room) };
            *room -= fits;
            let mut left = fits;
            for (index, mask) in bitmap::masks(pages) {
                let fresh = bitmap::word(&self.fresh, index) & mask;
                let fast = super::oracle::lowest(fresh, &mut left);
                self.harvest.on_slow[index] |= fresh & !fast;
                self.chosen[index] |= fast;
            }
        }
    }
}
