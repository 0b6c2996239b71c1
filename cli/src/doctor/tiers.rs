// SPDX-License-Identifier: MIT OR Apache-2.0
//! The two kinds of memory, and the kernel's own ideas of what belongs where.

use std::path::Path;

use ept_virt_core::topology::{NodeSet, NumaBalancing, Tiers, node_memory, numa_balancing};
use ept_virt_core::units::Bytes;

use super::report::Check;
use super::root::Root;

/// What is asked of the host's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Which nodes are fast and which slow, or why that is not known.
    pub tiers: Result<Tiers, String>,
    /// Free and all memory of each node, in bytes, where known.
    pub nodes: Vec<(u32, u64, u64)>,
    /// What NUMA balancing does, or why that is not known.
    pub balancing: Result<NumaBalancing, String>,
}

impl Memory {
    /// Reads it.
    pub fn read(root: &Root) -> Self {
        let sys = root.join("/sys");
        let tiers = Tiers::detect(&sys).map_err(|error| error.to_string());
        let all = tiers.as_ref().map(|tiers| tiers.fast.union(&tiers.slow)).unwrap_or_default();
        let balancing = numa_balancing(&root.join("/proc")).map_err(|error| error.to_string());
        Self { tiers, nodes: sizes(&sys, &all), balancing }
    }

    /// All nodes of either tier.
    pub fn all_nodes(&self) -> NodeSet {
        self.tiers.as_ref().map(|tiers| tiers.fast.union(&tiers.slow)).unwrap_or_default()
    }

    /// Whether there is somewhere to place cold memory.
    pub fn judge_tiers(&self) -> Check {
        const NAME: &str = "tiers";
        let tiers = match &self.tiers {
            Ok(tiers) => tiers,
            Err(problem) => {
                return Check::fail(
                    NAME,
                    format!("the NUMA nodes are not known: {problem}"),
                    "run a kernel with CONFIG_NUMA, and with /sys mounted",
                );
            }
        };
        let fast = self.words(&tiers.fast);
        if tiers.slow.is_empty() {
            return Check::warn(
                NAME,
                format!(
                    "{}: DRAM on {fast}. Guests are observed, and nothing is moved unless policies name slower nodes",
                    tiers.from
                ),
                "bring NVM or CXL memory up as a NUMA node, as by `daxctl reconfigure-device --mode=system-ram dax0.0`, \
                 or name the nodes in policies",
            );
        }
        let slow = self.words(&tiers.slow);
        Check::ok(NAME, format!("DRAM on {fast}; NVM on {slow} ({})", tiers.from))
    }

    /// Whether the kernel moves pages too.
    pub fn judge_balancing(&self) -> Check {
        const NAME: &str = "NUMA balancing";
        let found = match &self.balancing {
            Ok(balancing) => match balancing.trouble() {
                None => return Check::ok(NAME, "off"),
                Some(trouble) => format!("on: it {trouble}"),
            },
            Err(problem) => problem.clone(),
        };
        Check::warn(NAME, found, format!("{}; in /etc/sysctl.d for good", NumaBalancing::MEND))
    }

    /// `node 0 (2 GiB, 1 GiB free)`.
    fn words(&self, nodes: &NodeSet) -> String {
        let word = |node: u32| match self.nodes.iter().find(|(known, ..)| *known == node) {
            Some((_, free, total)) => format!("node {node} ({}, {} free)", Bytes(*total), Bytes(*free)),
            None => format!("node {node}"),
        };
        nodes.iter().map(word).collect::<Vec<_>>().join(", ")
    }
}

fn sizes(sys: &Path, nodes: &NodeSet) -> Vec<(u32, u64, u64)> {
    let size = |node| node_memory(sys, node).ok().map(|memory| (node, memory.free_bytes, memory.total_bytes));
    nodes.iter().filter_map(size).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::report::Verdict::{self, Ok as Good, Warn};

    fn captured(name: &str) -> Memory {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../core/tests/fixtures/topology").join(name);
        Memory::read(&Root::new(dir))
    }

    #[test]
    fn names_the_nodes_of_captured_hosts() {
        for (name, verdict, words) in [
            ("hmat", Good, "NVM on node 1 ("),
            ("cpu-less", Good, "nodes without CPUs"),
            ("one-node", Warn, "one NUMA node"),
            ("fake", Warn, "DRAM on node 0, node 1"),
        ] {
            let check = captured(name).judge_tiers();
            assert_eq!(check.verdict, verdict, "{name}: {check:?}");
            assert!(check.text.contains(words), "{name}: {check:?}");
        }
        assert_eq!(captured("no such host").judge_tiers().verdict, Verdict::Fail);
    }

    #[test]
    fn balancing_gets_in_the_way() {
        let memory = |balancing| Memory { tiers: Ok(Tiers::default()), nodes: Vec::new(), balancing };
        for (balancing, verdict) in [
            (Ok(NumaBalancing::Off), Good),
            (Ok(NumaBalancing::Normal), Warn),
            (Ok(NumaBalancing::Tiering), Warn),
            (Err("cannot read it".to_owned()), Warn),
        ] {
            assert_eq!(memory(balancing).judge_balancing().verdict, verdict);
        }
    }
}
