// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which pages of a memory slot are not planned, and for how long.
//!
//! What the policy excludes, and a slot whose writes are being logged, for good.
//! What was refused, for a time that doubles while it goes on being refused: a page
//! that is pinned for DMA costs a try now and then, not one in each round.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use crate::bitmap;
use crate::units::PAGES_PER_2M;

/// For how long pages that were refused are left alone at first.
pub const SHORTEST_HOLD: Duration = Duration::from_secs(30);

/// How often that is doubled: 16 minutes at most.
const MOST_DOUBLINGS: u32 = 5;

/// Refusals are remembered for this many pages together. Neighbours share their
/// fate: who pins memory pins it in pieces.
const REGION_PAGES: usize = PAGES_PER_2M as usize;

/// Refusals in one region.
#[derive(Clone, Copy, Debug)]
struct Region {
    /// Until when its refused pages are held.
    until: Duration,
    /// How often in a row, less one.
    doublings: u32,
    holds: bool,
}

impl Region {
    fn time(doublings: u32) -> Duration {
        SHORTEST_HOLD * (1 << doublings.min(MOST_DOUBLINGS))
    }

    /// A refusal after as long a time of peace is no repetition.
    fn is_forgotten(&self, now: Duration) -> bool {
        !self.holds && now >= self.until + Self::time(self.doublings)
    }
}

/// The pages of one slot that are not planned. Times are on the caller's clock.
#[derive(Clone, Debug)]
pub(super) struct Holds {
    /// All that are held now, for whatever reason.
    held: Vec<u64>,
    /// Indices in the slot, in order.
    excluded: Vec<Range<usize>>,
    /// Whoever logs writes would see each moved page as written.
    logged: bool,
    /// It may turn out to be an excluded memory device; since when that is waited for.
    awaits: Option<Option<Duration>>,
    /// Only those where something was refused lately.
    regions: BTreeMap<usize, Region>,
}

impl Holds {
    /// Nothing is held yet.
    pub(super) fn new(pages: usize) -> Self {
        let held = vec![0; bitmap::words_for(pages)];
        Self { held, excluded: Vec::new(), logged: false, awaits: None, regions: BTreeMap::new() }
    }

    /// Bitmap of what is held now.
    pub(super) fn held(&self) -> &[u64] {
        &self.held
    }

    /// What is excluded, by indices.
    pub(super) fn excluded(&self) -> impl Iterator<Item = Range<usize>> {
        self.excluded.iter().cloned()
    }

    /// Pages that are excluded.
    pub(super) fn excluded_pages(&self) -> u64 {
        self.excluded.iter().map(|range| range.len() as u64).sum()
    }

    /// Holds all, or no longer all, because writes are logged. What was held for no other
    /// reason is free at once.
    pub(super) fn set_logged(&mut self, logged: bool) {
        if std::mem::replace(&mut self.logged, logged) != logged {
            self.rebuild();
        }
    }

    /// Excludes these pages, and no others.
    pub(super) fn exclude(&mut self, pages: Vec<Range<usize>>) {
        if self.excluded != pages {
            self.excluded = pages;
            self.rebuild();
        }
    }

    /// Holds all for the shortest time, until it is known whether it is excluded.
    pub(super) fn await_device(&mut self) {
        self.awaits = Some(None);
        self.hold_always();
    }

    /// These pages were refused.
    pub(super) fn refuse(&mut self, pages: Range<usize>, now: Duration) {
        let first = pages.start / REGION_PAGES;
        for index in first..pages.end.div_ceil(REGION_PAGES) {
            let fresh = Region { until: now, doublings: 0, holds: false };
            let region = self.regions.entry(index).or_insert(fresh);
            if !region.holds {
                let again = region.until != now && !region.is_forgotten(now);
                region.doublings = if again { (region.doublings + 1).min(MOST_DOUBLINGS) } else { 0 };
                region.until = now + Region::time(region.doublings);
                region.holds = true;
            }
        }
        bitmap::fill(&mut self.held, pages, true);
    }

    /// Lets go of what has been held for long enough.
    pub(super) fn release(&mut self, now: Duration) {
        let mut released = false;
        for (index, region) in &mut self.regions {
            if region.holds && now >= region.until {
                region.holds = false;
                released = true;
                bitmap::fill(&mut self.held, index * REGION_PAGES..(index + 1) * REGION_PAGES, false);
            }
        }
        self.regions.retain(|_, region| !region.is_forgotten(now));
        let waited = self.awaits.as_mut().map(|since| now.saturating_sub(*since.get_or_insert(now)));
        if waited.is_some_and(|waited| waited >= SHORTEST_HOLD) {
            self.awaits = None;
            self.rebuild();
        } else if released {
            self.hold_always();
        }
    }

    /// Holds what is held for good, and forgets which pages of a region were refused:
    /// all of it is held as long as any would be.
    fn rebuild(&mut self) {
        self.held.fill(0);
        for (index, _) in self.regions.iter().filter(|(_, region)| region.holds) {
            bitmap::fill(&mut self.held, index * REGION_PAGES..(index + 1) * REGION_PAGES, true);
        }
        self.hold_always();
    }

    fn hold_always(&mut self) {
        if self.logged || self.awaits.is_some() {
            self.held.fill(!0);
        }
        for range in &self.excluded {
            bitmap::fill(&mut self.held, range.clone(), true);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BEGIN: Duration = Duration::from_secs(1000);

    fn at(seconds: u64) -> Duration {
        BEGIN + Duration::from_secs(seconds)
    }

    #[test]
    fn holds_grow_while_a_page_goes_on_being_refused_and_are_bounded() {
        let mut holds = Holds::new(1024);
        let (mut now, mut times) = (0, Vec::new());
        for _ in 0..8 {
            holds.refuse(7..8, at(now));
            let begun = now;
            while bitmap::get(holds.held(), 7) {
                now += 1;
                holds.release(at(now));
            }
            times.push(now - begun);
            now += 2;
        }
        assert_eq!(times, [30, 60, 120, 240, 480, 960, 960, 960]);
        // After a time of peace it begins anew.
        now += 961;
        holds.release(at(now));
        assert!(holds.regions.is_empty());
        holds.refuse(7..8, at(now));
        holds.release(at(now + 30));
        assert!(!bitmap::get(holds.held(), 7));
    }

    #[test]
    fn refusals_of_one_round_count_once() {
        let mut holds = Holds::new(1024);
        (0..100).for_each(|page| holds.refuse(page..page + 1, at(0)));
        holds.refuse(600..700, at(5));
        assert_eq!(bitmap::count(holds.held()), 200);
        holds.release(at(30));
        assert_eq!(bitmap::count(holds.held()), 100, "the other region is held from later on");
        holds.release(at(35));
        assert_eq!(bitmap::count(holds.held()), 0);
    }

    #[test]
    fn logged_slots_are_held_until_they_are_not() {
        let mut holds = Holds::new(128);
        holds.set_logged(true);
        holds.release(at(1000));
        assert_eq!(bitmap::count(holds.held()), 128);
        holds.set_logged(false);
        assert_eq!(bitmap::count(holds.held()), 0);
    }

    #[test]
    fn memory_that_may_be_excluded_waits() {
        let mut holds = Holds::new(128);
        holds.await_device();
        holds.release(at(0));
        holds.release(at(29));
        assert_eq!(bitmap::count(holds.held()), 128);
        holds.release(at(30));
        assert_eq!(bitmap::count(holds.held()), 0);
    }

    #[derive(Clone, Debug)]
    enum Step {
        Refuse(usize, usize),
        Release(u64),
        Logged(bool),
        Await,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            3 => (0usize..3000, 1usize..600).prop_map(|(start, pages)| Step::Refuse(start, pages)),
            3 => (0u64..2000).prop_map(Step::Release),
            1 => any::<bool>().prop_map(Step::Logged),
            1 => Just(Step::Await),
        ]
    }

    proptest! {
        #[test]
        fn an_excluded_page_is_held_whatever_happens_and_others_are_not_for_ever(
            ranges in proptest::collection::vec((0usize..3000, 1usize..900), 0..4),
            steps in proptest::collection::vec(step(), 0..40),
        ) {
            const PAGES: usize = 3000;
            let mut expected = [false; PAGES];
            let asked: Vec<_> = ranges.iter().map(|(start, n)| *start..(start + n).min(PAGES)).collect();
            asked.iter().cloned().flatten().for_each(|page| expected[page] = true);
            let mut holds = Holds::new(PAGES);
            holds.exclude(asked);
            let (mut now, mut logged) = (BEGIN, false);
            for step in steps {
                match step {
                    Step::Refuse(start, pages) => holds.refuse(start..(start + pages).min(PAGES), now),
                    Step::Release(seconds) => {
                        now += Duration::from_secs(seconds);
                        holds.release(now);
                    }
                    Step::Logged(on) => {
                        holds.set_logged(on);
                        logged = on;
                    }
                    Step::Await => holds.await_device(),
                }
                prop_assert!((0..PAGES).all(|page| !expected[page] || bitmap::get(holds.held(), page)));
            }
            for _ in 0..2 {
                now += Region::time(MOST_DOUBLINGS);
                holds.release(now);
            }
            if !logged {
                prop_assert!((0..PAGES).all(|page| expected[page] || !bitmap::get(holds.held(), page)));
            }
        }
    }
}
