// SPDX-License-Identifier: MIT OR Apache-2.0

use std::collections::BTreeMap;

use ept_virt_core::bitmap;
use ept_virt_core::policy::{Dram, HostLimits, Migration};
use ept_virt_core::sampler::{EntryFormat, Level, MemSlot, ModuleInfo};
use ept_virt_core::topology::{NodeMemory, NodeSet};
use ept_virt_core::units::{BytesPerSecond, Share};

use super::super::budget::Budget;
use super::*;

const FAST: u32 = 0;
const SLOW: u32 = 1;
const HVA: u64 = 0x7f00_0000_0000;
const ROUND: Duration = Duration::from_millis(500);

#[derive(Clone, Copy, Debug, Default)]
struct Page {
    /// Where it is resident.
    node: Option<u32>,
    mapped: bool,
    accessed: bool,
}

/// A guest, its VMM and the kernel, as far as rounds see them.
#[derive(Default)]
struct World {
    slots: Vec<MemSlot>,
    generation: u64,
    pages: BTreeMap<u64, Page>,
    requests: Vec<HarvestRequest>,
    room: BTreeMap<u32, u64>,
    refuse: Option<Refused>,
    /// The kernel does not tell where pages lie.
    mute: bool,
    /// Pages of hugetlbfs, of which none is free.
    hugetlb: Range<u64>,
    /// Pages that the host keeps in one.
    joined: Range<u64>,
    vm_gone: bool,
    /// Accesses are seen by KVM's word alone: nothing is seen as mapped.
    shadowed: bool,
}

impl World {
    fn touch(&mut self, gfns: impl IntoIterator<Item = u64>) {
        for gfn in gfns {
            let page = self.pages.entry(gfn).or_default();
            *page = Page { node: page.node.or(Some(FAST)), mapped: !self.shadowed, accessed: true };
        }
    }

    fn on(&self, node: u32) -> Vec<u64> {
        self.pages.iter().filter(|(_, page)| page.node == Some(node)).map(|(gfn, _)| *gfn).collect()
    }
}

type Shared = Arc<Mutex<World>>;

struct FakeSampler(Shared);

impl Sampler for FakeSampler {
    fn info(&self) -> ModuleInfo {
        ModuleInfo {
            abi: (1, 0),
            format: EntryFormat::Npt,
            clear_dirty: true,
            keep_young: true,
            patched_kvm: false,
        }
    }

    fn memslots(&mut self) -> Result<(u64, Vec<MemSlot>), SamplerError> {
        let world = lock(&self.0);
        if world.vm_gone { Err(SamplerError::VmGone) } else { Ok((world.generation, world.slots.clone())) }
    }

    fn harvest(
        &mut self,
        request: &HarvestRequest,
        slow_nodes: &NodeSet,
        out: &mut Harvest,
    ) -> Result<(), SamplerError> {
        let mut world = lock(&self.0);
        world.requests.push(*request);
        let range = request.gfn_start..request.gfn_start + request.gfn_count;
        out.reset(request.gfn_start, request.gfn_count);
        for (gfn, page) in world.pages.range_mut(range).filter(|(_, page)| page.mapped || page.accessed) {
            let index = (gfn - request.gfn_start) as usize;
            let set = |words: &mut Vec<u64>| bitmap::fill(words, index..index + 1, true);
            if page.accessed {
                set(&mut out.accessed);
                out.stats.accessed += 1;
            }
            page.accessed &= !request.clear_accessed;
            if !page.mapped {
                continue;
            }
            set(&mut out.mapped);
            if page.node.is_some_and(|node| slow_nodes.contains(node)) {
                set(&mut out.on_slow);
            }
            out.stats.mapped_4k += 1;
        }
        out.levels.fill(Level::Page4K);
        out.stats.flushes = u32::from(request.flush);
        Ok(())
    }
}

struct FakeMover(Shared);

impl Mover for FakeMover {
    fn places(&mut self, addresses: &[u64], nodes: &mut Vec<Option<u32>>) -> Result<(), ProcessGone> {
        let world = lock(&self.0);
        let node = |hva: &u64| world.pages.get(&((hva - HVA) / PAGE_BYTES)).and_then(|page| page.node);
        nodes.clear();
        nodes.extend(addresses.iter().map(node).filter(|_| !world.mute));
        if world.vm_gone { Err(ProcessGone) } else { Ok(()) }
    }

    fn room(&self, target: &NodeSet) -> u64 {
        let world = lock(&self.0);
        target.iter().map(|node| world.room.get(&node).copied().unwrap_or(1 << 40)).sum()
    }

    fn apply(
        &mut self,
        units: &[MoveUnit],
        target: &NodeSet,
        _stop: &AtomicBool,
    ) -> Result<MoveOutcome, ProcessGone> {
        let mut world = lock(&self.0);
        let refuse = world.refuse;
        let node = target.iter().next();
        let mut outcome = MoveOutcome::default();
        for unit in units {
            assert_eq!(unit.hva, HVA + unit.gfn * PAGE_BYTES);
            let full = world.hugetlb.contains(&unit.gfn).then_some(Refused::HugetlbFull);
            let refuse = refuse.or(full);
            if refuse.is_none() {
                // A page that moves is unmapped until the guest touches it.
                world.pages.insert(unit.gfn, Page { node, mapped: false, accessed: false });
            }
            outcome.units.push((*unit, refuse.map_or(Ok(()), Err)));
            if world.joined.contains(&unit.gfn) {
                let others = std::mem::take(&mut world.joined).filter(|gfn| *gfn != unit.gfn);
                for gfn in others {
                    world.pages.insert(gfn, Page { node, mapped: false, accessed: false });
                    outcome.along.push(HVA + gfn * PAGE_BYTES);
                }
                break;
            }
        }
        outcome.left = units.len() - outcome.units.len();
        Ok(outcome)
    }
}

/// A guest with a clock that the test moves.
struct Test {
    world: Shared,
    guest: Guest,
    moves: Moves,
    now: Duration,
}

fn slot(gfn_start: u64, page_count: u64) -> MemSlot {
    let hva = HVA + gfn_start * PAGE_BYTES;
    MemSlot { gfn_start, page_count, hva, id: 0, read_only: false, dirty_log: false }
}

/// Half of the guest's memory may be on the fast tier.
fn orders(mode: Mode) -> Orders {
    let policy = Policy {
        mode,
        half_life: Duration::from_secs(1),
        dram: Dram { share: Share::from_percent(50), ..Policy::default().dram },
        migration: Migration {
            delay: Duration::from_secs(2),
            bandwidth: BytesPerSecond(1 << 30),
            ..Policy::default().migration
        },
        ..Policy::default()
    };
    let tiers =
        Tiers { fast: NodeSet::from_iter([FAST]), slow: NodeSet::from_iter([SLOW]), from: "test".into() };
    Orders::new(policy, tiers)
}

impl Test {
    fn new(orders: Orders, slots: Vec<MemSlot>) -> Self {
        let world = Arc::new(Mutex::new(World { slots, generation: 1, ..World::default() }));
        let (sampler, mover) = (FakeSampler(Arc::clone(&world)), FakeMover(Arc::clone(&world)));
        let memory = Arc::new(Mutex::new(GuestMemory::new(orders.policy.heat_params())));
        let now = Duration::from_secs(100);
        let guest = Guest::new(Box::new(sampler), Box::new(mover), memory, orders, now);
        Self { guest, moves: Moves::default(), world, now }
    }

    fn world(&self) -> std::sync::MutexGuard<'_, World> {
        lock(&self.world)
    }

    /// A whole round, with what may move until the next one begins.
    fn round(&mut self) -> RoundStatus {
        let status = self.guest.round(self.now).unwrap();
        self.guest.verify_places().unwrap();
        self.guest.survey(Instant::now() + Duration::from_secs(60)).unwrap();
        self.guest.claim(self.now);
        let moves = std::mem::take(&mut self.moves);
        self.moves = self.guest.plan_if_due(moves, self.now, ROUND);
        let stop = AtomicBool::new(false);
        let mut at = self.now;
        self.now += ROUND;
        while at < self.now {
            match self.guest.move_some(&mut self.moves, at, &stop).unwrap() {
                Pace::Done => break,
                Pace::More => {}
                Pace::Wait(time) => at += time,
            }
        }
        status
    }

    /// Rounds in which the guest keeps touching the same pages.
    fn rounds(&mut self, count: usize, hot: std::ops::Range<u64>) -> RoundStatus {
        let mut status = RoundStatus::default();
        for _ in 0..count {
            self.world().touch(hot.clone());
            status = self.round();
        }
        status
    }
}

#[test]
fn counts_what_a_harvest_finds() {
    let mut test = Test::new(orders(Mode::Observe), vec![slot(0, 16), slot(512, 100)]);
    test.world().touch(512..532);
    let first = test.round();
    assert_eq!((first.number, first.interval_ms), (1, 0));
    assert_eq!(first.accessed_bytes, 20 * PAGE_BYTES);
    assert_eq!(first.hot_bytes, 0, "when the pages were accessed is not known yet");
    test.world().touch(512..522);
    let second = test.round();
    assert_eq!((second.number, second.interval_ms), (2, 500));
    assert_eq!((second.mapped_bytes, second.accessed_bytes), (20 * PAGE_BYTES, 10 * PAGE_BYTES));
    let later = test.rounds(6, 512..522);
    assert_eq!(later.hot_bytes, 10 * PAGE_BYTES);
    assert_eq!(later.hot_bytes + later.warm_bytes + later.cold_bytes, 116 * PAGE_BYTES);
    assert_eq!(later.fast_bytes, 20 * PAGE_BYTES);
    assert_eq!(later.absent_bytes, 96 * PAGE_BYTES);
    assert_eq!(later.dram_target_bytes, Some(58 * PAGE_BYTES));
}

#[test]
fn rounds_are_given_to_who_records_them() {
    let cell = super::super::state::Cell::new("vm1", "6695eb01");
    cell.update(|status| status.state = ept_virt_core::wire::DomainState::Observing);
    let rounds = cell.record().unwrap();
    let mut test = Test::new(orders(Mode::Observe), vec![slot(0, 16), slot(512, 100)]);
    test.round();
    test.guest.record(cell.take_tap().unwrap());
    test.world().touch(512..522);
    test.round();
    let frame = rounds.next_round().unwrap();
    let pages: Vec<u64> = frame.slots.iter().map(|slot| bitmap::count(&slot.accessed)).collect();
    assert_eq!((pages, frame.time), (vec![0, 10], ROUND));
    assert_eq!(frame.slots[1].levels, [Level::Page4K]);
    drop(rounds);
    // Nobody listens any more.
    test.rounds(2, 512..522);
    assert!(cell.record().is_ok());
}

#[test]
fn one_flush_a_round_and_only_if_wanted() {
    let slots = vec![slot(0, 16), slot(512, 100), slot(1024, 8)];
    let mut test = Test::new(orders(Mode::Observe), slots.clone());
    assert_eq!(test.round().flushes, 1);
    let flushed: Vec<u64> = test
        .world()
        .requests
        .iter()
        .filter(|request| request.flush)
        .map(|request| request.gfn_count)
        .collect();
    assert_eq!(flushed, [8], "the last slot");
    assert!(test.world().requests.iter().all(|request| request.clear_accessed && !request.clear_dirty));
    let mut gentle = orders(Mode::Observe);
    gentle.policy.sampling.flush = false;
    assert_eq!(Test::new(gentle, slots).round().flushes, 0);
}

#[test]
fn nothing_moves_without_an_order() {
    for orders in [orders(Mode::Observe), Orders { obstacle: Some("one tier".into()), ..orders(Mode::Place) }]
    {
        let mut test = Test::new(orders, vec![slot(0, 100)]);
        test.world().touch(0..100);
        test.rounds(10, 0..20);
        assert!(test.world().on(SLOW).is_empty());
        let totals = MoveTotals { places_verified: 0, ..test.guest.totals() };
        assert_eq!(totals, MoveTotals::default());
        assert_eq!(test.guest.hindrance(test.now), test.guest.orders().obstacle);
    }
}

#[test]
fn nothing_is_called_idle_that_was_not_observed_for_long_enough() {
    let mut test = Test::new(orders(Mode::Place), vec![slot(0, 100)]);
    test.world().touch(0..100);
    test.rounds(4, 0..0);
    assert!(test.world().on(SLOW).is_empty(), "observed for 1.5 s, and the delay is 2 s");
    test.rounds(4, 0..0);
    assert_eq!(test.world().on(SLOW).len(), 50);
    // The same holds for memory that is plugged in.
    test.world().slots.push(slot(512, 100));
    test.world().generation = 2;
    test.world().touch(512..612);
    test.rounds(4, 0..0);
    assert!(test.world().on(SLOW).iter().all(|gfn| *gfn < 100));
    test.rounds(4, 0..0);
    assert_eq!(test.world().on(SLOW).len(), 100);
}

#[test]
fn where_memory_lies_is_told_as_it_is_after_the_moves() {
    let mut test = Test::new(orders(Mode::Place), vec![slot(0, 100)]);
    test.world().touch(0..100);
    let mut status = test.round();
    for _ in 0..20 {
        if !test.world().on(SLOW).is_empty() {
            break;
        }
        status = test.rounds(1, 0..0);
    }
    let slow_bytes = test.world().on(SLOW).len() as u64 * PAGE_BYTES;
    assert_eq!((status.slow_bytes, slow_bytes), (0, 50 * PAGE_BYTES), "they moved after the round");
    let by_now = test.guest.with_places(status.clone());
    assert_eq!((by_now.fast_bytes, by_now.slow_bytes), (50 * PAGE_BYTES, slow_bytes));
    assert_eq!((by_now.number, by_now.mapped_bytes), (status.number, status.mapped_bytes));
}

#[test]
fn idle_pages_leave_the_fast_tier_and_hot_ones_stay() {
    let mut test = Test::new(orders(Mode::Place), vec![slot(0, 100)]);
    test.world().touch(0..100);
    let status = test.rounds(12, 0..20);
    let slow = test.world().on(SLOW);
    assert_eq!(slow.len(), 50, "down to the target and no further");
    assert!(slow.iter().all(|gfn| *gfn >= 20), "{slow:?}");
    // What moved is unmapped, and its place is known all the same.
    assert_eq!((status.fast_bytes, status.slow_bytes), (50 * PAGE_BYTES, 50 * PAGE_BYTES));
    assert_eq!(status.mapped_bytes, 50 * PAGE_BYTES);
    let totals = test.guest.totals();
    assert_eq!((totals.demote_tried_bytes, totals.demoted_bytes), (50 * PAGE_BYTES, 50 * PAGE_BYTES));
    assert_eq!((totals.promoted_bytes, totals.refused.len()), (0, 0));
}

#[test]
fn excluded_memory_stays_and_what_names_nothing_is_told() {
    let mut orders = orders(Mode::Place);
    orders.excluded.frames = vec![1030..1040, 9000..9010];
    orders.excluded.warnings = vec!["odd".into()];
    let mut test = Test::new(orders, vec![slot(0, 2048)]);
    assert_eq!(test.guest.excluded().1, ["odd"], "nothing is known of the memory yet");
    test.world().touch(0..2048);
    test.rounds(40, 0..10);
    let slow = test.world().on(SLOW);
    assert_eq!(slow.len(), 1024, "the rest makes up for it");
    assert!(slow.iter().all(|gfn| !(1024..1536).contains(gfn)), "{slow:?}");
    let (bytes, warnings) = test.guest.excluded();
    assert_eq!(bytes, Bytes::of_pages(512));
    assert_eq!(warnings[1], "the policy excludes 0x2328000 to 0x2332000, where the guest has no memory");
    // Nor does it come back when it is hot.
    let mut orders = test.guest.orders().clone();
    orders.excluded.frames.clear();
    orders.excluded.frames.push(slow[0]..slow[0] + 1);
    test.guest.obey(orders, test.now);
    test.rounds(20, slow[0]..slow[0] + 1);
    assert_eq!(test.world().pages[&slow[0]].node, Some(SLOW));
}

#[test]
fn what_keeps_memory_in_dram_is_told_by_its_cause() {
    let mut orders = orders(Mode::Place);
    orders.excluded.frames = std::iter::once(1030..1540).collect();
    orders.policy.dram.share = Share::from_percent(1);
    let mut test = Test::new(orders.clone(), vec![slot(0, 2048)]);
    test.world().touch(0..2048);
    test.rounds(40, 0..2048);
    let reason = test.guest.hindrance(test.now).unwrap();
    assert!(reason.contains("4 MiB excluded") && reason.contains("4 MiB in use"), "{reason}");
    // Without a delay nothing is in use: what can stay is excluded.
    orders.policy.migration.delay = Duration::ZERO;
    test.guest.obey(orders, test.now);
    test.rounds(40, 0..2048);
    let reason = test.guest.hindrance(test.now).unwrap();
    assert!(reason.contains("4 MiB excluded") && !reason.contains("in use"), "{reason}");
}

#[test]
fn a_guest_that_is_slowed_down_gets_more_up_to_its_maximum() {
    let mut orders = orders(Mode::Place);
    orders.policy.dram.share = Share::from_percent(10);
    orders.policy.dram.max_slowdown = Some(Share::from_percent(5));
    orders.policy.dram.max = Some(Bytes(2 << 20));
    let (fast, slow) = (Duration::from_nanos(80), Duration::from_millis(1));
    orders.latencies = Some(Latencies { fast, slow, from: "a test" });
    let mut test = Test::new(orders, vec![slot(0, 1000)]);
    // Half of a CPU.
    let mut cpu = Duration::ZERO;
    let cpu_time = move || {
        cpu += ROUND / 2;
        Some(cpu)
    };
    test.guest.watch_by(Watch::new(Box::new(cpu_time)));
    test.world().touch(0..1000);
    // What is in use stays whatever is granted: first little is.
    test.rounds(6, 0..50);
    let told = test.guest.slowdown().unwrap();
    assert_eq!((told.estimate_percent, told.given_bytes), (None, 0), "too little is known yet");
    test.rounds(14, 0..50);
    let status = test.rounds(80, 0..300);
    assert_eq!(status.dram_target_bytes, Some(2 << 20));
    let on_fast = |test: &Test| (0..300).filter(|gfn| test.world().pages[gfn].node == Some(FAST)).count();
    assert_eq!(on_fast(&test), 300, "they fit the maximum, and not the share");
    let told = test.guest.slowdown().unwrap();
    assert_eq!((told.limit_percent, told.gap_ns, told.confidence.as_deref()), (5.0, 999_920, Some("low")));
    assert_eq!(told.given_bytes, (2 << 20) - 100 * PAGE_BYTES);
    assert!(told.estimate_percent.unwrap() < 5.0);
    // Without a limit, nothing is given.
    let mut orders = test.guest.orders().clone();
    orders.policy.dram.max_slowdown = None;
    test.guest.obey(orders, test.now);
    let status = test.rounds(1, 0..300);
    assert_eq!((status.dram_target_bytes, test.guest.slowdown()), (Some(100 * PAGE_BYTES), None));
}

#[test]
fn a_share_is_one_of_what_the_guest_has_now() {
    let mut test = Test::new(orders(Mode::Place), vec![slot(0, 1000)]);
    test.world().touch(0..1000);
    let target = |test: &mut Test, current_pages: Option<u64>| {
        let current_memory = current_pages.map(Bytes::of_pages);
        test.guest.obey(Orders { current_memory, ..test.guest.orders().clone() }, test.now);
        test.rounds(1, 0..10).dram_target_bytes.map(|bytes| bytes / PAGE_BYTES)
    };
    assert_eq!(target(&mut test, None), Some(500));
    // A balloon keeps three quarters.
    assert_eq!(target(&mut test, Some(250)), Some(125));
    // Memory that is no slot's, as that of a device model, is none of the guest's.
    assert_eq!(target(&mut test, Some(5000)), Some(500));
}

/// Nested guests, and hosts without tables to walk: a page is accessed and not
/// mapped, and the harvest never says where it lies.
#[test]
fn pages_that_are_accessed_without_being_mapped_are_placed_as_well() {
    let mut test = Test::new(orders(Mode::Place), vec![slot(0, 100)]);
    test.world().shadowed = true;
    test.world().touch(0..100);
    let status = test.rounds(12, 0..20);
    let slow = test.world().on(SLOW);
    assert_eq!(slow.len(), 50, "down to the target and no further");
    assert!(slow.iter().all(|gfn| *gfn >= 20), "{slow:?}");
    assert_eq!((status.mapped_bytes, status.accessed_bytes), (0, 20 * PAGE_BYTES));
    assert_eq!(status.hot_bytes, 20 * PAGE_BYTES);
    assert_eq!((status.fast_bytes, status.slow_bytes), (50 * PAGE_BYTES, 50 * PAGE_BYTES));
    let now_hot = slow[0]..slow[9] + 1;
    test.rounds(12, now_hot.clone());
    assert!(now_hot.clone().all(|gfn| test.world().pages[&gfn].node == Some(FAST)), "they came back");
}

#[test]
fn pages_that_become_hot_come_back_in_exchange() {
    let mut test = Test::new(orders(Mode::Place), vec![slot(0, 100)]);
    test.world().touch(0..100);
    test.rounds(12, 0..20);
    let slow = test.world().on(SLOW);
    let now_hot = slow[0]..slow[9] + 1;
    test.rounds(12, now_hot.clone());
    assert!(now_hot.clone().all(|gfn| test.world().pages[&gfn].node == Some(FAST)));
    assert_eq!(test.world().on(SLOW).len(), 50);
    assert!(test.guest.totals().promoted_bytes >= 10 * PAGE_BYTES);
}

#[test]
fn resident_pages_that_the_guest_never_mapped_are_found() {
    let mut test = Test::new(orders(Mode::Place), vec![slot(0, 2000)]);
    let page = |node| Page { node: Some(node), mapped: false, accessed: false };
    test.world().pages.extend((0..1500).map(|gfn| (gfn, page(FAST))));
    test.world().pages.extend((1500..1600).map(|gfn| (gfn, page(SLOW))));
    test.guest.round(test.now).unwrap();
    test.now += Duration::from_secs(2);
    // The time is up at once: one part of the pages is looked at.
    test.guest.survey(Instant::now()).unwrap();
    assert!(!test.guest.surveyed());
    assert!(test.guest.hindrance(test.now).unwrap().contains("place of every page"));
    assert!(test.guest.plan(test.now, ROUND).is_empty());
    let status = test.rounds(8, 0..0);
    assert!(test.guest.surveyed());
    assert_eq!(status.absent_bytes, 400 * PAGE_BYTES);
    assert_eq!(test.world().on(FAST).len(), 1000, "idle from the start, so demoted down to the target");
}

#[test]
fn a_page_that_left_behind_our_back_is_noticed() {
    let mut test = Test::new(orders(Mode::Place), vec![slot(0, 100)]);
    test.world().touch(0..100);
    test.rounds(12, 0..20);
    let slow = test.world().on(SLOW);
    test.world().pages.insert(slow[0], Page::default());
    assert_eq!(test.rounds(2, 0..20).absent_bytes, PAGE_BYTES);
}

#[test]
fn the_bandwidth_holds() {
    let mut orders = orders(Mode::Place);
    orders.policy.migration.bandwidth = BytesPerSecond(40 * PAGE_BYTES);
    let mut test = Test::new(orders, vec![slot(0, 400)]);
    test.world().touch(0..400);
    test.rounds(6, 0..0);
    let before = test.world().on(SLOW).len();
    test.rounds(4, 0..0);
    let moved = test.world().on(SLOW).len() - before;
    assert!((70..=84).contains(&moved), "{moved} pages in 2 seconds at 40 pages a second");
    let mut moves = test.guest.plan(test.now, ROUND);
    let stop = AtomicBool::new(false);
    let mut paces = Vec::new();
    for _ in 0..4 {
        paces.push(test.guest.move_some(&mut moves, test.now, &stop).unwrap());
    }
    assert!(paces.iter().any(|pace| matches!(pace, Pace::Wait(_))), "{paces:?}");
}

#[test]
fn what_moves_along_is_counted_and_paid_for() {
    let mut orders = orders(Mode::Place);
    orders.policy.migration.bandwidth = BytesPerSecond(40 * PAGE_BYTES);
    let mut test = Test::new(orders, vec![slot(0, 600)]);
    test.world().touch(0..600);
    test.world().joined = 60..160;
    let mut slow = vec![0];
    for _ in 0..24 {
        let status = test.rounds(1, 0..0);
        slow.push(test.world().on(SLOW).len() as u64);
        let totals = test.guest.totals();
        assert_eq!(totals.demoted_bytes, slow[slow.len() - 1] * PAGE_BYTES);
        assert_eq!(totals.demote_tried_bytes, totals.demoted_bytes, "no unit twice, and none left out");
        assert_eq!(test.guest.with_places(status).slow_bytes, totals.demoted_bytes);
    }
    let grown: Vec<u64> = slow.windows(2).map(|pair| pair[1] - pair[0]).collect();
    let joined = grown.iter().position(|pages| *pages >= 99).unwrap();
    // 99 pages at 20 a round.
    assert!(grown[joined + 1..joined + 5].iter().all(|pages| *pages == 0), "{grown:?}");
    assert!(grown[joined + 5..joined + 8].iter().all(|pages| (15..=25).contains(pages)), "{grown:?}");
}

#[test]
fn refusals_have_reasons_and_are_not_repeated_at_once() {
    let mut test = Test::new(orders(Mode::Place), vec![slot(0, 100)]);
    test.world().touch(0..100);
    test.world().refuse = Some(Refused::Shared);
    test.rounds(20, 0..20);
    let totals = test.guest.totals();
    assert_eq!(totals.demoted_bytes, 0);
    assert_eq!(totals.demote_tried_bytes, 80 * PAGE_BYTES, "each page once");
    let [refusal] = totals.refused.as_slice() else { panic!("{totals:?}") };
    assert_eq!((refusal.reason.as_str(), refusal.bytes), ("shared", 80 * PAGE_BYTES));
    // After a while they are tried again.
    test.world().refuse = None;
    test.rounds(140, 0..20);
    assert_eq!(test.world().on(SLOW).len(), 50);
}

#[test]
fn a_tier_that_the_kernel_finds_full_is_left_alone_for_longer_each_time() {
    for tiers_change in [false, true] {
        let refused = Refused::NodeFull;
        let mut test = Test::new(orders(Mode::Place), vec![slot(0, 100)]);
        test.world().touch(0..100);
        test.rounds(4, 0..20);
        test.world().refuse = Some(refused);
        test.rounds(120, 0..20);
        // Tried after 1, 2, 4, 8, 16, 32 s: not in each of 120 rounds.
        let totals = test.guest.totals();
        let tries = totals.demote_tried_bytes / (50 * PAGE_BYTES);
        assert!((5..8).contains(&tries), "{tries} tries");
        assert!(test.guest.hindrance(test.now).unwrap().contains("no room on the slow tier"));
        assert_eq!(totals.refused[0].reason, refused.name());
        // It is no fault of the pages: all of them go as soon as there is room.
        test.world().refuse = None;
        let mut orders = test.guest.orders().clone();
        orders.tiers.from.push_str(if tiers_change { ", by hand" } else { "" });
        test.guest.obey(orders, test.now);
        test.rounds(1, 0..20);
        assert_eq!(test.world().on(SLOW).len(), if tiers_change { 50 } else { 0 }, "other tiers have room");
        test.rounds(130, 0..20);
        assert_eq!(test.world().on(SLOW).len(), 50);
        assert_eq!(test.guest.hindrance(test.now), None);
    }
}

#[test]
fn pages_of_hugetlbfs_without_a_pool_hold_up_no_others() {
    let mut test = Test::new(orders(Mode::Place), vec![slot(0, 100)]);
    test.world().touch(0..100);
    test.world().hugetlb = 20..60;
    test.rounds(12, 0..20);
    let slow = test.world().on(SLOW);
    assert_eq!(slow, (60..100).collect::<Vec<_>>(), "all others that are idle");
    let totals = test.guest.totals();
    let [refusal] = totals.refused.as_slice() else { panic!("{totals:?}") };
    assert_eq!((refusal.reason.as_str(), refusal.bytes), ("hugetlb-full", 40 * PAGE_BYTES), "each page once");
}

#[test]
fn places_are_verified_and_mended() {
    let mut test = Test::new(orders(Mode::Observe), vec![slot(0, 64)]);
    test.world().touch(0..64);
    let first = test.round();
    assert_eq!(first.fast_bytes, 64 * PAGE_BYTES);
    let totals = test.guest.totals();
    assert!(totals.places_verified > 0);
    assert_eq!(totals.places_wrong, 0);
    // Moved by somebody else between the harvest and the look.
    test.guest.round(test.now).unwrap();
    test.world().pages.values_mut().for_each(|page| page.node = Some(SLOW));
    test.guest.verify_places().unwrap();
    assert!(test.guest.totals().places_wrong > 0);
}

#[test]
fn nothing_is_concluded_when_the_kernel_does_not_tell_places() {
    let mut test = Test::new(orders(Mode::Place), vec![slot(0, 128)]);
    test.world().touch(0..64);
    test.world().mute = true;
    let status = test.rounds(3, 0..64);
    let totals = test.guest.totals();
    assert_eq!((totals.places_verified, totals.places_wrong), (0, 0));
    assert_eq!((status.fast_bytes, test.guest.surveyed()), (64 * PAGE_BYTES, false));
    assert!(test.guest.hindrance(test.now).unwrap().contains("place of every page"));
    test.world().mute = false;
    test.rounds(4, 0..64);
    assert!(test.guest.surveyed());
    assert!(test.guest.totals().places_verified > 0);
    // Mapped, and on no node: a device's memory.
    test.world().touch(64..70);
    test.guest.round(test.now).unwrap();
    test.world().pages.values_mut().for_each(|page| page.node = None);
    let before = test.guest.totals();
    test.guest.verify_places().unwrap();
    let totals = test.guest.totals();
    assert_eq!((totals.places_verified, totals.places_wrong), (before.places_verified, 0));
}

#[test]
fn a_cpuset_pauses_placement_and_is_told() {
    let mut test = Test::new(orders(Mode::Place), vec![slot(0, 1000)]);
    test.world().touch(0..1000);
    test.world().refuse = Some(Refused::NotPermitted);
    test.rounds(10, 0..0);
    let reason = test.guest.hindrance(test.now).unwrap();
    assert!(reason.contains("not permitted") && reason.contains("numatune"), "{reason}");
    assert!(
        test.guest.totals().demote_tried_bytes <= ept_virt_core::migrate::BATCH_UNITS as u64 * PAGE_BYTES,
        "one batch"
    );
    assert_eq!(test.guest.totals().refused[0].reason, "not-permitted");
    test.world().refuse = None;
    test.rounds(140, 0..0);
    assert_eq!(test.guest.hindrance(test.now), None);
    assert_eq!(test.world().on(SLOW).len(), 500);
}

#[test]
fn placement_pauses_while_writes_are_logged() {
    let mut test = Test::new(orders(Mode::Place), vec![slot(0, 100)]);
    test.world().touch(0..100);
    test.rounds(1, 0..20);
    test.world().slots[0].dirty_log = true;
    test.world().generation = 2;
    test.rounds(10, 0..20);
    assert!(test.guest.hindrance(test.now).unwrap().contains("live migration"));
    assert!(test.world().on(SLOW).is_empty());
    test.world().slots[0].dirty_log = false;
    test.world().generation = 3;
    test.rounds(140, 0..20);
    assert_eq!(test.world().on(SLOW).len(), 50);
}

#[test]
fn a_full_slow_tier_is_told_and_not_run_against() {
    let mut test = Test::new(orders(Mode::Place), vec![slot(0, 100)]);
    test.world().touch(0..100);
    test.world().room.insert(SLOW, 7 * PAGE_BYTES);
    test.rounds(5, 0..20);
    test.world().room.insert(SLOW, 0);
    let moved = test.world().on(SLOW).len();
    test.rounds(5, 0..20);
    assert_eq!(test.world().on(SLOW).len(), moved);
    assert!(test.guest.hindrance(test.now).unwrap().contains("no room"));
    assert_eq!(test.guest.totals().refused, []);
}

#[test]
fn the_host_keeps_its_dram() {
    let mut test = Test::new(orders(Mode::Place), vec![slot(0, 100)]);
    test.world().touch(0..100);
    test.rounds(12, 0..20);
    test.world().room.insert(FAST, 0);
    let slow = test.world().on(SLOW);
    // Everything is hot now, and nothing can go in exchange.
    test.rounds(12, 0..100);
    assert_eq!(test.world().on(SLOW), slow);
}

#[test]
fn other_orders_hold_at_once() {
    let mut test = Test::new(orders(Mode::Place), vec![slot(0, 100)]);
    test.world().touch(0..100);
    test.rounds(12, 0..20);
    test.guest.obey(orders(Mode::Observe), test.now);
    let slow = test.world().on(SLOW);
    test.rounds(10, 60..100);
    assert_eq!(test.world().on(SLOW), slow);
    // The tiers change places: what was slow is fast, and all of it is looked at anew.
    let mut turned = orders(Mode::Place);
    std::mem::swap(&mut turned.tiers.fast, &mut turned.tiers.slow);
    test.guest.obey(turned, test.now);
    assert!(!test.guest.surveyed());
    let status = test.rounds(2, 0..0);
    assert_eq!(status.fast_bytes + status.slow_bytes, 100 * PAGE_BYTES);
    assert_eq!(test.guest.hindrance(test.now), None);
}

#[test]
fn a_guest_that_ends_in_mid_round_ends_quietly() {
    let mut test = Test::new(orders(Mode::Place), vec![slot(0, 100)]);
    test.world().touch(0..50);
    test.round();
    test.world().vm_gone = true;
    assert!(matches!(test.guest.round(test.now), Err(SamplerError::VmGone)));
    assert_eq!(test.guest.survey(Instant::now()), Err(ProcessGone));
}

#[test]
fn memory_that_is_plugged_in_is_observed() {
    let mut test = Test::new(orders(Mode::Place), vec![slot(0, 100)]);
    test.world().touch(0..100);
    test.rounds(12, 0..20);
    test.world().slots.push(slot(512, 64));
    test.world().generation = 2;
    test.world().touch(512..544);
    let status = test.round();
    assert_eq!(test.guest.size(), (Bytes::of_pages(164), 2));
    assert_eq!(status.slow_bytes, 50 * PAGE_BYTES, "what was known is kept");
    assert_eq!(status.fast_bytes, 82 * PAGE_BYTES);
}

/// What a suspended guest's pages are afterwards, compared with those of a guest
/// that was never suspended.
#[test]
fn a_guest_that_was_suspended_comes_back_with_its_heat() {
    let mut test = Test::new(orders(Mode::Place), vec![slot(0, 100)]);
    test.world().touch(0..20);
    let before = test.rounds(12, 0..20);
    assert_eq!(before.hot_bytes, 20 * PAGE_BYTES);
    let idle = |test: &Test| {
        let memory = lock(&test.guest.memory);
        (0..100).filter(|page| memory.views()[0].heat.is_idle(*page)).count()
    };
    let idle_before = idle(&test);
    test.guest.obey(Orders { suspended: true, ..orders(Mode::Place) }, test.now);
    assert!(test.guest.rests());
    assert!(test.guest.hindrance(test.now).unwrap().contains("suspended"));
    // A round may be held all the same: no time passes for the guest.
    test.now += Duration::from_secs(1800);
    assert_eq!(test.rounds(3, 0..0).hot_bytes, 20 * PAGE_BYTES);
    test.now += Duration::from_secs(1800);
    test.guest.obey(orders(Mode::Place), test.now);
    assert!(!test.guest.rests());
    assert_eq!(idle(&test), idle_before);
    let after = test.rounds(1, 0..20);
    assert_eq!((after.hot_bytes, after.interval_ms), (20 * PAGE_BYTES, 0));
    // From here on time passes again.
    assert_eq!(test.rounds(20, 0..0).hot_bytes, 0);
}

/// The time until it was suspended, and the accesses in it, count.
#[test]
fn what_was_accessed_just_before_a_suspension_counts() {
    let mut test = Test::new(orders(Mode::Observe), vec![slot(0, 100)]);
    test.rounds(2, 0..0);
    let last_round = test.now - ROUND;
    test.world().touch(0..10);
    test.guest.obey(Orders { suspended: true, ..orders(Mode::Observe) }, last_round + Duration::from_secs(2));
    test.now = last_round + Duration::from_secs(3602);
    test.guest.obey(orders(Mode::Observe), test.now);
    let status = test.round();
    assert_eq!((status.interval_ms, status.hot_bytes), (2000, 10 * PAGE_BYTES));
}

#[test]
fn heat_that_came_back_is_stepped_by_what_the_tables_still_know() {
    let mut old = Test::new(orders(Mode::Observe), vec![slot(0, 100), slot(512, 64)]);
    old.rounds(12, 0..20);
    let harvested_at = old.guest.harvested_at(old.now).unwrap();
    assert_eq!(harvested_at, old.now - ROUND);
    let mut memory = lock(&old.guest.memory);
    let heat: Vec<_> = memory
        .settle()
        .into_iter()
        .map(|slot| {
            let mut cells = Vec::new();
            assert!(memory.copy_cells(&slot, 0..1000, &mut cells));
            assert_eq!(cells.len() as u64, slot.page_count);
            (slot, cells)
        })
        .collect();
    drop(memory);

    // A slot went, and one came, while no daemon was there.
    let mut new = Test::new(orders(Mode::Observe), vec![slot(0, 100), slot(1024, 32)]);
    new.now = old.now + Duration::from_millis(300);
    assert_eq!(new.guest.learn_slots().unwrap().len(), 2);
    assert_eq!(new.guest.recall(heat, harvested_at), 1);
    // Meanwhile the guest accessed half of its hot pages, and at some time before
    // some of the slot that came.
    new.world().touch((0..10).chain(1024..1034));
    let first = new.round();
    assert_eq!((first.number, first.interval_ms), (1, 800));
    let memory = lock(&new.guest.memory);
    let temperature = |page| memory.views()[0].heat.temperature(page);
    assert!(temperature(5) > temperature(15) && temperature(15) > 0);
    assert_eq!(temperature(50), 0);
    assert!(temperature(5) >= ept_virt_core::heat::HOT_FROM);
    let came = |memory: &GuestMemory| memory.views()[1].heat.temperature(5);
    assert_eq!(came(&memory), 0, "when that was nobody knows");
    drop(memory);
    new.world().touch(1024..1034);
    new.round();
    assert!(came(&lock(&new.guest.memory)) > 0);
}

#[test]
fn a_host_that_reclaims_is_told_of_accesses() {
    for keep_young in [false, true] {
        let mut test = Test::new(Orders { keep_young, ..orders(Mode::Observe) }, vec![slot(0, 64)]);
        test.round();
        assert!(test.world().requests.iter().all(|request| request.keep_young == keep_young));
        assert!(!test.world().requests.is_empty());
    }
}

/// Guests on a host whose DRAM holds so many pages beside what must be free.
fn beside_each_other(dram_pages: usize, orders: Vec<Orders>) -> Vec<Test> {
    const RESERVE_PAGES: u64 = 100;
    // An eighth of the reserve may be missing.
    const FREE_PAGES: u64 = 88;
    let new = |orders| Test::new(orders, vec![slot(0, 100)]);
    let mut tests: Vec<Test> = orders.into_iter().map(new).collect();
    let worlds: Vec<Shared> = tests.iter().map(|test| Arc::clone(&test.world)).collect();
    let look = move |_| {
        let used: usize = worlds.iter().map(|world| lock(world).on(FAST).len()).sum();
        let free = (dram_pages as u64 + FREE_PAGES).saturating_sub(used as u64);
        let total_bytes = 10 * RESERVE_PAGES * PAGE_BYTES;
        Ok((NodeMemory { total_bytes, free_bytes: free * PAGE_BYTES }, 0))
    };
    let limits = HostLimits { dram_reserve: Share::from_percent(10), ..HostLimits::default() };
    let budget = Arc::new(Budget::with(limits, Box::new(look)));
    tests.iter_mut().for_each(|test| test.guest.sit(budget.seat()));
    tests
}

/// All may have all of their memory in DRAM, as far as their policy goes.
fn weighing(weight: u32, min_pages: u64) -> Orders {
    let mut orders = orders(Mode::Place);
    orders.policy.dram = Dram { weight, min: Bytes::of_pages(min_pages), ..Policy::default().dram };
    orders.policy.migration.delay = Duration::from_secs(1);
    orders.policy.half_life = Duration::from_secs(4);
    orders
}

/// A fifth of the memory is hot; the rest is used every two and a half seconds,
/// which is neither cold nor always within the delay.
fn use_for(tests: &mut [Test], seconds: u64) {
    for round in 0..seconds * 2 {
        for test in tests.iter_mut() {
            let used = if round % 5 == 0 { 0..100 } else { 0..20 };
            test.world().touch(used);
            test.round();
        }
    }
}

fn pages_held(tests: &[Test]) -> Vec<usize> {
    tests.iter().map(|test| test.world().on(FAST).len()).collect()
}

fn grant_reason(test: &Test) -> String {
    test.guest.budget_status().unwrap().grant_reason
}

#[test]
fn guests_share_the_host_s_dram_by_weight() {
    let mut tests = beside_each_other(120, vec![weighing(100, 0), weighing(300, 0)]);
    use_for(&mut tests, 60);
    assert_eq!(pages_held(&tests), [30, 90]);
    assert!(grant_reason(&tests[0]).starts_with("its share by weight"));
    let status = tests[1].guest.budget_status().unwrap();
    assert_eq!((status.grant_bytes, status.fair_bytes), (90 * PAGE_BYTES, 90 * PAGE_BYTES));
    assert_eq!(status.working_set_bytes, Some(100 * PAGE_BYTES));
    assert!(tests.iter().all(|test| (0..20).all(|gfn| test.world().pages[&gfn].node == Some(FAST))));
    // One that goes leaves its share to the other.
    let gone = tests.remove(1);
    gone.world().pages.clear();
    drop(gone);
    use_for(&mut tests, 20);
    assert_eq!(pages_held(&tests), [100]);
}

#[test]
fn what_has_moved_is_known_to_the_others_at_once() {
    let mut slow = weighing(100, 0);
    slow.policy.migration.bandwidth = BytesPerSecond(4 * PAGE_BYTES);
    let mut tests = beside_each_other(120, vec![slow, weighing(100, 0)]);
    use_for(&mut tests, 5);
    let fair_of_the_other = |tests: &mut [Test]| {
        let now = tests[1].now + Duration::from_secs(60);
        tests[1].now = now;
        tests[1].guest.claim(now);
        tests[1].guest.budget_status().unwrap().fair_bytes
    };
    let before = (pages_held(&tests)[0], fair_of_the_other(&mut tests));
    tests[0].world().touch(0..20);
    let now = tests[0].now + Duration::from_secs(2);
    tests[0].guest.round(now).unwrap();
    let mut moves = tests[0].guest.plan(now, ROUND);
    tests[0].guest.move_some(&mut moves, now, &AtomicBool::new(false)).unwrap();
    assert!(pages_held(&tests)[0] < before.0, "some has moved, and the round has not ended");
    assert_eq!(fair_of_the_other(&mut tests), before.1);
}

#[test]
fn a_guest_s_minimum_is_kept_beside_heavier_ones() {
    let mut tests = beside_each_other(120, vec![weighing(1, 50), weighing(1000, 0)]);
    use_for(&mut tests, 60);
    assert_eq!(pages_held(&tests), [50, 70]);
    assert!(grant_reason(&tests[0]).starts_with("its minimum"));
}

#[test]
fn a_guest_that_is_only_observed_loses_nothing_to_others() {
    let observed = Orders { policy: orders(Mode::Observe).policy, ..weighing(1, 0) };
    let mut tests = beside_each_other(120, vec![weighing(1000, 0), observed]);
    use_for(&mut tests, 60);
    assert_eq!(pages_held(&tests), [20, 100]);
    assert!(grant_reason(&tests[1]).contains("nothing of it is moved"));
}

#[test]
fn what_a_guest_does_not_use_is_lent_to_another() {
    let mut tests = beside_each_other(120, vec![weighing(100, 0), weighing(100, 0)]);
    for round in 0..120 {
        for (test, idle) in tests.iter_mut().zip([true, false]) {
            let used = if idle { 0..20 } else { 0..100 };
            test.world().touch(if round == 0 { 0..100 } else { used });
            test.round();
        }
    }
    let held = pages_held(&tests);
    assert!((20..=25).contains(&held[0]) && (95..=100).contains(&held[1]), "{held:?}");
}

#[test]
fn plans_are_as_far_apart_as_the_policy_says() {
    let mut orders = orders(Mode::Place);
    orders.policy.migration.interval = Some(Duration::from_secs(6));
    let mut test = Test::new(orders, vec![slot(0, 100)]);
    test.world().touch(0..100);
    test.rounds(13, 0..20);
    let slow = test.world().on(SLOW);
    assert_eq!(slow.len(), 50, "by the plan of the seventh second");
    let now_hot = slow[0]..slow[9] + 1;
    test.rounds(11, now_hot.clone());
    assert_eq!(test.world().on(SLOW), slow, "no plan since then");
    test.rounds(12, now_hot.clone());
    assert!(now_hot.clone().all(|gfn| test.world().pages[&gfn].node == Some(FAST)));
}

#[test]
fn what_a_plan_left_is_moved_until_the_next_or_until_nothing_may_move() {
    let mut orders = orders(Mode::Place);
    orders.policy.migration.interval = Some(Duration::from_secs(60));
    orders.policy.migration.bandwidth = BytesPerSecond(20 * PAGE_BYTES);
    let mut test = Test::new(orders, vec![slot(0, 100)]);
    test.world().touch(0..100);
    // The first plan finds nothing idle; the second is a minute later.
    test.rounds(122, 0..20);
    let before = test.world().on(SLOW).len();
    assert!((1..50).contains(&before), "{before}");
    test.world().slots[0].dirty_log = true;
    test.world().generation += 1;
    let logged = test.rounds(2, 0..20).slow_bytes / PAGE_BYTES;
    test.rounds(4, 0..20);
    assert!(test.world().on(SLOW).len() as u64 <= logged, "nothing moves while writes are logged");
}

#[test]
fn a_plan_does_not_outlive_the_slots_that_it_was_made_of() {
    let mut orders = orders(Mode::Place);
    orders.policy.migration.interval = Some(Duration::from_secs(60));
    orders.policy.migration.bandwidth = BytesPerSecond(20 * PAGE_BYTES);
    let mut test = Test::new(orders, vec![slot(0, 100), slot(512, 8)]);
    test.world().touch(0..100);
    test.rounds(122, 0..20);
    assert!(!test.moves.is_empty());
    test.world().slots.pop();
    test.world().generation += 1;
    // Between two rounds, and long before the next plan.
    test.guest.look().unwrap();
    let moved = test.guest.totals().demoted_bytes;
    let pace = test.guest.move_some(&mut test.moves, test.now, &AtomicBool::new(false)).unwrap();
    assert!(matches!(pace, Pace::Done) && test.moves.is_empty(), "{pace:?}");
    assert_eq!(test.guest.totals().demoted_bytes, moved);
    // The next round plans anew.
    test.round();
    assert!(test.guest.totals().demoted_bytes > moved);
}

#[test]
fn of_a_round_with_a_window_only_the_window_counts() {
    let mut test = Test::new(orders(Mode::Observe), vec![slot(0, 100)]);
    test.rounds(2, 0..0);
    for _ in 0..4 {
        test.world().touch(0..60);
        // A look is not to be noticed by the round.
        assert_eq!(test.guest.look().unwrap(), Bytes::of_pages(60));
        let opens = test.now - Duration::from_millis(8);
        test.guest.open_window(|| opens).unwrap();
        assert_eq!(test.guest.look().unwrap(), Bytes(0));
        test.world().touch(20..30);
        let status = test.round();
        assert_eq!((status.interval_ms, status.watched_us), (500, 8000));
        assert_eq!(status.accessed_bytes, 10 * PAGE_BYTES);
    }
    let windows: Vec<_> = test.world().requests.iter().rev().take(4).map(|request| request.flush).collect();
    assert_eq!(windows, [true, false, true, false], "a window begins with a flush, a look needs none");
    let status = test.rounds(1, 20..30);
    assert_eq!((status.hot_bytes, status.watched_us), (10 * PAGE_BYTES, 500_000));
    assert_eq!(status.warm_bytes, 0, "what was accessed before the windows is not known");
}

#[test]
fn a_window_does_not_go_on_while_the_guest_stands_still() {
    let mut test = Test::new(orders(Mode::Observe), vec![slot(0, 100)]);
    test.rounds(2, 0..50);
    let opens = test.now - Duration::from_millis(8);
    test.guest.open_window(|| opens).unwrap();
    test.guest.obey(Orders { suspended: true, ..orders(Mode::Observe) }, test.now);
    test.now += Duration::from_secs(1000);
    test.guest.obey(orders(Mode::Observe), test.now);
    let status = test.round();
    assert_eq!((status.interval_ms, status.watched_us), (500, 8000));
}
