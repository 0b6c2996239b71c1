// SPDX-License-Identifier: MIT OR Apache-2.0
//! The host's memory: NUMA nodes, which of them are fast and which slow, and
//! how much is free. Read from sysfs and procfs under a given root, so that
//! tests read captured trees.

mod latency;
mod nodes;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

pub use latency::Latencies;
pub use nodes::{MAX_NODES, NodeSet, NodeSetError};

/// Distance of a node to itself (ACPI SLIT).
const LOCAL_DISTANCE: u32 = 10;

/// Why the host's memory could not be read.
#[derive(Debug, thiserror::Error)]
pub enum TopologyError {
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file does not say what it should.
    #[error("{} holds {found:?} where {expected} was expected", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What it holds.
        found: String,
        /// What was expected.
        expected: &'static str,
    },
    /// A file lacks a line.
    #[error("{} has no line \"{line}\"", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// How the line begins.
        line: &'static str,
    },
}

/// Which nodes are fast and which are slow. Disjoint; together all nodes that
/// have memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tiers {
    /// DRAM.
    pub fast: NodeSet,
    /// NVM, CXL or other slower memory; empty when the host has one tier.
    pub slow: NodeSet,
    /// Where this is known from, or why there is one tier, in plain words.
    pub from: String,
}

impl Tiers {
    /// Finds the tiers of the host whose sysfs is at `sys` (`/sys`): from the
    /// kernel's memory tiers, where a lower number is faster, else from CPUs and
    /// distances. With more than two tiers the first is fast, the others slow.
    pub fn detect(sys: &Path) -> Result<Self, TopologyError> {
        let nodes_dir = sys.join("devices/system/node");
        let with_memory = read_node_set(&nodes_dir.join("has_memory"))?;
        let tiers = memory_tiers(&sys.join("devices/virtual/memory_tiering"))?;
        if let [(_, fastest), _, ..] = tiers.as_slice() {
            let fast = with_memory.intersection(fastest);
            let slow = with_memory.difference(&fast);
            if !fast.is_empty() && !slow.is_empty() {
                return Ok(Tiers { fast, slow, from: "memory tiers of the kernel".into() });
            }
        }
        let slow = remote_without_cpus(&nodes_dir, &with_memory)?;
        let fast = with_memory.difference(&slow);
        Ok(if slow.is_empty() || fast.is_empty() {
            let from = match with_memory.len() {
                1 => "one tier: the host has one NUMA node with memory",
                _ => {
                    "one tier: the kernel knows no slower memory tier, and no node with memory of its own is without CPUs"
                }
            };
            Tiers { fast: with_memory, slow: NodeSet::default(), from: from.into() }
        } else {
            Tiers { fast, slow, from: "nodes without CPUs".into() }
        })
    }

    /// These tiers with the sets that a policy names in their place. Where it
    /// names only one, the other is all the rest of the host's nodes.
    pub fn with_policy(&self, fast: Option<&NodeSet>, slow: Option<&NodeSet>) -> Self {
        let all = self.fast.union(&self.slow);
        let (fast, slow) = match (fast, slow) {
            (None, None) => return self.clone(),
            (Some(fast), Some(slow)) => (fast.clone(), slow.clone()),
            (Some(fast), None) => (fast.clone(), all.difference(fast)),
            (None, Some(slow)) => (all.difference(slow), slow.clone()),
        };
        Tiers { fast, slow, from: "the domain's policy".into() }
    }

    /// Nodes of either set that have no memory on this host: `detected` tells
    /// which have.
    pub fn unknown_nodes(&self, detected: &Tiers) -> NodeSet {
        let known = detected.fast.union(&detected.slow);
        self.fast.union(&self.slow).difference(&known)
    }
}

/// Memory of one NUMA node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeMemory {
    /// All of it, in bytes.
    pub total_bytes: u64,
    /// Not in use, in bytes.
    pub free_bytes: u64,
}

/// Reads the memory of `node` of the host whose sysfs is at `sys`.
pub fn node_memory(sys: &Path, node: u32) -> Result<NodeMemory, TopologyError> {
    MemInfo::read(sys, node)?.memory()
}

/// As [`node_memory`], and from the same look bytes of the node that hold what the kernel drops when the memory is needed: pages
/// of files, and slabs that it can take back. What MemAvailable counts beside free
/// memory, without its allowance of a watermark for what of it is in use
/// (si_mem_available() in mm/show_mem.c). All of it, so that a page cache that grows
/// takes nothing away from free memory and this together.
pub fn node_memory_and_reclaimable(sys: &Path, node: u32) -> Result<(NodeMemory, u64), TopologyError> {
    let text = MemInfo::read(sys, node)?;
    let of_files = text.bytes("Active(file):")?.saturating_add(text.bytes("Inactive(file):")?);
    Ok((text.memory()?, of_files.saturating_add(text.bytes("SReclaimable:")?)))
}

/// The file `meminfo` of a node.
struct MemInfo {
    path: PathBuf,
    text: String,
}

impl MemInfo {
    fn read(sys: &Path, node: u32) -> Result<Self, TopologyError> {
        let path = sys.join(format!("devices/system/node/node{node}/meminfo"));
        Ok(Self { text: read(&path)?, path })
    }

    fn memory(&self) -> Result<NodeMemory, TopologyError> {
        Ok(NodeMemory { total_bytes: self.bytes("MemTotal:")?, free_bytes: self.bytes("MemFree:")? })
    }

    fn bytes(&self, name: &'static str) -> Result<u64, TopologyError> {
        // "Node 0 MemTotal:  2043212 kB"
        let value = |line: &str| {
            let mut words = line.split_whitespace().skip(2);
            (words.next()? == name).then(|| words.next()?.parse::<u64>().ok()?.checked_mul(1024))?
        };
        let missing = || TopologyError::Missing { path: self.path.clone(), line: name };
        self.text.lines().find_map(value).ok_or_else(missing)
    }
}

/// What the kernel's own NUMA balancing does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NumaBalancing {
    /// Nothing, or the kernel has none.
    Off,
    /// It moves pages to the node of the CPU that uses them, and so undoes
    /// demotions.
    Normal,
    /// It promotes pages between tiers on its own.
    Tiering,
}

impl NumaBalancing {
    /// What ends it.
    pub const MEND: &str = "sysctl kernel.numa_balancing=0";

    /// What it does against placement, as in "it ..."; none when it does nothing.
    pub fn trouble(self) -> Option<&'static str> {
        match self {
            Self::Off => None,
            Self::Normal => Some("moves pages back to the nodes of the CPUs that use them"),
            Self::Tiering => Some("promotes pages between tiers by a judgement of its own"),
        }
    }
}

/// Reads `sys/kernel/numa_balancing` below `proc` (`/proc`).
pub fn numa_balancing(proc: &Path) -> Result<NumaBalancing, TopologyError> {
    /// NUMA_BALANCING_MEMORY_TIERING, include/linux/sched/sysctl.h.
    const TIERING: u32 = 2;
    let path = proc.join("sys/kernel/numa_balancing");
    let text = match read(&path) {
        Err(TopologyError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Ok(NumaBalancing::Off);
        }
        other => other?,
    };
    match text.trim().parse::<u32>() {
        Ok(0) => Ok(NumaBalancing::Off),
        Ok(flags) if flags & TIERING != 0 => Ok(NumaBalancing::Tiering),
        Ok(_) => Ok(NumaBalancing::Normal),
        Err(_) => Err(TopologyError::Malformed { path, found: text.trim().into(), expected: "a number" }),
    }
}

/// Whether the kernel takes memory away from processes by its own judgement of what
/// they do not use: it has somewhere to swap, or demotes pages to slower nodes. Reads
/// `swaps` below `proc` and `kernel/mm/numa/demotion_enabled` below `sys`; a kernel
/// without one of them does not do that.
pub fn reclaims(proc: &Path, sys: &Path) -> bool {
    // The first line is the heading of a table.
    let swaps = read(&proc.join("swaps")).is_ok_and(|text| text.lines().count() > 1);
    let demotes = read(&sys.join("kernel/mm/numa/demotion_enabled")).is_ok_and(|text| text.trim() == "true");
    swaps || demotes
}

/// The kernel's memory tiers that have nodes, fastest first.
fn memory_tiers(dir: &Path) -> Result<Vec<(u32, NodeSet)>, TopologyError> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        // Kernels before 6.1 and kernels without NUMA have none.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(TopologyError::Read { path: dir.into(), source }),
    };
    let mut tiers = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|source| TopologyError::Read { path: dir.into(), source })?;
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("memory_tier"));
        let Some(number) = number.and_then(|number| number.parse().ok()) else { continue };
        let nodes = read_node_set(&entry.path().join("nodelist"))?;
        if !nodes.is_empty() {
            tiers.push((number, nodes));
        }
    }
    tiers.sort_by_key(|(number, _)| *number);
    Ok(tiers)
}

/// Nodes without CPUs that are farther from every CPU than its own memory. At
/// local distance a node without CPUs is a slice of the same DRAM (numa=fake).
fn remote_without_cpus(nodes_dir: &Path, with_memory: &NodeSet) -> Result<NodeSet, TopologyError> {
    let with_cpus = read_node_set(&nodes_dir.join("has_cpu"))?;
    let online: Vec<u32> = read_node_set(&nodes_dir.join("online"))?.iter().collect();
    let mut slow = NodeSet::default();
    for node in with_memory.difference(&with_cpus).iter() {
        let distances = read_distances(&nodes_dir.join(format!("node{node}/distance")))?;
        // The file has one number for each online node, in order.
        let nearest_cpu = online
            .iter()
            .zip(&distances)
            .filter(|(other, _)| with_cpus.contains(**other))
            .map(|(_, distance)| *distance)
            .min();
        if nearest_cpu.is_some_and(|distance| distance > LOCAL_DISTANCE) {
            slow = slow.union(&NodeSet::from_iter([node]));
        }
    }
    Ok(slow)
}

fn read_distances(path: &Path) -> Result<Vec<u32>, TopologyError> {
    let text = read(path)?;
    text.split_whitespace().map(str::parse).collect::<Result<_, _>>().map_err(|_| TopologyError::Malformed {
        path: path.into(),
        found: text.trim().into(),
        expected: "a list of distances",
    })
}

fn read_node_set(path: &Path) -> Result<NodeSet, TopologyError> {
    let text = read(path)?;
    text.trim().parse().map_err(|_| TopologyError::Malformed {
        path: path.into(),
        found: text.trim().into(),
        expected: "a list of nodes",
    })
}

fn read(path: &Path) -> Result<String, TopologyError> {
    fs::read_to_string(path).map_err(|source| TopologyError::Read { path: path.into(), source })
}
