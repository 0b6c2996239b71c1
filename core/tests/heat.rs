// SPDX-License-Identifier: MIT OR Apache-2.0
//! What holds for temperatures whatever is accessed when.

use std::time::Duration;

use ept_virt_core::heat::{HeatMap, HeatParams, MAX_TEMPERATURE};
use ept_virt_core::wire::Class;
use proptest::prelude::*;

const HALF_LIFE: Duration = Duration::from_secs(10);

/// Rounding to 14 bits in steps of a 256th: 4 of 65536 in each step, 256 steps deep.
const TOLERANCE: f64 = 0.016;

fn map(pages: usize) -> HeatMap {
    HeatMap::new(pages, HeatParams { half_life: HALF_LIFE, delay: Duration::from_secs(2) })
}

fn share(temperature: u16) -> f64 {
    f64::from(temperature) / f64::from(MAX_TEMPERATURE)
}

fn rounds(heat: &mut HeatMap, accessed: u64, time: Duration, dt: Duration) {
    let mut left = time;
    while !left.is_zero() {
        let step = dt.min(left);
        heat.step(&[accessed], step);
        left -= step;
    }
}

/// Round lengths from far below to above the half-life.
fn round_length() -> impl Strategy<Value = Duration> {
    (1u64..15_000).prop_map(Duration::from_millis)
}

proptest! {
    #[test]
    fn half_is_left_after_a_half_life(dt in round_length()) {
        let mut heat = map(1);
        rounds(&mut heat, 1, HALF_LIFE * 20, dt);
        let before = share(heat.temperature(0));
        prop_assert!(before > 1.0 - TOLERANCE, "saturates at {before}");
        rounds(&mut heat, 0, HALF_LIFE, dt);
        // The step that is still put off may be missing.
        let after = share(heat.temperature(0));
        prop_assert!((after - before / 2.0).abs() < TOLERANCE, "{before} -> {after} in rounds of {dt:?}");
    }

    #[test]
    fn the_length_of_rounds_does_not_matter(
        phases in proptest::collection::vec((any::<bool>(), 1u64..8), 1..6),
        dt in (20u64..1000).prop_map(Duration::from_millis),
    ) {
        let mut heat = map(1);
        let (mut exact, mut past) = (0.0_f64, 0.0_f64);
        for (accessed, seconds) in &phases {
            rounds(&mut heat, u64::from(*accessed), Duration::from_secs(*seconds), dt);
            // Millisecond by millisecond: the mean of a short past, the exponential average of a
            // long one.
            for _ in 0..*seconds * 1000 {
                let rate = (1.0 / (past + 0.0005)).max(std::f64::consts::LN_2 / HALF_LIFE.as_secs_f64());
                let keep = (-rate * 0.001).exp();
                exact = exact * keep + if *accessed { 1.0 - keep } else { 0.0 };
                past += 0.001;
            }
        }
        // Within a step that is put off, one access counts for the whole step.
        let steps = phases.len() as f64 / 256.0;
        let found = share(heat.temperature(0));
        prop_assert!((found - exact).abs() < TOLERANCE + steps, "{found}, not {exact}");
    }

    #[test]
    fn more_accesses_are_never_colder(history in proptest::collection::vec((any::<u64>(), any::<u64>(), 1u64..5000), 1..60)) {
        let (mut more, mut less) = (map(64), map(64));
        for (a, b, ms) in history {
            let dt = Duration::from_millis(ms);
            more.step(&[a | b], dt);
            less.step(&[a & b], dt);
            for page in 0..64 {
                prop_assert!(more.temperature(page) >= less.temperature(page));
                prop_assert!(less.is_idle(page) || !more.is_idle(page));
            }
        }
    }

    #[test]
    fn an_access_warms_and_no_access_cools(history in proptest::collection::vec((any::<u64>(), 100u64..30_000), 1..60)) {
        let mut heat = map(64);
        for (accessed, ms) in history {
            let before = heat.clone();
            heat.step(&[accessed], Duration::from_millis(ms));
            for page in 0..64 {
                let (old, new) = (before.temperature(page), heat.temperature(page));
                if accessed >> page & 1 == 1 {
                    // Near the top, rounding may take one unit of 14 bits.
                    prop_assert!(new >= old.saturating_sub(4));
                    prop_assert!(!heat.is_idle(page));
                } else {
                    prop_assert!(new < old || old == 0 && new == 0);
                }
            }
        }
    }

    #[test]
    fn idle_means_not_accessed_for_the_delay(
        history in proptest::collection::vec((any::<bool>(), 1u64..3000), 1..80),
        delay_ms in 0u64..10_000,
        half_life_ms in 100u64..600_000,
    ) {
        let delay = Duration::from_millis(delay_ms);
        let params = HeatParams { half_life: Duration::from_millis(half_life_ms), delay };
        let mut heat = HeatMap::new(1, params);
        // A new map knows nothing, so it starts as after an access.
        let mut since_access = Duration::ZERO;
        let mut longest_round = Duration::ZERO;
        for (accessed, ms) in history {
            let dt = Duration::from_millis(ms);
            longest_round = longest_round.max(dt);
            heat.step(&[u64::from(accessed)], dt);
            let time = if accessed { Duration::ZERO } else { since_access + dt };
            since_access = time;
            if heat.is_idle(0) {
                // With no delay at all, also a page that has just been accessed.
                prop_assert!(time >= delay && (!accessed || delay.is_zero()), "idle after {time:?}");
            }
            // A step is put off for a 177th of the half-life and a round at most.
            let put_off = params.half_life / 170 + longest_round;
            if time > delay * 3 / 2 + put_off * 2 {
                prop_assert!(heat.is_idle(0), "not idle after {time:?}");
            }
        }
    }

    #[test]
    fn any_size_and_any_words_are_fine(
        pages in 0usize..300,
        words in proptest::collection::vec(any::<u64>(), 0..8),
        times in proptest::collection::vec(any::<u64>(), 1..5),
        half_life in any::<u64>(), delay in any::<u64>(),
    ) {
        let params = HeatParams { half_life: Duration::from_micros(half_life), delay: Duration::from_micros(delay) };
        let mut heat = HeatMap::new(pages, params);
        for micros in times {
            heat.step(&words, Duration::from_micros(micros));
            let counts = heat.class_counts();
            prop_assert_eq!(counts.hot + counts.warm + counts.cold, pages as u64);
            let by_page = |class| (0..pages).filter(|page| heat.class(*page) == class).count() as u64;
            prop_assert_eq!((counts.hot, counts.warm), (by_page(Class::Hot), by_page(Class::Warm)));
        }
        prop_assert_eq!(heat.temperature(pages), 0);
        heat.step(&words, Duration::MAX);
    }

    #[test]
    fn a_round_in_parts_is_as_one_at_once(
        pages in 1usize..1000, at in 0usize..20,
        history in proptest::collection::vec((proptest::collection::vec(any::<u64>(), 0..17), 1u64..5000), 1..12),
    ) {
        let (mut whole, mut parts) = (map(pages), map(pages));
        for (accessed, ms) in history {
            let dt = Duration::from_millis(ms);
            let surprise = whole.step(&accessed, dt);
            let mut round = parts.begin(dt.into());
            parts.part(&mut round, 0..at, &accessed[..at.min(accessed.len())]);
            parts.part(&mut round, at..pages.div_ceil(64).max(at), &accessed[at.min(accessed.len())..]);
            prop_assert_eq!(parts.end(round), surprise);
            prop_assert_eq!(whole.cells(), parts.cells());
            prop_assert_eq!(whole.variance(), parts.variance());
        }
    }

    #[test]
    fn a_unit_is_judged_by_its_hottest_page(words in proptest::collection::vec(any::<u64>(), 4), start in 0usize..256, length in 0usize..256) {
        let mut heat = map(256);
        heat.step(&words, Duration::from_secs(3));
        heat.step(&[0], Duration::from_secs(1));
        let range = start..(start + length).min(256);
        let hottest = range.clone().map(|page| heat.temperature(page)).max().unwrap_or(0);
        let idle = range.clone().all(|page| heat.is_idle(page));
        prop_assert_eq!(heat.unit(range), (hottest, idle));
    }
}

proptest! {
    /// As long as the past is short, the temperature is the part of it in which the page
    /// was accessed, and as uncertain as that many rounds make it.
    #[test]
    fn a_short_past_is_averaged(history in proptest::collection::vec(any::<bool>(), 1..14)) {
        let mut heat = map(1);
        for accessed in &history {
            heat.step(&[u64::from(*accessed)], Duration::from_secs(1));
        }
        let mean = history.iter().filter(|accessed| **accessed).count() as f64 / history.len() as f64;
        prop_assert!((share(heat.temperature(0)) - mean).abs() < TOLERANCE);
        prop_assert!((heat.variance() - 1.0 / history.len() as f64).abs() < 0.01);
    }

    /// After a restart, what was known counts as half a round.
    #[test]
    fn a_restart_makes_the_past_short(before in any::<bool>(), rounds in 1_u32..10) {
        let mut heat = map(1);
        for _ in 0..60 {
            heat.step(&[u64::from(before)], Duration::from_secs(1));
        }
        heat.restart();
        for _ in 0..rounds {
            heat.step(&[u64::from(!before)], Duration::from_secs(1));
        }
        let new = f64::from(rounds) / (f64::from(rounds) + 0.5);
        let expected = if before { 1.0 - new } else { new };
        prop_assert!((share(heat.temperature(0)) - expected).abs() < TOLERANCE);
    }
}

/// Numbers from 0 to 1, the same in every run.
fn random(state: &mut u64) -> f64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state >> 11) as f64 / (1_u64 << 53) as f64
}

/// What a round has accessed, by the chance of each page.
fn accessed(pages: usize, state: &mut u64, chance: impl Fn(usize) -> f64) -> Vec<u64> {
    let mut words = vec![0; pages.div_ceil(64)];
    for page in 0..pages {
        words[page / 64] |= u64::from(random(state) < chance(page)) << (page % 64);
    }
    words
}

#[test]
fn only_a_guest_that_turns_to_other_pages_surprises() {
    const PAGES: usize = 4096;
    const SECOND: Duration = Duration::from_secs(1);
    let mut state = 88_172_645_463_325_252;
    // From hardly ever to always.
    let mixed = |page: usize| page as f64 / PAGES as f64;
    let third = |page: usize, from: usize| if (from..from + PAGES / 3).contains(&page) { 0.9 } else { 0.01 };
    let mut heat = map(PAGES);
    let mut surprises = |heat: &mut HeatMap, rounds: usize, chance: &dyn Fn(usize, usize) -> f64| {
        let told = (0..rounds).map(|round| {
            let words = accessed(PAGES, &mut state, |page| chance(page, round));
            heat.step(&words, SECOND).is_shift()
        });
        told.collect::<Vec<_>>()
    };
    // The first round is all that is known.
    assert!(!surprises(&mut heat, 100, &|page, _| mixed(page))[2..].contains(&true));
    assert!(surprises(&mut heat, 1, &|page, _| third(page, 0))[0]);
    heat.restart();
    assert!(!surprises(&mut heat, 60, &|page, _| third(page, 0))[2..].contains(&true));
    // A scan beside it, and an end of all work, are no turn.
    let scan = |page: usize, round: usize| if page / 256 == round % 16 { 1.0 } else { third(page, 0) };
    assert!(!surprises(&mut heat, 48, &scan).contains(&true));
    assert!(!surprises(&mut heat, 5, &|_, _| 0.0).contains(&true));
    let mut heat = map(PAGES);
    assert!(!surprises(&mut heat, 30, &|page, _| third(page, 0))[2..].contains(&true));
    assert!(surprises(&mut heat, 1, &|page, _| third(page, PAGES / 2))[0]);
}

#[test]
fn classes_follow_half_lives() {
    let mut heat = map(1);
    rounds(&mut heat, 1, HALF_LIFE * 2, Duration::from_secs(1));
    assert_eq!(heat.class(0), Class::Hot);
    rounds(&mut heat, 0, HALF_LIFE * 2, Duration::from_secs(1));
    assert_eq!(heat.class(0), Class::Warm);
    rounds(&mut heat, 0, HALF_LIFE * 3, Duration::from_secs(1));
    assert_eq!(heat.class(0), Class::Cold);
    rounds(&mut heat, 0, HALF_LIFE * 20, Duration::from_secs(1));
    assert_eq!(heat.temperature(0), 0);
}

#[test]
fn other_parameters_keep_the_temperatures() {
    let mut heat = map(2);
    rounds(&mut heat, 1, HALF_LIFE, Duration::from_secs(1));
    let before = (heat.temperature(0), heat.temperature(1));
    heat.set_params(HeatParams { half_life: Duration::from_secs(1), delay: Duration::ZERO });
    assert_eq!((heat.temperature(0), heat.temperature(1)), before);
    heat.step(&[0], Duration::from_secs(1));
    assert!(share(heat.temperature(0)) < share(before.0) / 2.0 + TOLERANCE);
}
