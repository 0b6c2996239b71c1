// SPDX-License-Identifier: MIT OR Apache-2.0
//! What holds for every plan. The units are found anew here, page by page, so
//! that plan and test do not share a mistake.

use std::collections::HashMap;
use std::ops::Range;
use std::time::Duration;

use ept_virt_core::bitmap;
use ept_virt_core::heat::{COLD_BELOW, HeatMap, HeatParams, MAX_TEMPERATURE};
use ept_virt_core::plan::{
    Joined, MoveUnit, PlaceMap, Plan, PlanInput, Recent, SlotView, map_runs, plan, quota_pages, strip,
};
use ept_virt_core::sampler::Level;
use ept_virt_core::units::{Bytes, BytesPerSecond, PAGE_BYTES, Share};
use ept_virt_core::wire::Place;
use proptest::prelude::*;

const ROUND: Duration = Duration::from_secs(1);
const PARAMS: HeatParams = HeatParams { half_life: Duration::from_secs(4), delay: ROUND };

/// A slot with everything that a view borrows.
#[derive(Clone, Debug)]
struct Slot {
    hva: u64,
    heat: HeatMap,
    place: PlaceMap,
    levels: Vec<Level>,
    held: Vec<u64>,
    recent: Recent,
    turned: Recent,
    joined: Joined,
}

impl Slot {
    fn view(&self) -> SlotView<'_> {
        let Slot { hva, heat, place, held, recent, turned, joined, .. } = self;
        SlotView { hva: *hva, heat, place, held, recent, turned, joined }
    }

    /// Pages of the slot that lie in its `index`th 2 MiB of guest-physical space.
    fn region(gfn_start: u64, pages: usize, index: usize) -> Range<usize> {
        let first = (gfn_start / 512 + index as u64) * 512;
        let start = first.max(gfn_start) - gfn_start;
        start as usize..((first + 512 - gfn_start) as usize).min(pages)
    }
}

/// A unit as this test finds it.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Unit {
    unit: MoveUnit,
    temperature: u16,
    idle: bool,
    place: Place,
    held: bool,
}

fn units(slot: &Slot) -> Vec<Unit> {
    let mut found = Vec::new();
    for (index, level) in slot.levels.iter().enumerate() {
        let region = Slot::region(slot.place.gfn_start(), slot.place.pages(), index);
        let place = slot.place.place(region.start);
        let one_place = region.clone().all(|page| slot.place.place(page) == place);
        let joined = slot.joined.contains(slot.hva + region.start as u64 * PAGE_BYTES);
        let whole = (*level == Level::Huge2M || joined) && region.len() == 512 && one_place;
        let step = if whole { 512 } else { 1 };
        for page in region.clone().step_by(step) {
            let pages = if joined { region.clone() } else { page..page + step };
            let is_cut_off = joined && region.len() < 512;
            found.push(Unit {
                unit: MoveUnit {
                    gfn: slot.place.gfn_start() + page as u64,
                    hva: slot.hva + page as u64 * PAGE_BYTES,
                    pages: step as u32,
                },
                temperature: pages.clone().map(|page| slot.heat.temperature(page)).max().unwrap(),
                idle: pages.clone().all(|page| slot.heat.is_idle(page)),
                place: slot.place.place(page),
                held: *level == Level::Huge1G
                    || is_cut_off
                    || pages.clone().any(|page| bitmap::get(&slot.held, page)),
            });
        }
    }
    found
}

/// Words that have runs, not noise only.
fn words(count: usize) -> impl Strategy<Value = Vec<u64>> {
    let word = prop_oneof![3 => Just(0), 3 => Just(!0), 1 => any::<u64>()];
    proptest::collection::vec(word, count)
}

fn slot() -> impl Strategy<Value = Slot> {
    let level = prop_oneof![
        1 => Just(Level::None),
        1 => Just(Level::Page4K),
        3 => Just(Level::Huge2M),
        1 => Just(Level::Huge1G),
    ];
    (0u64..1500, 1usize..2500)
        .prop_flat_map(move |(gfn_start, pages)| {
            let count = pages.div_ceil(64);
            let regions = (gfn_start + pages as u64).div_ceil(512) - gfn_start / 512;
            let levels = proptest::collection::vec(
                (level.clone(), any::<bool>(), 0usize..3, 0..4u8),
                regions as usize,
            );
            let rounds = proptest::collection::vec(words(count), 1..8);
            (Just((gfn_start, pages)), words(count), words(count), levels, rounds, words(count))
        })
        .prop_map(|((gfn_start, pages), mut mapped, on_slow, levels, rounds, held)| {
            let mut heat = HeatMap::new(pages, PARAMS);
            let mut place = PlaceMap::new(gfn_start, pages);
            if pages % 64 != 0 {
                *mapped.last_mut().unwrap() &= (1 << (pages % 64)) - 1;
            }
            let only: Vec<Level> = levels.iter().map(|(level, ..)| *level).collect();
            place.observe(&mapped, &on_slow, &only);
            for (index, (_, uniform, tier, _)) in levels.iter().enumerate() {
                if *uniform {
                    let tier = [Place::Fast, Place::Slow, Place::Absent][*tier];
                    place.record(Slot::region(gfn_start, pages, index), tier);
                }
            }
            let hva = 0x7f00_0000_0000 + gfn_start * PAGE_BYTES;
            let mut joined = Joined::default();
            for (index, _) in levels.iter().enumerate().filter(|(_, (.., kind))| *kind == 0) {
                let first = Slot::region(gfn_start, pages, index).start;
                joined.insert(hva + first as u64 * PAGE_BYTES);
            }
            for accessed in rounds {
                heat.step(&accessed, ROUND);
            }
            // Held pages are the exception.
            let held = held.iter().map(|word| if word % 5 == 0 { word >> 32 } else { 0 }).collect();
            Slot {
                hva,
                heat,
                place,
                levels: only,
                held,
                recent: Recent::default(),
                turned: Recent::default(),
                joined,
            }
        })
}

/// A domain: its slots do not overlap.
fn domain() -> impl Strategy<Value = Vec<Slot>> {
    proptest::collection::vec(slot(), 1..4).prop_map(|slots| {
        let mut base = 0;
        slots
            .into_iter()
            .map(|mut slot| {
                let shifted = base * 512 + slot.place.gfn_start();
                base = shifted / 512 + slot.place.pages() as u64 / 512 + 2;
                let hva = 0x7f00_0000_0000 + shifted * PAGE_BYTES;
                slot.joined = joined_at(&slot, hva);
                slot.hva = hva;
                slot.place = moved_to(&slot, shifted);
                slot
            })
            .collect()
    })
}

fn joined_at(slot: &Slot, hva: u64) -> Joined {
    let mut joined = Joined::default();
    for index in 0..slot.levels.len() {
        let offset =
            Slot::region(slot.place.gfn_start(), slot.place.pages(), index).start as u64 * PAGE_BYTES;
        if slot.joined.contains(slot.hva + offset) {
            joined.insert(hva + offset);
        }
    }
    joined
}

fn moved_to(slot: &Slot, gfn_start: u64) -> PlaceMap {
    let mut place = PlaceMap::new(gfn_start, slot.place.pages());
    place.observe(&[], &[], &slot.levels);
    for page in 0..slot.place.pages() {
        place.record(page..page + 1, slot.place.place(page));
    }
    place
}

#[derive(Clone, Copy, Debug)]
struct Limits {
    target: Option<Bytes>,
    gap: Share,
    quota: u64,
    settling: bool,
}

fn limits() -> impl Strategy<Value = Limits> {
    let target = proptest::option::of((0u64..4000).prop_map(Bytes::of_pages));
    let quota = prop_oneof![0u64..3000, Just(u64::MAX / 4)];
    (target, 0u16..40, quota, any::<bool>()).prop_map(|(target, gap, quota, settling)| Limits {
        target,
        gap: Share::from_percent(gap),
        quota,
        settling,
    })
}

fn plan_of(slots: &[Slot], limits: Limits) -> Plan {
    let views: Vec<SlotView<'_>> = slots.iter().map(Slot::view).collect();
    let Limits { target, gap, quota, settling } = limits;
    plan(&PlanInput {
        slots: &views,
        dram_target: target,
        gap,
        quota_pages: quota,
        settling,
        heat: 0.0,
        trickle_pages: u64::MAX,
    })
}

fn pages_of(units: &[MoveUnit]) -> u64 {
    units.iter().map(|unit| u64::from(unit.pages)).sum()
}

/// The test's units by first GFN, and the pages on the fast tier.
fn survey(slots: &[Slot]) -> (HashMap<u64, Unit>, u64) {
    let all: HashMap<u64, Unit> = slots.iter().flat_map(units).map(|unit| (unit.unit.gfn, unit)).collect();
    let fast = slots.iter().map(|slot| slot.place.counts().fast).sum();
    (all, fast)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn only_whole_units_move_and_each_once_and_no_more_than_the_quota(slots in domain(), limits in limits()) {
        let (all, _) = survey(&slots);
        let plan = plan_of(&slots, limits);
        prop_assert!(pages_of(&plan.demote) + pages_of(&plan.promote) <= limits.quota);
        let mut seen = std::collections::HashSet::new();
        for (units, place) in [(&plan.demote, Place::Fast), (&plan.promote, Place::Slow)] {
            for unit in units {
                let known = all.get(&unit.gfn);
                prop_assert_eq!(known.map(|known| known.unit), Some(*unit), "no unit of the domain");
                let known = known.unwrap();
                prop_assert!(known.place == place && !known.held);
                let may_move = if place == Place::Fast { known.idle } else { known.temperature >= COLD_BELOW };
                prop_assert!(may_move);
                for gfn in unit.gfn..unit.gfn + u64::from(unit.pages) {
                    prop_assert!(seen.insert(gfn), "page {} twice", gfn);
                }
            }
        }
    }

    #[test]
    fn the_coldest_go_and_the_hottest_come(slots in domain(), limits in limits()) {
        let (mut all, _) = survey(&slots);
        let plan = plan_of(&slots, limits);
        let take = |all: &mut HashMap<u64, Unit>, units: &[MoveUnit]| -> Vec<u16> {
            units.iter().map(|unit| all.remove(&unit.gfn).unwrap().temperature).collect()
        };
        let gone = take(&mut all, &plan.demote);
        let come = take(&mut all, &plan.promote);
        prop_assert!(gone.is_sorted() && come.is_sorted_by(|a, b| a >= b));
        for stays in all.values().filter(|unit| !unit.held) {
            if stays.place == Place::Fast && stays.idle {
                prop_assert!(gone.last().is_none_or(|hottest| *hottest <= stays.temperature));
            }
            if stays.place == Place::Slow {
                prop_assert!(come.last().is_none_or(|coldest| *coldest >= stays.temperature));
            }
        }
    }

    #[test]
    fn the_target_is_kept_and_approached(slots in domain(), limits in limits()) {
        let (mut all, fast) = survey(&slots);
        let plan = plan_of(&slots, limits);
        let target = limits.target.map_or(u64::MAX, Bytes::pages);
        let (gone, come) = (pages_of(&plan.demote), pages_of(&plan.promote));
        let after = fast - gone + come;
        prop_assert!(after <= fast.max(target));
        // One huge page driven out by a small one may leave room.
        prop_assert!(after + 512 > fast.min(target));
        if come == 0 {
            prop_assert!(gone <= fast.saturating_sub(target));
            for unit in &plan.demote {
                all.remove(&unit.gfn);
            }
            let may_go = all.values().filter(|unit| unit.place == Place::Fast && unit.idle && !unit.held);
            let coldest = may_go.clone().map(|unit| unit.temperature).min();
            let fits = |unit: &Unit| u64::from(unit.unit.pages) <= after.saturating_sub(target).min(limits.quota - gone);
            // Of equals, the first that does not fit ends the list.
            let stuck = may_go.filter(|unit| Some(unit.temperature) == coldest).any(|unit| !fits(unit));
            prop_assert!(after <= target || coldest.is_none() || stuck);
        }
    }

    #[test]
    fn an_exchange_needs_the_gap(slots in domain(), limits in limits()) {
        let (all, fast) = survey(&slots);
        // Exactly full: whatever comes drives something out.
        let limits = Limits { target: Some(Bytes::of_pages(fast)), ..limits };
        let plan = plan_of(&slots, limits);
        prop_assert!(pages_of(&plan.promote) <= pages_of(&plan.demote));
        prop_assert_eq!(plan.promote.is_empty(), plan.demote.is_empty());
        let temperature = |unit: &MoveUnit| u64::from(all[&unit.gfn].temperature);
        let gap = limits.gap.of(u64::from(MAX_TEMPERATURE));
        if let (Some(gone), Some(come)) = (plan.demote.last(), plan.promote.last()) {
            prop_assert!(temperature(gone) + gap <= temperature(come));
        }
    }

    #[test]
    fn pictures_show_every_page_once(slots in domain(), cells in 1usize..300) {
        let views: Vec<SlotView<'_>> = slots.iter().map(Slot::view).collect();
        let runs = map_runs(&views, usize::MAX).unwrap();
        prop_assert_eq!(map_runs(&views, runs.len()).map(|runs| runs.len()), Some(runs.len()));
        prop_assert_eq!(map_runs(&views, runs.len() - 1), None);
        let mut runs = runs.into_iter();
        let mut run = runs.next().unwrap();
        for slot in &slots {
            for page in 0..slot.place.pages() {
                let shown = (run.gfn, run.hva, run.class, run.place);
                let gfn = slot.place.gfn_start() + page as u64;
                let hva = slot.hva + page as u64 * PAGE_BYTES;
                prop_assert_eq!(shown, (gfn, hva, slot.heat.class(page), slot.place.place(page)));
                run.gfn += 1;
                run.hva += PAGE_BYTES;
                run.pages -= 1;
                if run.pages == 0 {
                    let Some(next) = runs.next() else { break };
                    let neighbour = (next.gfn, next.class, next.place) == (run.gfn, run.class, run.place);
                    prop_assert!(!neighbour || page + 1 == slot.place.pages(), "a run that could be longer");
                    run = next;
                }
            }
        }
        prop_assert!(runs.next().is_none() && run.pages == 0);

        let pages: Vec<(u16, Place)> = slots
            .iter()
            .flat_map(|slot| (0..slot.place.pages()).map(|page| (slot.heat.temperature(page), slot.place.place(page))))
            .collect();
        let shown = strip(&views, cells);
        let cells = cells.min(pages.len());
        prop_assert_eq!(shown.len(), cells);
        for (index, cell) in shown.iter().enumerate() {
            let part = &pages[index * pages.len() / cells..(index + 1) * pages.len() / cells];
            let mut hottest: Vec<u64> = part.iter().map(|(temperature, _)| u64::from(temperature >> 8)).collect();
            hottest.sort_by_key(|temperature| std::cmp::Reverse(*temperature));
            hottest.truncate(part.len().div_ceil(8));
            prop_assert_eq!(u64::from(cell.heat), hottest.iter().sum::<u64>() / hottest.len() as u64);
            let count = |place| part.iter().filter(|page| page.1 == place).count();
            let (slow, resident) = (count(Place::Slow), part.len() - count(Place::Absent));
            prop_assert_eq!(usize::from(cell.slow), (slow * 255).div_ceil(resident.max(1)));
            prop_assert_eq!(usize::from(cell.resident), (resident * 255).div_ceil(part.len()));
        }
    }

    #[test]
    fn the_same_input_gives_the_same_plan(slots in domain(), limits in limits()) {
        prop_assert_eq!(plan_of(&slots, limits), plan_of(&slots.clone(), limits));
    }
}

/// A slot of 4 KiB pages; `hot` pages were accessed in each of 20 rounds, the
/// rest never; `slow` pages lie on the slow tier.
fn simple(pages: usize, hot: Range<usize>, slow: Range<usize>) -> Slot {
    let mut heat = HeatMap::new(pages, PARAMS);
    let mut accessed = vec![0; pages.div_ceil(64)];
    bitmap::fill(&mut accessed, hot, true);
    for _ in 0..20 {
        heat.step(&accessed, ROUND);
    }
    let levels = vec![Level::Page4K; pages.div_ceil(512)];
    let mut place = PlaceMap::new(0, pages);
    place.observe(&vec![!0; pages.div_ceil(64)], &[], &levels);
    place.record(slow, Place::Slow);
    Slot {
        hva: 1 << 40,
        heat,
        place,
        levels,
        held: Vec::new(),
        recent: Recent::default(),
        turned: Recent::default(),
        joined: Joined::default(),
    }
}

fn percent_of_heat(gap: u16, target_pages: u64, quota: u64) -> Limits {
    Limits {
        target: Some(Bytes::of_pages(target_pages)),
        gap: Share::from_percent(gap),
        quota,
        settling: false,
    }
}

/// Enough pages that the search drops its surplus on the way.
#[test]
fn in_a_large_slot_the_best_are_found_as_by_sorting() {
    let pages = 300_000;
    let mut slot = simple(pages, 0..0, 0..pages / 2);
    // Temperatures that fall with the address: each page is colder than all before.
    for round in 0..60 {
        let mut accessed = vec![0; pages.div_ceil(64)];
        let low = |from: usize| from..from + (pages / 2) * (60 - round) / 60;
        bitmap::fill(&mut accessed, low(0), true);
        bitmap::fill(&mut accessed, low(pages / 2), true);
        slot.heat.step(&accessed, ROUND / 10);
    }
    slot.heat.step(&[], ROUND);
    slot.heat.step(&[], ROUND);
    let mut all = units(&slot);
    let sorted_by_heat = |all: &[Unit], place: Place, quota: usize| -> Vec<MoveUnit> {
        all.iter().filter(|unit| unit.place == place).map(|unit| unit.unit).take(quota).collect()
    };
    for quota in [1, 100, 40_000] {
        all.sort_by_key(|unit| unit.temperature);
        let coldest = sorted_by_heat(&all, Place::Fast, quota);
        let plan = plan_of(std::slice::from_ref(&slot), percent_of_heat(100, 0, quota as u64));
        assert!(plan.demote == coldest, "the coldest {quota}");

        all.sort_by_key(|unit| (std::cmp::Reverse(unit.temperature), unit.unit.gfn));
        let hottest = sorted_by_heat(&all, Place::Slow, quota);
        let limits = Limits { target: None, gap: Share::WHOLE, quota: quota as u64, settling: false };
        let plan = plan_of(std::slice::from_ref(&slot), limits);
        assert!(plan.promote == hottest, "the hottest {quota}");
        all.sort_by_key(|unit| unit.unit.gfn);
    }
}

/// What exchanges are worth is measured by the domain's heat.
#[test]
fn exchanges_that_win_little_are_done_a_few_at_a_time() {
    // 100 pages lie wrong.
    let mut slot = simple(1024, 0..100, 0..100);
    let moved = |slot: &Slot, settling, heat, trickle_pages| {
        let plan = plan(&PlanInput {
            slots: &[slot.view()],
            dram_target: Some(Bytes::of_pages(924)),
            gap: Share::from_percent(10),
            quota_pages: 10_000,
            settling,
            heat,
            trickle_pages,
        });
        assert_eq!(plan.promote.len(), plan.demote.len());
        (plan.promote.len(), plan.trickled_pages)
    };
    // Hot and cold need no second thought.
    assert_eq!(moved(&slot, false, 1e9, 0), (100, 0));
    slot.heat = HeatMap::new(1024, HeatParams { half_life: ROUND * 60, ..PARAMS });
    let mut accessed = [0; 16];
    bitmap::fill(&mut accessed, 0..100, true);
    for round in 0..100 {
        slot.heat.step(if round % 2 == 0 { &accessed } else { &[] }, ROUND);
    }
    let heat = 100.0 * f64::from(slot.heat.temperature(0)) / f64::from(MAX_TEMPERATURE);
    assert!((45.0..55.0).contains(&heat), "{heat}");
    assert_eq!(moved(&slot, false, heat * 49.0, 0), (100, 0));
    assert_eq!(moved(&slot, false, heat * 51.0, 0), (0, 0));
    assert_eq!(moved(&slot, false, heat * 51.0, 21), (10, 20));
    // There is no time to lose.
    assert_eq!(moved(&slot, true, heat * 51.0, 0), (100, 0));
}

#[test]
fn what_turned_hot_comes_first_whatever_it_wins() {
    // All pages are hot, the upper half lies on the slow tier: no page wins much.
    let mut slot = simple(1024, 0..1024, 512..1024);
    let mut accessed = vec![!0; 16];
    bitmap::fill(&mut accessed, 0..100, false);
    (0..4).for_each(|_| _ = slot.heat.step(&accessed, ROUND));
    let promoted = |slot: &Slot, quota_pages| {
        let plan = plan(&PlanInput {
            slots: &[slot.view()],
            dram_target: Some(Bytes::of_pages(512)),
            gap: Share::from_percent(10),
            quota_pages,
            settling: false,
            heat: 1e9,
            trickle_pages: 0,
        });
        plan.promote.iter().map(|unit| unit.gfn).collect::<Vec<u64>>()
    };
    assert_eq!(promoted(&slot, 1000), Vec::<u64>::new());
    slot.turned.record(900..910);
    assert_eq!(promoted(&slot, 1000), (900..910).collect::<Vec<u64>>());
    assert_eq!(promoted(&slot, 6), (900..903).collect::<Vec<u64>>());
    // Not when there is none that it may drive out.
    slot.recent.record(0..100);
    assert_eq!(promoted(&slot, 1000), Vec::<u64>::new());
}

#[test]
fn what_has_just_moved_stays_and_what_came_back_stays_in_any_case() {
    let mut slot = simple(1024, 0..100, 0..100);
    let promoted = |slot: &Slot, settling| {
        let limits = Limits { settling, ..percent_of_heat(10, 924, 10_000) };
        plan_of(std::slice::from_ref(slot), limits).promote.len()
    };
    slot.recent.record(0..60);
    assert_eq!((promoted(&slot, false), promoted(&slot, true)), (40, 100));
    slot.recent.next_round();
    slot.recent.record(50..70);
    assert_eq!((promoted(&slot, false), promoted(&slot, true)), (30, 90));
    (0..4).for_each(|_| slot.recent.next_round());
    assert_eq!((promoted(&slot, false), promoted(&slot, true)), (80, 100));
}

/// Two pages that were accessed now and then: which is hotter, few rounds can not tell.
#[test]
fn chance_is_no_reason_to_exchange() {
    let mut slot = simple(64, 0..0, 0..0);
    slot.heat = HeatMap::new(64, HeatParams { half_life: Duration::from_secs(60), ..PARAMS });
    slot.place.record(0..32, Place::Slow);
    let promoted =
        |slot: &Slot| plan_of(std::slice::from_ref(slot), percent_of_heat(10, 32, 100)).promote.len();
    // The slow pages in four rounds of eight, the fast ones in two.
    for round in 0..8 {
        let slow = if round % 2 == 0 { 0xffff_ffff } else { 0 };
        let fast = if round < 2 { 0xffff_ffff_u64 << 32 } else { 0 };
        slot.heat.step(&[slow | fast], ROUND);
    }
    assert_eq!(promoted(&slot), 0);
    for round in 0..72 {
        let slow = if round % 2 == 0 { 0xffff_ffff } else { 0 };
        let fast = if round % 4 == 1 { 0xffff_ffff_u64 << 32 } else { 0 };
        slot.heat.step(&[slow | fast], ROUND);
    }
    slot.heat.step(&[0], ROUND);
    slot.heat.step(&[0], ROUND);
    assert_eq!(promoted(&slot), 32);
}

#[test]
fn cold_pages_leave_until_the_target_is_met() {
    let slot = simple(1024, 0..256, 0..0);
    let plan = plan_of(&[slot], percent_of_heat(10, 300, 10_000));
    assert_eq!(pages_of(&plan.demote), 1024 - 300);
    assert!(plan.demote.iter().all(|unit| unit.gfn >= 256));
    assert!(plan.promote.is_empty());
}

#[test]
fn a_hot_page_is_kept_even_above_the_target() {
    let slot = simple(1024, 0..256, 0..0);
    let plan = plan_of(&[slot], percent_of_heat(10, 100, 10_000));
    assert_eq!(pages_of(&plan.demote), 1024 - 256);
}

#[test]
fn hot_pages_come_back_into_free_room_and_then_by_exchange() {
    // 128 hot pages on the slow tier; room for 28 under the target.
    let slot = simple(1024, 0..128, 0..128);
    let plan = plan_of(&[slot], percent_of_heat(10, 1024 - 100, 10_000));
    assert_eq!((pages_of(&plan.promote), pages_of(&plan.demote)), (128, 100));
}

#[test]
fn without_a_target_hot_pages_come_and_nothing_goes() {
    let slot = simple(1024, 0..128, 0..512);
    let limits = Limits { target: None, gap: Share::from_percent(10), quota: 10_000, settling: false };
    let plan = plan_of(&[slot], limits);
    assert_eq!((pages_of(&plan.promote), pages_of(&plan.demote)), (128, 0));
}

#[test]
fn both_directions_of_an_exchange_are_charged() {
    let slot = simple(1024, 0..128, 0..128);
    let plan = plan_of(&[slot], percent_of_heat(10, 1024 - 128, 51));
    assert_eq!((pages_of(&plan.promote), pages_of(&plan.demote)), (25, 25));
}

#[test]
fn what_was_moved_stays_known_while_it_is_unmapped() {
    let mut place = PlaceMap::new(0, 512);
    place.observe(&[!0; 8], &[], &[Level::Huge2M]);
    place.record(0..512, Place::Slow);
    // The kernel unmaps what it moves: the next harvest sees nothing.
    place.observe(&[0; 8], &[0; 8], &[Level::None]);
    assert_eq!((place.place(0), place.counts().slow), (Place::Slow, 512));
    place.observe(&[1, 0, 0, 0, 0, 0, 0, 0], &[], &[Level::Page4K]);
    assert_eq!((place.place(0), place.place(1)), (Place::Fast, Place::Slow));
    place.record(1..512, Place::Absent);
    assert_eq!((place.counts().fast, place.counts().slow, place.counts().absent), (1, 0, 511));
}

#[test]
fn a_quota_is_what_the_bandwidth_moves_and_enough_for_huge_pages() {
    let quota = |bytes, interval| quota_pages(BytesPerSecond(bytes), interval);
    assert_eq!(quota(40 << 20, Duration::from_millis(2500)), 25_600);
    assert_eq!(quota(4096, Duration::from_secs(1)), 1024, "one comes and one goes");
    assert_eq!(quota(u64::MAX, Duration::MAX), u64::MAX / 4096);
}
