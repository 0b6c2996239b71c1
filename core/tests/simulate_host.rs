// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guests that share a host's DRAM, with heat, claims, plans and bandwidth as the
//! daemon's.

use std::time::Duration;

use ept_virt_core::policy::{Layer, Policy};
use ept_virt_core::record::{Frame, FrameSlot};
use ept_virt_core::sampler::Level;
use ept_virt_core::simulate::{
    Domain, Guest, GuestParams, Host, Pattern, Replay, Start, Workload, WorkloadParams,
};
use ept_virt_core::units::Bytes;

/// 16 MiB: enough to see, and soon done without optimization.
const PAGES: u64 = 1 << 12;
const ROUND: Duration = Duration::from_secs(1);

/// Half of the guests' memory.
const TOTAL: Bytes = Bytes::of_pages(PAGES);

fn params(weight: u32, start: Start) -> GuestParams {
    let mut layer = Layer::default();
    let weight = weight.to_string();
    let settings =
        [("migration.bandwidth", "1GiB/s"), ("temperature.half-life", "2s"), ("dram.weight", &weight)];
    for (path, value) in settings {
        layer.assign(path, value).unwrap();
    }
    GuestParams { policy: Policy::of(&layer), interval: ROUND, start }
}

fn guest(index: u64, weight: u32, pattern: Pattern, start: Start) -> Domain {
    // So often that all that is in use is accessed in each round.
    let workload = WorkloadParams { pattern, pages: PAGES, huge: false, rate_hz: 4.0, granule_pages: None };
    Domain::Guest(Box::new(Guest::new(params(weight, start), Workload::new(workload, 1, index))))
}

/// Pages of each guest in DRAM, round by round; never more than there are.
fn run(host: &mut Host, rounds: usize) -> Vec<Vec<u64>> {
    let round = |_| {
        let round = host.round()?;
        let fast: Vec<u64> = host.domains().iter().map(|domain| domain.fast().pages()).collect();
        assert!(fast.iter().sum::<u64>() <= TOTAL.pages(), "{fast:?}");
        let granted: u64 = host.domains().iter().map(|domain| domain.granted().pages()).sum();
        assert!(granted <= TOTAL.pages() && round.target_pages <= TOTAL.pages(), "{granted} granted");
        Some(fast)
    };
    (0..rounds).map_while(round).collect()
}

fn near(pages: u64, parts: u64, of: u64) -> bool {
    pages.abs_diff(TOTAL.pages() * parts / of) <= TOTAL.pages() / 100
}

#[test]
fn busy_guests_share_dram_by_weight_and_then_rest() {
    for start in [Start::FirstTouch, Start::Fast, Start::Slow] {
        let domains =
            [1, 3].map(|weight| guest(weight.into(), weight, Pattern::Zipf { theta: 0.5 }, start)).into();
        let mut host = Host::new(domains).with_dram(TOTAL);
        let fast = run(&mut host, 40);
        // Memory of all guests begins in DRAM alike.
        if start != Start::Slow {
            assert!(near(fast[0][0], 1, 2) && near(fast[0][1], 1, 2), "{fast:?}");
        }
        // A half-life until it is known what they use, and steps of an eighth.
        for fast in &fast[20..] {
            assert!(near(fast[0], 1, 4) && near(fast[1], 3, 4), "{start:?}: {fast:?}");
        }
        let granted: Vec<Bytes> = host.domains().iter().map(Domain::granted).collect();
        assert_eq!(granted, [Bytes(TOTAL.0 / 4), Bytes(TOTAL.0 / 4 * 3)]);
    }
}

#[test]
fn what_an_idle_guest_lends_comes_back_when_it_wakes_up() {
    // All of its memory is hot at noon, and next to none at midnight.
    let day = Pattern::Diurnal { hot: 1.0, to_hot: 1.0, period: 50 * ROUND };
    let domains = vec![
        guest(0, 1, day, Start::FirstTouch),
        guest(1, 1, Pattern::Static { hot: 1.0, to_hot: 1.0 }, Start::FirstTouch),
    ];
    let fast = run(&mut Host::new(domains).with_dram(TOTAL), 100);
    let second = &fast[50..];
    let least = second.iter().map(|fast| fast[0]).min().unwrap();
    assert!(least * 3 < TOTAL.pages(), "{least} pages are left to it in the night");
    assert!(second.iter().any(|fast| near(fast[0], 1, 2)), "its share came back: {second:?}");
    let most = second.iter().map(|fast| fast[1]).max().unwrap();
    assert!(most * 3 > TOTAL.pages() * 2, "{most} pages were lent to the other");
}

/// Pages come up all the time, and have no room in DRAM but what is free.
#[test]
fn recorded_guests_fit_as_well_and_leave_what_they_had() {
    let replay = |start: Start, rounds: u64| {
        let frame = move |round: u64| {
            let mut words = vec![0; PAGES as usize / 64];
            let seen = words.len() * (round as usize + 1) / 10;
            words[..seen.min(PAGES as usize / 64)].fill(!0);
            let slot = FrameSlot {
                gfn_start: 0,
                page_count: PAGES,
                accessed: words.clone(),
                mapped: words,
                on_slow: vec![0; PAGES as usize / 64],
                levels: vec![Level::Page4K; PAGES as usize / 512],
            };
            Frame { time: Duration::from_secs(round), slots: vec![slot] }
        };
        let mut frames = (0..rounds).map(frame);
        Domain::Replay(Box::new(Replay::new(&params(1, start))), Box::new(move || frames.next()))
    };
    for start in [Start::FirstTouch, Start::Fast, Start::Slow] {
        let domains = vec![replay(start, 20), replay(start, 60)];
        let mut host = Host::new(domains).with_dram(TOTAL);
        for round in 0..60 {
            let fast = host.round().unwrap().fast_pages;
            assert!(fast <= TOTAL.pages(), "{start:?}: {fast} pages in round {round}");
        }
        // The first one has ended, and the other needs no more than there is.
        assert_eq!(host.domains()[1].fast(), TOTAL, "{start:?}");
        assert!(host.round().is_none());
    }
}
