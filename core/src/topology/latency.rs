// SPDX-License-Identifier: MIT OR Apache-2.0
//! How much slower the slow tier is.

use std::path::Path;
use std::time::Duration;

use super::{LOCAL_DISTANCE, NodeSet, Tiers, read, read_distances};

/// Read latency of DRAM where the host does not tell: a socket's own memory, idle
/// (Intel Memory Latency Checker gives 70 to 100 ns on servers since 2017).
const ASSUMED_DRAM_NS: u64 = 80;

/// That of a slow tier where nothing at all is told: CXL memory has 170 to 250 ns
/// (Sun et al., MICRO 2023).
const ASSUMED_SLOW_NS: u64 = 250;

/// Read latencies of the tiers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Latencies {
    /// Of the fast tier's nearest node.
    pub fast: Duration,
    /// Of the slow tier's farthest node.
    pub slow: Duration,
    /// Where this is known from, in plain words.
    pub from: &'static str,
}

impl Latencies {
    /// Reads those of the host whose sysfs is at `sys`: from ACPI's HMAT, as the kernel
    /// shows it (Documentation/admin-guide/mm/numaperf.rst, in nanoseconds), else from the
    /// distances of the nodes, else what is usual.
    pub fn detect(sys: &Path, tiers: &Tiers) -> Self {
        let nodes = sys.join("devices/system/node");
        let told = |set: &NodeSet| -> Vec<u64> {
            let read_latency = |node| {
                read(&nodes.join(format!("node{node}/access0/initiators/read_latency")))
                    .ok()?
                    .trim()
                    .parse()
                    .ok()
            };
            set.iter().filter_map(read_latency).filter(|latency| *latency > 0).collect()
        };
        let (fast, slow) = (told(&tiers.fast).into_iter().min(), told(&tiers.slow).into_iter().max());
        if let (Some(fast), Some(slow)) = (fast, slow) {
            return Self::new(fast, slow, "ACPI's HMAT");
        }
        match farthest(&nodes, tiers) {
            Some(distance) if distance > LOCAL_DISTANCE => {
                let slow = ASSUMED_DRAM_NS * u64::from(distance) / u64::from(LOCAL_DISTANCE);
                Self::new(ASSUMED_DRAM_NS, slow, "the nodes' distances, and 80 ns assumed for DRAM")
            }
            _ => Self::new(ASSUMED_DRAM_NS, ASSUMED_SLOW_NS, "nothing on this host: 80 and 250 ns assumed"),
        }
    }

    fn new(fast_ns: u64, slow_ns: u64, from: &'static str) -> Self {
        Self { fast: Duration::from_nanos(fast_ns), slow: Duration::from_nanos(slow_ns), from }
    }

    /// By how much an access to the slow tier takes longer.
    pub fn gap(&self) -> Duration {
        self.slow.saturating_sub(self.fast)
    }
}

/// The distance from the fast tier of the slow node that is farthest from it.
fn farthest(nodes: &Path, tiers: &Tiers) -> Option<u32> {
    let online: NodeSet = read(&nodes.join("online")).ok()?.trim().parse().ok()?;
    let online: Vec<u32> = online.iter().collect();
    let distance = |node| {
        let distances = read_distances(&nodes.join(format!("node{node}/distance"))).ok()?;
        let from_fast = online.iter().zip(distances).filter(|(other, _)| tiers.fast.contains(**other));
        from_fast.map(|(_, distance)| distance).min()
    };
    tiers.slow.iter().filter_map(distance).max()
}
