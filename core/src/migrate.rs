// SPDX-License-Identifier: MIT OR Apache-2.0
//! Moving pages of a running guest between NUMA nodes, with move_pages(2).
//!
//! Tried and moved are counted apart: every unit that was tried has a result,
//! and one that was not moved has a reason. The kernel keeps the guest's data
//! whole whatever happens here; a page that can not be moved stays where it is.

mod bucket;
mod kernel;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use log::warn;

use crate::plan::MoveUnit;
use crate::process::Process;
use crate::topology::{NodeMemory, NodeSet, TopologyError};
use crate::units::PAGE_BYTES;
use crate::wire::Refusal;

pub use bucket::TokenBucket;

use kernel::LinuxPages;

/// Units in one system call: bounds how long a cancelled move goes on.
pub const BATCH_UNITS: usize = 512;

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
    /// No target node has room.
    NodeFull,
    /// The process may not have memory on the node, or we may not move it.
    NotPermitted,
    /// No page is there.
    NotPresent,
    /// Other processes map it too.
    Shared,
}

impl Refused {
    /// For programs, as [`Refusal::reason`].
    pub fn name(self) -> &'static str {
        match self {
            Self::AlreadyThere => "already-there",
            Self::Busy => "busy",
            Self::Failed => "failed",
            Self::NodeFull => "node-full",
            Self::NotPermitted => "not-permitted",
            Self::NotPresent => "not-present",
            Self::Shared => "shared",
        }
    }

    /// For people, as [`Refusal::explanation`].
    pub fn explanation(self) -> &'static str {
        match self {
            Self::AlreadyThere => "the page lay on the target tier already",
            Self::Busy => {
                "in use by a device or the kernel (pinned for DMA by VFIO, under I/O or being written back); tried again later"
            }
            Self::Failed => "the kernel could not move the page; the daemon's log has the error",
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
}

impl MoveOutcome {
    /// Bytes tried: moved and refused.
    pub fn tried_bytes(&self) -> u64 {
        self.units.iter().map(|(unit, _)| unit_bytes(unit)).sum()
    }

    /// Bytes moved.
    pub fn moved_bytes(&self) -> u64 {
        let moved = self.units.iter().filter(|(_, result)| result.is_ok());
        moved.map(|(unit, _)| unit_bytes(unit)).sum()
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
    /// Writes the node of each address, `None` where no page is resident.
    fn places(&mut self, addresses: &[u64], nodes: &mut Vec<Option<u32>>) -> Result<(), ProcessGone>;

    /// Bytes that the nodes of `target` can take, less what stays free for the
    /// host's own needs.
    fn room(&self, target: &NodeSet) -> u64;

    /// Moves the units to the nodes of `target`, to the one with the most room
    /// first. Ends early, leaving units untried, when `stop` becomes true.
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
}

/// Moves pages with move_pages(2).
pub struct KernelMover {
    pages: Box<dyn Pages>,
}

impl KernelMover {
    /// A mover for the pages of `process`, on the host whose sysfs is at `sys`.
    pub fn new(process: Arc<Process>, sys: PathBuf) -> Self {
        Self { pages: Box::new(LinuxPages { process, sys }) }
    }

    /// The nodes of the set that tell their memory, each with the bytes that it
    /// can take.
    fn rooms<'a>(&'a self, target: &'a NodeSet) -> impl Iterator<Item = (u32, u64)> + 'a {
        target.iter().filter_map(|node| match self.pages.node_memory(node) {
            Ok(memory) => {
                let reserve = memory.total_bytes / RESERVE_DIVISOR;
                Some((node, memory.free_bytes.saturating_sub(reserve)))
            }
            Err(error) => {
                warn!("node {node} takes no pages: {error}");
                None
            }
        })
    }

    /// Tries at most [`BATCH_UNITS`] units.
    fn apply_batch(
        &mut self,
        batch: &[MoveUnit],
        target: &NodeSet,
        outcome: &mut MoveOutcome,
    ) -> Result<(), ProcessGone> {
        let Some((node, mut room)) = self.rooms(target).max_by_key(|(_, room)| *room) else {
            let failed = batch.iter().map(|unit| (*unit, Err(Refused::Failed)));
            outcome.units.extend(failed);
            return Ok(());
        };
        let addresses: Vec<u64> = batch.iter().map(|unit| unit.hva).collect();
        let mut nodes = Vec::new();
        self.places(&addresses, &mut nodes)?;
        let mut fit = Vec::with_capacity(batch.len());
        for (unit, place) in batch.iter().zip(&nodes) {
            let refused = match place {
                None => Refused::NotPresent,
                Some(place) if target.contains(*place) => Refused::AlreadyThere,
                Some(_) if unit_bytes(unit) > room => Refused::NodeFull,
                Some(_) => {
                    room -= unit_bytes(unit);
                    fit.push(*unit);
                    continue;
                }
            };
            outcome.units.push((*unit, Err(refused)));
        }
        let addresses: Vec<u64> = fit.iter().map(|unit| unit.hva).collect();
        let results = self.migrate(&addresses, node)?;
        let split = self.split_since(&fit, &results, node)?;
        for (unit, result) in fit.into_iter().zip(results) {
            if split.contains(&unit.hva) {
                self.apply_split(&unit, target, outcome)?;
            } else {
                outcome.units.push((unit, result));
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
        outcome: &mut MoveOutcome,
    ) -> Result<(), ProcessGone> {
        let page =
            |index: u64| MoveUnit { gfn: unit.gfn + index, hva: unit.hva + index * PAGE_BYTES, pages: 1 };
        let rest: Vec<MoveUnit> = (1..u64::from(unit.pages)).map(page).collect();
        outcome.units.push((page(0), Ok(())));
        self.apply_batch(&rest, target, outcome)
    }

    /// Moves the pages at `addresses`, and with each the huge page that it is in.
    ///
    /// When a page fails, the kernel gives up the call: it says how many pages
    /// were not migrated, but neither which nor why, and leaves their status as
    /// it was. A look at the places tells which. The pages behind the failed
    /// ones were not tried, and are tried in another call.
    fn migrate(&mut self, addresses: &[u64], node: u32) -> Result<Vec<Result<(), Refused>>, ProcessGone> {
        let mut results = Vec::with_capacity(addresses.len());
        while results.len() < addresses.len() {
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
            for (status, place) in statuses.iter().zip(&nodes) {
                results.push(match (*status, place) {
                    (_, Some(place)) if *place == node => Ok(()),
                    (STATUS_UNKNOWN, Some(_)) => Err(reason),
                    (status, _) if status < 0 && status != STATUS_UNKNOWN => {
                        Err(Refused::from_status(-status))
                    }
                    (_, None) => Err(Refused::NotPresent),
                    // Moved, and away again: somebody else moves pages too.
                    (_, Some(_)) => Err(Refused::Busy),
                });
            }
        }
        Ok(results)
    }
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
        if let Err(error) = self.pages.places(addresses, &mut statuses) {
            if error.raw_os_error() == Some(libc::ESRCH) {
                return Err(ProcessGone);
            }
            warn!("cannot tell where pages lie: {error}");
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
        for batch in units.chunks(BATCH_UNITS) {
            if stop.load(Ordering::Relaxed) {
                break;
            }
            if !self.pages.is_alive() {
                return Err(ProcessGone);
            }
            self.apply_batch(batch, target, &mut outcome)?;
        }
        Ok(outcome)
    }
}

#[cfg(test)]
mod tests;
