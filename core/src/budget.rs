// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which domain may have how much of the host's DRAM. No I/O: the same input
//! gives the same grants.
//!
//! DRAM is shared by weighted max-min fairness: one level rises for all, each
//! domain gets the level times its weight, and those that have enough drop out,
//! so that what they do not use goes to those that want more.
//!
//! 1. **Floors first.** Each domain has its floor before another has more than
//!    its own. When all floors together do not fit, all are cut to one part of
//!    themselves, and [`Settlement::floors_cut`] says so.
//! 2. **Then what is used**, [`Claim::demand`], by weight.
//! 3. **What nobody uses stays where it is**, and what lies nowhere yet is
//!    offered by weight up to the ceilings: memory is not moved for its own sake.
//!
//! What a domain has to give back, it gives in steps: it is never asked for more
//! than [`STEP_DIVISOR`] says at a time, and is asked for the next step when it
//! holds less. Only floors of others, a ceiling that was lowered and a host that
//! runs short are served at once. Who gets more waits until it was given back:
//! all grants together are never more than there is.
//!
//! Nothing is remembered from one settlement to the next but what domains hold,
//! so constant claims can not make grants swing.

mod claim;
mod fill;

use crate::units::{BYTES_PER_2M, Bytes};

use fill::{Span, fill};

/// A domain gives back one part in this of its ceiling at a time.
pub const STEP_DIVISOR: u64 = 8;

/// But a huge page at least.
const SMALLEST_STEP: u64 = BYTES_PER_2M;

/// What one domain wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// Part in the host's DRAM beside other domains; 0 counts as 1.
    pub weight: u32,
    /// Not less than this, if the host has it. More than the ceiling counts as
    /// the ceiling.
    pub floor: Bytes,
    /// Never more than this: what its policy allows, and no more than its memory.
    pub ceiling: Bytes,
    /// What it uses.
    pub demand: Bytes,
    /// What it has there now.
    pub held: Bytes,
    /// Its memory can be moved. Otherwise it keeps what it has, and the others
    /// share the rest.
    pub movable: bool,
}

/// Why a domain is granted what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Its memory is not to be moved.
    Held,
    /// The floors of all domains do not fit.
    FloorsCut,
    /// It has more than it shall have, and gives it back step by step.
    GivesBack,
    /// It shall have more, as soon as others have given it back.
    Waits,
    /// All that its policy allows.
    Ceiling,
    /// Its floor, which is more than its share by weight.
    Floor,
    /// Its share by weight; it uses more.
    Share,
    /// More than its share, which others do not use.
    Lent,
    /// All that it uses, and no more, as others use the rest.
    Demand,
    /// All that it uses, and some that nobody uses.
    Spare,
}

impl Why {
    /// For people.
    pub fn explanation(self) -> &'static str {
        match self {
            Why::Held => "what it has: nothing of it is moved",
            Why::FloorsCut => {
                "a part of its minimum: the minimums of all domains do not fit this host's DRAM"
            }
            Why::GivesBack => "more than it shall have; it gives DRAM back step by step",
            Why::Waits => "less than it shall have, until others have given DRAM back",
            Why::Ceiling => "all that its policy allows",
            Why::Floor => "its minimum, which is more than its share by weight",
            Why::Share => "its share by weight; it uses more",
            Why::Lent => "more than its share by weight, lent by domains that use less",
            Why::Demand => "all that it uses; others use the rest of its share",
            Why::Spare => "all that it uses, and DRAM that nobody uses",
        }
    }
}

/// What one domain may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grant {
    /// So much, from now on.
    pub bytes: Bytes,
    /// Its share by weight, floor and ceiling alone, if all used all they can.
    pub fair: Bytes,
    /// Where the grant tends to while all claims stay as they are.
    pub target: Bytes,
    /// How it came about.
    pub why: Why,
}

/// How the DRAM is shared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settlement {
    /// One for each claim, in their order.
    pub grants: Vec<Grant>,
    /// The floors together were more than there is, and were cut.
    pub floors_cut: bool,
}

/// A claim with what was found out about it, in bytes.
struct Party {
    movable: bool,
    weight: u32,
    floor: u64,
    ceiling: u64,
    /// What it uses, within floor and ceiling.
    wanted: u64,
    held: u64,
    fair: u64,
    target: u64,
    grant: u64,
}

impl Party {
    fn new(claim: &Claim) -> Self {
        let held = claim.held.0;
        let (weight, movable) = (claim.weight.max(1), claim.movable);
        let (floor, ceiling) = match movable {
            true => (claim.floor.0.min(claim.ceiling.0), claim.ceiling.0),
            false => (held, held),
        };
        let wanted = claim.demand.0.clamp(floor, ceiling);
        Self { movable, weight, floor, ceiling, wanted, held, fair: held, target: held, grant: held }
    }

    fn span(&self, low: u64, high: u64) -> Span {
        match self.movable {
            true => Span { weight: self.weight, low, high },
            false => Span::fixed(0),
        }
    }

    /// What it is left with at once: a step below what it has, if it has too
    /// much; else what it has, or its floor.
    fn base(&self) -> u64 {
        let step = (self.ceiling / STEP_DIVISOR).max(SMALLEST_STEP);
        match self.held > self.target {
            true => self.held.saturating_sub(step).clamp(self.target, self.ceiling),
            false => self.held.max(self.floor),
        }
    }

    fn why(&self, floors_cut: bool) -> Why {
        if !self.movable {
            Why::Held
        } else if floors_cut {
            Why::FloorsCut
        } else if self.grant > self.target {
            Why::GivesBack
        } else if self.grant < self.target {
            Why::Waits
        } else if self.target == self.ceiling {
            Why::Ceiling
        } else if self.target < self.wanted && self.target == self.floor {
            Why::Floor
        } else if self.target < self.wanted && self.target <= self.fair {
            Why::Share
        } else if self.target <= self.wanted && self.target > self.fair {
            Why::Lent
        } else if self.target == self.wanted {
            Why::Demand
        } else {
            Why::Spare
        }
    }
}

/// Shares `total`, all the DRAM that guests have and can have: what the domains
/// of all claims hold there, and what is free besides and not the host's own.
/// Domains that are not in `claims` must not be in `total` either.
pub fn settle(total: Bytes, claims: &[Claim]) -> Settlement {
    let mut parties: Vec<Party> = claims.iter().map(Party::new).collect();
    let kept = parties.iter().filter(|party| !party.movable).fold(0u64, |sum, p| sum.saturating_add(p.held));
    let left = total.0.saturating_sub(kept);
    let floors_cut = cut_floors(&mut parties, left);
    // Each stage begins where the one before it ended.
    let stages: [fn(&Party) -> u64; 4] =
        [|p| p.floor, |p| p.wanted, |p| p.held.clamp(p.wanted, p.ceiling), |p| p.ceiling];
    let fair = fill(&spans(&parties, stages[0], stages[3]), left);
    set(&mut parties, fair, |party| &mut party.fair);
    let holds = |stage: fn(&Party) -> u64| sum(&parties, stage) >= u128::from(left);
    let full = (1..3).find(|stage| holds(stages[*stage])).unwrap_or(3);
    let target = fill(&spans(&parties, stages[full - 1], stages[full]), left);
    set(&mut parties, target, |party| &mut party.target);
    let grants = match sum(&parties, Party::base) > u128::from(left) {
        // The steps are too small for what must be served at once.
        true => spans(&parties, |p| p.base().min(p.target), Party::base),
        false => spans(&parties, Party::base, |p| p.target),
    };
    set(&mut parties, fill(&grants, left), |party| &mut party.grant);
    let grant = |party: &Party| Grant {
        bytes: Bytes(party.grant),
        fair: Bytes(party.fair),
        target: Bytes(party.target),
        why: party.why(floors_cut),
    };
    Settlement { grants: parties.iter().map(grant).collect(), floors_cut }
}

/// Cuts all floors to the same part of themselves when they do not fit.
fn cut_floors(parties: &mut [Party], left: u64) -> bool {
    let floors = sum(parties, |party| party.floor);
    if floors <= u128::from(left) {
        return false;
    }
    for party in parties.iter_mut().filter(|party| party.movable) {
        // Less than the floor was, so it fits again.
        party.floor = (u128::from(party.floor) * u128::from(left) / floors) as u64;
    }
    true
}

fn sum(parties: &[Party], amount: impl Fn(&Party) -> u64) -> u128 {
    parties.iter().filter(|party| party.movable).map(|party| u128::from(amount(party))).sum()
}

fn spans(parties: &[Party], low: impl Fn(&Party) -> u64, high: impl Fn(&Party) -> u64) -> Vec<Span> {
    parties.iter().map(|party| party.span(low(party), high(party))).collect()
}

/// Writes what movable domains got; the others keep what they hold.
fn set(parties: &mut [Party], amounts: Vec<u64>, field: impl Fn(&mut Party) -> &mut u64) {
    for (party, amount) in parties.iter_mut().zip(amounts).filter(|(party, _)| party.movable) {
        *field(party) = amount;
    }
}
