// SPDX-License-Identifier: MIT OR Apache-2.0
//! What moved without being asked for, as the host keeps it in one page with what was.

use crate::migrate::MoveOutcome;
use crate::sampler::MemSlot;
use crate::units::{BYTES_PER_2M, PAGE_BYTES};
use crate::wire::Place;

use super::GuestMemory;

impl GuestMemory {
    /// Takes note of what moved along to the tier `target`, and of what moves whole from
    /// now on. A region may be in several slots, and in memory that is none of the guest's.
    pub(super) fn record_along(&mut self, outcome: &MoveOutcome, target: Place) {
        for slot in &mut self.slots {
            let info = slot.info;
            for page in outcome.along.iter().filter_map(|address| page_at(&info, *address)) {
                slot.place.record(page..page + 1, target);
                slot.recent.record(page..page + 1);
            }
            let end = info.hva + info.page_count * PAGE_BYTES;
            let is_here = |hva: &&u64| **hva < end && info.hva < **hva + BYTES_PER_2M;
            outcome.apart.iter().filter(is_here).for_each(|hva| slot.joined.remove(*hva));
            outcome.joined.iter().filter(is_here).for_each(|hva| slot.joined.insert(*hva));
        }
    }
}

/// Index of the page at an address of the VMM, if it is the slot's.
fn page_at(slot: &MemSlot, address: u64) -> Option<usize> {
    let page = address.checked_sub(slot.hva)? / PAGE_BYTES;
    (page < slot.page_count).then_some(page as usize)
}
