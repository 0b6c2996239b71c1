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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn no_plan_touches_excluded_memory(
        gfn_start in 0u64..1024, offset in 0u64..1024,
        ranges in proptest::collection::vec((0u64..6000, 1u64..700), 1..4),
        huge in proptest::collection::vec(any::<bool>(), 10), slow in any::<u64>(),
        hot in proptest::collection::vec((0u64..PAGES, 1u64..600), 1..12),
    ) {
        let hva = 0x7f00_0000_0000 + offset * PAGE_BYTES;
        let slot = MemSlot { gfn_start, page_count: PAGES, hva, id: 0, read_only: false, dirty_log: false };
        let mut frames: Vec<_> = ranges.iter().map(|(start, pages)| *start..start + pages).collect();
        frames.sort_by_key(|range| range.start);
        let excluded: BTreeSet<u64> = frames.iter().cloned().flatten().collect();
        // The host moves 2 MiB of address space at once where it has huge pages.
        let unit = |gfn: u64| (hva / PAGE_BYTES + gfn - gfn_start) / 512;
        let is_memory = |gfn: &&u64| (gfn_start..gfn_start + PAGES).contains(*gfn);
        let units: BTreeSet<u64> = excluded.iter().filter(is_memory).map(|gfn| unit(*gfn)).collect();

        let params = HeatParams { half_life: ROUND * 3, delay: ROUND };
        let mut memory = GuestMemory::new(params);
        memory.exclude(&Excluded { frames, ..Excluded::default() });
        memory.adopt(1, vec![slot]);
        let mut planned = 0;
        for (round, (start, pages)) in hot.iter().enumerate() {
            let mut harvest = Harvest::default();
            harvest.reset(gfn_start, PAGES);
            harvest.mapped.fill(!0);
            harvest.on_slow.iter_mut().enumerate().for_each(|(word, bits)| *bits = slow.rotate_left(word as u32));
            let level = |index: usize| if huge[index % huge.len()] { Level::Huge2M } else { Level::Page4K };
            harvest.levels.iter_mut().enumerate().for_each(|(index, known)| {
                *known = level(index);
                if *known == Level::Huge2M {
                    let start = (gfn_start / 512 + index as u64) * 512;
                    let pages = start.saturating_sub(gfn_start)..(start + 512 - gfn_start).min(PAGES);
                    bitmap::fill(&mut harvest.on_slow, pages.start as usize..pages.end as usize, index % 2 == 0);
                }
            });
            bitmap::fill(&mut harvest.accessed, *start as usize..(start + pages).min(PAGES) as usize, true);
            memory.observe(0, &harvest, Some(ROUND));
            memory.end_round(Some(ROUND));
            memory.release_held(ROUND * 100 * round as u32);
            let plan = memory.plan(Some(Bytes::of_pages(PAGES / 3)), Share::from_percent(1), 1 << 20);
            for (moved, target) in [(&plan.demote, Place::Slow), (&plan.promote, Place::Fast)] {
                for moved in moved {
                    let pages = moved.gfn..moved.gfn + u64::from(moved.pages);
                    prop_assert!(pages.clone().all(|gfn| !excluded.contains(&gfn)), "{:?}", moved);
                    prop_assert!(pages.clone().all(|gfn| !units.contains(&unit(gfn))), "{:?}", moved);
                    planned += 1;
                }
                // Refused and released, they are planned again; the others never are.
                let units = moved.iter().map(|unit| (*unit, Err(Refused::Busy))).collect();
                memory.record_moves(&MoveOutcome { units }, target, ROUND * 100 * round as u32);
            }
        }
        // Where much is left to move, something is.
        prop_assert!(planned > 0 || units.len() > 3 || hot.len() < 4);
    }
}
