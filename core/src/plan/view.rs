// SPDX-License-Identifier: MIT OR Apache-2.0
//! A domain's memory with heat and place, and the pictures made from it.

use std::ops::Range;

use crate::bitmap::{self, WORD_BITS};
use crate::heat::{HeatMap, class_of};
use crate::units::PAGE_BYTES;
use crate::wire::{Class, MapRun, Place, StripCell};

use super::{Joined, PlaceMap, Recent};

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
    /// What moved in the last rounds.
    pub recent: &'a Recent,
    /// What turned hot in the last rounds: it comes first, whatever it wins.
    pub turned: &'a Recent,
    /// What moves whole, whatever the guest's tables say.
    pub joined: &'a Joined,
}

impl SlotView<'_> {
    /// Class and place that all `pages` of one block of 64 have, if they do.
    fn common(&self, pages: Range<usize>) -> Option<(Class, Place)> {
        let (low, high) = self.heat.extremes(pages.clone());
        let class = class_of(low);
        let place = self.place.common_place(pages)?;
        (class == class_of(high)).then_some((class, place))
    }
}

/// The domain's pages as runs of one class and place, in order of the slots; none when
/// there are more than `most`, which are not gathered.
pub fn map_runs(slots: &[SlotView<'_>], most: usize) -> Option<Vec<MapRun>> {
    let mut runs: Vec<MapRun> = Vec::new();
    for slot in slots {
        let first = runs.len();
        let extend =
            |runs: &mut Vec<MapRun>, page: usize, pages: usize, class: Class, place: Place| match runs
                [first..]
                .last_mut()
            {
                Some(run) if run.class == class && run.place == place => run.pages += pages as u64,
                _ => runs.push(MapRun {
                    gfn: slot.place.gfn_start() + page as u64,
                    pages: pages as u64,
                    hva: slot.hva + page as u64 * PAGE_BYTES,
                    class,
                    place,
                }),
            };
        for block in blocks(0..slot.place.pages()) {
            match slot.common(block.clone()) {
                Some((class, place)) => extend(&mut runs, block.start, block.len(), class, place),
                None => block.for_each(|page| {
                    extend(&mut runs, page, 1, slot.heat.class(page), slot.place.place(page));
                }),
            }
            if runs.len() > most {
                return None;
            }
        }
    }
    Some(runs)
}

/// The domain's memory in `cells` equal parts, or one part for each page when
/// it has fewer pages.
pub fn strip(slots: &[SlotView<'_>], cells: usize) -> Vec<StripCell> {
    let total: usize = slots.iter().map(|slot| slot.place.pages()).sum();
    let cells = cells.min(total);
    let mut strip = Vec::with_capacity(cells);
    let mut tally = Tally::new();
    let mut done = 0;
    for slot in slots {
        let mut page = 0;
        while page < slot.place.pages() {
            // Multiplied before divided, so that the parts differ by a page at most.
            let cell_end = (strip.len() + 1) * total / cells;
            let pages = (cell_end - done).min(slot.place.pages() - page);
            tally.add(slot, page..page + pages);
            page += pages;
            done += pages;
            if done == cell_end {
                strip.push(tally.take());
            }
        }
    }
    strip
}

/// Pages of one part of the memory.
struct Tally {
    pages: u64,
    slow: u64,
    resident: u64,
    /// Pages by the upper 8 bits of their temperature.
    heat: [u64; 256],
}

impl Tally {
    fn new() -> Self {
        Tally { pages: 0, slow: 0, resident: 0, heat: [0; 256] }
    }

    fn add(&mut self, slot: &SlotView<'_>, pages: Range<usize>) {
        self.pages += pages.len() as u64;
        for (index, mask) in bitmap::masks(pages.clone()) {
            let (fast, slow) = slot.place.words(index);
            self.slow += u64::from((slow & mask).count_ones());
            self.resident += u64::from(((fast | slow) & mask).count_ones());
        }
        let bin = |temperature: u16| usize::from(temperature >> 8);
        for block in blocks(pages) {
            let (low, high) = slot.heat.extremes(block.clone());
            if bin(low) == bin(high) {
                self.heat[bin(low)] += block.len() as u64;
            } else {
                block.for_each(|page| self.heat[bin(slot.heat.temperature(page))] += 1);
            }
        }
    }

    fn take(&mut self) -> StripCell {
        let share = |part: u64, whole: u64| (part * 255).div_ceil(whole.max(1)).min(255) as u8;
        let eighth = self.pages.div_ceil(8).max(1);
        let (mut left, mut sum) = (eighth, 0);
        for (value, pages) in self.heat.iter().enumerate().rev() {
            let taken = left.min(*pages);
            sum += taken * value as u64;
            left -= taken;
        }
        let cell = StripCell {
            heat: (sum / eighth) as u8,
            slow: share(self.slow, self.resident),
            resident: share(self.resident, self.pages),
        };
        *self = Tally::new();
        cell
    }
}

/// `pages` cut where words of a bitmap end.
fn blocks(pages: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    (pages.start / WORD_BITS..bitmap::words_for(pages.end)).map(move |index| {
        let (start, end) = (index * WORD_BITS, (index + 1) * WORD_BITS);
        start.max(pages.start)..end.min(pages.end)
    })
}
