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

use std::time::Duration;

use crate::units::{Bytes, BytesPerSecond, PAGE_BYTES, PAGES_PER_2M, Share};

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
const HUGE_PAIR_BYTES: u64 = 2 * PAGES_PER_2M * PAGE_BYTES;

/// Memory for which [`Limits::cpu`] holds once.
const CPU_MEMORY: Bytes = Bytes(64 << 30);

/// An interval in which the target is young to an eighth stays as it is.
const GOOD_ENOUGH: f64 = 1.125;

/// What the interval changes by in one round, at most.
const LARGEST_CHANGE: f64 = 2.0;

/// A round that is off by more than this shows that the guest does something
/// else now, and that the rounds before tell nothing.
const SURPRISE: f64 = 1.5;

/// Least power of the law: less is a guest that has been through all it uses.
const LEAST_POWER: f64 = 0.25;

/// How much the rounds must differ, in squares of the logarithm of their time,
/// until they tell the power better than the guess of 1, which is always safe.
const DOUBT: f64 = 0.1;

/// Rounds that the law is drawn through.
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
}

impl Limits {
    /// Bytes that are to be young in a round.
    pub fn target(&self) -> Bytes {
        let most = self.memory.0 / 3 * 2;
        let dram = self.dram.map_or(self.memory.0 / 2, |dram| dram.0);
        Bytes(most.min(dram.saturating_mul(3) / 2).max(PAGE_BYTES))
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
        let times = (self.memory.0 as f64 / CPU_MEMORY.0 as f64).max(1.0);
        let part = self.cpu.of(1 << 32) as f64 / (1u64 << 32) as f64 * times;
        let affordable = Duration::try_from_secs_f64(cost.as_secs_f64() / part).unwrap_or(LONGEST);
        let shortest = worth_moving.max(affordable).clamp(SHORTEST, LONGEST);
        (shortest, longest.max(shortest))
    }
}

/// A round that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// Time since the one before.
    pub interval: Duration,
    /// Bytes accessed in it.
    pub young: Bytes,
    /// CPU time that harvest, heat and plan took.
    pub cost: Duration,
}

/// The pace of one guest's rounds.
#[derive(Clone, Debug)]
pub struct Pace {
    interval: Duration,
    /// Logarithms of seconds and of bytes, the latest last.
    rounds: Vec<(f64, f64)>,
    /// Mean of what rounds took; none yet without one.
    cost: Option<Duration>,
}

impl Default for Pace {
    fn default() -> Self {
        Self { interval: FIRST_INTERVAL, rounds: Vec::with_capacity(ROUNDS + 1), cost: None }
    }
}

impl Pace {
    /// Time from the first round to the second.
    pub fn first(&mut self, limits: &Limits, cost: Duration) -> Duration {
        self.cost = Some(cost);
        let (shortest, longest) = limits.bounds(cost);
        self.interval = FIRST_INTERVAL.clamp(shortest.min(FIRST_INTERVAL), longest);
        self.interval
    }

    /// Time from this round to the next.
    pub fn next(&mut self, round: &Round, limits: &Limits) -> Duration {
        // One round that was held up does not change much.
        let cost = self.cost.map_or(round.cost, |mean| (mean * 3 + round.cost) / 4);
        self.cost = Some(cost);
        let now = self.interval.as_secs_f64();
        let (shortest, longest) = limits.bounds(cost);
        let target = limits.target();
        let wanted = self.wanted(round, target);
        let next = match round.young.0 as f64 / target.0 as f64 {
            share if (1.0 / GOOD_ENOUGH..=GOOD_ENOUGH).contains(&share) => now,
            _ => wanted,
        };
        let next = next.clamp(shortest.as_secs_f64(), longest.as_secs_f64());
        let next = next.clamp(now / LARGEST_CHANGE, now * LARGEST_CHANGE);
        self.interval = Duration::from_secs_f64(next).clamp(SHORTEST, LONGEST);
        self.interval
    }

    /// Seconds in which `target` bytes would have been accessed.
    fn wanted(&mut self, round: &Round, target: Bytes) -> f64 {
        let idle = f64::from(LONGEST.as_secs() as u32);
        if round.young.0 == 0 || round.interval.is_zero() {
            self.rounds.clear();
            return idle;
        }
        let seen = (round.interval.as_secs_f64().ln(), (round.young.0 as f64).ln());
        if self.surprises(seen) {
            self.rounds.clear();
        }
        self.rounds.push(seen);
        if self.rounds.len() > ROUNDS {
            self.rounds.remove(0);
        }
        let target = (target.0 as f64).ln();
        let extrapolated = || seen.0 + (target - seen.1) / self.power();
        self.between(target).unwrap_or_else(extrapolated).exp().min(idle)
    }

    /// Where the target is between the longest round that fell short of it and the
    /// shortest that did not. The law would swing about it, coming from times in
    /// which all was young.
    fn between(&self, target: f64) -> Option<f64> {
        let by_time = |a: &&(f64, f64), b: &&(f64, f64)| a.0.total_cmp(&b.0);
        let below = self.rounds.iter().filter(|seen| seen.1 < target).max_by(by_time)?;
        let above = self.rounds.iter().filter(|seen| seen.1 >= target).min_by(by_time)?;
        let part = (target - below.1) / (above.1 - below.1);
        (below.0 < above.0).then_some(below.0 + part * (above.0 - below.0))
    }

    fn surprises(&self, seen: (f64, f64)) -> bool {
        let Some(last) = self.rounds.last() else { return false };
        let expected = last.1 + (seen.0 - last.0) * self.power();
        (seen.1 - expected).abs() > SURPRISE.ln()
    }

    /// The power of the law, by least squares.
    fn power(&self) -> f64 {
        let count = self.rounds.len().max(1) as f64;
        let mean =
            self.rounds.iter().fold((0.0, 0.0), |sum, seen| (sum.0 + seen.0 / count, sum.1 + seen.1 / count));
        let (squares, products) = self.rounds.iter().fold((DOUBT, DOUBT), |(squares, products), seen| {
            let (time, young) = (seen.0 - mean.0, seen.1 - mean.1);
            (squares + time * time, products + time * young)
        });
        (products / squares).clamp(LEAST_POWER, 1.0)
    }
}
