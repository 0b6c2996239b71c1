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

mod histogram;
pub mod store;

use std::ops::Range;
use std::time::Duration;

use crate::bitmap::{self, WORD_BITS};
use crate::wire::Class;

pub use histogram::Histogram;

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
    pending_time: Duration,
    /// Time since the idle counts went down, less than half a delay.
    since_countdown: Duration,
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

impl HeatMap {
    /// A map of `pages` pages, all cold. None is idle yet: that takes as long as
    /// after an access, for nothing is known of the time before.
    pub fn new(pages: usize, params: HeatParams) -> Self {
        HeatMap {
            params,
            pages,
            cells: vec![IDLE_COUNT; bitmap::words_for(pages) * WORD_BITS],
            pending: Vec::new(),
            pending_time: Duration::ZERO,
            since_countdown: Duration::ZERO,
        }
    }

    /// A map that goes on from the [`HeatMap::cells`] of an earlier one, a cell a
    /// page. Missing ones are cold, surplus ones left out.
    pub fn from_cells(pages: usize, params: HeatParams, mut cells: Vec<u16>) -> Self {
        let padded = bitmap::words_for(pages) * WORD_BITS;
        cells.truncate(pages);
        cells.resize(padded, IDLE_COUNT);
        let (pending_time, since_countdown) = (Duration::ZERO, Duration::ZERO);
        HeatMap { params, pages, cells, pending: Vec::new(), pending_time, since_countdown }
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
    pub fn settle(&mut self) {
        if !self.pending_time.is_zero() {
            self.step_pending();
        }
    }

    /// Goes on with other parameters; temperatures stay as they are.
    pub fn set_params(&mut self, params: HeatParams) {
        self.params = params;
        self.since_countdown = Duration::ZERO;
    }

    /// Takes in a round: the pages accessed in it, and the time since the round
    /// before. Missing words are zero, surplus ones ignored.
    pub fn step(&mut self, accessed: &[u64], dt: Duration) {
        if self.is_too_short(dt) {
            self.put_off(accessed);
            self.pending_time = self.pending_time.saturating_add(dt);
            if !self.is_too_short(self.pending_time) {
                self.step_pending();
            }
        } else {
            // Accesses of short rounds must not count for this long one.
            self.settle();
            self.step_cells(accessed, dt);
        }
    }

    /// Temperature of `page`, 0 to [`MAX_TEMPERATURE`]; 0 past the end.
    pub fn temperature(&self, page: usize) -> u16 {
        self.cells.get(page).map_or(0, |cell| cell & MAX_TEMPERATURE)
    }

    /// Whether `page` was not accessed for [`HeatParams::delay`] at least.
    pub fn is_idle(&self, page: usize) -> bool {
        self.cells.get(page).is_none_or(|cell| cell & IDLE_COUNT == 0)
    }

    /// The highest temperature in `pages`, and whether all of them are idle:
    /// how pages are judged that can only move together.
    pub fn unit(&self, pages: Range<usize>) -> (u16, bool) {
        let cells = self.cells.get(pages).unwrap_or_default();
        let (hottest, counts) =
            cells.iter().fold((0, 0), |(hottest, counts), cell| (*cell.max(&hottest), counts | cell));
        (hottest & MAX_TEMPERATURE, counts & IDLE_COUNT == 0)
    }

    /// The lowest and the highest temperature in `pages`.
    pub fn extremes(&self, pages: Range<usize>) -> (u16, u16) {
        let cells = self.cells.get(pages).unwrap_or_default();
        let (low, high) =
            cells.iter().fold((u16::MAX, 0), |(low, high), cell| (*cell.min(&low), *cell.max(&high)));
        (low & MAX_TEMPERATURE, high & MAX_TEMPERATURE)
    }

    /// The lowest temperature of the idle ones among the 64 pages of word
    /// `index` of a bitmap, those past the last page included.
    pub(crate) fn coldest_idle(&self, index: usize) -> Option<u16> {
        // The count becomes the highest bits, so one minimum tells both.
        let low = self.block(index).iter().fold(u16::MAX, |low, cell| low.min(cell.rotate_right(2)));
        let temperature = low.rotate_left(2);
        (temperature & IDLE_COUNT == 0).then_some(temperature)
    }

    /// The highest temperature among the 64 pages of word `index` of a bitmap.
    pub(crate) fn hottest(&self, index: usize) -> u16 {
        self.block(index).iter().fold(0, |high, cell| high.max(*cell)) & MAX_TEMPERATURE
    }

    /// The cells of word `index` of a bitmap. The fixed length lets loops over
    /// it run in vectors.
    fn block(&self, index: usize) -> &[u16; WORD_BITS] {
        self.cells.as_chunks().0.get(index).unwrap_or(&[0; WORD_BITS])
    }

    /// Class of `page`.
    pub fn class(&self, page: usize) -> Class {
        class_of(self.temperature(page))
    }

    /// Number of pages of each class.
    pub fn class_counts(&self) -> ClassCounts {
        let mut counts = ClassCounts::default();
        for block in self.cells.as_chunks::<WORD_BITS>().0 {
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

    /// The part of a temperature that is left after `dt`.
    fn keep(&self, dt: Duration) -> f64 {
        (-dt.as_secs_f64() / self.params.half_life.as_secs_f64()).exp2()
    }

    fn is_too_short(&self, dt: Duration) -> bool {
        1.0 - self.keep(dt) < 1.0 / FINEST_STEP
    }

    /// Steps the temperatures by the rounds that were put off.
    fn step_pending(&mut self) {
        let mut pending = std::mem::take(&mut self.pending);
        self.step_cells(&pending, self.pending_time);
        pending.fill(0);
        self.pending = pending;
        self.pending_time = Duration::ZERO;
    }

    fn step_cells(&mut self, accessed: &[u64], dt: Duration) {
        let step = Step::new(self.keep(dt), self.countdown(dt));
        let last = self.cells.len() / WORD_BITS;
        for (index, block) in self.cells.as_chunks_mut::<WORD_BITS>().0.iter_mut().enumerate() {
            let mut word = bitmap::word(accessed, index);
            if index + 1 == last {
                word &= bitmap::tail_mask(self.pages);
            }
            step.apply(block, word);
        }
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

    /// Keeps a round's accesses for a later step; the pages are not idle now.
    fn put_off(&mut self, accessed: &[u64]) {
        let words = self.cells.len() / WORD_BITS;
        self.pending.resize(words, 0);
        for (index, pending) in self.pending.iter_mut().enumerate() {
            let mut word = bitmap::word(accessed, index);
            if index + 1 == words {
                word &= bitmap::tail_mask(self.pages);
            }
            *pending |= word;
            for bit in bitmap::ones(word) {
                self.cells[index * WORD_BITS + bit] |= IDLE_COUNT;
            }
        }
    }
}

/// Class of a temperature.
pub fn class_of(temperature: u16) -> Class {
    match temperature {
        HOT_FROM.. => Class::Hot,
        COLD_BELOW.. => Class::Warm,
        _ => Class::Cold,
    }
}

/// One step of all cells: constants of the inner loop.
struct Step {
    /// 2^16 times the part of the temperature that is kept.
    keep: u16,
    /// What an access adds, a whole number of temperature units.
    gain: u16,
    /// How far the idle counts go down.
    countdown: u16,
}

impl Step {
    fn new(keep: f64, countdown: u16) -> Self {
        let keep = (keep * 65536.0).min(65535.0) as u16;
        // What is not kept of the maximum, so that the maximum stays the maximum.
        let gain = MAX_TEMPERATURE - decayed(MAX_TEMPERATURE, keep);
        Step { keep, gain, countdown }
    }

    fn apply(&self, block: &mut [u16; WORD_BITS], accessed: u64) {
        let Step { keep, gain, countdown } = *self;
        for cell in block.iter_mut() {
            *cell = decayed(*cell & MAX_TEMPERATURE, keep) | (*cell & IDLE_COUNT).saturating_sub(countdown);
        }
        if accessed == !0 {
            for cell in block {
                *cell = cell.saturating_add(gain) | IDLE_COUNT;
            }
        } else {
            for bit in bitmap::ones(accessed) {
                block[bit] = block[bit].saturating_add(gain) | IDLE_COUNT;
            }
        }
    }
}

/// The upper half of a 16-bit product: one instruction for a vector of cells.
fn decayed(temperature: u16, keep: u16) -> u16 {
    ((u32::from(temperature) * u32::from(keep)) >> 16) as u16 & MAX_TEMPERATURE
}
