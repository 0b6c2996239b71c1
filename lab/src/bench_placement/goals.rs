// SPDX-License-Identifier: MIT OR Apache-2.0
//! What ept-virt is to reach, and whether it did. Pure.

use super::cell::Cell;
use super::figures::Reached;

/// Rounds in which it is to converge, and to find a small hot block.
const ROUNDS: u64 = 5;
const ROUNDS_TO_FIND: u64 = 2;

/// Of what the best pages would serve: on workloads that hold still, and on others.
const STILL_PART: f64 = 0.98;
const MOVING_PART: f64 = 0.95;

/// Moves beside those of who always keeps the best pages.
const MOVES: f64 = 1.5;
/// Part of the guest's memory that may move in a minute when nothing changes.
const STILL_MOVES: f64 = 0.001;

/// A goal beside what was measured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Goal {
    /// What is asked.
    pub asked: String,
    /// What was seen.
    pub seen: String,
    /// Whether that is enough.
    pub held: bool,
}

/// The part of the best that counts as converged for a workload.
pub fn part(workload: &str) -> f64 {
    if matches!(workload, "static" | "zipf") { STILL_PART } else { MOVING_PART }
}

/// The goals of one workload in one kind of memory: `own` is ept-virt's cell, `peers`
/// are those of the others.
pub fn judge(own: &Cell, peers: &[&Cell]) -> Vec<Goal> {
    let mut goals = match own.workload.as_str() {
        "scan" => vec![at_end(own)],
        "hot-block" => {
            let asked = format!("the hot block is found in {ROUNDS_TO_FIND} rounds");
            vec![soon(asked, own.found(), ROUNDS_TO_FIND)]
        }
        workload => {
            let asked = format!("{:.0} % of the oracle's share in {ROUNDS} rounds", part(workload) * 100.0);
            vec![soon(asked, own.reached(part(workload)), ROUNDS), at_end(own)]
        }
    };
    goals.extend(peers.iter().map(|peer| ahead(own, peer)));
    let (moved, best) = (own.moved_at_end(), own.best_now_moves());
    goals.push(Goal {
        asked: format!("moves at the end at most {MOVES} x those of an oracle for each period"),
        seen: format!("{} of {} MiB/min", mib(moved), mib(best)),
        held: moved <= MOVES * best,
    });
    if matches!(own.workload.as_str(), "static" | "zipf") {
        let part = moved / (own.guest_pages as f64 * 4096.0).max(1.0);
        goals.push(Goal {
            asked: format!("under {} % of memory moves in a minute at the end", STILL_MOVES * 100.0),
            seen: format!("{:.2} %", part * 100.0),
            held: part < STILL_MOVES,
        });
    }
    goals
}

fn at_end(own: &Cell) -> Goal {
    let part = part(&own.workload);
    let ratio = own.converged() / own.best().max(1e-9);
    Goal {
        asked: format!("{:.0} % of the oracle's share at the end", part * 100.0),
        seen: format!("{:.1} %", ratio * 100.0),
        held: ratio >= part,
    }
}

fn soon(asked: String, reached: Option<Reached>, rounds: u64) -> Goal {
    let (seen, held) = match reached {
        Some(Reached { rounds: Some(taken), periods }) => {
            (format!("{taken} rounds ({periods} periods)"), taken <= rounds)
        }
        Some(Reached { rounds: None, periods }) => (format!("in period {periods}, of no known round"), false),
        None => ("never".into(), false),
    };
    Goal { asked, seen, held }
}

fn ahead(own: &Cell, peer: &Cell) -> Goal {
    Goal {
        asked: format!("ahead of {} at the end", peer.contestant),
        seen: format!(
            "{:.1} % and {:.1} % served by DRAM",
            own.converged() * 100.0,
            peer.converged() * 100.0
        ),
        held: own.converged() > peer.converged(),
    }
}

fn mib(bytes: f64) -> String {
    format!("{:.1}", bytes / f64::from(1 << 20))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench_placement::figures::tests::cell;

    fn held(goals: &[Goal]) -> Vec<bool> {
        goals.iter().map(|goal| goal.held).collect()
    }

    #[test]
    fn a_jump_is_followed_or_not() {
        let mut own = cell("phase", "ept-virt");
        let mut peer = cell("phase", "damon");
        peer.periods.iter_mut().for_each(|period| period.dram /= 2.0);
        let goals = judge(&own, &[&peer]);
        // In time, not converged in the mean of the end, ahead, too many moves.
        assert_eq!(held(&goals), [true, false, true, false], "{goals:#?}");
        // One that is as good is not behind.
        assert!(!judge(&own, &[&own.clone()])[2].held);
        own.periods.iter_mut().for_each(|period| period.migrated_pages = 9);
        assert!(judge(&own, &[])[2].held);
        own.periods.iter_mut().for_each(|period| period.round = period.round.map(|round| round * 2));
        assert!(!judge(&own, &[])[0].held, "8 rounds are too many");
    }

    #[test]
    fn what_never_comes_is_missed() {
        let mut own = cell("hot-block", "ept-virt");
        assert!(!judge(&own, &[])[0].held, "3 rounds are too many");
        own.periods[11].block_found = Some(0.9);
        assert!(judge(&own, &[])[0].held);
        own.periods.iter_mut().for_each(|period| period.block_found = Some(0.0));
        assert_eq!(judge(&own, &[])[0].seen, "never");
    }

    #[test]
    fn a_still_workload_moves_next_to_nothing() {
        let mut own = cell("static", "ept-virt");
        let last = |own: &Cell| judge(own, &[]).pop().map(|goal| goal.held);
        assert_eq!(last(&own), Some(false));
        own.periods.iter_mut().for_each(|period| period.migrated_pages = 0);
        assert_eq!(last(&own), Some(true));
    }
}
