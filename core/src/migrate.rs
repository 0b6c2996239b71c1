// SPDX-License-Identifier: MIT OR Apache-2.0
//! Moving pages of a running guest between NUMA nodes, with move_pages(2).
//!
//! Tried and moved are counted apart: every unit that was tried has a result,
//! and one that was not moved has a reason. The kernel keeps the guest's data
//! whole whatever happens here; a page that can not be moved stays where it is.

mod along;
mod backoff;
mod bucket;
mod kernel;
mod mappings;
mod moves;
mod shared_bucket;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use log::warn;

use crate::plan::MoveUnit;
use crate::process::Process;
use crate::topology::{NodeMemory, NodeSet, TopologyError};
use crate::units::{BYTES_PER_2M, PAGE_BYTES};
use crate::wire::Refusal;

pub use backoff::Backoff;
pub use bucket::TokenBucket;
pub use moves::Moves;
pub use shared_bucket::SharedBucket;

use along::{Regions, region_of};
use kernel::LinuxPages;

/// Units in one system call: bounds how long a cancelled move goes on, where each takes
/// as long whatever its size.
pub const BATCH_UNITS: usize = 512;

/// Bytes in one system call: bounds how long a cancelled move goes on, where copying is
/// what takes the time. Less than 100 ms from 160 MiB/s on; a kernel copies several
/// times as much between nodes.
pub const BATCH_BYTES: u64 = 16 << 20;

/// Part of a node's memory that moves leave free, for the host's own needs.
const RESERVE_DIVISOR: u64 = 64;

/// What stands in the status array where the kernel wrote nothing.
const STATUS_UNKNOWN: i32 = i32::MIN;

/// Why a unit was not moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Refused {
    /// It lies on a target node already.
    AlreadyThere,
    /// The kernel could not take it from its users.
    Busy,
    /// Another error of the kernel.
    Failed,
    /// A page of hugetlbfs, for which no target node has a free one.
    HugetlbFull,
    /// No target node has room.
    NodeFull,
    /// The process may not have memory on the node, or we may not move it.
    NotPermitted,
    /// No page is there.
    NotPresent,
    /// Other processes map it too.
    Shared,
    /// Part of a page of 1 GiB, which would move as a whole.
    TooLarge,
}

impl Refused {
    /// For programs, as [`Refusal::reason`].
    pub fn name(self) -> &'static str {
        match self {
            Self::AlreadyThere => "already-there",
            Self::Busy => "busy",
            Self::Failed => "failed",
            Self::HugetlbFull => "hugetlb-full",
            Self::NodeFull => "node-full",
            Self::NotPermitted => "not-permitted",
            Self::NotPresent => "not-present",
            Self::Shared => "shared",
            Self::TooLarge => "too-large",
        }
    }

    /// For people, as [`Refusal::explanation`].
    pub fn explanation(self) -> &'static str {
        match self {
            Self::AlreadyThere => "the page lay on the target tier already",
            Self::Busy => {
                "in use by a device or the kernel (pinned for DMA, under I/O or being written back); tried again later, and more seldom each time"
            }
            Self::Failed => "the kernel could not move the page; the daemon's log has the error",
            Self::HugetlbFull => {
                "a page of hugetlbfs, and no node of the target tier has a free one of its size: give it some in /sys/devices/system/node/node*/hugepages/"
            }
            Self::NodeFull => {
                "no node of the target tier has room; a part of each node stays free for the host"
            }
            Self::NotPermitted => {
                "the target node is outside of the domain's cpuset: <numatune> with mode='strict' allows only its nodeset. Add the node to it, or use mode='preferred'. If there is no <numatune>, the daemon lacks CAP_SYS_PTRACE"
            }
            Self::NotPresent => "the page was freed, swapped out or never used",
            Self::Shared => {
                "mapped more than once: by other processes (vhost-user, ivshmem) or merged by KSM"
            }
            Self::TooLarge => {
                "part of a page of 1 GiB of hugetlbfs, which moves as a whole or not at all: give the domain pages of 2 MiB"
            }
        }
    }

    /// Meaning of a negative entry of the status array.
    fn from_status(errno: i32) -> Self {
        match errno {
            libc::EACCES => Self::Shared,
            libc::EBUSY => Self::Busy,
            libc::ENOMEM => Self::NodeFull,
            // EFAULT: the zero page, or nothing is mapped there any more.
            libc::ENOENT | libc::EFAULT => Self::NotPresent,
            _ => Self::Failed,
        }
    }

    /// Meaning of the error of a whole call, which is another than that of a
    /// page: EACCES is the cpuset's.
    fn from_call(errno: i32) -> Self {
        match errno {
            libc::EACCES | libc::EPERM => Self::NotPermitted,
            libc::ENOMEM => Self::NodeFull,
            libc::EBUSY | libc::EAGAIN => Self::Busy,
            _ => Self::Failed,
        }
    }
}

/// The process whose pages were to be moved has exited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the process has exited")]
pub struct ProcessGone;

/// Result for each unit that was tried.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MoveOutcome {
    /// In no certain order. A unit of 512 pages that the kernel had split in the
    /// meantime stands here as single pages.
    pub units: Vec<(MoveUnit, Result<(), Refused>)>,
    /// Addresses of 4 KiB pages that are in no unit and moved all the same: the host
    /// keeps them in one page with one that is.
    pub along: Vec<u64>,
    /// Addresses of 2 MiB that turned out to be one page of the host, which moves whole.
    pub joined: Vec<u64>,
    /// Addresses of 2 MiB that turned out not to be, or no longer.
    pub apart: Vec<u64>,
    /// Units at the end that were not tried.
    pub left: usize,
}

impl MoveOutcome {
    /// Bytes tried: moved and refused.
    pub fn tried_bytes(&self) -> u64 {
        self.units.iter().map(|(unit, _)| unit_bytes(unit)).sum::<u64>() + self.along_bytes()
    }

    /// Bytes moved.
    pub fn moved_bytes(&self) -> u64 {
        let moved = self.units.iter().filter(|(_, result)| result.is_ok());
        moved.map(|(unit, _)| unit_bytes(unit)).sum::<u64>() + self.along_bytes()
    }

    /// Bytes moved that nobody asked for.
    pub fn along_bytes(&self) -> u64 {
        self.along.len() as u64 * PAGE_BYTES
    }
}

/// Bytes refused, by reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RefusedBytes(BTreeMap<Refused, u64>);

impl RefusedBytes {
    /// Adds what `outcome` refused.
    pub fn add(&mut self, outcome: &MoveOutcome) {
        for (unit, result) in &outcome.units {
            if let Err(refused) = result {
                *self.0.entry(*refused).or_insert(0) += unit_bytes(unit);
            }
        }
    }

    /// As the status shows it.
    pub fn to_wire(&self) -> Vec<Refusal> {
        let refusal = |(refused, bytes): (&Refused, &u64)| Refusal {
            reason: refused.name().to_owned(),
            bytes: *bytes,
            explanation: refused.explanation().to_owned(),
        };
        self.0.iter().map(refusal).collect()
    }
}

/// Bytes of a unit.
pub fn unit_bytes(unit: &MoveUnit) -> u64 {
    u64::from(unit.pages) * PAGE_BYTES
}

/// Something that moves pages of one process. Unit tests replace it.
pub trait Mover: Send {
    /// Writes the node of each address, `None` where no page is resident; nothing at all
    /// when the kernel does not tell.
    fn places(&mut self, addresses: &[u64], nodes: &mut Vec<Option<u32>>) -> Result<(), ProcessGone>;

    /// Bytes that the nodes of `target` can take, less what stays free for the
    /// host's own needs.
    fn room(&self, target: &NodeSet) -> u64;

    /// Moves the units to the nodes of `target`, to the one with the most room
    /// first. Ends early, leaving units untried, when `stop` becomes true, or more has
    /// moved than was asked for: after the system call that is under way, which moves
    /// [`BATCH_BYTES`] at most.
    fn apply(
        &mut self,
        units: &[MoveUnit],
        target: &NodeSet,
        stop: &AtomicBool,
    ) -> Result<MoveOutcome, ProcessGone>;
}

/// What the kernel is asked. A seam of this module, for its tests only.
trait Pages: Send {
    fn is_alive(&self) -> bool;
    /// Fills `statuses`: a node, or a negative errno.
    fn places(&self, addresses: &[u64], statuses: &mut [i32]) -> io::Result<()>;
    /// As move_pages(2): the number of pages that were not migrated.
    fn migrate(&self, addresses: &[u64], node: u32, statuses: &mut [i32]) -> io::Result<u64>;
    fn node_memory(&self, node: u32) -> Result<NodeMemory, TopologyError>;
    /// Forgets what is known of the process's mappings, if that is old.
    fn renew(&self);
    /// Size of the pages of hugetlbfs at `address`; `None` for memory of any other kind.
    fn hugetlb_page(&self, address: u64) -> Option<u64>;
    /// Bytes of the node's free pages of hugetlbfs of this size.
    fn hugetlb_free(&self, node: u32, page_bytes: u64) -> u64;
}

/// The largest page that may move: the largest unit of a plan.
const LARGEST_PAGE: u64 = BYTES_PER_2M;

/// Moves pages with move_pages(2).
pub struct KernelMover {
    pages: Box<dyn Pages>,
    /// Size of the process's pages of hugetlbfs, as soon as some were met.
    hugetlb: Option<u64>,
    regions: Regions,
}

impl KernelMover {
    /// A mover for the pages of `process`, on the host whose sysfs is at `sys`.
    pub fn new(process: Arc<Process>, sys: PathBuf) -> Self {
        Self { pages: Box::new(LinuxPages::new(process, sys)), hugetlb: None, regions: Regions::default() }
    }

    /// The nodes of the set that tell their memory, each with the bytes that it
    /// can take. Pages of hugetlbfs come out of their pool, or else out of free memory.
    fn rooms<'a>(&'a self, target: &'a NodeSet) -> impl Iterator<Item = (u32, u64)> + 'a {
        target.iter().filter_map(|node| match self.pages.node_memory(node) {
            Ok(memory) => {
                let reserve = memory.total_bytes / RESERVE_DIVISOR;
                let free = memory.free_bytes.saturating_sub(reserve);
                let pool = self.hugetlb.map_or(0, |page_bytes| self.pages.hugetlb_free(node, page_bytes));
                Some((node, free.saturating_add(pool)))
            }
            Err(error) => {
                warn!("node {node} takes no pages: {error}");
                None
            }
        })
    }

    /// Tries a batch of units in one system call, or some more when pages fail. Those
    /// that are left when `stop` becomes true have no result.
    fn apply_batch(
        &mut self,
        batch: &[MoveUnit],
        target: &NodeSet,
        stop: &AtomicBool,
        outcome: &mut MoveOutcome,
    ) -> Result<(), ProcessGone> {
        let hugetlb: Vec<Option<u64>> = batch.iter().map(|unit| self.pages.hugetlb_page(unit.hva)).collect();
        self.hugetlb = self.hugetlb.max(hugetlb.iter().flatten().copied().max());
        let Some((node, mut room)) = self.rooms(target).max_by_key(|(_, room)| *room) else {
            let failed = batch.iter().map(|unit| (*unit, Err(Refused::Failed)));
            outcome.units.extend(failed);
            return Ok(());
        };
        let witnesses = self.regions.witnesses(batch);
        let addresses: Vec<u64> =
            batch.iter().map(|unit| unit.hva).chain(witnesses.iter().copied()).collect();
        let mut nodes = Vec::new();
        self.places(&addresses, &mut nodes)?;
        if nodes.len() < addresses.len() {
            outcome.units.extend(batch.iter().map(|unit| (*unit, Err(Refused::Failed))));
            return Ok(());
        }
        let mut fit = Vec::with_capacity(batch.len());
        for ((unit, place), hugetlb) in batch.iter().zip(&nodes).zip(&hugetlb) {
            let bytes = hugetlb.unwrap_or_else(|| unit_bytes(unit));
            let refused = match place {
                None => Refused::NotPresent,
                Some(place) if target.contains(*place) => Refused::AlreadyThere,
                Some(_) if bytes > LARGEST_PAGE => Refused::TooLarge,
                Some(_) if bytes > room => full(*hugetlb),
                Some(_) => {
                    room -= bytes;
                    fit.push(*unit);
                    continue;
                }
            };
            outcome.units.push((*unit, Err(refused)));
        }
        let addresses: Vec<u64> = fit.iter().map(|unit| unit.hva).collect();
        let results = self.migrate(&addresses, node, stop)?;
        let before = nodes.iter().skip(batch.len());
        let witnesses = witnesses.iter().copied().zip(before.copied());
        self.find_along(&fit, &results, witnesses, node, outcome)?;
        let split = self.split_since(&fit, &results, node)?;
        for (unit, result) in fit.into_iter().zip(results) {
            if split.contains(&unit.hva) {
                self.apply_split(&unit, target, stop, outcome)?;
            } else {
                let told = result.map_err(|refused| match refused {
                    Refused::NodeFull => full(self.pages.hugetlb_page(unit.hva)),
                    other => other,
                });
                outcome.units.push((unit, told));
            }
        }
        Ok(())
    }

    /// Addresses of huge units of which the kernel moved the first page only:
    /// they were huge pages when they were observed and no longer are.
    fn split_since(
        &mut self,
        units: &[MoveUnit],
        results: &[Result<(), Refused>],
        node: u32,
    ) -> Result<Vec<u64>, ProcessGone> {
        let huge: Vec<&MoveUnit> = units
            .iter()
            .zip(results)
            .filter(|(unit, result)| unit.pages > 1 && result.is_ok())
            .map(|(unit, _)| unit)
            .collect();
        let last_pages: Vec<u64> = huge.iter().map(|unit| unit.hva + unit_bytes(unit) - PAGE_BYTES).collect();
        let mut nodes = Vec::new();
        self.places(&last_pages, &mut nodes)?;
        let split = huge.iter().zip(nodes);
        Ok(split.filter(|(_, place)| *place != Some(node)).map(|(unit, _)| unit.hva).collect())
    }

    /// Moves the rest of a unit whose first page has been moved, page by page.
    fn apply_split(
        &mut self,
        unit: &MoveUnit,
        target: &NodeSet,
        stop: &AtomicBool,
        outcome: &mut MoveOutcome,
    ) -> Result<(), ProcessGone> {
        let page =
            |index: u64| MoveUnit { gfn: unit.gfn + index, hva: unit.hva + index * PAGE_BYTES, pages: 1 };
        let rest: Vec<MoveUnit> = (1..u64::from(unit.pages)).map(page).collect();
        outcome.units.push((page(0), Ok(())));
        self.regions.note_small(region_of(unit.hva), outcome);
        self.apply_batch(&rest, target, stop, outcome)
    }

    /// Moves the pages at `addresses`, and with each the huge page that it is in.
    ///
    /// When a page fails, the kernel gives up the call: it says how many pages
    /// were not migrated, but neither which nor why, and leaves their status as
    /// it was. A look at the places tells which. The pages behind the failed
    /// ones were not tried, and are tried in another call, unless `stop` is true.
    fn migrate(
        &mut self,
        addresses: &[u64],
        node: u32,
        stop: &AtomicBool,
    ) -> Result<Vec<Result<(), Refused>>, ProcessGone> {
        let mut results = Vec::with_capacity(addresses.len());
        while results.len() < addresses.len() && !stop.load(Ordering::Relaxed) {
            let rest = &addresses[results.len()..];
            let mut statuses = vec![STATUS_UNKNOWN; rest.len()];
            let (tried, reason) = match self.pages.migrate(rest, node, &mut statuses) {
                Ok(0) => (rest.len(), Refused::Busy),
                Ok(_) => (tried_until(&statuses), Refused::Busy),
                Err(error) => {
                    let errno = error.raw_os_error().unwrap_or(0);
                    if errno == libc::ESRCH {
                        return Err(ProcessGone);
                    }
                    let reason = Refused::from_call(errno);
                    if reason == Refused::Failed {
                        warn!("cannot move pages to node {node}: {error}");
                    }
                    (rest.len(), reason)
                }
            };
            let mut nodes = Vec::new();
            self.places(&rest[..tried], &mut nodes)?;
            for (index, status) in statuses.iter().take(tried).enumerate() {
                results.push(match (*status, nodes.get(index)) {
                    (_, Some(Some(place))) if *place == node => Ok(()),
                    (STATUS_UNKNOWN, Some(Some(_)) | None) => Err(reason),
                    (status, _) if status < 0 && status != STATUS_UNKNOWN => {
                        Err(Refused::from_status(-status))
                    }
                    (_, Some(None)) => Err(Refused::NotPresent),
                    // Moved, and away again: somebody else moves pages too.
                    (_, Some(Some(_))) => Err(Refused::Busy),
                    // By the call's own word alone.
                    (status, None) if u32::try_from(status) == Ok(node) => Ok(()),
                    (_, None) => Err(Refused::Failed),
                });
            }
        }
        Ok(results)
    }
}

/// There is no room for a page, which is of hugetlbfs or not.
fn full(hugetlb: Option<u64>) -> Refused {
    if hugetlb.is_some() { Refused::HugetlbFull } else { Refused::NodeFull }
}

/// Units for one system call, off the front: [`BATCH_UNITS`] at most, and
/// [`BATCH_BYTES`], but one at least.
pub fn batch(units: &[MoveUnit]) -> &[MoveUnit] {
    let count = fitting(units, BATCH_BYTES).len().clamp(1, BATCH_UNITS);
    units.get(..count).unwrap_or(units)
}

/// The first units, as many as fit in so many bytes together.
pub fn fitting(units: &[MoveUnit], bytes: u64) -> &[MoveUnit] {
    let mut left = bytes;
    let fits = |unit: &&MoveUnit| left.checked_sub(unit_bytes(unit)).inspect(|rest| left = *rest).is_some();
    let count = units.iter().take_while(fits).count();
    units.get(..count).unwrap_or_default()
}

/// Keeps the first units, up to so many bytes.
pub fn keep_bytes(units: &mut Vec<MoveUnit>, bytes: u64) {
    units.truncate(fitting(units, bytes).len());
}

/// How many pages were tried by a call that gave up: the kernel leaves the
/// status of those that it was migrating when it gave up, and of those that it
/// never came to. Between the two stands at least one page that it had decided
/// before, or nothing stands behind.
fn tried_until(statuses: &[i32]) -> usize {
    let unknown = |status: &i32| *status == STATUS_UNKNOWN;
    let decided = statuses.iter().take_while(|s| !unknown(s)).count();
    let migrating = statuses[decided..].iter().take_while(|s| unknown(s)).count();
    // At least one, so that the caller gets on whatever the kernel wrote.
    (decided + migrating).max(1)
}

impl Mover for KernelMover {
    fn places(&mut self, addresses: &[u64], nodes: &mut Vec<Option<u32>>) -> Result<(), ProcessGone> {
        nodes.clear();
        let mut statuses = vec![STATUS_UNKNOWN; addresses.len()];
        if addresses.is_empty() {
            return Ok(());
        }
        if !self.pages.is_alive() {
            return Err(ProcessGone);
        }
        // What has room is asked before anything moves.
        self.hugetlb =
            self.hugetlb.max(addresses.first().and_then(|address| self.pages.hugetlb_page(*address)));
        if let Err(error) = self.pages.places(addresses, &mut statuses) {
            if error.raw_os_error() == Some(libc::ESRCH) {
                return Err(ProcessGone);
            }
            warn!("cannot tell where pages lie: {error}");
            return Ok(());
        }
        nodes.extend(statuses.iter().map(|status| u32::try_from(*status).ok()));
        Ok(())
    }

    fn room(&self, target: &NodeSet) -> u64 {
        self.rooms(target).map(|(_, room)| room).sum()
    }

    fn apply(
        &mut self,
        units: &[MoveUnit],
        target: &NodeSet,
        stop: &AtomicBool,
    ) -> Result<MoveOutcome, ProcessGone> {
        let mut outcome = MoveOutcome::default();
        let mut rest = units;
        // What came along has to be paid for first.
        while !rest.is_empty() && outcome.along.is_empty() && !stop.load(Ordering::Relaxed) {
            if !self.pages.is_alive() {
                return Err(ProcessGone);
            }
            self.pages.renew();
            let batch = self.regions.batch(rest);
            self.apply_batch(batch, target, stop, &mut outcome)?;
            rest = rest.get(batch.len()..).unwrap_or_default();
        }
        outcome.left = rest.len();
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests;
