// SPDX-License-Identifier: MIT OR Apache-2.0
//! What moves along with a page, because the host keeps both in one larger page.
//!
//! KVM may map a transparent huge page by 4 KiB: it splits what the guest executes where
//! its NX huge pages are on, and what was dirty-logged, and it maps nothing huge where
//! guest-physical and virtual addresses are not aligned alike. move_pages(2) on any
//! address of such a page moves all of it, and tells of that address alone. So pages
//! nobody asked to move are asked for their place before a call and after it.
//!
//! How large the host's pages are it tells nobody cheaply (PAGEMAP_SCAN came with Linux
//! 6.7, page flags need physical addresses). So a region of 2 MiB is unknown at first:
//! all of it is asked, and it counts as 2 MiB to the bounds of a call. Once nothing
//! moved along it is known to be of small pages, and two neighbours are asked only,
//! which tell when it has been collapsed since.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    BATCH_BYTES, KernelMover, LARGEST_PAGE, MoveOutcome, Mover, ProcessGone, Refused, batch, unit_bytes,
};
use crate::bitmap;
use crate::plan::MoveUnit;
use crate::units::{PAGE_BYTES, PAGES_PER_2M};

/// Pages asked in a region that is known to be of small pages.
const NEIGHBOURS: usize = 2;

const PAGES: usize = PAGES_PER_2M as usize;

/// The number of the region of 2 MiB that the address is in.
pub(super) fn region_of(address: u64) -> u64 {
    address / LARGEST_PAGE
}

/// A page that is in no unit of a call.
#[derive(Clone, Copy, Debug)]
struct Witness {
    address: u64,
    before: Option<u32>,
    after: Option<u32>,
}

impl Witness {
    /// It moved to the node.
    fn came(&self, node: u32) -> bool {
        self.after == Some(node) && self.before.is_some_and(|before| before != node)
    }

    /// It is no part of a page that moved to the node.
    fn stayed(&self, node: u32) -> bool {
        self.before.is_some() && !self.came(node)
    }
}

/// What is known of the regions of a process, by their numbers.
#[derive(Debug, Default)]
pub(super) struct Regions {
    /// A page moved alone, the last time that one did. Eight bytes for each 2 MiB.
    small: BTreeSet<u64>,
}

impl Regions {
    /// Units for one system call, off the front, as [`batch`], where the first single page
    /// of a region may move all of that.
    pub(super) fn batch<'a>(&self, units: &'a [MoveUnit]) -> &'a [MoveUnit] {
        let units = batch(units);
        let (mut bytes, mut unknown) = (0, BTreeSet::new());
        let fits = |unit: &&MoveUnit| {
            let region = region_of(unit.hva);
            bytes += match unit.pages == 1 && !self.small.contains(&region) {
                true if unknown.insert(region) => LARGEST_PAGE,
                true => 0,
                false => unit_bytes(unit),
            };
            bytes <= BATCH_BYTES
        };
        let count = units.iter().take_while(fits).count().max(1);
        units.get(..count).unwrap_or(units)
    }

    /// Addresses of the pages to ask about, in order: of regions in which single pages
    /// are to move, and in no unit themselves.
    pub(super) fn witnesses(&self, units: &[MoveUnit]) -> Vec<u64> {
        let mut taken: BTreeMap<u64, [u64; PAGES / bitmap::WORD_BITS]> = BTreeMap::new();
        for unit in units.iter().filter(|unit| unit.pages == 1) {
            let page = (unit.hva / PAGE_BYTES % PAGES_PER_2M) as usize;
            bitmap::fill(taken.entry(region_of(unit.hva)).or_default(), page..page + 1, true);
        }
        let mut addresses = Vec::new();
        for (region, taken) in taken {
            let free = |page: &usize| !bitmap::get(&taken, *page);
            let address = |page: usize| region * LARGEST_PAGE + page as u64 * PAGE_BYTES;
            if self.small.contains(&region) {
                addresses.extend(neighbours(&taken).into_iter().map(address));
            } else {
                addresses.extend((0..PAGES).filter(free).map(address));
            }
        }
        addresses
    }

    /// Takes in what became of the witnesses of one region, in which a single page moved
    /// to the node. Whether only neighbours were asked, and the rest of the region is to
    /// be asked as well, since it has been collapsed.
    fn learn(&mut self, region: u64, seen: &[Witness], node: u32, out: &mut MoveOutcome) -> bool {
        let came = seen.iter().filter(|witness| witness.came(node));
        let along: Vec<u64> = came.map(|witness| witness.address).collect();
        if along.is_empty() {
            // One that lay on the node before is none of what moved there either.
            if seen.iter().any(|witness| witness.before.is_some()) {
                self.note_small(region, out);
            }
            return false;
        }
        out.along.extend(along);
        let collapsed = self.small.remove(&region);
        if !collapsed && !seen.iter().any(|witness| witness.stayed(node)) {
            out.joined.push(region * LARGEST_PAGE);
        }
        collapsed
    }

    /// A page of the region moved alone.
    pub(super) fn note_small(&mut self, region: u64, outcome: &mut MoveOutcome) {
        if self.small.insert(region) {
            outcome.apart.push(region * LARGEST_PAGE);
        }
    }
}

/// The free pages next to the first that is taken.
fn neighbours(taken: &[u64]) -> Vec<usize> {
    let first = (0..PAGES).find(|page| bitmap::get(taken, *page)).unwrap_or_default();
    let around = (1..PAGES).flat_map(|distance| [first.checked_sub(distance), Some(first + distance)]);
    let free = |page: &usize| *page < PAGES && !bitmap::get(taken, *page);
    let mut found: Vec<usize> = around.flatten().filter(free).take(NEIGHBOURS).collect();
    found.sort_unstable();
    found
}

impl KernelMover {
    /// Finds what moved along with single pages, of these witnesses with their places
    /// before the move.
    pub(super) fn find_along(
        &mut self,
        units: &[MoveUnit],
        results: &[Result<(), Refused>],
        witnesses: impl Iterator<Item = (u64, Option<u32>)>,
        node: u32,
        outcome: &mut MoveOutcome,
    ) -> Result<(), ProcessGone> {
        let moved = units.iter().zip(results).filter(|(unit, result)| unit.pages == 1 && result.is_ok());
        let moved: BTreeSet<u64> = moved.map(|(unit, _)| unit.hva).collect();
        let regions: BTreeSet<u64> = moved.iter().map(|address| region_of(*address)).collect();
        let asked: Vec<_> = witnesses.filter(|(address, _)| regions.contains(&region_of(*address))).collect();
        let addresses: Vec<u64> = asked.iter().map(|(address, _)| *address).collect();
        let mut nodes = Vec::new();
        self.places(&addresses, &mut nodes)?;
        let seen: Vec<Witness> = asked
            .into_iter()
            .zip(nodes)
            .map(|((address, before), after)| Witness { address, before, after })
            .collect();
        for seen in seen.chunk_by(|a, b| region_of(a.address) == region_of(b.address)) {
            let Some(region) = seen.first().map(|witness| region_of(witness.address)) else { continue };
            if self.regions.learn(region, seen, node, outcome) {
                let is_new = |address: &u64| {
                    !moved.contains(address) && !seen.iter().any(|witness| witness.address == *address)
                };
                self.find_collapsed(region, is_new, node, outcome)?;
            }
        }
        Ok(())
    }

    /// Where nothing of a region stayed behind, though small pages were thought to be
    /// there, all of it moved. Else the next harvest tells.
    fn find_collapsed(
        &mut self,
        region: u64,
        is_new: impl Fn(&u64) -> bool,
        node: u32,
        outcome: &mut MoveOutcome,
    ) -> Result<(), ProcessGone> {
        let first = region * LARGEST_PAGE;
        let all = (first..first + LARGEST_PAGE).step_by(PAGE_BYTES as usize);
        let addresses: Vec<u64> = all.filter(is_new).collect();
        let mut nodes = Vec::new();
        self.places(&addresses, &mut nodes)?;
        if nodes.len() == addresses.len() && nodes.iter().flatten().all(|place| *place == node) {
            let there = addresses.iter().zip(nodes).filter(|(_, place)| place.is_some());
            outcome.along.extend(there.map(|(address, _)| *address));
            outcome.joined.push(first);
        }
        Ok(())
    }
}
