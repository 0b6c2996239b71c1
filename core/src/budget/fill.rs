// SPDX-License-Identifier: MIT OR Apache-2.0
//! Filling vessels with one level, as water would.

use std::cmp::Ordering;

/// One vessel: it holds `level * weight`, but `low` at least and `high` at most.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub weight: u32,
    pub low: u64,
    /// Counts as `low` when it is less.
    pub high: u64,
}

impl Span {
    /// A vessel that holds `amount` whatever the level.
    pub fn fixed(amount: u64) -> Self {
        Span { weight: 1, low: amount, high: amount }
    }

    fn weight(&self) -> u128 {
        u128::from(self.weight.max(1))
    }

    fn high(&self) -> u64 {
        self.high.max(self.low)
    }
}

/// What each span holds at the highest level at which all together hold no more
/// than `amount`. The level is an exact fraction and each is rounded down, so
/// less than a byte for each span may stay over. Should the lows alone not fit,
/// each holds its low: callers see to it that they fit.
pub(super) fn fill(spans: &[Span], amount: u64) -> Vec<u64> {
    let highs: u128 = spans.iter().map(|span| u128::from(span.high())).sum();
    if highs <= u128::from(amount) {
        return spans.iter().map(Span::high).collect();
    }
    let (water, weights) = level(spans, u128::from(amount));
    let at_level = |span: &Span| {
        let share = (water * span.weight()).checked_div(weights).unwrap_or(0);
        // At most `high`, so it fits again.
        share.clamp(u128::from(span.low), u128::from(span.high())) as u64
    };
    spans.iter().map(at_level).collect()
}

/// The level as a fraction. Below 2^64 times 2^44 and below 2^44: no number of
/// domains that fits a host's memory overflows what is made of it.
fn level(spans: &[Span], amount: u128) -> (u128, u128) {
    /// A span leaves its low, or comes to its high.
    #[derive(Clone, Copy)]
    struct Event {
        at: u128,
        weight: u128,
        leaves_low: bool,
    }
    let event = |span: &Span, at: u64, leaves_low| Event { at: at.into(), weight: span.weight(), leaves_low };
    let mut events: Vec<Event> = spans
        .iter()
        .flat_map(|span| [event(span, span.low, true), event(span, span.high(), false)])
        .collect();
    let in_order = |a: &Event, b: &Event| -> Ordering {
        let by_level = (a.at * b.weight).cmp(&(b.at * a.weight));
        // A span whose low is its high leaves the one before it comes to the other.
        by_level.then(b.leaves_low.cmp(&a.leaves_low))
    };
    events.sort_by(in_order);
    // What the spans hold that do not move with the level, and the weight of those that do.
    let mut still: u128 = spans.iter().map(|span| u128::from(span.low)).sum();
    let mut moving: u128 = 0;
    for event in events {
        if still * event.weight + event.at * moving >= amount * event.weight {
            break;
        }
        if event.leaves_low {
            (still, moving) = (still - event.at, moving + event.weight);
        } else {
            (still, moving) = (still + event.at, moving - event.weight);
        }
    }
    (amount.saturating_sub(still), moving)
}
