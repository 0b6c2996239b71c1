// SPDX-License-Identifier: MIT OR Apache-2.0
//! How long to wait between two harvests, where the policy leaves it open. No
//! I/O and no clock.
//!
//! A harvest tells of each page whether it was accessed since the last one: one
//! bit. It tells most of the pages whose rank by heat is near the last that fits
//! DRAM, as those are the ones to decide about. Of a page that is accessed at
//! random, at a rate `r`, `n` rounds of the length `t` tell `r` best when it is
//! young in a share of about 0.8 of them (`rt` = 1.59: the most Fisher
//! information of `ln r` a round). All hotter pages are then young almost always,
//! and of the colder ones some are too: about twice the DRAM target in all. The first
//! rounds, in which all is decided, tell more if they are a little shorter. So the
//! interval is the one in which one and a half times the target is accessed, but never
//! more than two thirds of memory, which a guest may not reach whatever the time.
//!
//! How many bytes are young after which time, the last rounds tell: a power law
//! through them, `young = c * t^b` with `b` from 1/4 to 1. What is young grows
//! ever more slowly with time, so the law errs towards too short an interval on
//! the way up. Once the target lies between two rounds, so does the interval.
//!
//! # Windows
//!
//! Rounds can not be as short as that where they would cost too much, or where no more
//! than a few pages could move in one: a guest of huge pages, of which one bit stands
//! for 512, is through with all of them within milliseconds. Then a round is watched for
//! its last part only, its *window*: accesses are cleared when it begins, and what was
//! accessed before does not count. A short time tells as much of a page as a long one,
//! if in neither all is accessed, or nothing.
//!
//! While every time that was tried is too long, the next interval is looked at on the
//! way ([`Pace::looks`]), without clearing: one round tells the whole curve.

use std::time::Duration;

use crate::heat;
use crate::units::{BYTES_PER_2M, Bytes, BytesPerSecond, PAGE_BYTES, Share};

/// Time to the second round, about which nothing is known yet.
pub const FIRST_INTERVAL: Duration = Duration::from_secs(1);

/// No interval is shorter than this.
pub const SHORTEST: Duration = Duration::from_millis(100);

/// Nor longer.
pub const LONGEST: Duration = Duration::from_secs(60);

/// The longest interval as a part of the half-life: temperature is to have some
/// rounds to work with.
const HALF_LIFE_DIVISOR: u32 = 4;

/// A round in which less than this part of memory can move is too short.
const MOVE_DIVISOR: u64 = 4096;

/// One huge page comes and one goes.
const HUGE_PAIR_BYTES: u64 = 2 * BYTES_PER_2M;

/// Memory for which [`Limits::cpu`] holds once.
const CPU_MEMORY: Bytes = Bytes(64 << 30);

/// An interval in which the target is young to an eighth stays as it is.
const GOOD_ENOUGH: f64 = 1.125;

/// What the interval changes by in one round, at most; and what a window grows by.
const LARGEST_CHANGE: f64 = 2.0;

/// What a window shrinks by at most: one that is much too short tells nothing.
const LARGEST_CUT: f64 = 16.0;

/// No window is shorter: waking up in time is not sure to a tenth of this.
const SHORTEST_WINDOW: Duration = Duration::from_millis(1);

/// The largest part of an interval that is worth a second harvest.
const WINDOW_DIVISOR: u32 = 2;

/// Looks in an interval, and by how much each is later than the one before.
const LOOKS: u32 = 3;
const LOOK_STEP: u32 = 4;

/// Rounds that are off by more than this from each other were not of a guest that did
/// the same.
const SURPRISE: f64 = 1.5;

/// Least power of the law: less is a guest that has been through all it uses.
const LEAST_POWER: f64 = 0.25;

/// How far from a time others are near it: by a factor of two, and a little.
const NEAR: f64 = 0.75;

/// How much the rounds must differ, in squares of the logarithm of their time,
/// until they tell the power better than the guess of 1, which is always safe.
const DOUBT: f64 = 0.1;

/// Times whose logarithms differ by less tell the same: their mean is remembered, of which
/// the latest is half.
const SAME_TIME: f64 = 0.05;

/// Rounds and looks that the law is drawn through.
const ROUNDS: usize = 6;

/// Where in an interval the rounds of a domain are, from 0 to less than 1: for one
/// UUID always the same, and for many all over it.
pub fn phase(uuid: &str) -> f64 {
    // FNV-1a; the multiplication after it (by 2^64 over the golden ratio) spreads what
    // differs in the last digits alone.
    let hash = uuid.bytes().fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    // A f64 holds 53 bits without rounding up to 1.
    (hash.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 11) as f64 / (1u64 << 53) as f64
}

/// What bounds the interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// All of the guest's memory.
    pub memory: Bytes,
    /// What may lie in DRAM; `None` when nothing is to be moved.
    pub dram: Option<Bytes>,
    /// Of the temperature.
    pub half_life: Duration,
    /// At which pages move.
    pub bandwidth: BytesPerSecond,
    /// The part of one CPU that rounds may take for each 64 GiB of memory, and for
    /// less memory all the same.
    pub cpu: Share,
    /// The interval that the policy asks for, whatever it costs.
    pub asked: Option<Duration>,
    /// Whether rounds may be watched in part.
    pub windows: bool,
}

impl Limits {
    /// Bytes that are to be young in a round.
    pub fn target(&self) -> Bytes {
        let most = self.memory.0 / 3 * 2;
        let dram = self.dram.map_or(self.memory.0 / 2, |dram| dram.0);
        Bytes(most.min(dram.saturating_mul(3) / 2).max(PAGE_BYTES))
    }

    /// Whether a window in which so much was young need not go on. Less is of a guest that
    /// rested, of which some pages are always in use.
    pub fn tells_enough(&self, young: Bytes) -> bool {
        young.0 >= self.target().0 / 4 * 3
    }

    /// The shortest and the longest interval when a round takes `cost` of CPU
    /// time. What rounds may cost comes before all else.
    fn bounds(&self, cost: Duration) -> (Duration, Duration) {
        let longest = (self.half_life / HALF_LIFE_DIVISOR).clamp(SHORTEST, LONGEST);
        let worth_moving = match (self.dram, self.bandwidth.0) {
            (None, _) | (_, 0) => Duration::ZERO,
            (Some(_), bandwidth) => {
                let bytes = (self.memory.0 / MOVE_DIVISOR).max(HUGE_PAIR_BYTES);
                Duration::from_secs_f64(bytes as f64 / bandwidth as f64).min(longest)
            }
        };
        if let Some(asked) = self.asked {
            return (asked, asked);
        }
        let times = (self.memory.0 as f64 / CPU_MEMORY.0 as f64).max(1.0);
        let part = self.cpu.of(1 << 32) as f64 / (1u64 << 32) as f64 * times;
        let affordable = Duration::try_from_secs_f64(cost.as_secs_f64() / part).unwrap_or(LONGEST);
        let shortest = worth_moving.max(affordable).clamp(SHORTEST, LONGEST);
        (shortest, longest.max(shortest))
    }

    /// The shortest interval of which a part is watched: in a shorter one temperatures
    /// would not move, and be told what was accessed in one of several windows.
    fn shortest_with_window(&self) -> Duration {
        heat::finest_step(self.half_life)
    }
}

/// A round that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// How long it was watched: since the round before, or for a window.
    pub watched: Duration,
    /// Bytes accessed meanwhile.
    pub young: Bytes,
    /// CPU time that harvest, heat and plan took.
    pub cost: Duration,
    /// Time that the harvest alone took.
    pub harvest: Duration,
}

/// When a guest is harvested next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Next {
    /// Time from this round to the next.
    pub interval: Duration,
    /// For how long, up to the next round, it is watched; all the time if none.
    pub window: Option<Duration>,
}

/// What [`Pace`] remembers of a time. Nothing has no logarithm: it is taken for a page.
fn point(watched: Duration, young: Bytes) -> (f64, f64) {
    (watched.as_secs_f64().ln(), (young.0.max(PAGE_BYTES) as f64).ln())
}

/// The pace of one guest's rounds.
#[derive(Clone, Debug)]
pub struct Pace {
    interval: Duration,
    /// Logarithms of seconds and of the bytes that were young after them, the latest last.
    seen: Vec<(f64, f64)>,
    /// Mean of what rounds took; none yet without one.
    cost: Option<Duration>,
    /// Time that the last harvest took.
    harvest: Duration,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            interval: FIRST_INTERVAL,
            seen: Vec::with_capacity(ROUNDS + 1),
            cost: None,
            harvest: Duration::ZERO,
        }
    }
}

impl Pace {
    /// Time from the first round, which took so much CPU time and so long to harvest, to
    /// the second.
    pub fn first(&mut self, limits: &Limits, cost: Duration, harvest: Duration) -> Duration {
        (self.cost, self.harvest) = (Some(cost), harvest);
        let (shortest, longest) = limits.bounds(cost);
        self.interval = limits.asked.unwrap_or(FIRST_INTERVAL.clamp(shortest.min(FIRST_INTERVAL), longest));
        self.interval
    }

    /// Times after a round at which to look, without clearing, what is young by then.
    /// None unless that can tell something new. `watched` is how long the next round is.
    pub fn looks(&self, limits: &Limits, watched: Duration) -> impl Iterator<Item = Duration> {
        let target = (limits.target().0 as f64).ln();
        let unknown = limits.windows && self.seen.iter().all(|seen| seen.1 > target);
        (0..LOOKS)
            .map(move |look| watched / LOOK_STEP.pow(LOOKS - look))
            .filter(move |after| unknown && self.may_look(*after))
    }

    /// Whether a look that long after something is not late by much of that time: it takes
    /// as long as a harvest.
    pub fn may_look(&self, after: Duration) -> bool {
        after >= SHORTEST_WINDOW.max(self.harvest * LOOK_STEP)
    }

    /// Takes in what was young at a look, so long after a round.
    pub fn looked(&mut self, after: Duration, young: Bytes) {
        self.learn(point(after, young));
    }

    /// Time from this round to the next, and how much of that is to be watched.
    pub fn next(&mut self, round: &Round, limits: &Limits) -> Next {
        // One round that was held up does not change much.
        let cost = self.cost.map_or(round.cost, |mean| (mean * 3 + round.cost) / 4);
        (self.cost, self.harvest) = (Some(cost), round.harvest);
        let now = self.interval.as_secs_f64();
        let (shortest, longest) = limits.bounds(cost);
        let wanted = self.wanted(round, limits.target());
        let next = wanted.clamp(shortest.as_secs_f64(), longest.as_secs_f64());
        let next = next.clamp(now / LARGEST_CHANGE, now * LARGEST_CHANGE);
        self.interval = Duration::from_secs_f64(next).clamp(SHORTEST, LONGEST);
        if let Some(asked) = limits.asked {
            self.interval = asked;
        }
        let window = self.window(limits);
        let least = if window.is_some() { limits.shortest_with_window() } else { Duration::ZERO };
        Next { interval: self.interval.max(least), window }
    }

    /// For how long the next round is watched, as far as is known by now; all the time
    /// if none.
    pub fn window(&self, limits: &Limits) -> Option<Duration> {
        let longest = match limits.asked {
            Some(asked) if asked < limits.shortest_with_window() => return None,
            _ => self.interval.max(limits.shortest_with_window()) / WINDOW_DIVISOR,
        };
        let last = self.seen.last().filter(|_| limits.windows)?;
        let wanted = self.near(*last, limits.target());
        // Both harvests of a page are as long apart, but the flush comes after the first.
        let window = Duration::try_from_secs_f64(wanted).ok()?.max(SHORTEST_WINDOW).max(self.harvest);
        (window < longest).then_some(window)
    }

    /// Seconds in which `target` bytes would have been accessed.
    fn wanted(&mut self, round: &Round, target: Bytes) -> f64 {
        if round.watched.is_zero() {
            return LONGEST.as_secs_f64();
        }
        let seen = self.learn(point(round.watched, round.young));
        self.near(seen, target)
    }

    /// The same, not too far from the time of `seen`.
    fn near(&self, seen: (f64, f64), target: Bytes) -> f64 {
        let watched = seen.0.exp();
        let target = (target.0 as f64).ln();
        if (seen.1 - target).abs() <= GOOD_ENOUGH.ln() {
            return watched;
        }
        // While all times were too long, the shortest says most.
        let shortest = self.seen.iter().min_by(|a, b| a.0.total_cmp(&b.0)).copied().unwrap_or(seen);
        let from = if seen.1 > target { shortest } else { seen };
        // How flat the law is far from here says little of a small step.
        let near = if (from.1 - target).abs() < SURPRISE.ln() { NEAR } else { f64::INFINITY };
        let power = self.power(from.0, near);
        let extrapolated = || from.0 + (target - from.1) / power;
        let wanted = self.between(target).unwrap_or_else(extrapolated).exp().min(LONGEST.as_secs_f64());
        wanted.clamp(from.0.exp().min(watched) / LARGEST_CUT, watched * LARGEST_CHANGE)
    }

    /// Where the target is between the longest time that fell short of it and the
    /// shortest that did not. The law would swing about it, coming from times in
    /// which all was young.
    fn between(&self, target: f64) -> Option<f64> {
        let by_time = |a: &&(f64, f64), b: &&(f64, f64)| a.0.total_cmp(&b.0);
        let below = self.seen.iter().filter(|seen| seen.1 < target).max_by(by_time)?;
        let above = self.seen.iter().filter(|seen| seen.1 >= target).min_by(by_time)?;
        let part = (target - below.1) / (above.1 - below.1);
        (below.0 < above.0).then_some(below.0 + part * (above.0 - below.0))
    }

    /// Goes on with this, and with what else may be true of the same guest: what is
    /// young grows with time, and no faster than it. Returns what is known by now of that
    /// time.
    fn learn(&mut self, seen: (f64, f64)) -> (f64, f64) {
        let mut mean = seen;
        self.seen.retain(|earlier| {
            let (short, long) = if earlier.0 < seen.0 { (*earlier, seen) } else { (seen, *earlier) };
            let (grown, later) = (long.1 - short.1, long.0 - short.0);
            let agrees = (-SURPRISE.ln()..=later + SURPRISE.ln()).contains(&grown);
            if later <= SAME_TIME && agrees {
                mean.1 = (earlier.1 + seen.1) / 2.0;
            }
            later > SAME_TIME && agrees
        });
        self.seen.push(mean);
        if self.seen.len() > ROUNDS {
            self.seen.remove(0);
        }
        mean
    }

    /// The power of the law, by least squares over the times that are no further than
    /// `near` from the logarithm `at`.
    fn power(&self, at: f64, near: f64) -> f64 {
        let seen = || self.seen.iter().filter(|seen| (seen.0 - at).abs() <= near);
        let count = seen().count().max(1) as f64;
        let mean = seen().fold((0.0, 0.0), |sum, seen| (sum.0 + seen.0 / count, sum.1 + seen.1 / count));
        let (squares, products) = seen().fold((DOUBT, DOUBT), |(squares, products), seen| {
            let (time, young) = (seen.0 - mean.0, seen.1 - mean.1);
            (squares + time * time, products + time * young)
        });
        (products / squares).clamp(LEAST_POWER, 1.0)
    }
}
