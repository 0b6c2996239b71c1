// SPDX-License-Identifier: MIT OR Apache-2.0
//! How the interval between rounds adapts, with guests whose young bytes are known
//! as a function of time.

use std::time::Duration;

use ept_virt_core::pace::{FIRST_INTERVAL, LONGEST, Limits, Pace, Round, SHORTEST, phase};
use ept_virt_core::units::{Bytes, BytesPerSecond, PAGE_BYTES, Share};
use proptest::prelude::*;

const PAGES: u64 = 1 << 20;
const MEMORY: Bytes = Bytes::of_pages(PAGES);

/// Intervals go up to a minute.
const LIMITS: Limits = Limits {
    memory: MEMORY,
    dram: Some(Bytes::of_pages(PAGES * 3 / 10)),
    half_life: Duration::from_secs(240),
    bandwidth: BytesPerSecond(64 << 20),
    cpu: Share::from_percent(1),
    asked: None,
    windows: false,
};

/// Pages that are accessed at random, so many at such a rate in Hz.
#[derive(Clone, Debug)]
struct Guest(Vec<(f64, f64)>);

impl Guest {
    fn young(&self, interval: Duration) -> Bytes {
        let young = |(pages, rate): &(f64, f64)| pages * (1.0 - (-rate * interval.as_secs_f64()).exp());
        Bytes((self.0.iter().map(young).sum::<f64>() as u64) * PAGE_BYTES)
    }

    fn hot_set(pages: u64, rate: f64) -> Self {
        Guest(vec![(pages as f64, rate)])
    }

    fn uniform(rate: f64) -> Self {
        Guest::hot_set(PAGES, rate)
    }

    /// Rates fall with the rank as it to the power of `skew`; ranks in steps of a
    /// tenth, as none of a million pages needs a term of its own.
    fn zipf(skew: f64, accesses_per_second: f64) -> Self {
        let mut ranks = vec![(1.0f64, 1.0f64)];
        while let Some((rank, width)) = ranks.last().copied().filter(|(rank, _)| *rank < PAGES as f64) {
            ranks.push((rank + width, (rank / 10.0).max(1.0)));
        }
        let sum: f64 = ranks.iter().map(|(rank, width)| width * rank.powf(-skew)).sum();
        let rate = |rank: f64| accesses_per_second * rank.powf(-skew) / sum;
        Guest(ranks.into_iter().map(|(rank, width)| (width, rate(rank))).collect())
    }
}

fn guest() -> impl Strategy<Value = Guest> {
    let rate = || (-3.0f64..4.0).prop_map(|exponent| 10f64.powf(exponent));
    prop_oneof![
        rate().prop_map(Guest::uniform),
        (1..PAGES, rate()).prop_map(|(pages, rate)| Guest::hot_set(pages, rate)),
        (0.5f64..1.3, 3.0f64..9.0).prop_map(|(skew, accesses)| Guest::zipf(skew, 10f64.powf(accesses))),
        // A hot set in memory that is looked through now and then.
        (1..PAGES / 2, rate(), rate()).prop_map(|(pages, hot, rest)| {
            Guest(vec![(pages as f64, hot), ((PAGES - pages) as f64, rest / 100.0)])
        }),
        Just(Guest(Vec::new())),
    ]
}

fn limits() -> impl Strategy<Value = Limits> {
    let dram = prop_oneof![Just(None), (0..=PAGES).prop_map(|pages| Some(Bytes::of_pages(pages)))];
    (dram, 400u64..600_000, 20u32..34, 1u16..20).prop_map(|(dram, half_life_ms, bandwidth, percent)| Limits {
        dram,
        half_life: Duration::from_millis(half_life_ms),
        bandwidth: BytesPerSecond(1 << bandwidth),
        cpu: Share::from_percent(percent),
        ..LIMITS
    })
}

/// A round that cost nothing.
fn watch(guest: &Guest, watched: Duration) -> Round {
    Round { watched, young: guest.young(watched), cost: Duration::ZERO, harvest: Duration::ZERO }
}

/// The intervals of so many rounds of a guest.
fn run(pace: &mut Pace, guest: &Guest, limits: &Limits, from: Duration, rounds: usize) -> Vec<Duration> {
    let mut intervals = vec![from];
    for _ in 0..rounds {
        let interval = *intervals.last().unwrap();
        let round = Round { cost: Duration::from_micros(500), ..watch(guest, interval) };
        intervals.push(pace.next(&round, limits).interval);
    }
    intervals
}

fn begin(guest: &Guest, limits: &Limits, rounds: usize) -> Vec<Duration> {
    let mut pace = Pace::default();
    let first = pace.first(limits, Duration::from_micros(500), Duration::ZERO);
    run(&mut pace, guest, limits, first, rounds)
}

fn turns(intervals: &[Duration]) -> usize {
    let moves: Vec<bool> =
        intervals.windows(2).filter(|pair| pair[0] != pair[1]).map(|pair| pair[0] < pair[1]).collect();
    moves.windows(2).filter(|pair| pair[0] != pair[1]).count()
}

/// At rest: young bytes are near the target, or no other interval is allowed
/// that is nearer.
fn assert_settled(guest: &Guest, limits: &Limits, intervals: &[Duration]) -> Result<(), TestCaseError> {
    let last = *intervals.last().unwrap();
    prop_assert!(intervals[intervals.len() - 8..].iter().all(|interval| *interval == last), "{intervals:?}");
    let share = guest.young(last).0 as f64 / limits.target().0 as f64;
    let longest = (limits.half_life / 4).clamp(SHORTEST, LONGEST);
    if share < 0.85 {
        prop_assert!(last >= longest, "{share} young at {last:?}, and {longest:?} is allowed");
    }
    if share > 1.2 {
        // Shorter is forbidden by cost, bandwidth or the clamp.
        let pair = Duration::from_secs_f64((4 << 20) as f64 / limits.bandwidth.0 as f64).min(longest);
        let bound = if limits.dram.is_some() { pair } else { SHORTEST };
        prop_assert!(last <= bound.max(SHORTEST) + SHORTEST, "{share} young at {last:?}");
    }
    Ok(())
}

proptest! {
    #[test]
    fn it_comes_to_rest_where_the_target_is_young(guest in guest(), limits in limits()) {
        let intervals = begin(&guest, &limits, 40);
        assert_settled(&guest, &limits, &intervals)?;
        prop_assert!(turns(&intervals) <= 2, "{intervals:?}");
    }

    #[test]
    fn it_changes_by_a_factor_of_two_at_most_and_keeps_to_its_bounds(
        guests in proptest::collection::vec(guest(), 1..5),
        limits in limits(),
    ) {
        let mut pace = Pace::default();
        let mut last = pace.first(&limits, Duration::from_micros(500), Duration::ZERO);
        prop_assert!(last <= FIRST_INTERVAL);
        for guest in guests {
            let intervals = run(&mut pace, &guest, &limits, last, 7);
            for pair in intervals.windows(2) {
                let ratio = pair[1].as_secs_f64() / pair[0].as_secs_f64();
                prop_assert!((0.499..=2.001).contains(&ratio), "{pair:?}");
                prop_assert!((SHORTEST..=LONGEST).contains(&pair[1]));
            }
            last = *intervals.last().unwrap();
        }
    }

    #[test]
    fn it_follows_a_guest_that_does_something_else(before in guest(), after in guest(), limits in limits()) {
        let mut pace = Pace::default();
        let first = pace.first(&limits, Duration::from_micros(500), Duration::ZERO);
        let rest = run(&mut pace, &before, &limits, first, 40);
        let intervals = run(&mut pace, &after, &limits, *rest.last().unwrap(), 40);
        assert_settled(&after, &limits, &intervals)?;
        prop_assert!(turns(&intervals) <= 2, "{intervals:?}");
    }

    /// Counts that are off by a twentieth do not make it swing.
    #[test]
    fn noise_does_not_move_it(guest in guest(), noise in proptest::collection::vec(-0.05f64..0.05, 20)) {
        let mut pace = Pace::default();
        let first = pace.first(&LIMITS, Duration::ZERO, Duration::ZERO);
        let rest = *run(&mut pace, &guest, &LIMITS, first, 40).last().unwrap();
        let mut interval = rest;
        for noise in noise {
            let young = Bytes((guest.young(interval).0 as f64 * (1.0 + noise)) as u64);
            interval = pace.next(&Round { young, ..watch(&guest, interval) }, &LIMITS).interval;
            // The interval of a guest that is through with all it uses means nothing.
            let ratio = guest.young(interval).0 as f64 / guest.young(rest).0.max(1) as f64;
            prop_assert!(guest.0.is_empty() || (0.8..=1.25).contains(&ratio), "{ratio} at {interval:?}");
        }
    }
}

#[test]
fn an_idle_guest_is_harvested_as_seldom_as_allowed() {
    let idle = Guest(Vec::new());
    let intervals = begin(&idle, &LIMITS, 8);
    assert_eq!(intervals[..4], [1, 2, 4, 8].map(Duration::from_secs));
    assert_eq!(intervals[8], LONGEST);
    let half_life = Duration::from_secs(30);
    assert_eq!(begin(&idle, &Limits { half_life, ..LIMITS }, 8)[8], half_life / 4);
}

#[test]
fn rounds_cost_no_more_than_they_may() {
    // All of memory is young at once, so it would be as fast as it can.
    let busy = Guest::uniform(1000.0);
    let last = |cost_ms: u64, limits: &Limits| {
        let mut pace = Pace::default();
        let mut interval = pace.first(limits, Duration::from_millis(cost_ms), Duration::ZERO);
        for _ in 0..20 {
            let cost = Duration::from_millis(cost_ms);
            interval = pace.next(&Round { cost, ..watch(&busy, interval) }, limits).interval;
        }
        interval.as_millis()
    };
    assert_eq!(last(0, &LIMITS), 100);
    assert_eq!(last(3, &LIMITS), 300, "one percent");
    // Cost comes before the half-life, and the longest interval before all.
    assert_eq!(last(100, &Limits { half_life: Duration::from_secs(4), ..LIMITS }), 10_000);
    assert_eq!(last(10_000, &LIMITS), 60_000);
    // Of 256 GiB rounds may take four percent. A 4096th of that, 64 MiB, takes a second to move.
    let large = Limits { memory: Bytes(256 << 30), dram: Some(Bytes(1 << 30)), ..LIMITS };
    assert_eq!(last(3, &large), 1000);
    assert_eq!(last(400, &large), 10_000);
    assert_eq!(last(4, &Limits { dram: None, ..large }), 60_000, "no more than the 4 GiB are young");
}

#[test]
fn what_may_lie_in_dram_says_how_many_bytes_are_to_be_young() {
    let target = |dram| Limits { dram, ..LIMITS }.target().pages();
    assert_eq!(target(Some(Bytes::of_pages(PAGES / 10))), PAGES / 10 * 3 / 2);
    assert_eq!(target(Some(Bytes::of_pages(PAGES / 2))), PAGES / 3 * 2);
    assert_eq!(target(None), PAGES / 3 * 2);
    assert_eq!(target(Some(Bytes(0))), 1);
}

#[test]
fn rounds_of_many_domains_are_spread_over_an_interval() {
    let mut tenths = [0; 10];
    for number in 0..500 {
        let uuid = format!("6695eb01-f6a4-8304-79aa-97f25020{number:04x}");
        assert_eq!(phase(&uuid), phase(&uuid));
        tenths[(phase(&uuid) * 10.0) as usize] += 1;
    }
    assert!(tenths.iter().all(|count| (25..=80).contains(count)), "{tenths:?}");
}

/// Guests of huge pages: a bit stands for 512 of them.
fn huge_guest() -> impl Strategy<Value = Guest> {
    let rate = || (0.0f64..3.5).prop_map(|exponent| 10f64.powf(exponent));
    prop_oneof![
        (rate(), rate(), 0.05f64..0.4).prop_map(|(hot, cold, share)| {
            let pages = PAGES as f64;
            Guest(vec![(pages * share, hot.max(cold) * 10.0), (pages * (1.0 - share), hot.min(cold))])
        }),
        rate().prop_map(Guest::uniform),
    ]
}

/// Rounds with windows; what each was watched for.
fn run_with_windows(pace: &mut Pace, guest: &Guest, limits: &Limits, rounds: usize) -> Vec<Duration> {
    let mut interval = pace.first(limits, Duration::ZERO, Duration::ZERO);
    let mut watched = Vec::new();
    for _ in 0..rounds {
        let looks: Vec<_> = pace.looks(limits, interval).collect();
        looks.iter().for_each(|after| pace.looked(*after, guest.young(*after)));
        let window = pace.window(limits).unwrap_or(interval);
        watched.push(window);
        interval = pace.next(&watch(guest, window), limits).interval;
    }
    watched
}

proptest! {
    /// Whatever the interval that bandwidth or policy allow: what is watched tells.
    #[test]
    fn a_window_is_as_long_as_tells_most(guest in huge_guest(), asked_ms in proptest::option::of(500u64..4000)) {
        let asked = asked_ms.map(Duration::from_millis);
        let limits = Limits { windows: true, asked, half_life: Duration::from_secs(60), ..LIMITS };
        let watched = run_with_windows(&mut Pace::default(), &guest, &limits, 12);
        for window in &watched[3..] {
            let share = guest.young(*window).0 as f64 / limits.target().0 as f64;
            let at_an_end = *window <= Duration::from_millis(1) || (share < 1.0 && asked == Some(*window));
            prop_assert!(at_an_end || (0.4..=1.6).contains(&share), "{share} young in {window:?} of {watched:?}");
        }
        let last = watched.last().unwrap().as_secs_f64();
        let steady = |window: &Duration| (0.8..=1.25).contains(&(window.as_secs_f64() / last));
        prop_assert!(watched[8..].iter().all(steady), "{watched:?}");
    }

    /// A window that fell into a rest of the guest is no reason to begin anew.
    #[test]
    fn a_rest_lengthens_a_window_by_two_at_most(guest in huge_guest(), rests in 1usize..4) {
        let limits = Limits { windows: true, half_life: Duration::from_secs(60), ..LIMITS };
        let mut pace = Pace::default();
        let before = *run_with_windows(&mut pace, &guest, &limits, 12).last().unwrap();
        let mut window = before;
        for _ in 0..rests {
            let rest = Round { young: Bytes(0), ..watch(&guest, window) };
            let next = pace.next(&rest, &limits);
            window = next.window.unwrap_or(next.interval);
        }
        prop_assert!(window <= before * 2u32.pow(rests as u32).max(2), "{before:?} became {window:?}");
    }
}

#[test]
fn windows_need_rounds_that_step_the_heat() {
    let busy = Guest::uniform(100.0);
    let mut pace = Pace::default();
    let mut next = None;
    let limits = Limits { windows: true, half_life: Duration::from_secs(100), ..LIMITS };
    pace.first(&limits, Duration::ZERO, Duration::ZERO);
    for _ in 0..10 {
        next = Some(pace.next(&watch(&busy, Duration::from_millis(4)), &limits));
    }
    let next = next.unwrap();
    assert!(next.window.is_some_and(|window| window < Duration::from_millis(8)), "{next:?}");
    assert!((0.56..0.58).contains(&next.interval.as_secs_f64()), "{next:?}");
    // Asked for shorter ones, all of each counts.
    let asked = Limits { asked: Some(Duration::from_millis(200)), ..limits };
    let next = pace.next(&watch(&busy, Duration::from_millis(4)), &asked);
    assert_eq!((next.interval, next.window), (Duration::from_millis(200), None));
    // A harvest takes longer than the guest needs to be through.
    let slow = Round { harvest: Duration::from_millis(90), ..watch(&busy, Duration::from_millis(4)) };
    assert_eq!(pace.next(&slow, &limits).window, Some(Duration::from_millis(90)));
}
