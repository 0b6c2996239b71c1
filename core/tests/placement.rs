// SPDX-License-Identifier: MIT OR Apache-2.0
//! Heat, plan and place together over many rounds, on a guest made up here.

use std::time::Duration;

use ept_virt_core::bitmap;
use ept_virt_core::heat::{HeatParams, Span};
use ept_virt_core::memory::GuestMemory;
use ept_virt_core::migrate::MoveOutcome;
use ept_virt_core::plan::PlaceMap;
use ept_virt_core::sampler::{Harvest, Level, MemSlot};
use ept_virt_core::units::{Bytes, Share};
use ept_virt_core::wire::Place;

const PAGES: usize = 16_384;
const ROUND: Duration = Duration::from_secs(1);
const DELAY: Duration = Duration::from_secs(2);

/// A guest whose pages are all in DRAM when it is found.
struct Guest {
    memory: GuestMemory,
    /// What the kernel would say.
    place: PlaceMap,
    level: Level,
    target_pages: u64,
    quota_pages: u64,
    random: u64,
}

impl Guest {
    fn new(level: Level, target_pages: u64, half_life_s: u64) -> Self {
        let mut memory =
            GuestMemory::new(HeatParams { half_life: Duration::from_secs(half_life_s), delay: DELAY });
        let (gfn_start, page_count, hva) = (0, PAGES as u64, 1 << 40);
        let slot = MemSlot { gfn_start, page_count, hva, id: 0, read_only: false, dirty_log: false };
        memory.adopt(1, vec![slot]);
        let mut place = PlaceMap::new(0, PAGES);
        place.observe(&[!0; PAGES / 64], &[], &[level; PAGES / 512]);
        let mut guest =
            Guest { memory, place, level, target_pages, quota_pages: 2048, random: 88_172_645_463_325_252 };
        // The first harvest tells where pages lie, and nothing of their heat.
        guest.harvest(&[], None);
        guest
    }

    fn harvest(&mut self, accessed: &[u64], elapsed: Option<Duration>) {
        let mut harvest = Harvest::default();
        harvest.reset(0, PAGES as u64);
        harvest.mapped.fill(!0);
        harvest.levels.fill(self.level);
        harvest.accessed[..accessed.len()].copy_from_slice(accessed);
        for page in 0..PAGES {
            bitmap::fill(&mut harvest.on_slow, page..page + 1, self.place.place(page) == Place::Slow);
        }
        self.memory.observe(0, &harvest, elapsed);
        self.memory.end_round(elapsed.map(Span::from));
    }

    /// Xorshift: the same numbers in every run.
    fn chance(&mut self, one_in: u64) -> bool {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random % one_in == 0
    }

    /// A round in which the pages of `hot` are accessed, and one in a hundred of
    /// the others; returns the pages moved.
    fn round(&mut self, hot: impl Fn(usize) -> bool) -> u64 {
        let mut accessed = vec![0; PAGES / 64];
        for page in 0..PAGES {
            let unit = if self.level == Level::Huge2M {
                page / 512 * 512..page / 512 * 512 + 512
            } else {
                page..page + 1
            };
            // Noise would make every huge page young in every round.
            let noise = self.level == Level::Page4K && self.chance(100);
            if hot(page) || noise {
                bitmap::fill(&mut accessed, unit, true);
            }
        }
        self.harvest(&accessed, Some(ROUND));
        let target = Some(Bytes::of_pages(self.target_pages));
        let plan = self.memory.plan(target, Share::from_percent(10), self.quota_pages);
        self.memory.accept(&plan, self.quota_pages);
        for (units, place) in [(&plan.demote, Place::Slow), (&plan.promote, Place::Fast)] {
            for unit in units {
                let first = unit.gfn as usize;
                self.place.record(first..first + unit.pages as usize, place);
            }
            let units = units.iter().map(|unit| (*unit, Ok(()))).collect();
            self.memory.record_moves(&MoveOutcome { units, ..MoveOutcome::default() }, place, Duration::ZERO);
        }
        plan.demote.iter().chain(&plan.promote).map(|unit| u64::from(unit.pages)).sum()
    }

    /// Share of the accesses to `hot` that DRAM serves.
    fn hit_ratio(&self, hot: impl Fn(usize) -> bool) -> f64 {
        let hot: Vec<usize> = (0..PAGES).filter(|page| hot(*page)).collect();
        let hits = hot.iter().filter(|page| self.place.place(**page) == Place::Fast).count();
        hits as f64 / hot.len() as f64
    }
}

#[test]
fn a_scattered_hot_set_stays_in_dram_and_the_moving_ends() {
    let hot = |page: usize| page % 5 == 3;
    let mut guest = Guest::new(Level::Page4K, PAGES as u64 * 3 / 10, 30);
    let moved: u64 = (0..60).map(|_| guest.round(hot)).sum();
    assert!(guest.hit_ratio(hot) >= 0.98, "{}", guest.hit_ratio(hot));
    assert_eq!(guest.place.counts().fast, guest.target_pages);
    // The oracle moves what is above the target, once.
    let oracle = PAGES as u64 - guest.target_pages;
    assert!(moved * 2 <= oracle * 3, "{moved} pages moved, the oracle moves {oracle}");
    let steady: u64 = (0..60).map(|_| guest.round(hot)).sum();
    assert!(steady * 1000 <= PAGES as u64, "{steady} pages moved in a steady minute");
}

#[test]
fn a_hot_set_that_moves_is_followed() {
    let (before, after) = (|page: usize| page < PAGES / 4, |page: usize| page >= PAGES - PAGES / 4);
    let mut guest = Guest::new(Level::Page4K, PAGES as u64 * 3 / 10, 10);
    for _ in 0..30 {
        guest.round(before);
    }
    assert!(guest.hit_ratio(before) >= 0.98 && guest.hit_ratio(after) < 0.2);
    guest.quota_pages = PAGES as u64;
    for _ in 0..5 {
        guest.round(after);
    }
    assert!(guest.hit_ratio(after) >= 0.95, "{}", guest.hit_ratio(after));
}

#[test]
fn a_small_hot_block_among_huge_pages_stays() {
    // Two huge pages of 32, one of them hot by a single page.
    let hot = |page: usize| page == 700 || (8192..8704).contains(&page);
    let mut guest = Guest::new(Level::Huge2M, 4 * 512, 10);
    for _ in 0..30 {
        guest.round(hot);
    }
    assert_eq!(guest.hit_ratio(hot), 1.0);
    assert_eq!(guest.place.counts().fast, 4 * 512);
}

#[test]
fn a_hot_block_of_a_thousandth_comes_back_within_seconds() {
    let hot = |page: usize| (5000..5016).contains(&page);
    let mut guest = Guest::new(Level::Page4K, PAGES as u64 / 10, 10);
    guest.place.record(0..PAGES, Place::Slow);
    guest.harvest(&[], None);
    // Nobody uses DRAM: what is not cold comes at once.
    for _ in 0..2 {
        guest.round(hot);
    }
    assert_eq!(guest.hit_ratio(hot), 1.0);
}

/// What is hot lies in DRAM, and is known.
fn settled_guest(level: Level, hot: impl Fn(usize) -> bool) -> Guest {
    let mut guest = Guest::new(level, PAGES as u64 * 3 / 10, 30);
    (0..60).for_each(|_| _ = guest.round(&hot));
    assert_eq!(guest.hit_ratio(&hot), 1.0);
    guest
}

fn hot_fifth(page: usize) -> bool {
    page < PAGES / 5
}

#[test]
fn a_block_that_turns_hot_late_comes_after_two_rounds() {
    let mut guest = settled_guest(Level::Page4K, hot_fifth);
    let block = |page: usize| (15_001..15_017).contains(&page);
    assert!(guest.hit_ratio(block) < 0.5);
    guest.round(|page| hot_fifth(page) || block(page));
    assert!(guest.hit_ratio(block) < 0.5, "one round proves nothing");
    let moved = guest.round(|page| hot_fifth(page) || block(page));
    assert_eq!(guest.hit_ratio(block), 1.0);
    assert!(moved <= 2 * (16 + 6) + 2, "{moved} pages moved for 16");
    // Nor does it leave again, also when it is known by its temperature alone.
    for _ in 0..30 {
        guest.round(|page| hot_fifth(page) || block(page));
        assert_eq!(guest.hit_ratio(block), 1.0);
    }
}

/// Over all of memory once; where it stands at the end of a round, pages count for two.
#[test]
fn a_scan_brings_nothing_to_dram() {
    let pages = [(512, 0), (1024, 8), (4096, 11)];
    for (length, overlap) in pages {
        let mut guest = settled_guest(Level::Page4K, hot_fifth);
        let moved: u64 = (0..PAGES / length)
            .map(|round| {
                let scanned = (round * length).saturating_sub(overlap)..(round + 1) * length;
                guest.round(|page| hot_fifth(page) || scanned.contains(&page))
            })
            .sum();
        assert!(moved * 1000 <= PAGES as u64, "{moved} pages moved for a scan of {length} pages a round");
    }
}

/// Buffers that are used for two rounds each, one after the other without end, look like
/// blocks that turn hot: how much moves for them is bounded.
#[test]
fn short_bursts_without_end_move_little() {
    let mut guest = settled_guest(Level::Page4K, hot_fifth);
    let mut rounds = |count: usize| -> u64 {
        let burst = |round: usize| {
            let start = 4096 + round / 2 % 90 * 128;
            guest.round(|page| hot_fifth(page) || (start..start + 64).contains(&page))
        };
        (0..count).map(burst).sum()
    };
    let first = rounds(240);
    let later = rounds(120);
    // 512 pages at first, as of any small guest; then a 2000th of memory in a minute,
    // with as many that go, beside what moves for little gain.
    assert!(first >= 100 && first <= 2 * 512 + PAGES as u64 / 50, "{first}");
    assert!(later * 250 <= PAGES as u64, "{later} pages moved in two minutes");
}

#[test]
fn a_huge_page_that_is_used_for_two_rounds_is_one_sign() {
    let hot = |page: usize| page < 4 * 512;
    let mut guest = settled_guest(Level::Huge2M, hot);
    let other = |page: usize| (20 * 512..21 * 512).contains(&page);
    for _ in 0..2 {
        assert_eq!(guest.round(|page| hot(page) || other(page)), 0);
    }
}
