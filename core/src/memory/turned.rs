// SPDX-License-Identifier: MIT OR Apache-2.0
//! Small pieces of memory that turned hot a moment ago.
//!
//! In a mean over half-lives, a piece that turns hot stands out after many rounds only.
//! But that neighbours which were seldom accessed are *all* accessed, and again in the
//! next round, chance does not explain: were each accessed at random, as often as its
//! temperature says, a run of twelve with a chance of a half each would be found so once
//! in 2^24 runs. The temperature of such a run is of a time that is over. It is set to
//! what the last two rounds say, and the run may be exchanged at once.
//!
//! * *Two rounds*, as a scan comes by in one, or where it stands at a round's end, two.
//! * *As often as its temperature says* when all of the guest does as much as before.
//!   Where a guest turns to one piece, all else is accessed less, and what goes on as
//!   before stands out. So the rates of all pages are thought to have changed by the
//!   factor that makes as many accessed as were.
//! * *Neighbours* of which the guest always accesses all, or none, are not as many signs
//!   as they are pages; how many, no bit tells. So there is a bound on how much may turn
//!   hot: a guest of which every minute some seldom used buffer is used for two rounds
//!   moves no more than that.
//!
//! A page of 2 MiB, which has one bit, is one sign.

use std::ops::Range;

use crate::bitmap;
use crate::heat::BLOCK_PAGES;
use crate::sampler::Level;
use crate::units::PAGES_PER_2M;

use super::Slot;

/// How unlikely it must be that chance finds any run in a round: e^-3, one in twenty
/// rounds; in two that follow each other, one in millions.
const SURENESS: f64 = 3.0;

/// Pages of a run, at least: few are often accessed together.
const LEAST_PAGES: usize = 3 * BLOCK_PAGES;

/// Nor are those of which nearly all are accessed in any case, however many they are: their
/// chance is not known so well. No block with a chance above 0.7 is news.
const LEAST_SIGN: f32 = 0.36;

/// A guest that does less than this part of what it did pauses, rather than that it turned.
const LEAST_ACTIVITY: f64 = 0.1;

/// Of one that did nothing, anything is more than any part of what it did.
const MOST_ACTIVITY: f64 = 10.0;

/// Part of the memory that may turn hot at once: five blocks of a thousandth.
const MOST: f64 = 1.0 / 200.0;

/// Part of the memory that may turn hot in a minute, after that.
const PER_MINUTE: f64 = 1.0 / 2000.0;

/// Temperatures differ in their upper 8 bits here.
const BINS: usize = 256;

/// A run that turned hot, with what of it lies on the fast tier already.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Run {
    pub(super) slot: usize,
    pub(super) pages: Range<usize>,
    /// How unlikely it was: the logarithm, for a page in the mean.
    evidence: f32,
}

/// What is known of all rounds.
#[derive(Clone, Debug)]
pub(super) struct Turned {
    /// The rates of accesses in the last round and in the one before, as a part of what
    /// was forecast.
    activity: [f64; 2],
    /// Pages that turned hot, less those that might have since.
    spent: f64,
}

impl Default for Turned {
    fn default() -> Self {
        Self { activity: [1.0; 2], spent: 0.0 }
    }
}

impl Turned {
    /// Takes in a round of `minutes` in which `seen` of all `pages` were accessed; `heat`
    /// is how many temperatures forecast.
    pub(super) fn take(&mut self, pages: f64, seen: f64, heat: f64, minutes: f64) {
        let forecast = rate(heat / pages.max(1.0)).max(f64::MIN_POSITIVE);
        let activity = rate(seen / pages.max(1.0)) / forecast;
        self.activity = [activity.clamp(LEAST_ACTIVITY, MOST_ACTIVITY), self.activity[0]];
        self.spent = (self.spent - pages * PER_MINUTE * minutes).max(0.0);
    }

    /// What turned hot and lies on the slow tier at least in part, as much as may.
    pub(super) fn find(&mut self, slots: &[Slot]) -> Vec<Run> {
        let pages: u64 = slots.iter().map(|slot| slot.info.page_count).sum();
        // As many runs could begin.
        let blocks = (pages as f64 / BLOCK_PAGES as f64).max(1.0);
        let needed = blocks.ln() + SURENESS;
        let mut runs: Vec<Run> = Vec::new();
        for (index, slot) in slots.iter().enumerate() {
            let signs = self.signs(slot);
            let runs_of_slot = slot.heat.accessed_twice().filter(|run| run.len() >= LEAST_PAGES);
            for run in runs_of_slot.filter(|run| slot.place.any_slow(run.clone())) {
                for (pages, [last, before]) in unlikely(slot, &signs, run) {
                    // A scan, or a moment of less activity, makes one round look unlikely.
                    if pages.len() >= LEAST_PAGES && f64::from(last.min(before)) >= needed {
                        let evidence = (last + before) / pages.len() as f32;
                        runs.push(Run { slot: index, pages: with_edges(slot, pages), evidence });
                    }
                }
            }
        }
        // The least likely first; of equals, those that came first.
        runs.sort_by(|a, b| b.evidence.total_cmp(&a.evidence));
        let mut left = ((pages as f64 * MOST).max(PAGES_PER_2M as f64) - self.spent).max(0.0) as u64;
        runs.retain(|run| match movable(&slots[run.slot], run.pages.clone()) {
            pages if pages > left => false,
            pages => {
                left -= pages;
                self.spent += pages as f64;
                pages > 0
            }
        });
        runs
    }

    /// How unlikely it was that a page was accessed in each of the rounds, as a logarithm,
    /// by its temperature now.
    fn signs(&self, slot: &Slot) -> Signs {
        std::array::from_fn(|bin| {
            let chance = slot.heat.chance_before(((bin << 8) + (1 << 7)) as u16);
            self.activity.map(|activity| -at_rate(rate(chance) * activity).ln() as f32)
        })
    }
}

/// At which rate accesses come of which there is one with this chance.
fn rate(chance: f64) -> f64 {
    -(-chance.clamp(0.0, 1.0 - f64::EPSILON)).ln_1p()
}

/// The chance that there is one.
fn at_rate(rate: f64) -> f64 {
    -(-rate).exp_m1()
}

/// See [`Turned::signs`].
type Signs = [[f32; 2]; BINS];

/// The parts of a run of which each block was unlikely to be accessed in each of the
/// rounds, and how unlikely all of it was.
fn unlikely(slot: &Slot, signs: &Signs, run: Range<usize>) -> Vec<(Range<usize>, [f32; 2])> {
    let mut parts: Vec<(Range<usize>, [f32; 2])> = Vec::new();
    let mut page = run.start;
    while page < run.end {
        let (level, end) = slot.place.level(page);
        let (piece, temperatures) = match level {
            Level::Huge2M => (page..end.min(run.end), 1),
            _ => (page..(page + BLOCK_PAGES).min(run.end), BLOCK_PAGES),
        };
        page = piece.end;
        let sum = match temperatures {
            1 => signs[bin(slot.heat.unit(piece.clone()).0)],
            _ => piece.clone().map(|page| signs[bin(slot.heat.temperature(page))]).fold([0.0; 2], add),
        };
        // Pages of 1 GiB can not move.
        if level == Level::Huge1G || sum[0].min(sum[1]) < LEAST_SIGN * temperatures as f32 {
            continue;
        }
        match parts.last_mut() {
            Some((part, sums)) if part.end == piece.start => {
                part.end = piece.end;
                *sums = add(*sums, sum);
            }
            _ => parts.push((piece, sum)),
        }
    }
    parts
}

fn bin(temperature: u16) -> usize {
    usize::from(temperature >> 8)
}

fn add(one: [f32; 2], other: [f32; 2]) -> [f32; 2] {
    [one[0] + other[0], one[1] + other[1]]
}

/// The run with the pages beside it that do not fill a block, as far as they may have
/// been accessed twice too.
fn with_edges(slot: &Slot, pages: Range<usize>) -> Range<usize> {
    let alike = |page: &usize| slot.heat.may_be_accessed_twice(*page);
    let before = (0..pages.start).rev().take(BLOCK_PAGES - 1).take_while(alike).count();
    let after = (pages.end..slot.heat.pages()).take(BLOCK_PAGES - 1).take_while(alike).count();
    pages.start - before..pages.end + after
}

/// How many of `pages` may come to the fast tier.
fn movable(slot: &Slot, pages: Range<usize>) -> u64 {
    let slow = bitmap::masks(pages).map(|(word, mask)| (word, slot.place.words(word).1 & mask));
    let may = slow.filter(|(_, slow)| *slow != 0).map(|(word, slow)| slow & !slot.stays(word));
    may.map(|may| u64::from(may.count_ones())).sum()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::heat::HeatParams;
    use crate::memory::GuestMemory;
    use crate::memory::tests::{harvest, info};

    const PAGES: usize = 1 << 16;
    const ROUND: Duration = Duration::from_secs(1);

    /// A guest all of whose memory lies on the slow tier, after many rounds in which `hot`
    /// was accessed.
    fn guest(hot: &Range<usize>) -> GuestMemory {
        let params = HeatParams { half_life: ROUND * 10, delay: Duration::ZERO };
        let mut memory = GuestMemory::new(params);
        memory.adopt(1, vec![info(0, PAGES as u64)]);
        memory.observe(0, &harvest(&info(0, PAGES as u64), &[]), None);
        (0..60).for_each(|_| round(&mut memory, std::slice::from_ref(hot)));
        memory
    }

    fn round(memory: &mut GuestMemory, accessed: &[Range<usize>]) {
        let mut seen = harvest(&info(0, PAGES as u64), &[]);
        seen.mapped.fill(!0);
        seen.on_slow.fill(!0);
        seen.levels.fill(Level::Page4K);
        accessed.iter().for_each(|pages| bitmap::fill(&mut seen.accessed, pages.clone(), true));
        memory.observe(0, &seen, Some(ROUND));
        memory.end_round(Some(ROUND.into()));
    }

    #[test]
    fn what_is_hot_all_the_time_is_no_news_and_hides_none() {
        // A run of which each page would be a small sign, right beside what turns hot.
        let hot = 0..300;
        let mut memory = guest(&hot);
        assert_eq!(memory.turned.spent, 0.0);
        for turned in [300..330, 5001..5020] {
            round(&mut memory, &[hot.clone(), turned.clone()]);
            assert_eq!(memory.turned.spent.ceil(), 0.0, "one round proves nothing");
            round(&mut memory, &[hot.clone(), turned.clone()]);
            let spent = memory.turned.spent.ceil() as usize;
            assert!((turned.len()..turned.len() + BLOCK_PAGES).contains(&spent), "{spent} for {turned:?}");
            let heat = memory.views()[0].heat;
            assert!(turned.clone().all(|page| heat.temperature(page) == crate::heat::MAX_TEMPERATURE));
            memory.turned.spent = 0.0;
        }
    }

    #[test]
    fn no_more_turns_hot_than_may() {
        let mut memory = guest(&(0..0));
        let most = (PAGES as f64 * MOST).max(512.0);
        let pieces: Vec<Range<usize>> = (1..20).map(|piece| piece * 1000..piece * 1000 + 100).collect();
        for _ in 0..6 {
            round(&mut memory, &pieces);
        }
        assert!((400.0..=most).contains(&memory.turned.spent), "{}", memory.turned.spent);
        // Nor does a piece that is larger.
        let mut memory = guest(&(0..0));
        let piece = 1000..1600;
        (0..6).for_each(|_| round(&mut memory, std::slice::from_ref(&piece)));
        assert_eq!(memory.turned.spent, 0.0);
    }
}
