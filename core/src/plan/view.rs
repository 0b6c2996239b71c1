// SPDX-License-Identifier: MIT OR Apache-2.0
//! A domain's memory with heat and place, and the pictures made from it.

use crate::heat::{HeatMap, MAX_TEMPERATURE};
use crate::units::PAGE_BYTES;
use crate::wire::{MapRun, Place, StripCell};

use super::PlaceMap;

/// One memory slot. Heat and place count the same pages.
#[derive(Clone, Copy, Debug)]
pub struct SlotView<'a> {
    /// Address of the first page in the VMM.
    pub hva: u64,
    /// How hot the pages are.
    pub heat: &'a HeatMap,
    /// Where they lie.
    pub place: &'a PlaceMap,
    /// Bitmap of pages that are not to be planned now, as those that were
    /// refused lately; may be shorter than the slot.
    pub held: &'a [u64],
}

/// The domain's pages as runs of one class and place, in order of the slots.
pub fn map_runs(slots: &[SlotView<'_>]) -> Vec<MapRun> {
    let mut runs = Vec::new();
    for slot in slots {
        let mut open: Option<MapRun> = None;
        for page in 0..slot.place.pages() {
            let (class, place) = (slot.heat.class(page), slot.place.place(page));
            match &mut open {
                Some(run) if run.class == class && run.place == place => run.pages += 1,
                _ => runs.extend(open.replace(MapRun {
                    gfn: slot.place.gfn_start() + page as u64,
                    pages: 1,
                    hva: slot.hva + page as u64 * PAGE_BYTES,
                    class,
                    place,
                })),
            }
        }
        runs.extend(open);
    }
    runs
}

/// The domain's memory in `cells` equal parts, or one part for each page when
/// it has fewer pages.
pub fn strip(slots: &[SlotView<'_>], cells: usize) -> Vec<StripCell> {
    let total: usize = slots.iter().map(|slot| slot.place.pages()).sum();
    let cells = cells.min(total);
    let mut pages = slots.iter().flat_map(|slot| {
        (0..slot.place.pages()).map(|page| (slot.heat.temperature(page), slot.place.place(page)))
    });
    (1..=cells)
        .map(|cell| {
            // Multiplied before divided, so that the parts differ by a page at most.
            let length = cell * total / cells - (cell - 1) * total / cells;
            strip_cell(pages.by_ref().take(length), length)
        })
        .collect()
}

fn strip_cell(pages: impl Iterator<Item = (u16, Place)>, length: usize) -> StripCell {
    let mut temperatures = Vec::with_capacity(length);
    let (mut slow, mut resident) = (0, 0);
    for (temperature, place) in pages {
        temperatures.push(temperature);
        slow += usize::from(place == Place::Slow);
        resident += usize::from(place != Place::Absent);
    }
    let eighth = length.div_ceil(8);
    if temperatures.len() > eighth {
        temperatures.select_nth_unstable_by(eighth, |a, b| b.cmp(a));
        temperatures.truncate(eighth);
    }
    let sum: u64 = temperatures.iter().map(|temperature| u64::from(*temperature)).sum();
    StripCell {
        heat: share_of_255(sum, temperatures.len() as u64 * u64::from(MAX_TEMPERATURE)),
        slow: share_of_255(slow as u64, resident as u64),
        resident: share_of_255(resident as u64, length as u64),
    }
}

/// Rounded up, so that 0 means none at all.
fn share_of_255(part: u64, whole: u64) -> u8 {
    (part * 255).div_ceil(whole.max(1)).min(255) as u8
}
