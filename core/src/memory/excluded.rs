// SPDX-License-Identifier: MIT OR Apache-2.0
//! What moves together with excluded memory.
//!
//! The host moves a huge page as a whole, also where the guest's tables map it in parts,
//! and huge pages lie in the VMM's address space: what shares 2 MiB of that with an
//! excluded page is excluded too. A VMM cuts one piece of its memory into several slots
//! (QEMU's pc.ram goes around the VGA window and the ROMs), so the other part of such
//! 2 MiB may lie in another slot, far away in guest-physical space; and the excluded
//! part in one that is read-only.

use std::ops::Range;

use crate::sampler::MemSlot;
use crate::units::{PAGE_BYTES, PAGES_PER_2M};

/// The 2 MiB pieces of the VMM's address space, by number, in which `frames` of these
/// slots lie: in order, none overlap.
pub(super) fn blocks<'a>(slots: impl Iterator<Item = &'a MemSlot>, frames: &[Range<u64>]) -> Vec<Range<u64>> {
    let of_slot = |slot: &MemSlot| {
        let (own, first) = (slot.frames(), slot.hva / PAGE_BYTES);
        let gfn = own.start;
        let inside = frames.iter().map(move |range| range.start.max(own.start)..range.end.min(own.end));
        let inside = inside.filter(|range| range.start < range.end);
        inside.map(move |range| {
            let address = |frame: u64| first + (frame - gfn);
            address(range.start) / PAGES_PER_2M..address(range.end).div_ceil(PAGES_PER_2M)
        })
    };
    let mut found: Vec<Range<u64>> = slots.flat_map(of_slot).collect();
    found.sort_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in found {
        match joined.last_mut().filter(|last| range.start <= last.end) {
            Some(last) => last.end = last.end.max(range.end),
            None => joined.push(range),
        }
    }
    joined
}

/// The pages of a slot, by index, that lie in these pieces.
pub(super) fn pages_in(slot: &MemSlot, blocks: &[Range<u64>]) -> Vec<Range<usize>> {
    let first = slot.hva / PAGE_BYTES;
    let index = |address: u64| address.saturating_sub(first).min(slot.page_count) as usize;
    let pages = blocks.iter().map(|block| index(block.start * PAGES_PER_2M)..index(block.end * PAGES_PER_2M));
    pages.filter(|pages| !pages.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// QEMU's pc.ram: below the VGA window, a ROM shadow, and the rest.
    #[test]
    fn what_shares_2_mib_of_the_vmm_with_an_excluded_page_is_found_in_every_slot() {
        let slot = |gfn_start: u64, page_count: u64, read_only: bool| MemSlot {
            gfn_start,
            page_count,
            hva: 0x7f00_0000_0000 + gfn_start * PAGE_BYTES,
            id: 0,
            read_only,
            dirty_log: false,
        };
        let slots = [slot(0, 0xa0, false), slot(0xc0, 0x20, true), slot(0x100, 0x700, false)];
        let high = MemSlot { hva: slots[0].hva + 0x800 * PAGE_BYTES, ..slot(0x10_0000, 0x300, false) };
        let held = |frames: &[Range<u64>]| {
            let blocks = blocks(slots.iter().chain([&high]), frames);
            slots.iter().chain([&high]).map(|slot| pages_in(slot, &blocks)).collect::<Vec<_>>()
        };
        let one = |pages: Range<usize>| Vec::from([pages]);
        let low = [one(0..0xa0), one(0..0x20), one(0..0x100), Vec::new()];
        assert_eq!(held(std::slice::from_ref(&(0..0xa0))), low);
        assert_eq!(held(std::slice::from_ref(&(0xc0..0xc1))), low, "the ROM's frame alone");
        assert_eq!(held(std::slice::from_ref(&(0xa0..0xc0))), [vec![], vec![], vec![], vec![]]);
        let both = held(&[0x7ff..0x800, 0x10_0000..0x10_0001]);
        assert_eq!(both, [Vec::new(), Vec::new(), one(0x500..0x700), one(0..0x200)]);
        assert_eq!(held(&[0..1, 0x200..0x201])[2], one(0..0x300), "neighbours are one");
    }
}
