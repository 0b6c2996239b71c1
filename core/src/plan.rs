// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which pages to move, judged from heat, place and policy. No I/O: the same
//! input gives the same plan.
//!
//! A *unit* is what moves at once: a 4 KiB page, or a whole 2 MiB page where
//! the guest's tables map one. A huge page has one accessed bit for 512 pages,
//! so it is judged by its hottest page and moves as a whole or not at all. So is one
//! of the host's that the guest's tables map in parts, as soon as that is known.
//!
//! 1. More on the fast tier than the target: demote units that were idle for
//!    the policy's delay, the coldest first, until the rest above the target is
//!    smaller than the next unit.
//! 2. Room under the target: promote units that are not cold, the hottest first.
//! 3. No room: exchange. A unit comes only when enough colder idle units go, and
//!    each of them is colder by [`PlanInput::gap`] at least, and by more than chance
//!    explains; both directions are charged to the quota. When all exchanges together
//!    would win little, only the clearest are done at once, as those of what has just
//!    turned hot, and of the others a few.
//!
//! Each list ends at the first unit that does not fit the quota, so a hotter
//! page never goes while a colder one that may go stays. A unit that has just moved
//! stays where it is.

mod candidates;
mod gap;
mod joined;
mod place;
mod potential;
mod recent;
mod view;

use std::iter::Peekable;
use std::time::Duration;

use crate::heat::{self, HeatMap, MAX_TEMPERATURE};
use crate::units::{Bytes, BytesPerSecond, PAGE_BYTES, PAGES_PER_2M, Share};

use candidates::{Candidate, Candidates};
use gap::Gap;
pub use joined::Joined;
pub use place::{PlaceCounts, PlaceMap};
use potential::Potential;
pub use recent::{LOOKBACK_ROUNDS, Recent, Times};
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
    /// The guest was first seen, or turned to other pages, a few rounds ago: many
    /// pages lie wrong, and what is known of them changes from round to round.
    pub settling: bool,
    /// All heat of the domain, in pages of the highest temperature: what exchanges are
    /// measured by.
    pub heat: f64,
    /// Pages of 4 KiB that may move in exchanges which would win little, both
    /// directions together.
    pub trickle_pages: u64,
}

/// Part of all heat that exchanges must bring to the fast tier to be worth their moves
/// at once. Below that they are as good as what chance makes of temperatures.
const WORTH_MOVING: f64 = 0.02;

/// A domain is thought to have as much heat as if this part of it were hot: in one that
/// does next to nothing, all that could be won is next to nothing too.
const LEAST_HEAT: f64 = 0.1;

/// Part of the scale from which on a difference of temperature is worth a move whatever
/// all exchanges win: a small block may be hotter than one bit for each page can tell.
const CERTAIN: f64 = 0.75;

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
    /// Pages of both lists that were allowed by [`PlanInput::trickle_pages`].
    pub trickled_pages: u64,
}

/// Least quota of a plan: one huge page comes and one goes.
const SMALLEST_QUOTA_PAGES: u64 = 2 * PAGES_PER_2M;

/// The quota of a plan for `interval`, in pages of 4 KiB: what `bandwidth` moves in it, but
/// enough for huge pages to be exchanged at all.
pub fn quota_pages(bandwidth: BytesPerSecond, interval: Duration) -> u64 {
    let bytes = u128::from(bandwidth.0).saturating_mul(interval.as_nanos()) / 1_000_000_000;
    (u64::try_from(bytes).unwrap_or(u64::MAX) / PAGE_BYTES).max(SMALLEST_QUOTA_PAGES)
}

/// Makes a plan for one round of one domain.
pub fn plan(input: &PlanInput<'_>) -> Plan {
    let fast_pages: u64 = input.slots.iter().map(|slot| slot.place.counts().fast).sum();
    let target_pages = input.dram_target.map_or(u64::MAX, Bytes::pages);
    // What has moved twice in a few rounds has come back once.
    let banned = if input.settling { Times::Twice } else { Times::Once };
    let candidates = Candidates::collect(input.slots, input.quota_pages, banned);
    let mut cold = candidates.coldest_fast.into_iter().peekable();
    let mut quota = input.quota_pages;
    let mut plan = Plan::default();

    let mut excess = fast_pages.saturating_sub(target_pages);
    while let Some(unit) = cold.next_if(|unit| unit.pages() <= excess.min(quota)) {
        excess -= unit.pages();
        quota -= unit.pages();
        plan.demote.push(unit.unit);
    }

    let gap = Gap::new(input.gap, input.settling);
    let mut room = target_pages.saturating_sub(fast_pages);
    let mut hot = candidates.hottest_slow.into_iter().peekable();
    while let Some(unit) = hot.next_if(|unit| unit.pages() <= room.min(quota)) {
        room -= unit.pages();
        quota -= unit.pages();
        plan.promote.push(unit.unit);
    }

    let mut exchanges = Vec::new();
    // The hottest that was driven out, and may not be hotter than what comes later.
    let mut driven_out: Option<Candidate> = None;
    for unit in hot {
        let Some(victims) = make_room(&mut cold, &unit, room, gap) else { break };
        let freed: u64 = victims.iter().map(Candidate::pages).sum();
        driven_out = victims.last().copied().or(driven_out);
        let fits = driven_out.is_none_or(|victim| gap.lies_between(victim.estimate, unit.estimate));
        if freed + unit.pages() > quota || !fits {
            break;
        }
        room = room.saturating_add(freed) - unit.pages();
        quota -= freed + unit.pages();
        exchanges.push(Exchange { victims, unit });
    }
    let trickles = !exchanges.is_empty() && !input.settling && wins_little(input, candidates.potential, gap);
    plan.add(exchanges, trickles.then_some(input.trickle_pages));
    plan
}

/// Whether all exchanges that there could be are together not worth their moves.
fn wins_little(input: &PlanInput<'_>, potential: Potential, gap: Gap) -> bool {
    let variance = heat::most_pages(input.slots.iter().map(|slot| slot.heat)).map_or(0.0, HeatMap::variance);
    let pages: u64 = input.slots.iter().map(|slot| slot.place.pages() as u64).sum();
    let heat = input.heat.max(LEAST_HEAT * pages as f64);
    potential.gain(gap.sure(), variance) < WORTH_MOVING * heat
}

/// A unit that comes, and those that go for it.
struct Exchange {
    /// None, when those of the exchange before left enough room.
    victims: Vec<Candidate>,
    unit: Candidate,
}

impl Exchange {
    /// Whether what comes is hotter by far than what goes, or has just turned hot.
    fn is_certain(&self) -> bool {
        let certain = |victim: &Candidate| {
            let difference =
                f64::from(self.unit.estimate.temperature) - f64::from(victim.estimate.temperature);
            difference >= CERTAIN * f64::from(MAX_TEMPERATURE)
        };
        self.unit.turned || self.victims.iter().all(certain)
    }

    /// Pages that move.
    fn pages(&self) -> u64 {
        self.unit.pages() + self.victims.iter().map(Candidate::pages).sum::<u64>()
    }
}

impl Plan {
    /// Pages of 4 KiB that are to move.
    pub fn pages(&self) -> u64 {
        self.demote.iter().chain(&self.promote).map(|unit| u64::from(unit.pages)).sum()
    }

    /// Adds the exchanges, best first, or as many of them as a trickle allows.
    fn add(&mut self, exchanges: Vec<Exchange>, trickle_pages: Option<u64>) {
        let mut allowed = trickle_pages.unwrap_or(0);
        for exchange in exchanges {
            if trickle_pages.is_some() && !exchange.is_certain() {
                let pages = exchange.pages();
                if pages > allowed {
                    break;
                }
                allowed -= pages;
                self.trickled_pages += pages;
            }
            self.demote.extend(exchange.victims.iter().map(|victim| victim.unit));
            self.promote.push(exchange.unit.unit);
        }
    }
}

/// The coldest units that must go for `unit` to come, none if there is room;
/// `None` when too few are colder by `gap`.
fn make_room(
    cold: &mut Peekable<impl Iterator<Item = Candidate>>,
    unit: &Candidate,
    room: u64,
    gap: Gap,
) -> Option<Vec<Candidate>> {
    let mut victims = Vec::new();
    let mut freed = 0;
    while room.saturating_add(freed) < unit.pages() {
        let victim = cold.next_if(|victim| gap.lies_between(victim.estimate, unit.estimate))?;
        freed += victim.pages();
        victims.push(victim);
    }
    Some(victims)
}
