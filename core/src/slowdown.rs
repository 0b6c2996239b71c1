// SPDX-License-Identifier: MIT OR Apache-2.0
//! By how much a guest is slowed down by memory on the slow tier, and what is done
//! about it. Pure: no I/O and no clock.
//!
//! # The model
//!
//! Each access to the slow tier takes longer than one to the fast tier by the gap of
//! their latencies. In a second of the guest's own CPU time that makes
//!
//! ```text
//! slowdown = accesses per second * gap / CPU time of the vCPUs per second
//! ```
//!
//! Nobody counts accesses. Two things bound them from below:
//!
//! * **Bits.** A page that is accessed at random times `r` times a second has its bit
//!   set in a time of `dt` with the chance `p = 1 - exp(-r dt)`. Its temperature is
//!   `p`, so `r = -ln(1 - p) / dt`, where `dt` is what the temperature was stepped by:
//!   a round, or several when rounds are short ([`HeatMap::mean_step`](crate::heat::HeatMap::mean_step)). A page whose
//!   bit is set each time may have been accessed once or a million times: from
//!   [`MOST_CHANCE`] on, `p` counts as that.
//! * **Samples.** A mapping that is armed for `hold` faults with the chance
//!   `1 - exp(-r hold)`. Of those that were armed, drawn evenly, the share that
//!   faulted on the slow tier tells the mean `r` there; `hold` is a tenth of a second at
//!   most, so this tells more of pages that are accessed often.
//!
//! What both leave out: accesses that hit a cache cost nothing, and those that follow
//! the first one in a page, between two looks, are not counted. The second is mostly the
//! larger error, so the estimate is a lower bound, and a guard by it acts late
//! rather than without need. A CPU that has several misses under way hides some of the
//! gap, which makes the estimate larger than the truth.

use std::sync::LazyLock;
use std::time::Duration;

/// Chances of an access in a round are told apart in so many steps.
const STEPS: usize = 256;

/// And up to here: of more than about 256 rounds no temperature knows.
pub const MOST_CHANCE: f64 = 1.0 - 1.0 / STEPS as f64;

/// Accesses in a step of the heat, by the upper byte of the temperature, rounded down.
static ACCESSES: LazyLock<[f64; STEPS]> =
    LazyLock::new(|| std::array::from_fn(|step| -(1.0 - step as f64 / STEPS as f64).ln()));

/// Mappings on the slow tier that have to be armed in a round, and faults on them, for
/// samples to say more than bits.
const FEWEST_ARMED: f64 = 50.0;
const FEWEST_FAULTS: f64 = 10.0;

/// Standard deviations on either side that 95 % of chance lie in.
const SIGMAS: f64 = 1.96;

/// Below this part of a CPU there is no pace that could be slowed down.
const LEAST_CPU: f64 = 0.01;

/// What bits tell of the slow tier.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SlowBits {
    /// Sum of `-ln(1 - p) / dt` over what is mapped: accesses per second.
    pub accesses_per_s: f64,
    /// Mappings on the slow tier: pages, and huge pages as one each.
    pub mappings: u64,
    /// On both tiers.
    pub all_mappings: u64,
}

impl SlowBits {
    /// Takes in a mapping on the slow tier by the temperature of its hottest page, in a
    /// heat whose steps are so long. Before the first step nothing is known of it.
    pub fn add(&mut self, temperature: u16, mean_step: Duration) {
        if !mean_step.is_zero() {
            self.accesses_per_s += ACCESSES[usize::from(temperature >> 8)] / mean_step.as_secs_f64();
        }
    }
}

/// What sampling tells of a round.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SlowSamples {
    /// Samples on the slow tier.
    pub slow: u64,
    /// Mappings armed, on both tiers.
    pub armed: u64,
    /// For how long a mapping stays armed at most.
    pub hold: Duration,
}

/// How much is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Confidence {
    /// Bits alone: a lower bound.
    Low,
    /// Enough was sampled.
    Medium,
}

impl Confidence {
    /// For people and programs.
    pub fn name(self) -> &'static str {
        match self {
            Confidence::Low => "low",
            Confidence::Medium => "medium",
        }
    }
}

/// An estimate, as parts of the guest's CPU time: 0.05 is 5 %.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The most likely value.
    pub slowdown: f64,
    /// What it is at least, as far as chance goes.
    pub low: f64,
    /// What it is at most, as far as chance goes; `None` where only a lower bound is known.
    pub high: Option<f64>,
    /// How much is known.
    pub confidence: Confidence,
}

/// Estimates the slowdown in a round of `round`, in which the vCPUs had `cpu` of CPU
/// time, and accesses to the slow tier took `gap` longer. `None` when the guest did next
/// to nothing.
pub fn estimate(
    bits: &SlowBits,
    samples: Option<&SlowSamples>,
    round: Duration,
    cpu: Duration,
    gap: Duration,
) -> Option<Estimate> {
    let (round_s, cpu_s) = (round.as_secs_f64(), cpu.as_secs_f64());
    if round_s <= 0.0 || cpu_s / round_s < LEAST_CPU {
        return None;
    }
    // CPU time lost by one access a second.
    let cost = gap.as_secs_f64() * round_s / cpu_s;
    let by_bits = bits.accesses_per_s * cost;
    let by_samples =
        samples.and_then(|samples| rates(bits, samples)).map(|rates| rates.map(|rate| rate * cost));
    // Both are lower bounds, so the higher one is the better.
    Some(match by_samples {
        Some([low, likely, high]) if likely >= by_bits => Estimate {
            slowdown: likely,
            low: low.max(by_bits),
            high: Some(high),
            confidence: Confidence::Medium,
        },
        _ => Estimate { slowdown: by_bits, low: by_bits, high: None, confidence: Confidence::Low },
    })
}

/// Accesses per second to the slow tier by samples: low, likely, high.
fn rates(bits: &SlowBits, samples: &SlowSamples) -> Option<[f64; 3]> {
    let slow_part = bits.mappings as f64 / bits.all_mappings.max(1) as f64;
    let armed = samples.armed as f64 * slow_part;
    let (faults, hold_s) = (samples.slow as f64, samples.hold.as_secs_f64());
    if armed < FEWEST_ARMED || faults < FEWEST_FAULTS || hold_s <= 0.0 {
        return None;
    }
    let rate = |faults: f64| {
        let chance = (faults / armed).clamp(0.0, MOST_CHANCE);
        -(1.0 - chance).ln() / hold_s * bits.mappings as f64
    };
    let spread = SIGMAS * faults.sqrt();
    Some([rate(faults - spread), rate(faults), rate(faults + spread)])
}

/// For how long a change of the target is waited on before the next: moves take time,
/// and temperatures more.
const SETTLE: Duration = Duration::from_secs(10);

/// How long the slowdown must be small before DRAM is taken back, at first and at most.
const PATIENCE: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(3600));

/// Part of the memory that is given in a step, and what part of that is taken back.
const GIVE_DIVISOR: u64 = 32;
const TAKE_DIVISOR: u64 = 4;

/// Least step: a huge page.
const LEAST_STEP: u64 = 2 << 20;

/// What is small, as a part of the limit: hysteresis.
const SMALL: f64 = 0.5;

/// Gives a guest DRAM beyond its share while it is slowed down too much.
///
/// Fast up, slowly down: a step up is a 32nd of the memory, not before the last one had
/// its effect; a step down is a quarter of that, after the slowdown has been below half of
/// the limit for a minute. Where taking was wrong, so that it had to be given again, that
/// time doubles, up to an hour: a guest that needs what it has keeps it.
#[derive(Clone, Debug, Default)]
pub struct Guard {
    extra_bytes: u64,
    changed: Option<Duration>,
    /// Since when the slowdown is small.
    small_since: Option<Duration>,
    patience: Duration,
    /// The last change was down.
    took: bool,
}

impl Guard {
    /// Takes in the slowdown at `now`, if it is known, on any clock that does not go back. What is given
    /// is at most `most` bytes, for a guest of `memory` bytes.
    pub fn judge(&mut self, slowdown: Option<f64>, limit: f64, most: u64, memory: u64, now: Duration) {
        self.extra_bytes = self.extra_bytes.min(most);
        let Some(slowdown) = slowdown else {
            // Whether it stays small now, nobody sees.
            self.small_since = None;
            return;
        };
        let step = (memory / GIVE_DIVISOR).max(LEAST_STEP);
        let is_settled = self.changed.is_none_or(|at| now.saturating_sub(at) >= SETTLE);
        if slowdown > limit {
            self.small_since = None;
            if is_settled && self.extra_bytes < most {
                if std::mem::take(&mut self.took) {
                    self.patience = (self.patience() * 2).min(PATIENCE.1);
                }
                self.extra_bytes = self.extra_bytes.saturating_add(step).min(most);
                self.changed = Some(now);
            }
        } else if slowdown > limit * SMALL || self.extra_bytes == 0 {
            self.small_since = None;
        } else {
            let since = *self.small_since.get_or_insert(now);
            if is_settled && now.saturating_sub(since) >= self.patience() {
                self.extra_bytes = self.extra_bytes.saturating_sub((step / TAKE_DIVISOR).max(LEAST_STEP));
                (self.changed, self.small_since, self.took) = (Some(now), Some(now), true);
            }
        }
    }

    fn patience(&self) -> Duration {
        self.patience.max(PATIENCE.0)
    }

    /// Bytes that the guest wants beyond its share.
    pub fn extra_bytes(&self) -> u64 {
        self.extra_bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::heat::MAX_TEMPERATURE;

    const SECOND: Duration = Duration::from_secs(1);
    const GAP: Duration = Duration::from_nanos(170);
    const MEMORY: u64 = 64 << 30;

    /// Pages of which each is accessed in a round with this chance.
    fn bits(pages: u64, chance: f64) -> SlowBits {
        let mut one = SlowBits::default();
        one.add((chance * f64::from(MAX_TEMPERATURE)) as u16, SECOND);
        SlowBits {
            accesses_per_s: one.accesses_per_s * pages as f64,
            mappings: pages,
            all_mappings: pages * 4,
        }
    }

    #[test]
    fn a_million_accesses_of_170_ns_are_17_percent_of_a_cpu() {
        // -ln(1 - 0.632) is 1: an access a second.
        let million = bits(1_000_000, 1.0 - (-1.0_f64).exp());
        let estimate = estimate(&million, None, SECOND, SECOND, GAP).unwrap();
        assert!((estimate.slowdown - 0.17).abs() < 0.002, "{estimate:?}");
        assert_eq!((estimate.confidence, estimate.high), (Confidence::Low, None));
        let two_cpus = super::estimate(&million, None, SECOND, SECOND * 2, GAP).unwrap();
        assert!((two_cpus.slowdown - 0.085).abs() < 0.002);
        assert_eq!(super::estimate(&million, None, SECOND, Duration::from_millis(5), GAP), None);
    }

    #[test]
    fn samples_tell_more_of_pages_that_are_accessed_often() {
        // Each of 10000 pages 20 times a second: the bits are all set.
        let hot = bits(10_000, 1.0);
        let chance = 1.0 - (-20.0_f64 * 0.1).exp();
        let armed = 4000;
        let slow = (armed as f64 / 4.0 * chance) as u64;
        let samples = SlowSamples { slow, armed, hold: SECOND / 10 };
        let by_bits = estimate(&hot, None, SECOND, SECOND, GAP).unwrap();
        let sampled = estimate(&hot, Some(&samples), SECOND, SECOND, GAP).unwrap();
        let truth = 10_000.0 * 20.0 * GAP.as_secs_f64();
        assert!(by_bits.slowdown < truth / 3.0);
        assert!((sampled.slowdown / truth - 1.0).abs() < 0.02, "{sampled:?}, true is {truth}");
        assert_eq!(sampled.confidence, Confidence::Medium);
        assert!(sampled.low < sampled.slowdown && sampled.slowdown < sampled.high.unwrap());
        // Too few to tell.
        let few = SlowSamples { slow: 5, armed: 100, hold: SECOND / 10 };
        assert_eq!(estimate(&hot, Some(&few), SECOND, SECOND, GAP), Some(by_bits));
    }

    proptest! {
        #[test]
        fn estimates_are_monotone_and_finite(
            temperatures in proptest::collection::vec(0..=MAX_TEMPERATURE, 1..50), hotter in 0..=MAX_TEMPERATURE,
            slow in 0u64..2000, armed in 0u64..4000, gap_ns in 0u64..1000,
        ) {
            let mut bits = SlowBits { mappings: 100, all_mappings: 400, ..SlowBits::default() };
            temperatures.iter().for_each(|temperature| bits.add(*temperature, SECOND));
            let mut more = bits;
            more.add(hotter, SECOND);
            let samples = |slow| SlowSamples { slow, armed, hold: SECOND / 10 };
            let of = |bits: &SlowBits, slow, gap| {
                estimate(bits, Some(&samples(slow)), SECOND, SECOND, Duration::from_nanos(gap)).unwrap()
            };
            let plain = of(&bits, slow, gap_ns);
            prop_assert!(plain.slowdown.is_finite() && plain.slowdown >= 0.0);
            prop_assert!(plain.low <= plain.slowdown && plain.high.is_none_or(|high| high >= plain.slowdown));
            prop_assert!(of(&more, slow, gap_ns).slowdown >= plain.slowdown);
            prop_assert!(of(&bits, slow + 1, gap_ns).slowdown >= plain.slowdown);
            prop_assert!(of(&bits, slow, gap_ns + 1).slowdown >= plain.slowdown);
        }

        #[test]
        fn more_slowdown_never_gives_less(
            past in proptest::collection::vec((0.0..0.2_f64, 0u64..100), 0..50),
            low in 0.0..0.2_f64, more in 0.0..0.2_f64, limit in 0.01..0.1_f64,
        ) {
            let (mut guard, mut now) = (Guard::default(), SECOND);
            for (slowdown, seconds) in past {
                now += SECOND * seconds as u32;
                guard.judge(Some(slowdown), limit, MEMORY / 2, MEMORY, now);
                prop_assert!(guard.extra_bytes() <= MEMORY / 2);
            }
            let (mut other, before) = (guard.clone(), guard.extra_bytes());
            guard.judge(Some(low), limit, MEMORY / 2, MEMORY, now);
            other.judge(Some(low + more), limit, MEMORY / 2, MEMORY, now);
            prop_assert!(other.extra_bytes() >= guard.extra_bytes());
            // Within the band nothing changes.
            if (limit * SMALL..=limit).contains(&low) && low > limit * SMALL {
                prop_assert_eq!(guard.extra_bytes(), before);
            }
        }

        /// A guest whose slowdown falls with each byte of DRAM, however steeply.
        #[test]
        fn it_ends_under_the_limit_and_does_not_oscillate(
            worst in 0.0..1.0_f64, power in 0.3..6.0_f64, limit in 0.01..0.2_f64,
        ) {
            const DAY: u64 = 24 * 3600;
            let most = MEMORY / 2;
            let slowdown = |extra: u64| worst * (1.0 - extra as f64 / most as f64).powf(power);
            let (mut guard, mut turns, mut was_up, mut over) = (Guard::default(), 0, true, 0);
            for second in 0..DAY {
                let before = guard.extra_bytes();
                let now = slowdown(before);
                guard.judge(Some(now), limit, most, MEMORY, SECOND * second as u32);
                let after = guard.extra_bytes();
                if after != before {
                    turns += u32::from((after > before) != was_up);
                    was_up = after > before;
                }
                over += u64::from(now > limit && second > 600);
            }
            // Up and down once in an hour in the end, and some times before that.
            prop_assert!(turns <= 2 * (24 + 8), "{} turns", turns);
            prop_assert!(over <= DAY / 50, "over the limit for {} s", over);
        }
    }

    #[test]
    fn what_is_given_is_taken_back_slowly_when_it_is_not_needed() {
        let mut guard = Guard::default();
        guard.judge(Some(0.1), 0.05, MEMORY, MEMORY, SECOND);
        assert_eq!(guard.extra_bytes(), MEMORY / 32);
        guard.judge(Some(0.1), 0.05, MEMORY, MEMORY, SECOND * 5);
        assert_eq!(guard.extra_bytes(), MEMORY / 32, "the first step has had no time");
        let mut seconds = 5;
        while guard.extra_bytes() > 0 {
            seconds += 1;
            guard.judge(Some(0.0), 0.05, MEMORY, MEMORY, SECOND * seconds);
        }
        assert_eq!(seconds, 6 + 4 * 60);
        // A guest that rests says nothing.
        guard.judge(None, 0.05, MEMORY, MEMORY, SECOND * 1000);
        assert_eq!(guard.extra_bytes(), 0);
    }

    #[test]
    fn a_time_of_which_nothing_is_known_is_no_time_of_peace() {
        let mut guard = Guard::default();
        guard.judge(Some(0.1), 0.05, MEMORY, MEMORY, SECOND);
        guard.judge(Some(0.0), 0.05, MEMORY, MEMORY, SECOND * 20);
        (21..200).for_each(|second| guard.judge(None, 0.05, MEMORY, MEMORY, SECOND * second));
        guard.judge(Some(0.0), 0.05, MEMORY, MEMORY, SECOND * 200);
        guard.judge(Some(0.0), 0.05, MEMORY, MEMORY, SECOND * 259);
        assert_eq!(guard.extra_bytes(), MEMORY / 32);
        guard.judge(Some(0.0), 0.05, MEMORY, MEMORY, SECOND * 260);
        assert!(guard.extra_bytes() < MEMORY / 32);
    }
}
