// SPDX-License-Identifier: MIT OR Apache-2.0
//! The moves of a round: in which order, and how many at once.

use crate::plan::{MoveUnit, Plan};
use crate::wire::Place;

use super::{batch, fitting, unit_bytes};

/// What is left to move in a round.
///
/// Both directions take turns: DRAM is never much emptier than it is to be, nor fuller,
/// however long the bandwidth makes a round's moves last, and whatever is refused.
#[derive(Debug, Default)]
pub struct Moves {
    demote: Vec<MoveUnit>,
    promote: Vec<MoveUnit>,
    /// Units tried of each.
    demoted: usize,
    promoted: usize,
    /// Bytes that may be promoted before more are demoted; below zero, so many have to
    /// be demoted first.
    room: i64,
}

impl Moves {
    /// Moves after which DRAM holds what it is to hold.
    pub fn new(Plan { demote, promote, .. }: Plan) -> Self {
        let bytes = |units: &[MoveUnit]| i64::try_from(units.iter().map(unit_bytes).sum::<u64>());
        let room = bytes(&promote).unwrap_or(i64::MAX) - bytes(&demote).unwrap_or(i64::MAX);
        Moves { demote, promote, demoted: 0, promoted: 0, room }
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.slice(u64::MAX).1.is_empty()
    }

    /// Units that move in one direction at once: at most `bytes`, but one at least.
    pub fn slice(&self, bytes: u64) -> (Place, &[MoveUnit]) {
        let next = |units, done| first(from(units, done), bytes);
        let (go, come) = (next(&self.demote, self.demoted), next(&self.promote, self.promoted));
        let fits = fitting(come, u64::try_from(self.room).unwrap_or(0));
        match go.is_empty() || !come.is_empty() && fits.len() == come.len() {
            true => (Place::Fast, fits),
            false => (Place::Slow, go),
        }
    }

    /// Takes note that so many units were tried, and so many bytes moved.
    pub fn done(&mut self, target: Place, tried: usize, moved_bytes: u64) {
        let moved = i64::try_from(moved_bytes).unwrap_or(i64::MAX);
        if target == Place::Slow {
            self.demoted += tried;
            self.room = self.room.saturating_add(moved);
        } else {
            self.promoted += tried;
            self.room = self.room.saturating_sub(moved);
        }
    }
}

fn from(units: &[MoveUnit], done: usize) -> &[MoveUnit] {
    units.get(done..).unwrap_or_default()
}

/// The first units of a batch: at most `bytes`, but one at least.
fn first(units: &[MoveUnit], bytes: u64) -> &[MoveUnit] {
    let count = fitting(batch(units), bytes).len().max(1);
    units.get(..count).unwrap_or(units)
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;
    use crate::units::PAGE_BYTES;

    fn units(gfns: Range<u64>) -> Vec<MoveUnit> {
        gfns.map(|gfn| MoveUnit { gfn, hva: gfn * PAGE_BYTES, pages: 1 }).collect()
    }

    fn moves(demote: Range<u64>, promote: Range<u64>) -> Moves {
        Moves::new(Plan { demote: units(demote), promote: units(promote), ..Plan::default() })
    }

    /// Carries out what is planned, two pages at a time, of which `moves` says how many of
    /// a direction move; which way how many pages went, and by how many DRAM changed.
    fn carry_out(mut moves: Moves, moved: impl Fn(Place) -> u64) -> (Vec<(Place, usize)>, Vec<i64>) {
        let (mut turns, mut dram, mut balance) = (Vec::new(), 0, Vec::new());
        loop {
            let (place, count) = {
                let (place, units) = moves.slice(2 * PAGE_BYTES);
                (place, units.len())
            };
            if count == 0 {
                return (turns, balance);
            }
            let pages = moved(place).min(count as u64);
            moves.done(place, count, pages * PAGE_BYTES);
            dram += if place == Place::Slow { -(pages as i64) } else { pages as i64 };
            turns.push((place, count));
            balance.push(dram);
        }
    }

    #[test]
    fn both_directions_take_turns() {
        use Place::{Fast, Slow};
        // Three too many, and five to exchange.
        let (turns, balance) = carry_out(moves(0..8, 100..105), |_| 2);
        let expected = [(Slow, 2), (Slow, 2), (Slow, 2), (Fast, 2), (Slow, 2), (Fast, 2), (Fast, 1)];
        assert_eq!((turns.as_slice(), balance.last()), (expected.as_slice(), Some(&-3)));
        assert!(balance.iter().all(|pages| *pages >= -6));
        // Room for three, before two have to go.
        let (turns, balance) = carry_out(moves(0..2, 100..105), |_| 2);
        assert_eq!(turns, [(Fast, 2), (Slow, 2), (Fast, 2), (Fast, 1)]);
        assert_eq!(balance, [2, 0, 2, 3]);
        // What does not go makes no room.
        let refusing = |place| if place == Slow { 1 } else { 2 };
        let (_, balance) = carry_out(moves(0..6, 100..106), refusing);
        assert!(balance.iter().all(|pages| *pages <= 0), "{balance:?}");
        assert_eq!(carry_out(moves(0..4, 100..104), |place| u64::from(place != Slow)).1, [0, 0]);
    }
}
