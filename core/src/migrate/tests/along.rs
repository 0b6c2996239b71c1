// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pages that move along with others: mover, books and plans together.

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::bitmap;
use crate::heat::HeatParams;
use crate::memory::GuestMemory;
use crate::plan::{PlaceCounts, Plan};
use crate::policy::Excluded;
use crate::sampler::{Harvest, Level, MemSlot};
use crate::units::{Bytes, PAGES_PER_2M, Share};
use crate::wire::Place;

const ROUND: Duration = Duration::from_secs(1);
const REGION: u64 = PAGES_PER_2M;

fn slot(gfn_start: u64, page_count: u64, first: u64) -> MemSlot {
    MemSlot { gfn_start, page_count, hva: page(first), id: 0, read_only: false, dirty_log: false }
}

/// A guest of one slot, all of which its tables map by 4 KiB.
struct Guest {
    mover: KernelMover,
    fake: Fake,
    memory: GuestMemory,
    slot: MemSlot,
    target_pages: u64,
    now: Duration,
}

impl Guest {
    fn new(kernel: FakeKernel, slot: MemSlot, target_pages: u64) -> Self {
        let (mover, fake) = mover(kernel);
        let mut memory = GuestMemory::new(HeatParams { half_life: ROUND * 10, delay: ROUND * 2 });
        memory.adopt(1, vec![slot]);
        let mut guest = Self { mover, fake, memory, slot, target_pages, now: Duration::ZERO };
        guest.observe(&|_| false, None);
        guest
    }

    /// A harvest after a time in which these pages were accessed, by their index.
    fn observe(&mut self, is_hot: &dyn Fn(u64) -> bool, elapsed: Option<Duration>) {
        let mut seen = Harvest::default();
        seen.reset(self.slot.gfn_start, self.slot.page_count);
        let end = self.slot.hva + self.slot.page_count * PAGE_BYTES;
        for (address, node) in self.fake.kernel().pages.range(self.slot.hva..end) {
            let index = (address - self.slot.hva) / PAGE_BYTES;
            let bit = index as usize..index as usize + 1;
            bitmap::fill(&mut seen.mapped, bit.clone(), true);
            bitmap::fill(&mut seen.on_slow, bit.clone(), *node == SLOW);
            bitmap::fill(&mut seen.accessed, bit, is_hot(index));
        }
        seen.levels.fill(Level::Page4K);
        self.memory.observe(0, &seen, elapsed);
        self.memory.end_round(elapsed.map(Into::into));
    }

    fn plan(&self) -> Plan {
        self.memory.plan(Some(Bytes::of_pages(self.target_pages)), Share::from_percent(10), 4096)
    }

    fn carry_out(&mut self, units: &[MoveUnit], target: Place) -> u64 {
        let nodes = NodeSet::from_iter([if target == Place::Slow { SLOW } else { 0 }]);
        let (mut rest, mut moved) = (units, 0);
        while !rest.is_empty() {
            let outcome = self.mover.apply(rest, &nodes, &AtomicBool::new(false)).unwrap();
            self.memory.record_moves(&outcome, target, self.now);
            moved += outcome.moved_bytes() / PAGE_BYTES;
            rest = &rest[rest.len() - outcome.left..];
        }
        moved
    }

    /// A round; the pages that moved in it. The books are as the kernel's.
    fn round(&mut self, is_hot: &dyn Fn(u64) -> bool) -> u64 {
        self.now += ROUND;
        self.observe(is_hot, Some(ROUND));
        self.memory.release_held(self.now);
        let plan = self.plan();
        self.memory.accept(&plan, 4096);
        let before = self.fake.kernel().moved;
        let moved = self.carry_out(&plan.demote, Place::Slow) + self.carry_out(&plan.promote, Place::Fast);
        assert_eq!(moved, self.fake.kernel().moved - before);
        let on = |node| self.fake.kernel().pages.values().filter(|place| **place == node).count() as u64;
        let (fast, slow) = (on(0), on(SLOW));
        assert_eq!(
            self.memory.places(),
            PlaceCounts { fast, slow, absent: self.slot.page_count - fast - slow }
        );
        moved
    }

    fn node(&self, index: u64) -> u32 {
        self.fake.kernel().pages[&(self.slot.hva + index * PAGE_BYTES)]
    }
}

#[test]
fn what_moves_along_is_told_booked_and_moves_whole_from_then_on() {
    let mut guest = Guest::new(huge_kernel(2), slot(0, 1024, 0), 512);
    let outcome = apply(&mut guest.mover, &[small(7)]);
    assert_eq!((outcome.units.as_slice(), outcome.along.len()), ([(small(7), Ok(()))].as_slice(), 511));
    assert_eq!((outcome.moved_bytes(), outcome.tried_bytes()), (LARGEST_PAGE, LARGEST_PAGE));
    assert_eq!((outcome.joined.as_slice(), outcome.apart.len()), ([page(0)].as_slice(), 0));
    guest.memory.record_moves(&outcome, Place::Slow, ROUND);
    assert_eq!(guest.memory.places(), PlaceCounts { fast: 512, slow: 512, absent: 0 });
    for _ in 0..8 {
        guest.observe(&|index| index == 100, Some(ROUND));
    }
    let plan = guest.plan();
    assert_eq!(plan.promote, [huge(0)], "by its hottest page, and whole");
}

/// 500 cold pages and 12 hot ones in each of two pages of the host, among idle ones.
#[test]
fn a_cold_page_and_a_hot_one_in_one_page_of_the_host_do_not_go_to_and_fro() {
    for hot in [[0, 1], [0, 7], [3, 4], [6, 7]] {
        for target in [2 * REGION, 2 * REGION + 100, 3 * REGION, 5 * REGION - 1] {
            let is_hot = |index: u64| {
                hot.contains(&(index / REGION)) && index % REGION < 500 && index % REGION % 42 == 7
            };
            assert_eq!((0..8 * REGION).filter(|index| is_hot(*index)).count(), 24);
            let mut guest = Guest::new(huge_kernel(8), slot(0, 8 * REGION, 0), target);
            let early: u64 = (0..30).map(|_| guest.round(&is_hot)).sum();
            let late: u64 = (0..60).map(|_| guest.round(&is_hot)).sum();
            assert_eq!(late, 0, "{hot:?} hot, {target} pages of DRAM");
            assert!((0..8 * REGION).all(|index| !is_hot(index) || guest.node(index) == 0));
            assert!(guest.memory.places().fast <= target);
            // What has to go, and both that go once and come back.
            let most = (8 * REGION - target).next_multiple_of(REGION) + 4 * REGION;
            assert!(early <= most, "{early} pages moved, {hot:?} hot, {target} pages of DRAM");
        }
    }
}

/// Page by page all that is hot would fit.
#[test]
fn pages_of_the_host_that_do_not_all_fit_do_not_take_turns() {
    let is_hot = |index: u64| index < 4 * REGION && index % REGION % 42 == 7;
    let mut guest = Guest::new(huge_kernel(8), slot(0, 8 * REGION, 0), 2 * REGION + 200);
    (0..30).for_each(|_| _ = guest.round(&is_hot));
    assert_eq!((0..60).map(|_| guest.round(&is_hot)).sum::<u64>(), 0);
    let served = (0..8 * REGION).filter(|index| is_hot(*index) && guest.node(*index) == 0).count();
    assert_eq!((served, guest.memory.places().fast), (2 * 13, 2 * REGION));
}

#[test]
fn a_region_that_moves_whole_stays_for_any_page_that_must() {
    let mut guest = Guest::new(huge_kernel(2), slot(0, 1024, 0), 0);
    guest.carry_out(&[small(7)], Place::Slow);
    guest.carry_out(&[small(7)], Place::Fast);
    for _ in 0..8 {
        guest.observe(&|_| false, Some(ROUND));
    }
    assert!(guest.plan().demote.contains(&huge(0)));
    let busy = MoveOutcome { units: vec![(small(300), Err(Refused::Busy))], ..MoveOutcome::default() };
    guest.memory.record_moves(&busy, Place::Slow, guest.now);
    assert!(guest.plan().demote.iter().all(|unit| unit.gfn >= 512));
    guest.memory.release_held(ROUND * 1000);
    assert!(guest.plan().demote.contains(&huge(0)));
    guest.memory.exclude(&Excluded { frames: std::iter::once(3..4).collect(), ..Excluded::default() });
    assert!(guest.plan().demote.iter().all(|unit| unit.gfn >= 512));
}

/// A balloon took some of its pages: no unit can be all of it, and it moves whole anyway.
#[test]
fn a_region_with_holes_is_judged_by_its_hottest_page() {
    let mut kernel = huge_kernel(4);
    (0..REGION).step_by(3).for_each(|index| _ = kernel.pages.remove(&page(index)));
    let mut guest = Guest::new(kernel, slot(0, 4 * REGION, 0), 2 * REGION);
    let is_hot = |index: u64| index == 100;
    (0..20).for_each(|_| _ = guest.round(&is_hot));
    assert_eq!((0..60).map(|_| guest.round(&is_hot)).sum::<u64>(), 0);
    assert_eq!(guest.node(100), 0);
}

#[test]
fn a_region_that_was_split_moves_in_parts_again() {
    let mut guest = Guest::new(huge_kernel(2), slot(0, 1024, 0), 512);
    guest.carry_out(&[small(7)], Place::Slow);
    guest.fake.kernel().huge.clear();
    let promoted = guest.mover.apply(&[huge(0)], &NodeSet::from_iter([0]), &AtomicBool::new(false)).unwrap();
    assert_eq!((promoted.apart.as_slice(), promoted.along.len()), ([page(0)].as_slice(), 0));
    assert_eq!(promoted.moved_bytes(), LARGEST_PAGE);
    guest.memory.record_moves(&promoted, Place::Fast, ROUND);
    for _ in 0..8 {
        guest.observe(&|index| index == 100, Some(ROUND));
    }
    let plan = guest.plan();
    assert!(plan.demote.len() == 512 && plan.demote.iter().all(|unit| unit.pages == 1 && unit.gfn != 100));
}

/// Where the VMM's addresses and the guest's are not aligned alike, KVM maps nothing huge,
/// and the host has huge pages all the same.
#[test]
fn regions_are_those_of_the_vmm() {
    let kernel = || {
        let huge = (1..4).map(|index| page(index * REGION)).collect();
        FakeKernel { huge, ..FakeKernel::with_pages((100..4 * REGION + 50).map(page)) }
    };
    let mut guest = Guest::new(kernel(), slot(0, 4 * REGION - 50, 100), 2 * REGION);
    let is_hot = |index: u64| index == REGION;
    (0..20).for_each(|_| _ = guest.round(&is_hot));
    assert_eq!((0..60).map(|_| guest.round(&is_hot)).sum::<u64>(), 0);
    assert_eq!(guest.node(REGION), 0);
    for _ in 0..8 {
        guest.observe(&|_| false, Some(ROUND));
    }
    guest.target_pages = 0;
    let of_host = MoveUnit { gfn: REGION - 100, hva: page(REGION), pages: 512 };
    assert!(guest.plan().demote.contains(&of_host));

    // Half of a page of the host belongs to others, and stays with it.
    let mut guest = Guest::new(kernel(), slot(0, REGION, REGION + 256), 0);
    let at = |index: u64| MoveUnit { gfn: index, hva: page(REGION + 256 + index), pages: 1 };
    guest.carry_out(&[at(3)], Place::Slow);
    guest.carry_out(&[at(3)], Place::Fast);
    for _ in 0..8 {
        guest.observe(&|_| false, Some(ROUND));
    }
    let demote = guest.plan().demote;
    assert!(demote.len() == 256 && demote.iter().all(|unit| unit.gfn >= 256), "{}", demote.len());
}

#[test]
fn one_call_moves_no_more_than_it_may_whatever_comes_along() {
    let units: Vec<_> = (0..40).map(|region| small(region * REGION + 5)).collect();
    let (mut mover, fake) = mover(huge_kernel(40));
    let (mut rest, mut calls) = (units.as_slice(), 0);
    while !rest.is_empty() {
        let outcome = apply(&mut mover, rest);
        assert_eq!(outcome.moved_bytes(), BATCH_BYTES, "who asked is told before more moves");
        rest = &rest[rest.len() - outcome.left..];
        calls += 1;
    }
    assert_eq!((calls, fake.kernel().calls), (5, 5));
    assert_eq!(fake.kernel().largest_call * PAGE_BYTES, BATCH_BYTES);
}

#[test]
fn small_pages_move_in_few_calls_once_they_are_known() {
    let pages = (0..512 * REGION).filter(|index| index % REGION < 64);
    let (mut mover, fake) = mover(FakeKernel::with_pages(pages.map(page)));
    let units = |at: u64| (0..512).map(|region| small(region * REGION + at)).collect::<Vec<_>>();
    let outcome = apply(&mut mover, &units(3));
    assert_eq!((outcome.moved_bytes(), outcome.left), (512 * PAGE_BYTES, 0));
    assert_eq!((outcome.apart.len(), fake.kernel().calls), (512, 64));
    let outcome = apply(&mut mover, &units(33));
    assert_eq!((outcome.moved_bytes(), outcome.apart.len()), (512 * PAGE_BYTES, 0));
    assert_eq!(fake.kernel().calls, 65);
    // One is collapsed, which two neighbours tell.
    fake.kernel().pages.extend((0..REGION).map(|index| (page(index), 0)));
    fake.kernel().huge = [page(0)].into();
    let outcome = apply(&mut mover, &[small(3 * REGION + 9), small(7)]);
    assert_eq!((outcome.joined.as_slice(), outcome.along.len()), ([page(0)].as_slice(), 511));
    assert_eq!(outcome.moved_bytes(), LARGEST_PAGE + PAGE_BYTES);
}

#[test]
fn pages_of_64_kib_are_counted_and_are_no_region() {
    let mut kernel = FakeKernel::with_pages((0..REGION).map(page));
    kernel.medium = (0..REGION).step_by(16).map(page).collect();
    let (mut mover, _) = mover(kernel);
    let outcome = apply(&mut mover, &[small(18), small(40), small(41)]);
    assert_eq!((outcome.moved_bytes(), outcome.along.len()), (32 * PAGE_BYTES, 29));
    assert_eq!((outcome.joined.len(), outcome.apart.len()), (0, 0));
}

#[test]
fn nothing_is_told_of_what_the_kernel_does_not_tell() {
    // Before the move, and after it for the units alone.
    let (mut mover, _) = mover(FakeKernel { places_left: Some(2), ..huge_kernel(1) });
    let outcome = apply(&mut mover, &[small(7)]);
    assert_eq!(outcome, MoveOutcome { units: vec![(small(7), Ok(()))], ..MoveOutcome::default() });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn every_page_that_moves_is_told_once(
        huge in proptest::collection::vec(any::<bool>(), 6),
        moves in proptest::collection::vec(
            (proptest::collection::btree_set(0..6 * REGION, 1..200), any::<bool>()), 1..6),
    ) {
        let mut kernel = FakeKernel::with_pages((0..6 * REGION).map(page));
        kernel.huge = (0..6).filter(|index| huge[*index as usize]).map(|index| page(index * REGION)).collect();
        let is_huge = |address: &u64| huge[((address - page(0)) / LARGEST_PAGE) as usize];
        let (mut mover, fake) = mover(kernel);
        for (gfns, to_slow) in moves {
            let node = if to_slow { SLOW } else { 0 };
            let before = fake.kernel().pages.clone();
            let units: Vec<_> = gfns.into_iter().map(small).collect();
            let target = NodeSet::from_iter([node]);
            let outcome = mover.apply(&units, &target, &AtomicBool::new(false)).unwrap();
            let after = fake.kernel().pages.clone();
            let changed: Vec<u64> =
                after.iter().filter(|(at, node)| before[at] != **node).map(|(at, _)| *at).collect();
            let moved = outcome.units.iter().filter(|(_, result)| result.is_ok()).map(|(unit, _)| unit.hva);
            let mut told: Vec<u64> = moved.chain(outcome.along.iter().copied()).collect();
            told.sort_unstable();
            prop_assert_eq!(told, changed);
            prop_assert_eq!(outcome.units.len() + outcome.left, units.len());
            prop_assert!(outcome.joined.iter().all(is_huge) && !outcome.apart.iter().any(is_huge));
            prop_assert!(fake.kernel().largest_call * PAGE_BYTES <= BATCH_BYTES);
        }
    }
}
