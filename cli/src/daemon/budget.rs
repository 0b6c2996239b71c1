// SPDX-License-Identifier: MIT OR Apache-2.0
//! What all domains of the host share: DRAM, and the bandwidth of moves. Workers
//! say what their guests hold and use, and are told what they may have.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ept_virt_core::budget::{Claim, Grant, settle};
use ept_virt_core::migrate::SharedBucket;
use ept_virt_core::policy::HostLimits;
use ept_virt_core::topology::{NodeMemory, NodeSet, TopologyError, node_memory_and_reclaimable};
use ept_virt_core::units::{Bytes, Share};
use log::warn;

use super::state::lock;

/// DRAM is shared anew when this has passed, and when a claim is new.
const SETTLE_INTERVAL: Duration = Duration::from_secs(1);

/// Part of the reserve that may be missing before guests give back.
const SLACK_DIVISOR: u64 = 8;

/// Memory of a node, and bytes of it that the kernel gives up when they are needed.
pub(super) type NodeLook = dyn Fn(u32) -> Result<(NodeMemory, u64), TopologyError> + Send + Sync;

/// What domains share. Each worker has a [`Seat`] in it.
pub struct Budget {
    look: Box<NodeLook>,
    state: Mutex<State>,
}

struct State {
    limits: HostLimits,
    bucket: Option<SharedBucket>,
    seats: BTreeMap<u64, Option<Place>>,
    next_id: u64,
    settled: Option<Duration>,
    /// Why nodes could not be looked at, so that it is told once.
    trouble: Option<String>,
}

/// What one domain claims, and what it was granted.
struct Place {
    fast: NodeSet,
    claim: Claim,
    grant: Option<Grant>,
}

/// A worker's place among the others, until it is dropped.
pub struct Seat {
    id: u64,
    budget: Arc<Budget>,
}

impl Budget {
    /// The budget of the host whose sysfs is at `sys`.
    pub fn new(limits: HostLimits, sys: PathBuf) -> Self {
        Self::with(limits, Box::new(move |node| node_memory_and_reclaimable(&sys, node)))
    }

    /// The budget of a host whose nodes `look` tells of.
    pub(super) fn with(limits: HostLimits, look: Box<NodeLook>) -> Self {
        let state =
            State { limits, bucket: None, seats: BTreeMap::new(), next_id: 0, settled: None, trouble: None };
        Self { look, state: Mutex::new(state) }
    }

    /// Goes on with other limits.
    pub fn configure(&self, limits: HostLimits) {
        let mut state = lock(&self.state);
        match (&mut state.bucket, limits.bandwidth) {
            (Some(bucket), Some(rate)) => bucket.set_rate(rate.0, Duration::ZERO),
            (bucket, _) => *bucket = full_bucket(&limits),
        }
        state.limits = limits;
        state.settled = None;
    }

    /// Takes a seat. Until it claims something, what its guest has is not shared.
    pub fn seat(self: &Arc<Self>) -> Seat {
        let mut state = lock(&self.state);
        let id = state.next_id;
        state.next_id += 1;
        state.seats.insert(id, None);
        Seat { id, budget: Arc::clone(self) }
    }

    /// Workers that have a seat.
    pub fn seats(&self) -> usize {
        lock(&self.state).seats.len()
    }

    fn settle(&self, state: &mut State) {
        let State { limits, seats, trouble, .. } = state;
        let mut before = trouble.take();
        for (fast, ids) in pools(seats) {
            let mut members: Vec<&mut Place> =
                seats.iter_mut().filter(|(id, _)| ids.contains(id)).filter_map(|(_, p)| p.as_mut()).collect();
            let claims: Vec<Claim> = members.iter().map(|place| place.claim).collect();
            let held = claims.iter().fold(0u64, |sum, claim| sum.saturating_add(claim.held.0));
            let total = self.total(held, &fast, limits.dram_reserve, trouble);
            for (place, grant) in members.iter_mut().zip(settle(Bytes(total), &claims).grants) {
                place.grant = Some(grant);
            }
        }
        if let Some(trouble) = trouble.as_ref().filter(|trouble| before.take().as_ref() != Some(trouble)) {
            warn!("DRAM is shared as if no more of it could be used: {trouble}");
        }
    }

    /// All that guests can have on these nodes: what they hold, and what is free
    /// but for the reserve. They make room for the reserve only where even without
    /// the kernel's caches there is less: to drive pages of guests out for the page
    /// cache, which takes whatever is free, would have no end. And less by more than
    /// a [`SLACK_DIVISOR`]th: what the host's programs take for a moment is no reason
    /// to move memory to and fro.
    fn total(&self, held: u64, fast: &NodeSet, reserve: Share, trouble: &mut Option<String>) -> u64 {
        let mut total = held;
        for node in fast.iter() {
            match (self.look)(node) {
                Ok((memory, reclaimable)) => {
                    let reserve = reserve.of(memory.total_bytes);
                    let low = reserve - reserve / SLACK_DIVISOR;
                    let short = low.saturating_sub(memory.free_bytes.saturating_add(reclaimable));
                    total = total.saturating_add(memory.free_bytes.saturating_sub(reserve));
                    total = total.saturating_sub(short);
                }
                Err(error) => *trouble = Some(error.to_string()),
            }
        }
        total
    }
}

/// The bucket for what all domains move, if that is limited. Full, so that it does
/// not matter that nobody knows the time yet.
fn full_bucket(limits: &HostLimits) -> Option<SharedBucket> {
    limits.bandwidth.map(|rate| SharedBucket::new(rate.0, Duration::ZERO))
}

/// Domains whose fast tiers have nodes in common share them; the nodes, and who
/// they are.
fn pools(seats: &BTreeMap<u64, Option<Place>>) -> Vec<(NodeSet, Vec<u64>)> {
    let mut pools: Vec<(NodeSet, Vec<u64>)> = Vec::new();
    for (id, place) in seats.iter().filter_map(|(id, place)| Some((*id, place.as_ref()?))) {
        let mut joined = (place.fast.clone(), vec![id]);
        // Mostly there is one, with the same nodes.
        let (apart, common): (Vec<_>, Vec<_>) =
            pools.into_iter().partition(|(nodes, _)| nodes.intersection(&joined.0).is_empty());
        for (nodes, ids) in common {
            joined = (joined.0.union(&nodes), [ids, joined.1].concat());
        }
        pools = apart;
        pools.push(joined);
    }
    pools
}

impl Seat {
    /// Says what the guest claims of the nodes `fast`, and hears what it is granted.
    pub fn claim(&self, fast: &NodeSet, claim: Claim, now: Duration) -> Option<Grant> {
        let mut state = lock(&self.budget.state);
        let terms = |claim: &Claim| (claim.weight, claim.floor, claim.ceiling, claim.movable);
        let before = state.seats.get(&self.id).and_then(Option::as_ref);
        let known = before.filter(|place| terms(&place.claim) == terms(&claim) && place.fast == *fast);
        let grant = known.and_then(|place| place.grant);
        state.seats.insert(self.id, Some(Place { fast: fast.clone(), claim, grant }));
        let due = state.settled.is_none_or(|settled| now.saturating_sub(settled) >= SETTLE_INTERVAL);
        if grant.is_none() || due {
            self.budget.settle(&mut state);
            state.settled = Some(now);
        }
        state.seats.get(&self.id).and_then(Option::as_ref)?.grant
    }

    /// Says that the guest holds so much on the fast tier now, after pages moved.
    pub fn holds(&self, bytes: Bytes) {
        if let Some(Some(place)) = lock(&self.budget.state).seats.get_mut(&self.id) {
            place.claim.held = bytes;
        }
    }

    /// Largest number of bytes to move at once, as [`SharedBucket::burst_bytes`].
    pub fn burst_bytes(&self) -> u64 {
        lock(&self.budget.state).bucket.as_ref().map_or(u64::MAX, SharedBucket::burst_bytes)
    }

    /// Takes bytes out of what all domains may move, as [`SharedBucket::take`].
    pub fn take(&self, bytes: u64, now: Duration) -> Result<(), Option<Duration>> {
        let mut state = lock(&self.budget.state);
        state.bucket.as_mut().map_or(Ok(()), |bucket| bucket.take(self.id, bytes, now))
    }

    /// Takes bytes that have moved unasked out of the same, as [`SharedBucket::charge`].
    pub fn charge(&self, bytes: u64, now: Duration) {
        if let Some(bucket) = &mut lock(&self.budget.state).bucket {
            bucket.charge(self.id, bytes, now);
        }
    }

    /// Part of one CPU that rounds may take, as [`HostLimits::cpu`].
    pub fn cpu(&self) -> Share {
        lock(&self.budget.state).limits.cpu
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut state = lock(&self.budget.state);
        state.seats.remove(&self.id);
        if let Some(bucket) = &mut state.bucket {
            bucket.leave(self.id);
        }
    }
}

#[cfg(test)]
#[path = "budget_tests.rs"]
mod tests;
