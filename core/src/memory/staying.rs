// SPDX-License-Identifier: MIT OR Apache-2.0
//! Why memory on the fast tier can not leave it.

use std::fmt;

use crate::bitmap;
use crate::plan::{SlotView, Times};
use crate::sampler::Level;
use crate::units::{Bytes, format_duration};

use super::{GuestMemory, HeatParams};

/// Pages of the fast tier that no plan takes from there now, each by its first cause. A
/// huge page moves as a whole, so any of them in it keeps all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Staying {
    params: HeatParams,
    /// In pages of 1 GiB.
    pub giant: u64,
    /// Excluded by the policy, with what moves together with that.
    pub excluded: u64,
    /// Refused lately, or left alone because writes are logged.
    pub held: u64,
    /// Moved in one of the last rounds.
    pub moved: u64,
    /// All others: with a delay, what was accessed within it stays.
    pub others: u64,
}

impl GuestMemory {
    /// Why what lies on the fast tier stays there. Looks at each word of the bitmaps.
    pub fn staying(&self) -> Staying {
        let mut all = Staying { params: self.params, giant: 0, excluded: 0, held: 0, moved: 0, others: 0 };
        for slot in &self.slots {
            let view = slot.view();
            for (pages, level) in slot.place.regions() {
                for (index, mask) in bitmap::masks(pages) {
                    all.add(&view, index, mask, level == Level::Huge1G);
                }
            }
            // They count as held so far.
            for (index, mask) in slot.holds.excluded().flat_map(bitmap::masks) {
                let excluded = u64::from((slot.place.words(index).0 & mask).count_ones());
                all.excluded += excluded;
                all.held = all.held.saturating_sub(excluded);
            }
        }
        all
    }
}

impl Staying {
    fn add(&mut self, slot: &SlotView<'_>, index: usize, mask: u64, is_giant: bool) {
        let fast = slot.place.words(index).0 & mask;
        let held = bitmap::word(slot.held, index);
        let moved = if slot.recent.is_empty() { 0 } else { slot.recent.moved(index, Times::Once) };
        let mut left = fast;
        let mut take = |mask: u64, of: &mut u64| {
            *of += u64::from((left & mask).count_ones());
            left &= !mask;
        };
        take(held, &mut self.held);
        take(if is_giant { !0 } else { 0 }, &mut self.giant);
        take(moved, &mut self.moved);
        take(!0, &mut self.others);
    }
}

/// The causes, as a list in a sentence; nothing when there is none.
impl fmt::Display for Staying {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let delay = self.params.delay;
        let in_use = format!("in use, as far as it was accessed within {}", format_duration(delay));
        let causes = [
            (self.excluded, "excluded by the policy"),
            (self.held, "refused by the kernel a while ago, or its writes are logged"),
            (self.giant, "in pages of 1 GiB, which never move"),
            (self.moved, "moved a few rounds ago"),
            (if delay.is_zero() { 0 } else { self.others }, in_use.as_str()),
        ];
        for (index, (pages, why)) in causes.iter().filter(|(pages, _)| *pages > 0).enumerate() {
            let comma = if index > 0 { ", " } else { "" };
            write!(f, "{comma}{} {why}", Bytes::of_pages(*pages))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::tests::{harvest, info, params};
    use super::*;
    use crate::migrate::{MoveOutcome, Refused};
    use crate::plan::MoveUnit;
    use crate::policy::Excluded;
    use crate::wire::Place;

    #[test]
    fn each_page_of_the_fast_tier_has_its_first_cause() {
        let mut memory = GuestMemory::new(params());
        memory.exclude(&Excluded { frames: vec![600..601, 5000..5001], ..Excluded::default() });
        memory.adopt(1, vec![info(0, 2048)]);
        let mut seen = harvest(&info(0, 2048), &[]);
        bitmap::fill(&mut seen.mapped, 0..2000, true);
        bitmap::fill(&mut seen.on_slow, 0..10, true);
        seen.levels = vec![Level::Page4K, Level::Page4K, Level::Huge1G, Level::Page4K];
        memory.observe(0, &seen, None);
        let unit = |gfn: u64, result| (MoveUnit { gfn, hva: info(0, 1).hva + gfn * 4096, pages: 1 }, result);
        let units = (100..107).map(|gfn| unit(gfn, Err(Refused::Busy)));
        let units = units.chain((200..203).map(|gfn| unit(gfn, Ok(())))).collect();
        memory.record_moves(&MoveOutcome { units, ..MoveOutcome::default() }, Place::Fast, Duration::ZERO);
        let found = memory.staying();
        let expected =
            Staying { excluded: 512, held: 7, giant: 512, moved: 3, others: 2000 - 10 - 1034, ..found };
        assert_eq!(found, expected);
        let pages = found.excluded + found.held + found.giant + found.moved + found.others;
        assert_eq!(pages, memory.places().fast);
        assert_eq!(
            found.to_string(),
            "2 MiB excluded by the policy, 28 KiB refused by the kernel a while ago, or its writes \
             are logged, 2 MiB in pages of 1 GiB, which never move, 12 KiB moved a few rounds ago, \
             3.73 MiB in use, as far as it was accessed within 1 s"
        );
        memory.set_params(HeatParams { delay: Duration::ZERO, ..params() });
        assert!(!memory.staying().to_string().contains("accessed"), "without a delay all of it is idle");
    }
}
