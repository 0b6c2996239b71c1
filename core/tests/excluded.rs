// SPDX-License-Identifier: MIT OR Apache-2.0
//! No plan touches excluded memory, whatever the guest does and however it is mapped.

use std::collections::BTreeSet;
use std::time::Duration;

use ept_virt_core::bitmap;
use ept_virt_core::heat::HeatParams;
use ept_virt_core::memory::GuestMemory;
use ept_virt_core::migrate::{MoveOutcome, Refused};
use ept_virt_core::policy::Excluded;
use ept_virt_core::sampler::{Harvest, Level, MemSlot};
use ept_virt_core::units::{Bytes, PAGE_BYTES, Share};
use ept_virt_core::wire::Place;
use proptest::prelude::*;

const ROUND: Duration = Duration::from_secs(1);
const PAGES: u64 = 4096;

/// One piece of the VMM's memory from `hva` on, cut into slots as QEMU cuts pc.ram: each
/// lies `hole` frames behind the end of the one before, and some can only be read.
fn slots(gfn_start: u64, hva: u64, cuts: &[(u64, u64, bool)]) -> Vec<MemSlot> {
    let (mut slots, mut gfn_start, mut done) = (Vec::new(), gfn_start, 0);
    for (pages, hole, read_only) in cuts.iter().copied().chain([(PAGES, 0, false)]) {
        let page_count = pages.min(PAGES - done);
        let hva = hva + done * PAGE_BYTES;
        if page_count > 0 {
            slots.push(MemSlot { gfn_start, page_count, hva, id: 0, read_only, dirty_log: false });
        }
        gfn_start += page_count + hole;
        done += page_count;
    }
    slots
}

/// What a round finds in a slot.
fn harvest(slot: &MemSlot, slow: u64, huge: &[bool], hot: std::ops::Range<u64>) -> Harvest {
    let (gfn_start, page_count) = (slot.gfn_start, slot.page_count);
    let within = |gfn: u64| gfn.saturating_sub(gfn_start).min(page_count) as usize;
    let mut harvest = Harvest::default();
    harvest.reset(gfn_start, page_count);
    bitmap::fill(&mut harvest.mapped, 0..page_count as usize, true);
    harvest.on_slow.iter_mut().enumerate().for_each(|(word, bits)| *bits = slow.rotate_left(word as u32));
    for (index, known) in harvest.levels.iter_mut().enumerate() {
        *known = if huge[index % huge.len()] { Level::Huge2M } else { Level::Page4K };
        if *known == Level::Huge2M {
            let start = (gfn_start / 512 + index as u64) * 512;
            bitmap::fill(&mut harvest.on_slow, within(start)..within(start + 512), index % 2 == 0);
        }
    }
    bitmap::fill(&mut harvest.accessed, within(hot.start)..within(hot.end), true);
    harvest
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_plan_touches_excluded_memory(
        gfn_start in 0u64..1024, offset in 0u64..1024,
        cuts in proptest::collection::vec((1u64..1500, 0u64..600, any::<bool>()), 0..4),
        ranges in proptest::collection::vec((0u64..6000, 1u64..700), 1..4),
        huge in proptest::collection::vec(any::<bool>(), 10), slow in any::<u64>(),
        hot in proptest::collection::vec((0u64..6000, 1u64..600), 1..12),
    ) {
        let slots = slots(gfn_start, 0x7f00_0000_0000 + offset * PAGE_BYTES, &cuts);
        let mut frames: Vec<_> = ranges.iter().map(|(start, pages)| *start..start + pages).collect();
        frames.sort_by_key(|range| range.start);
        let excluded: BTreeSet<u64> = frames.iter().cloned().flatten().collect();
        // The host moves 2 MiB of address space at once where it has huge pages.
        let unit = |slot: &MemSlot, gfn: u64| (slot.hva / PAGE_BYTES + gfn - slot.gfn_start) / 512;
        let gfns = |slot: &MemSlot| slot.gfn_start..slot.gfn_start + slot.page_count;
        let is_excluded = |gfn: &u64| excluded.contains(gfn);
        let units: BTreeSet<u64> =
            slots.iter().flat_map(|slot| gfns(slot).filter(is_excluded).map(|gfn| unit(slot, gfn))).collect();
        let placed: Vec<MemSlot> = slots.iter().filter(|slot| !slot.read_only).copied().collect();
        let is_held = |slot: &MemSlot, gfn: u64| units.contains(&unit(slot, gfn));
        let held: u64 =
            placed.iter().map(|slot| gfns(slot).filter(|gfn| is_held(slot, *gfn)).count() as u64).sum();

        let params = HeatParams { half_life: ROUND * 3, delay: ROUND };
        let mut memory = GuestMemory::new(params);
        memory.exclude(&Excluded { frames, ..Excluded::default() });
        memory.adopt(1, slots);
        prop_assert_eq!(memory.excluded_bytes(), Bytes::of_pages(held), "that, and no more");
        let all = memory.bytes().pages();
        for (round, (start, pages)) in hot.iter().enumerate() {
            for (index, slot) in placed.iter().enumerate() {
                memory.observe(index, &harvest(slot, slow, &huge, *start..start + pages), Some(ROUND));
            }
            memory.end_round(Some(ROUND.into()));
            memory.release_held(ROUND * 100 * round as u32);
            let plan = memory.plan(Some(Bytes::of_pages(all / 3)), Share::from_percent(1), 1 << 20);
            for (moved, target) in [(&plan.demote, Place::Slow), (&plan.promote, Place::Fast)] {
                for moved in moved {
                    let slot = placed.iter().find(|slot| gfns(slot).contains(&moved.gfn)).unwrap();
                    let pages = moved.gfn..moved.gfn + u64::from(moved.pages);
                    prop_assert!(!pages.clone().any(|gfn| excluded.contains(&gfn)), "{:?}", moved);
                    prop_assert!(!pages.clone().any(|gfn| is_held(slot, gfn)), "{:?}", moved);
                }
                // Refused and released, they are planned again; the others never are.
                let units = moved.iter().map(|unit| (*unit, Err(Refused::Busy))).collect();
                memory.record_moves(&MoveOutcome { units, ..MoveOutcome::default() }, target, ROUND * 100 * round as u32);
            }
        }
        // All that is not excluded goes, when it is idle and nothing may stay.
        let later = ROUND * 10_000;
        for round in 0..4 {
            for (index, slot) in placed.iter().enumerate() {
                memory.observe(index, &harvest(slot, 0, &[false], 0..0), Some(ROUND));
            }
            memory.end_round(Some(ROUND.into()));
            memory.release_held(later * (round + 1));
        }
        let plan = memory.plan(Some(Bytes(0)), Share::from_percent(1), 1 << 20);
        let gone: BTreeSet<u64> = plan.demote.iter().map(|unit| unit.gfn).collect();
        let free = placed.iter().flat_map(|slot| gfns(slot).filter(|gfn| !is_held(slot, *gfn)));
        prop_assert!(gone.iter().copied().eq(free));
    }
}
