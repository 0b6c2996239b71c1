// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which page a workload accesses next. Pure: the same seed gives the same pages.
//!
//! A *grain* is a run of pages that are equally hot: 1 page, or the 512 of a huge
//! page of the host. Grains of any heat lie scattered over the block.

use anyhow::{Result, bail, ensure};

use crate::microvm::random::Random;

/// Of 100 accesses of `static` and `phase`, those to the hot set; the rest go
/// anywhere.
const HOT_PERCENT: u64 = 95;
/// The same of `scan`; the rest are the scan's.
const SCAN_HOT_PERCENT: u64 = 90;
/// The same of `hot-block`, once it is hot.
const BLOCK_PERCENT: u64 = 80;

/// The hot set is a fifth of the block.
const HOT_PART: u64 = 5;
/// The hot block is a thousandth.
const BLOCK_PART: u64 = 1000;

/// Exponent of the Zipf distribution: YCSB's (Cooper et al., "Benchmarking cloud
/// serving systems with YCSB", SoCC 2010).
const ZIPF_EXPONENT: f64 = 0.99;

/// What a workload does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// A fifth of the block is hot and stays so.
    Static,
    /// The hotness of grains falls with their rank to the power of -0.99.
    Zipf,
    /// As static; with each phase another fifth is hot.
    Phase,
    /// A fifth is hot while a scan goes over all of the block, again and again.
    Scan,
    /// All is equally cold, and from phase 1 on one run of pages is hot.
    HotBlock,
}

impl Pattern {
    /// By the name that the bench gives it.
    pub fn parse(name: &str) -> Result<Self> {
        Ok(match name {
            "static" => Self::Static,
            "zipf" => Self::Zipf,
            "phase" => Self::Phase,
            "scan" => Self::Scan,
            "hot-block" => Self::HotBlock,
            other => bail!("no workload is called {other:?}"),
        })
    }
}

/// Draws pages.
pub struct Chooser {
    pattern: Pattern,
    random: Random,
    /// Pages of the block and of a grain, both powers of two.
    pages: u64,
    grain: u64,
    phase: u64,
    scan_at: u64,
    ranks: Vec<Rank>,
}

impl Chooser {
    /// For a block of so many pages.
    pub fn new(pattern: Pattern, pages: u64, grain: u64, seed: u64) -> Result<Self> {
        ensure!(pages.is_power_of_two() && grain.is_power_of_two(), "{pages} pages, {grain} to a grain");
        ensure!(pages / grain >= HOT_PART * 4, "{pages} pages are too few for grains of {grain}");
        let ranks = if pattern == Pattern::Zipf { zipf((pages / grain) as usize) } else { Vec::new() };
        Ok(Self { pattern, random: Random::new(seed, 0), pages, grain, phase: 0, scan_at: 0, ranks })
    }

    /// Begins another phase.
    pub fn set_phase(&mut self, phase: u64) {
        self.phase = phase;
    }

    /// The next page, and a number that looks random.
    pub fn next(&mut self) -> (u64, u64) {
        let of_hundred = self.random.below(100);
        let page = match self.pattern {
            Pattern::Static if of_hundred < HOT_PERCENT => self.hot(0),
            Pattern::Phase if of_hundred < HOT_PERCENT => self.hot(self.phase),
            Pattern::Static | Pattern::Phase => self.random.below(self.pages),
            Pattern::Zipf => self.ranked(),
            Pattern::Scan if of_hundred < SCAN_HOT_PERCENT => self.hot(0),
            Pattern::Scan => {
                self.scan_at = (self.scan_at + 1) % self.pages;
                self.scan_at
            }
            Pattern::HotBlock if self.phase > 0 && of_hundred < BLOCK_PERCENT => {
                let (start, length) = hot_block(self.pages);
                start + self.random.below(length)
            }
            Pattern::HotBlock => self.random.below(self.pages),
        };
        (page, self.random.next())
    }

    /// A page of the hot set of a phase. The sets of some phases share no grain.
    fn hot(&mut self, phase: u64) -> u64 {
        let grains = self.pages / self.grain;
        let set = grains / HOT_PART;
        let index = phase * set + self.random.below(set);
        self.page_of(index % grains)
    }

    fn ranked(&mut self) -> u64 {
        let rank = self.random.below(self.ranks.len() as u64);
        let Some(entry) = self.ranks.get(rank as usize) else { return 0 };
        let keep = (self.random.next() >> 32) as u32 <= entry.threshold;
        self.page_of(if keep { rank } else { u64::from(entry.alias) })
    }

    /// Any page of the grain that stands at `index` in the order of heat.
    fn page_of(&mut self, index: u64) -> u64 {
        scatter(index, self.pages / self.grain) * self.grain + self.random.below(self.grain)
    }
}

/// First page and length of the block that becomes hot: in the last quarter, which
/// is the last to be written to, and not at the start of a huge page.
pub fn hot_block(pages: u64) -> (u64, u64) {
    (pages / 4 * 3 + 137, (pages / BLOCK_PART).max(1))
}

/// Takes the numbers below `count`, a power of two, to each other in an order
/// without visible pattern: each step can be undone, so none is met twice.
fn scatter(index: u64, count: u64) -> u64 {
    let mask = count - 1;
    let half = count.trailing_zeros().div_ceil(2);
    let mut number = index & mask;
    for odd in [0x9E37_79B9_7F4A_7C15_u64, 0xBF58_476D_1CE4_E5B9, 0x94D0_49BB_1331_11EB] {
        number ^= number >> half;
        number = number.wrapping_mul(odd) & mask;
    }
    (number ^ (number >> half)) & mask
}

/// An entry of an alias table (Walker 1977, in the form of Vose 1991): drawn
/// evenly, it stands for itself up to `threshold` and for `alias` above.
struct Rank {
    threshold: u32,
    alias: u32,
}

fn zipf(count: usize) -> Vec<Rank> {
    let weights: Vec<f64> = (1..=count).map(|rank| (rank as f64).powf(-ZIPF_EXPONENT)).collect();
    let mean = weights.iter().sum::<f64>() / count as f64;
    let mut shares: Vec<f64> = weights.iter().map(|weight| weight / mean).collect();
    let mut ranks: Vec<Rank> = (0..count as u32).map(|alias| Rank { threshold: u32::MAX, alias }).collect();
    let (mut small, mut large): (Vec<usize>, Vec<usize>) = (0..count).partition(|at| shares[*at] < 1.0);
    while let (Some(low), Some(high)) = (small.pop(), large.last().copied()) {
        ranks[low] = Rank { threshold: (shares[low] * f64::from(u32::MAX)) as u32, alias: high as u32 };
        shares[high] -= 1.0 - shares[low];
        if shares[high] < 1.0 {
            large.pop();
            small.push(high);
        }
    }
    ranks
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    const PAGES: u64 = 1 << 13;
    const DRAWS: usize = 200_000;

    fn counts(pattern: Pattern, grain: u64, phase: u64) -> BTreeMap<u64, u64> {
        let mut chooser = Chooser::new(pattern, PAGES, grain, 7).unwrap();
        chooser.set_phase(phase);
        let mut counts = BTreeMap::new();
        for _ in 0..DRAWS {
            *counts.entry(chooser.next().0).or_insert(0) += 1;
        }
        assert!(counts.keys().all(|page| *page < PAGES));
        counts
    }

    /// Share of all accesses that the hottest `pages` pages get.
    fn top(counts: &BTreeMap<u64, u64>, pages: u64) -> f64 {
        let mut sorted: Vec<u64> = counts.values().copied().collect();
        sorted.sort_unstable_by(|a, b| b.cmp(a));
        sorted.iter().take(pages as usize).sum::<u64>() as f64 / DRAWS as f64
    }

    #[test]
    fn scattering_meets_each_number_once() {
        for count in [32, 64, 128, 1 << 15, 1 << 16] {
            let met: BTreeSet<u64> = (0..count).map(|index| scatter(index, count)).collect();
            assert_eq!(met.len() as u64, count);
            assert!(met.iter().all(|number| *number < count));
            // The first fifth does not stand in one place.
            let early = (0..count / 5).filter(|index| scatter(*index, count) < count / 2).count() as u64;
            assert!((count / 5 / 4..=count / 5 * 3 / 4 + 1).contains(&early), "{early} of {}", count / 5);
        }
    }

    #[test]
    fn a_fifth_gets_what_it_should() {
        for (pattern, least) in [(Pattern::Static, 0.95), (Pattern::Phase, 0.95), (Pattern::Scan, 0.90)] {
            let share = top(&counts(pattern, 1, 0), PAGES / 5);
            assert!((least..least + 0.04).contains(&share), "{pattern:?}: {share}");
        }
    }

    #[test]
    fn phases_share_no_hot_page() {
        let hot = |phase| -> BTreeSet<u64> {
            let all = counts(Pattern::Phase, 1, phase);
            all.into_iter().filter(|(_, count)| *count >= 20).map(|(page, _)| page).collect()
        };
        let (first, second) = (hot(0), hot(1));
        assert!(first.len() as u64 > PAGES / 6 && second.len() as u64 > PAGES / 6);
        assert_eq!(first.intersection(&second).count(), 0);
    }

    #[test]
    fn zipf_has_its_known_shares() {
        // Sums of rank^-0.99 over the first n of 8192 ranks.
        let sum = |n: u64| (1..=n).map(|rank| (rank as f64).powf(-ZIPF_EXPONENT)).sum::<f64>();
        let all = counts(Pattern::Zipf, 1, 0);
        for part in [1, 82, 819, 2457] {
            let (share, expected) = (top(&all, part), sum(part) / sum(PAGES));
            assert!((share - expected).abs() < 0.02, "{part}: {share}, {expected}");
        }
    }

    #[test]
    fn grains_are_hot_as_a_whole() {
        let grain = 128;
        let mut grains: BTreeMap<u64, u64> = BTreeMap::new();
        for (page, count) in counts(Pattern::Static, grain, 0) {
            *grains.entry(page / grain).or_insert(0) += count;
        }
        let hot = grains.values().filter(|count| **count > DRAWS as u64 / 20).count() as u64;
        assert_eq!(hot, PAGES / grain / HOT_PART);
    }

    #[test]
    fn a_scan_passes_every_page() {
        let mut chooser = Chooser::new(Pattern::Scan, 1024, 1, 1).unwrap();
        let met: BTreeSet<u64> = (0..1024 * 12).map(|_| chooser.next().0).collect();
        assert_eq!(met.len(), 1024);
    }

    #[test]
    fn the_hot_block_appears() {
        let (start, length) = hot_block(PAGES);
        let inside = |phase| -> u64 {
            counts(Pattern::HotBlock, 1, phase).range(start..start + length).map(|(_, count)| count).sum()
        };
        assert!(inside(0) < DRAWS as u64 / 100);
        assert!((0.79..0.82).contains(&(inside(1) as f64 / DRAWS as f64)));
        assert_eq!(length, 8);
    }
}
