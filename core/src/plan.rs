// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which pages to move, judged from heat, place and policy. No I/O: the same
//! input gives the same plan.
//!
//! A *unit* is what moves at once: a 4 KiB page, or a whole 2 MiB page where
//! the guest's tables map one. A huge page has one accessed bit for 512 pages,
//! so it is judged by its hottest page and moves as a whole or not at all.
//!
//! 1. More on the fast tier than the target: demote units that were idle for
//!    the policy's delay, the coldest first, until the rest above the target is
//!    smaller than the next unit.
//! 2. Room under the target: promote units that are not cold, the hottest first.
//! 3. No room: exchange. A unit comes only when enough colder idle units go, and
//!    each of them is colder by [`PlanInput::gap`] at least; both directions are
//!    charged to the quota.
//!
//! Each list ends at the first unit that does not fit the quota, so a hotter
//! page never goes while a colder one that may go stays.

mod candidates;
mod place;
mod view;

use std::iter::Peekable;

use crate::heat::MAX_TEMPERATURE;
use crate::units::{Bytes, Share};

use candidates::{Candidate, Candidates};
pub use place::{PlaceCounts, PlaceMap};
pub use view::{SlotView, map_runs, strip};

/// What a plan is made from.
#[derive(Clone, Copy, Debug)]
pub struct PlanInput<'a> {
    /// The domain's memory.
    pub slots: &'a [SlotView<'a>],
    /// What the domain may have on the fast tier; no limit without it. Callers
    /// that know how much is free there give the smaller of the two.
    pub dram_target: Option<Bytes>,
    /// How much hotter, as a share of the whole scale of temperature, a page
    /// must be than the one that it drives out.
    pub gap: Share,
    /// Pages of 4 KiB that may move in this round, both directions together. With
    /// less than 512 no huge page moves, with less than 1024 none is exchanged.
    pub quota_pages: u64,
}

/// Pages that move at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MoveUnit {
    /// First guest frame number.
    pub gfn: u64,
    /// Its address in the VMM.
    pub hva: u64,
    /// Length in 4 KiB pages: 1 or 512.
    pub pages: u32,
}

/// What to move. Demote first: it makes the room that promotion needs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// To the slow tier, coldest first.
    pub demote: Vec<MoveUnit>,
    /// To the fast tier, hottest first.
    pub promote: Vec<MoveUnit>,
}

/// Makes a plan for one round of one domain.
pub fn plan(input: &PlanInput<'_>) -> Plan {
    let fast_pages: u64 = input.slots.iter().map(|slot| slot.place.counts().fast).sum();
    let target_pages = input.dram_target.map_or(u64::MAX, Bytes::pages);
    let candidates = Candidates::collect(input.slots, input.quota_pages);
    let mut cold = candidates.coldest_fast.into_iter().peekable();
    let mut quota = input.quota_pages;
    let mut plan = Plan::default();

    let mut excess = fast_pages.saturating_sub(target_pages);
    while let Some(unit) = cold.next_if(|unit| unit.pages() <= excess.min(quota)) {
        excess -= unit.pages();
        quota -= unit.pages();
        plan.demote.push(unit.unit);
    }

    let gap = input.gap.of(u64::from(MAX_TEMPERATURE));
    let mut room = target_pages.saturating_sub(fast_pages);
    // Temperature that a unit needs to take the place of what was driven out.
    let mut needed = 0;
    for unit in candidates.hottest_slow {
        let Some(victims) = make_room(&mut cold, &unit, room, gap) else { break };
        let freed: u64 = victims.iter().map(Candidate::pages).sum();
        // The last victim is the hottest one.
        needed = victims.last().map_or(needed, |victim| u64::from(victim.temperature) + gap);
        if freed + unit.pages() > quota || u64::from(unit.temperature) < needed {
            break;
        }
        room = room.saturating_add(freed) - unit.pages();
        quota -= freed + unit.pages();
        plan.demote.extend(victims.iter().map(|victim| victim.unit));
        plan.promote.push(unit.unit);
    }
    plan
}

/// The coldest units that must go for `unit` to come, none if there is room;
/// `None` when too few are colder by `gap`.
fn make_room(
    cold: &mut Peekable<impl Iterator<Item = Candidate>>,
    unit: &Candidate,
    room: u64,
    gap: u64,
) -> Option<Vec<Candidate>> {
    let mut victims = Vec::new();
    let mut freed = 0;
    while room.saturating_add(freed) < unit.pages() {
        let colder = |victim: &Candidate| u64::from(victim.temperature) + gap <= u64::from(unit.temperature);
        let victim = cold.next_if(colder)?;
        freed += victim.pages();
        victims.push(victim);
    }
    Some(victims)
}
