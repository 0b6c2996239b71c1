// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the host keeps in one page of 2 MiB, though the guest's tables map it by 4 KiB.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::sampler::Level;
use crate::units::{BYTES_PER_2M, PAGE_BYTES, PAGES_PER_2M};

use super::SlotView;

/// Regions of 2 MiB of the VMM's address space that turned out to move whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Joined {
    /// Their numbers: addresses by 2 MiB.
    regions: BTreeSet<u64>,
}

impl Joined {
    /// Takes note of the region that begins at `hva`.
    pub fn insert(&mut self, hva: u64) {
        self.regions.insert(hva / BYTES_PER_2M);
    }

    /// The region that begins at `hva` moves in parts.
    pub fn remove(&mut self, hva: u64) {
        self.regions.remove(&(hva / BYTES_PER_2M));
    }

    /// Whether the region around `hva` moves whole.
    pub fn contains(&self, hva: u64) -> bool {
        self.regions.contains(&(hva / BYTES_PER_2M))
    }
}

/// A part of a slot that lies in one 2 MiB.
pub(super) struct Region {
    /// Indices in the slot.
    pub(super) pages: Range<usize>,
    /// How the guest's tables map it.
    pub(super) level: Level,
    /// The host keeps it in one page, whatever they say.
    pub(super) joined: bool,
}

impl SlotView<'_> {
    /// The slot in parts that lie in one 2 MiB each, of guest-physical space or of the
    /// VMM's: KVM maps nothing huge in a slot where these are not the same.
    pub(super) fn regions(&self) -> impl Iterator<Item = Region> + '_ {
        let first = self.hva / PAGE_BYTES;
        let is_aligned = first % PAGES_PER_2M == self.place.gfn_start() % PAGES_PER_2M;
        let by_guest = (is_aligned || self.joined.regions.is_empty()).then(|| self.place.regions());
        let by_host = by_guest.is_none().then(|| cut(first, self.place.pages()));
        let by_host = by_host.into_iter().flatten().map(|pages| (pages, Level::Page4K));
        by_guest.into_iter().flatten().chain(by_host).map(|(pages, level)| {
            let hva = self.hva + pages.start as u64 * PAGE_BYTES;
            Region { joined: self.joined.contains(hva), pages, level }
        })
    }
}

/// So many pages from number `first` on, cut at each 2 MiB.
fn cut(first: u64, pages: usize) -> impl Iterator<Item = Range<usize>> {
    let (unit, offset) = (PAGES_PER_2M as usize, (first % PAGES_PER_2M) as usize);
    (0..(offset + pages).div_ceil(unit))
        .map(move |index| (index * unit).saturating_sub(offset)..((index + 1) * unit - offset).min(pages))
}
