// SPDX-License-Identifier: MIT OR Apache-2.0
//! How hot each page of a memory slot is.
//!
//! # Temperature
//!
//! A page's temperature is the exponentially weighted share of the recent past
//! in which it was accessed: 0 is never, [`MAX_TEMPERATURE`] is in every round.
//! A round that took `dt` changes it to
//!
//! ```text
//! t' = t * k + (accessed ? (1 - k) * MAX : 0)      k = 2^(-dt / half_life)
//! ```
//!
//! so what was seen one half-life ago weighs half, whatever the rounds' length.
//!
//! # A short past
//!
//! What a map has not seen must not count as *not accessed*. As long as all that was
//! seen is younger than 1 / ln 2 of the half-life, the temperature is the plain mean
//! of it: after one round a page has 0 or all of the scale. From then on both are
//! the same. When a guest turns to other pages ([`Surprise::is_shift`]), the past
//! says nothing of them either, and [`HeatMap::restart`] makes it short again.
//!
//! Decay rounds down, so a page that is never accessed again reaches 0.
//!
//! # Two bytes a page
//!
//! A cell holds the temperature in its upper 14 bits and, in the lower two, a
//! count that an access sets to 3 and that goes down by one at every half
//! [`HeatParams::delay`], down to 0. The first step down can come right after
//! the access, the next two can not: a page whose count is 0 was **not accessed
//! for at least the delay** ([`HeatMap::is_idle`]), and the count reaches 0
//! after one and a half delays at the latest, give or take a round. Cells
//! compare by temperature first.
//!
//! Rounds much shorter than the half-life would round the decay to nothing:
//! their bits are gathered in a bitmap (one more bit a page, allocated when
//! first needed) and the temperature is stepped when a 256th is to be decayed.

mod blocks;
mod histogram;
mod samples;
mod step;
pub mod store;
mod summary;
mod surprise;

use std::ops::{AddAssign, Range};
use std::time::Duration;

use crate::bitmap::{self, WORD_BITS};
use crate::units::Bytes;
use crate::wire::Class;

pub(crate) use blocks::BLOCK_PAGES;
use blocks::Blocks;
pub use histogram::Histogram;
pub(crate) use summary::Summaries;
pub use surprise::Surprise;

use step::Step;
use surprise::Sums;

/// Temperature of a page that was accessed in every round.
pub const MAX_TEMPERATURE: u16 = !IDLE_COUNT;

/// From here on a page is hot: it was accessed in half of the recent past.
pub const HOT_FROM: u16 = 1 << 15;

/// Below this a page is cold: a page that was accessed all the time gets here
/// after four half-lives without an access.
pub const COLD_BELOW: u16 = 1 << 12;

/// The bits of a cell that count down to idle.
const IDLE_COUNT: u16 = 3;

/// A step that decays less than one part in this is put off.
const FINEST_STEP: f64 = 256.0;

/// How temperatures move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeatParams {
    /// Time after which what was seen weighs half.
    pub half_life: Duration,
    /// Time without an access after which a page is idle.
    pub delay: Duration,
}

/// The time that a round is of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// Since the round before: by as much temperatures decay.
    pub elapsed: Duration,
    /// Of it, the last part, in which accesses were seen.
    pub watched: Duration,
}

impl From<Duration> for Span {
    /// All of it was watched.
    fn from(elapsed: Duration) -> Self {
        Span { elapsed, watched: elapsed }
    }
}

impl AddAssign for Span {
    fn add_assign(&mut self, other: Self) {
        self.elapsed = self.elapsed.saturating_add(other.elapsed);
        self.watched = self.watched.saturating_add(other.watched);
    }
}

/// Temperature of every page of one memory slot, by its index in the slot.
#[derive(Clone, Debug)]
pub struct HeatMap {
    params: HeatParams,
    pages: usize,
    /// One for each page, up to a whole number of words of a bitmap; those past
    /// the last page stay cold.
    cells: Vec<u16>,
    /// Accesses that the temperature does not know yet; empty until needed.
    pending: Vec<u64>,
    /// Time that the temperature does not know yet.
    pending_span: Span,
    /// Time since the idle counts went down, less than half a delay.
    since_countdown: Duration,
    /// How long a past the temperatures know, in seconds; what is beyond
    /// [`HeatMap::span_s`] makes no difference.
    past_s: f64,
    /// Length of the last step, in seconds, and how long of it was watched.
    last_step_s: f64,
    last_watched_s: f64,
    /// See [`HeatMap::variance`].
    variance: f64,
    /// Sampled in the round that the next step ends.
    sampled: samples::Sampled,
    /// Sampled with more weight than a bit has, and not in the temperatures yet.
    raised: samples::Sampled,
    /// See [`HeatMap::unweighed`].
    unweighed: u64,
    /// See [`HeatMap::mean_step`].
    mean_step_s: f64,
    blocks: Blocks,
    /// The part of each temperature that is left of what it was before the last round,
    /// and before the one before.
    kept: [f64; 2],
    /// Pages accessed in the last round.
    seen: u64,
}

/// Number of pages of each class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClassCounts {
    /// [`Class::Hot`].
    pub hot: u64,
    /// [`Class::Warm`].
    pub warm: u64,
    /// [`Class::Cold`].
    pub cold: u64,
}

impl ClassCounts {
    /// What looks used: all that is not cold.
    pub fn used(&self) -> Bytes {
        Bytes::of_pages(self.hot + self.warm)
    }
}

impl HeatMap {
    /// A map of `pages` pages, all cold. None is idle yet: that takes as long as
    /// after an access, for nothing is known of the time before.
    pub fn new(pages: usize, params: HeatParams) -> Self {
        HeatMap {
            params,
            pages,
            cells: vec![IDLE_COUNT; bitmap::words_for(pages) * WORD_BITS],
            pending: Vec::new(),
            pending_span: Span::default(),
            since_countdown: Duration::ZERO,
            past_s: 0.0,
            last_step_s: 0.0,
            last_watched_s: 0.0,
            variance: 1.0,
            sampled: samples::Sampled::default(),
            raised: samples::Sampled::default(),
            unweighed: 0,
            mean_step_s: 0.0,
            blocks: Blocks::new(pages),
            kept: [1.0; 2],
            seen: 0,
        }
    }

    /// A map that goes on from the [`HeatMap::cells`] of an earlier one, a cell a
    /// page. Missing ones are cold, surplus ones left out. They are taken for what a
    /// long past says: from a shorter one they would change faster.
    pub fn from_cells(pages: usize, params: HeatParams, mut cells: Vec<u16>) -> Self {
        let padded = bitmap::words_for(pages) * WORD_BITS;
        cells.truncate(pages);
        cells.resize(padded, IDLE_COUNT);
        // All of the past was seen, in steps of unknown length: the next one knows more.
        let variance = 1.0 / (2.0 * FINEST_STEP);
        let known = HeatMap { past_s: f64::INFINITY, variance, ..HeatMap::new(0, params) };
        HeatMap { pages, cells, blocks: Blocks::new(pages), ..known }
    }

    /// Number of pages.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// All that is known of each page, to be kept; in the form that
    /// [`HeatMap::from_cells`] takes. After [`HeatMap::settle`] nothing is missing.
    pub fn cells(&self) -> &[u16] {
        self.cells.get(..self.pages).unwrap_or_default()
    }

    /// Steps the temperatures by rounds that were put off, if there are any.
    pub fn settle(&mut self) -> Surprise {
        match self.pending_span.elapsed.is_zero() {
            true => Surprise::default(),
            false => self.step_pending(),
        }
    }

    /// Forgets faster from now on, until the past is as long again as the half-life
    /// asks for: what the temperatures say so far counts as half a round.
    pub fn restart(&mut self) {
        if self.last_step_s == 0.0 {
            return;
        }
        self.past_s = self.last_step_s / 2.0;
        self.mean_step_s = self.last_watched_s;
        self.variance = 1.0;
    }

    /// How long each of the steps that temperatures are made of was watched, weighted as
    /// they are: the time in which a page is accessed with the chance that its temperature
    /// tells. It is longer than a round where rounds were put off; zero before the first
    /// step.
    pub fn mean_step(&self) -> Duration {
        Duration::try_from_secs_f64(self.mean_step_s).unwrap_or_default()
    }

    /// How uncertain temperatures are, as a factor from 0 to 1: that of a page which
    /// is accessed in a round with the chance `p` has the variance `p (1 - p)` times
    /// this. It is 1 after one round and 1/n after n equal ones, until the half-life
    /// sets a lower end.
    pub fn variance(&self) -> f64 {
        self.variance
    }

    /// Goes on with other parameters; temperatures stay as they are.
    pub fn set_params(&mut self, params: HeatParams) {
        self.params = params;
        self.since_countdown = Duration::ZERO;
    }

    /// Takes in a round: the pages accessed in it, and the time since the round
    /// before. Missing words are zero, surplus ones ignored. Says what was not
    /// expected of it: nothing, when the temperatures are stepped later.
    pub fn step(&mut self, accessed: &[u64], dt: Duration) -> Surprise {
        let mut round = self.begin(dt.into());
        self.part(&mut round, 0..usize::MAX, accessed);
        self.end(round)
    }

    /// Begins to take in a round, part by part: what [`HeatMap::step`] does at once.
    pub fn begin(&mut self, span: Span) -> Round {
        self.kept = [1.0, self.kept[0]];
        self.seen = 0;
        if self.is_too_short(span.elapsed) {
            self.pending.resize(self.cells.len() / WORD_BITS, 0);
            let (sums, surprise) = (Sums::default(), Surprise::default());
            return Round { step: None, keep: 1.0, span, sums, surprise };
        }
        // Accesses of short rounds must not count for this long one.
        let surprise = self.settle();
        Round { surprise, ..self.start(span) }
    }

    /// Takes in the pages of the words `words` of a bitmap, which `accessed` has from
    /// its first word on. Each word must come once in a round.
    pub fn part(&mut self, round: &mut Round, words: Range<usize>, accessed: &[u64]) {
        let all = self.cells.len() / WORD_BITS;
        let words = words.start.min(all)..words.end.min(all);
        let accessed = self.sampled.heating(accessed, words.clone());
        self.seen += self.blocks.take(words.clone(), &accessed);
        self.warm(round, words, &accessed);
    }

    /// Warms the accessed pages of some words that there are, now or later.
    fn warm(&mut self, round: &mut Round, words: Range<usize>, accessed: &[u64]) {
        let tail = if words.end * WORD_BITS == self.cells.len() { bitmap::tail_mask(self.pages) } else { !0 };
        let cells = self.cells.get_mut(words.start * WORD_BITS..words.end * WORD_BITS);
        let Some(cells) = cells else { return };
        match round.step {
            Some(step) => round.sums += step.apply(cells, accessed, tail),
            None => put_off(cells, &mut self.pending[words], accessed, tail),
        }
    }

    /// Ends a round, after all its parts. Says what was not expected of it: nothing,
    /// when the temperatures are stepped later.
    pub fn end(&mut self, round: Round) -> Surprise {
        self.end_samples();
        if round.step.is_some() {
            let surprise = self.finish(&round);
            return round.surprise.and(surprise);
        }
        self.pending_span += round.span;
        match self.is_too_short(self.pending_span.elapsed) {
            true => Surprise::default(),
            false => self.step_pending(),
        }
    }

    /// Temperature of `page`, 0 to [`MAX_TEMPERATURE`]; 0 past the end.
    pub fn temperature(&self, page: usize) -> u16 {
        self.cells.get(page).map_or(0, |cell| cell & MAX_TEMPERATURE)
    }

    /// Whether `page` was not accessed for [`HeatParams::delay`] at least; always,
    /// if that is nothing.
    pub fn is_idle(&self, page: usize) -> bool {
        self.cells.get(page).is_none_or(|cell| cell & self.idle_bits() == 0)
    }

    /// The highest temperature in `pages`, and whether all of them are idle:
    /// how pages are judged that can only move together.
    pub fn unit(&self, pages: Range<usize>) -> (u16, bool) {
        let cells = self.cells.get(pages).unwrap_or_default();
        let (hottest, counts) =
            cells.iter().fold((0, 0), |(hottest, counts), cell| (*cell.max(&hottest), counts | cell));
        (hottest & MAX_TEMPERATURE, counts & self.idle_bits() == 0)
    }

    /// The lowest and the highest temperature in `pages`.
    pub fn extremes(&self, pages: Range<usize>) -> (u16, u16) {
        let cells = self.cells.get(pages).unwrap_or_default();
        let (low, high) =
            cells.iter().fold((u16::MAX, 0), |(low, high), cell| (*cell.min(&low), *cell.max(&high)));
        (low & MAX_TEMPERATURE, high & MAX_TEMPERATURE)
    }

    /// The bits of a cell that keep its page from being idle.
    fn idle_bits(&self) -> u16 {
        if self.params.delay.is_zero() { 0 } else { IDLE_COUNT }
    }

    /// Class of `page`.
    pub fn class(&self, page: usize) -> Class {
        class_of(self.temperature(page))
    }

    /// Number of pages of each class.
    pub fn class_counts(&self) -> ClassCounts {
        let mut counts = ClassCounts::default();
        for block in self.cells.chunks_exact(WORD_BITS) {
            // Sums of 64 fit the narrow type, which lets the loop run in vectors.
            let hot: u16 = block.iter().map(|cell| u16::from(*cell >= HOT_FROM)).sum();
            let cold: u16 = block.iter().map(|cell| u16::from(*cell < COLD_BELOW)).sum();
            counts.hot += u64::from(hot);
            counts.cold += u64::from(cold);
        }
        // The cells past the last page are cold.
        counts.cold -= (self.cells.len() - self.pages) as u64;
        counts.warm = self.pages as u64 - counts.hot - counts.cold;
        counts
    }

    /// The length of a past from which on the half-life alone decides, in seconds:
    /// a mean over a time `a` forgets as fast as the exponential average does when
    /// `1 / a` is `ln 2 / half-life`.
    fn span_s(&self) -> f64 {
        self.params.half_life.as_secs_f64() / std::f64::consts::LN_2
    }

    /// The part of a temperature that is left after `dt`. That of two parts of a time
    /// is the product of both, so the length of rounds makes no difference.
    fn keep(&self, dt: Duration) -> f64 {
        let (dt_s, span_s) = (dt.as_secs_f64(), self.span_s());
        // As much of the time as the plain mean holds for.
        let mean_s = dt_s.min((span_s - self.past_s).max(0.0));
        let mean = if mean_s > 0.0 { self.past_s / (self.past_s + mean_s) } else { 1.0 };
        mean * (-(dt_s - mean_s) / self.params.half_life.as_secs_f64()).exp2()
    }

    fn is_too_short(&self, dt: Duration) -> bool {
        1.0 - self.keep(dt) < 1.0 / FINEST_STEP
    }

    /// Steps the temperatures by the rounds that were put off.
    fn step_pending(&mut self) -> Surprise {
        let mut pending = std::mem::take(&mut self.pending);
        let span = std::mem::take(&mut self.pending_span);
        let mut round = self.start(span);
        self.warm(&mut round, 0..self.cells.len() / WORD_BITS, &pending);
        pending.fill(0);
        self.pending = pending;
        self.finish(&round)
    }

    /// A step of the temperatures after a time.
    fn start(&mut self, span: Span) -> Round {
        let keep = self.keep(span.elapsed);
        let step = Some(Step::new(keep, self.countdown(span.elapsed)));
        Round { step, keep, span, sums: Sums::default(), surprise: Surprise::default() }
    }

    /// Takes note that all cells were stepped.
    fn finish(&mut self, round: &Round) -> Surprise {
        if let Some(step) = round.step {
            std::mem::take(&mut self.raised).raise(&mut self.cells, step.gain());
        }
        let surprise = round.sums.surprise(self.variance);
        self.past_s += round.span.elapsed.as_secs_f64();
        self.last_step_s = round.span.elapsed.as_secs_f64();
        self.kept[0] *= round.keep;
        let gain = 1.0 - round.keep;
        self.last_watched_s = round.span.watched.as_secs_f64();
        // Nothing is known of the steps of a heat that came from elsewhere.
        let before_s = if self.mean_step_s > 0.0 { self.mean_step_s } else { self.last_watched_s };
        self.mean_step_s = round.keep * before_s + gain * self.last_watched_s;
        // The last is what it comes to when all rounds are as long as this one.
        let variance = round.keep * round.keep * self.variance + gain * gain;
        self.variance = variance.max(gain / (1.0 + round.keep));
        surprise
    }

    /// How far the idle counts go down after `dt` more.
    fn countdown(&mut self, dt: Duration) -> u16 {
        let half_delay = (self.params.delay / 2).as_nanos();
        let elapsed = self.since_countdown.saturating_add(dt).as_nanos();
        if half_delay == 0 {
            return IDLE_COUNT;
        }
        // Less than half a delay; 2^64 ns are 584 years.
        self.since_countdown = Duration::from_nanos((elapsed % half_delay) as u64);
        (elapsed / half_delay).min(u128::from(IDLE_COUNT)) as u16
    }
}

/// A round that is being taken in.
#[derive(Debug)]
pub struct Round {
    /// None: the round is too short, and put off.
    step: Option<Step>,
    keep: f64,
    span: Span,
    sums: Sums,
    /// Of rounds that were put off, and are stepped now.
    surprise: Surprise,
}

/// Keeps a round's accesses for a later step; the pages are not idle now.
fn put_off(cells: &mut [u16], pending: &mut [u64], accessed: &[u64], tail: u64) {
    let last = (cells.len() / WORD_BITS).saturating_sub(1);
    for (index, (block, pending)) in cells.chunks_exact_mut(WORD_BITS).zip(pending).enumerate() {
        let word = bitmap::word(accessed, index) & if index == last { tail } else { !0 };
        *pending |= word;
        bitmap::ones(word).for_each(|bit| block[bit] |= IDLE_COUNT);
    }
}

/// The chance of an access in a round that a page has, of which a share was seen by
/// temperatures of a `variance` above zero. One access more and one less are thought to
/// have been seen, lest 0 and 1 look certain.
pub(crate) fn likely(share: f64, variance: f64) -> f64 {
    let rounds = 1.0 / variance;
    (share * rounds + 1.0) / (rounds + 2.0)
}

/// The map with most pages, which stands for all where one must.
pub fn most_pages<'a>(maps: impl Iterator<Item = &'a HeatMap>) -> Option<&'a HeatMap> {
    maps.max_by_key(|map| map.pages())
}

/// The shortest step that is not put off, once the past is long: rounded up.
pub fn finest_step(half_life: Duration) -> Duration {
    let half_lives = -(1.0 - 1.0 / FINEST_STEP).log2();
    half_life.mul_f64(half_lives) + Duration::from_millis(1)
}

/// For how long a page that was accessed all the time must not have been accessed to
/// have `temperature`; what is at 0 has no age.
pub fn age(temperature: u16, half_life: Duration) -> Duration {
    let share = f64::from(temperature.max(1)) / f64::from(MAX_TEMPERATURE);
    half_life.mul_f64(-share.log2().min(0.0))
}

/// Class of a temperature.
pub fn class_of(temperature: u16) -> Class {
    match temperature {
        HOT_FROM.. => Class::Hot,
        COLD_BELOW.. => Class::Warm,
        _ => Class::Cold,
    }
}
