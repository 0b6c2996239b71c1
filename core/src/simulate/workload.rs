// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guests made up by a formula: how often each page is accessed, and what the
//! accessed bits then say.
//!
//! Memory is cut into *granules* of a few pages that are accessed equally often.
//! Each granule has a *rank*: 0 is the one most accessed. Ranks are scattered over
//! the memory at random, but for a hot block, which is one piece. A page is
//! accessed at random times at its rate (Poisson): an interval draws a count, and
//! the accessed bit says whether that is above 0. Guests of more than
//! [`MOST_COUNTED_PAGES`] draw the bits alone.

use std::ops::Range;
use std::time::Duration;

use crate::bitmap::{self, WORD_BITS};
use crate::units::PAGES_PER_2M;

use super::draw::Draws;

/// Up to this many pages, 4 GiB, each page's accesses are counted.
pub const MOST_COUNTED_PAGES: u64 = 1 << 20;

/// What a guest does with its memory. Shares are of the guest's pages, from 0 to 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Pattern {
    /// All pages alike.
    Uniform,
    /// The page of rank k is accessed as often as k^-theta says.
    Zipf {
        /// How steep; 0 is uniform.
        theta: f64,
    },
    /// A part is hot, and stays so.
    Static {
        /// Hot pages.
        hot: f64,
        /// Accesses that go to them.
        to_hot: f64,
    },
    /// The same in one piece.
    HotBlock {
        /// Hot pages.
        hot: f64,
        /// Accesses that go to them.
        to_hot: f64,
    },
    /// As `Uniform` at first, then as `HotBlock`.
    LateBlock {
        /// Hot pages.
        hot: f64,
        /// Accesses that go to them.
        to_hot: f64,
        /// When they turn hot.
        after: Duration,
    },
    /// As `Static`, and after each period other pages are hot.
    Phase {
        /// Hot pages.
        hot: f64,
        /// Accesses that go to them.
        to_hot: f64,
        /// How long a set stays hot.
        period: Duration,
    },
    /// As `Static`, and all pages are gone over without end, one access each.
    Scan {
        /// Hot pages.
        hot: f64,
        /// Accesses that go to them, of those that the scan does not do.
        to_hot: f64,
        /// How long it takes to go over all pages once.
        period: Duration,
    },
    /// As `Static`, and both the hot part and all rates grow and shrink as the sun
    /// does, down to a tenth.
    Diurnal {
        /// Hot pages, at most.
        hot: f64,
        /// Accesses that go to them.
        to_hot: f64,
        /// A day.
        period: Duration,
    },
    /// A thousandth is accessed once a second, as by a kernel's timers; nothing else.
    Idle,
}

/// A guest that is made up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WorkloadParams {
    /// What it does.
    pub pattern: Pattern,
    /// Its memory in pages of 4 KiB.
    pub pages: u64,
    /// Mapped by entries of 2 MiB, which have one accessed bit for 512 pages.
    pub huge: bool,
    /// Accesses of a page in a second, the mean over all pages. `Idle` knows better.
    pub rate_hz: f64,
    /// Pages that lie together and are alike, a power of two; `None`: one page, 512
    /// in huge pages, and 64 at least in guests that are not counted.
    pub granule_pages: Option<u64>,
}

/// How much the rates of a night are below those of the day.
const NIGHT: f64 = 0.1;

/// Share of an idle guest's pages that are accessed all the same.
const IDLE_PART: f64 = 0.001;

/// A guest that runs.
#[derive(Clone, Debug)]
pub struct Workload {
    params: WorkloadParams,
    granule_pages: u64,
    /// Rank of each granule, in order of address.
    ranks: Vec<u32>,
    /// `Zipf` only: mean rate of the pages of each rank.
    rates_hz: Vec<f32>,
    draws: Draws,
    now: Duration,
    /// Expected accesses of a page in the last interval, by granule.
    means: Vec<f32>,
    /// Accesses of each page in it; empty when not counted.
    counts: Vec<u32>,
}

impl Workload {
    /// Guest `index` of a run.
    pub fn new(params: WorkloadParams, seed: u64, index: u64) -> Self {
        let counted = params.pages <= MOST_COUNTED_PAGES;
        let least = match (params.huge, counted) {
            (true, _) => PAGES_PER_2M,
            (false, true) => 1,
            (false, false) => WORD_BITS as u64,
        };
        let granule_pages = params.granule_pages.unwrap_or(least).next_power_of_two();
        let granule_pages = if counted { granule_pages } else { granule_pages.max(WORD_BITS as u64) };
        // 2^32 granules of 64 pages are 1 PiB.
        let granules = params.pages.div_ceil(granule_pages) as u32;
        let mut draws = Draws::new(seed, index);
        let ranks = match params.pattern {
            Pattern::HotBlock { .. } | Pattern::LateBlock { .. } => {
                // At high addresses, where a guest that touches its memory in order finds
                // no DRAM left.
                let first = granules / 8 * 7 + draws.below(u64::from(granules / 16).max(1)) as u32;
                (0..granules).map(|granule| (granule + granules - first) % granules).collect()
            }
            _ => draws.shuffled(granules),
        };
        let rates_hz = match params.pattern {
            Pattern::Zipf { theta } => zipf_rates(theta, params.rate_hz, params.pages, granule_pages),
            _ => Vec::new(),
        };
        Self {
            granule_pages,
            means: vec![0.0; ranks.len()],
            counts: vec![0; if counted { params.pages as usize } else { 0 }],
            ranks,
            rates_hz,
            draws,
            now: Duration::ZERO,
            params,
        }
    }

    /// What the guest is.
    pub fn params(&self) -> &WorkloadParams {
        &self.params
    }

    /// Pages of a granule.
    pub fn granule_pages(&self) -> u64 {
        self.granule_pages
    }

    /// Expected accesses of a page of each granule in the last interval.
    pub fn means(&self) -> &[f32] {
        &self.means
    }

    /// Accesses of each page in the last interval, if they are counted.
    pub fn counts(&self) -> Option<&[u32]> {
        (!self.counts.is_empty()).then_some(&self.counts)
    }

    /// Runs for `interval`: sets the bits of the pages that are accessed, and clears
    /// all others.
    pub fn run(&mut self, interval: Duration, accessed: &mut [u64]) {
        let seconds = interval.as_secs_f64();
        let mut means = std::mem::take(&mut self.means);
        let rates = self.rates();
        for (mean, rank) in means.iter_mut().zip(&self.ranks) {
            *mean = (rates.of(*rank) * seconds) as f32;
        }
        self.means = means;
        accessed.fill(0);
        if self.counts.is_empty() {
            self.draw_bits(accessed);
        } else {
            self.draw_counts(accessed);
        }
        self.scan(interval, accessed);
        if self.params.huge {
            spread_to_huge_pages(accessed, self.params.pages);
        }
        self.now += interval;
    }

    /// The rates as they are now.
    fn rates(&self) -> Rates<'_> {
        let WorkloadParams { pattern, rate_hz, .. } = self.params;
        let granules = self.ranks.len() as u32;
        let two = |hot: f64, to_hot: f64, shift: u32, activity: f64| {
            let hot_ranks = (hot * f64::from(granules)).round().max(1.0).min(f64::from(granules));
            let part = hot_ranks / f64::from(granules);
            let cold_hz = if part < 1.0 { rate_hz * (1.0 - to_hot) / (1.0 - part) } else { 0.0 };
            Rates::Two {
                shift,
                granules,
                hot_ranks: hot_ranks as u32,
                hot_hz: activity * rate_hz * to_hot / part,
                cold_hz: activity * cold_hz,
            }
        };
        match pattern {
            Pattern::Uniform => two(1.0, 1.0, 0, 1.0),
            Pattern::LateBlock { after, .. } if self.now < after => two(1.0, 1.0, 0, 1.0),
            Pattern::Zipf { .. } => Rates::Each(&self.rates_hz),
            Pattern::Static { hot, to_hot }
            | Pattern::HotBlock { hot, to_hot }
            | Pattern::LateBlock { hot, to_hot, .. }
            | Pattern::Scan { hot, to_hot, .. } => two(hot, to_hot, 0, 1.0),
            Pattern::Phase { hot, to_hot, period } => {
                let step = (hot * f64::from(granules)).round() as u64;
                let shift = step.wrapping_mul(periods(self.now, period)) % u64::from(granules.max(1));
                two(hot, to_hot, shift as u32, 1.0)
            }
            Pattern::Diurnal { hot, to_hot, period } => {
                let day = self.now.as_secs_f64() / period.as_secs_f64().max(f64::MIN_POSITIVE);
                let sun = (1.0 - (day * std::f64::consts::TAU).cos()) / 2.0;
                let activity = NIGHT + (1.0 - NIGHT) * sun;
                // As many accesses to a hot page by night as by day, to fewer of them.
                two(hot * activity, to_hot, 0, activity)
            }
            Pattern::Idle => {
                let hot_ranks = (IDLE_PART * f64::from(granules)).ceil() as u32;
                Rates::Two { shift: 0, granules, hot_ranks, hot_hz: 1.0, cold_hz: 0.0 }
            }
        }
    }

    fn draw_counts(&mut self, accessed: &mut [u64]) {
        let pages = self.counts.len() as u64;
        for (granule, mean) in self.means.iter().enumerate() {
            let start = granule as u64 * self.granule_pages;
            for page in start..(start + self.granule_pages).min(pages) {
                let count = if *mean > 0.0 { self.draws.count(f64::from(*mean)) } else { 0 };
                self.counts[page as usize] = count;
                if count > 0 {
                    accessed[page as usize / WORD_BITS] |= 1 << (page as usize % WORD_BITS);
                }
            }
        }
    }

    fn draw_bits(&mut self, accessed: &mut [u64]) {
        let words = (self.granule_pages as usize / WORD_BITS).max(1);
        for (block, mean) in accessed.chunks_mut(words).zip(&self.means) {
            if *mean > 0.0 {
                block.fill_with(|| self.draws.word(f64::from(*mean)));
            }
        }
        if let Some(last) = accessed.get_mut(self.params.pages as usize / WORD_BITS) {
            *last &= bitmap::tail_mask(self.params.pages as usize);
        }
    }

    /// The pages that the scan comes by, each accessed once.
    fn scan(&mut self, interval: Duration, accessed: &mut [u64]) {
        let Pattern::Scan { period, .. } = self.params.pattern else { return };
        let at = |time: Duration| {
            let passes = time.as_secs_f64() / period.as_secs_f64().max(f64::MIN_POSITIVE);
            (passes * self.params.pages as f64) as u64
        };
        let (from, to) = (at(self.now), at(self.now + interval));
        let pages = self.params.pages;
        // More than one pass in an interval tells no more than one.
        let length = (to - from).min(pages);
        let from = from % pages.max(1);
        for range in [from..(from + length).min(pages), 0..(from + length).saturating_sub(pages)] {
            self.scan_range(range, accessed);
        }
    }

    fn scan_range(&mut self, pages: Range<u64>, accessed: &mut [u64]) {
        bitmap::fill(accessed, pages.start as usize..pages.end as usize, true);
        if let Some(counts) = self.counts.get_mut(pages.start as usize..pages.end as usize) {
            counts.iter_mut().for_each(|count| *count += 1);
        }
        let granule = self.granule_pages;
        for index in pages.start / granule..pages.end.div_ceil(granule) {
            let (start, end) = (index * granule, (index + 1) * granule);
            let covered = end.min(pages.end) - start.max(pages.start);
            if let Some(mean) = self.means.get_mut(index as usize) {
                *mean += (covered as f64 / granule as f64) as f32;
            }
        }
    }
}

/// How often pages are accessed, by rank.
enum Rates<'a> {
    Each(&'a [f32]),
    /// Ranks from `shift` on, round and round.
    Two {
        shift: u32,
        granules: u32,
        hot_ranks: u32,
        hot_hz: f64,
        cold_hz: f64,
    },
}

impl Rates<'_> {
    fn of(&self, rank: u32) -> f64 {
        match *self {
            Rates::Each(rates) => rates.get(rank as usize).map_or(0.0, |rate| f64::from(*rate)),
            Rates::Two { shift, granules, hot_ranks, hot_hz, cold_hz } => {
                let shifted = if rank >= shift { rank - shift } else { rank + granules - shift };
                if shifted < hot_ranks { hot_hz } else { cold_hz }
            }
        }
    }
}

fn periods(now: Duration, period: Duration) -> u64 {
    (now.as_nanos() / period.as_nanos().max(1)) as u64
}

/// Mean rate of the pages of each granule, the one with the hottest pages first.
fn zipf_rates(theta: f64, rate_hz: f64, pages: u64, granule_pages: u64) -> Vec<f32> {
    let granules = pages.div_ceil(granule_pages);
    // Beyond the first pages the sum over a granule is the curve's integral to
    // within a millionth.
    const SUMMED: u64 = 4096;
    let integral = |x: f64| match (theta - 1.0).abs() < 1e-9 {
        true => x.ln(),
        false => x.powf(1.0 - theta) / (1.0 - theta),
    };
    let weight = |granule: u64| {
        let (start, end) = (granule * granule_pages, ((granule + 1) * granule_pages).min(pages));
        if start < SUMMED {
            (start + 1..=end).map(|rank| (rank as f64).powf(-theta)).sum()
        } else {
            integral(end as f64 + 0.5) - integral(start as f64 + 0.5)
        }
    };
    let weights: Vec<f64> = (0..granules).map(weight).collect();
    let total: f64 = weights.iter().sum();
    let scale = rate_hz * pages as f64 / total.max(f64::MIN_POSITIVE) / granule_pages as f64;
    weights.into_iter().map(|weight| (weight * scale) as f32).collect()
}

/// One bit stands for 512 pages.
fn spread_to_huge_pages(accessed: &mut [u64], pages: u64) {
    const WORDS: usize = PAGES_PER_2M as usize / WORD_BITS;
    for block in accessed.chunks_mut(WORDS) {
        if block.iter().any(|word| *word != 0) {
            block.fill(!0);
        }
    }
    if let Some(last) = accessed.get_mut(pages as usize / WORD_BITS) {
        *last &= bitmap::tail_mask(pages as usize);
    }
}

#[cfg(test)]
#[path = "workload_tests.rs"]
mod tests;
