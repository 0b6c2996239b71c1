// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sizes and sharing of pages: what can be told apart, and what can be moved.

use ept_virt_core::topology::NodeSet;

use super::report::Check;
use super::root::Root;

/// Huge pages of one size that are set aside (hugetlb).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pool {
    /// Size of a page in KiB.
    pub size_kib: u64,
    /// Pages of all nodes.
    pub pages: u64,
    /// Nodes with none free: nothing can be moved there.
    pub full_nodes: NodeSet,
}

/// What is asked about pages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pages {
    /// Transparent huge pages: always, madvise or never; none without them.
    pub transparent: Option<String>,
    /// Pools that hold pages.
    pub pools: Vec<Pool>,
    /// Pages that KSM shares now.
    pub merged: u64,
}

impl Pages {
    /// Reads it; `nodes` are those of both tiers.
    pub fn read(root: &Root, nodes: &NodeSet) -> Self {
        Self {
            transparent: root.choice("/sys/kernel/mm/transparent_hugepage/enabled"),
            pools: pools(root, nodes),
            merged: root.number("/sys/kernel/mm/ksm/pages_sharing").unwrap_or(0),
        }
    }

    /// How finely heat is seen.
    pub fn judge_transparent(&self) -> Check {
        const NAME: &str = "THP";
        match self.transparent.as_deref() {
            // QEMU asks for them with madvise.
            Some(choice @ ("always" | "madvise")) => Check::ok(
                NAME,
                format!("{choice}: heat is seen, and memory moved, by 2 MiB where the host maps huge pages"),
            ),
            Some("never") => {
                Check::ok(NAME, "never: heat is seen, and memory moved, by 4 KiB; guests walk more tables")
            }
            _ => Check::ok(NAME, "this kernel has none: all pages are of 4 KiB"),
        }
    }

    /// Whether guests on hugetlbfs can be moved.
    pub fn judge_pools(&self) -> Check {
        const NAME: &str = "hugetlb";
        if self.pools.is_empty() {
            return Check::ok(NAME, "no huge pages are set aside");
        }
        let full = self.pools.iter().find(|pool| !pool.full_nodes.is_empty());
        match full {
            None => Check::ok(NAME, "huge pages are set aside, with some free on every node"),
            Some(Pool { size_kib, full_nodes, .. }) => Check::warn(
                NAME,
                format!(
                    "huge pages are set aside, and of {size_kib} KiB none is free on node {full_nodes}: \
                     guests on hugetlbfs can not be moved there"
                ),
                format!(
                    "echo N > /sys/devices/system/node/nodeX/hugepages/hugepages-{size_kib}kB/nr_hugepages"
                ),
            ),
        }
    }

    /// Whether pages are shared: such pages stay where they are.
    pub fn judge_merged(&self) -> Check {
        match self.merged {
            0 => Check::ok("KSM", "no page is merged"),
            merged => Check::warn(
                "KSM",
                format!("{merged} pages of 4 KiB are merged with others; merged pages are not moved"),
                "nothing, if merging saves more than placing; else `echo 2 > /sys/kernel/mm/ksm/run`, which parts them all",
            ),
        }
    }
}

fn pools(root: &Root, nodes: &NodeSet) -> Vec<Pool> {
    let mut pools = Vec::new();
    for name in root.names("/sys/kernel/mm/hugepages") {
        let size = name.strip_prefix("hugepages-").and_then(|size| size.strip_suffix("kB"));
        let Some(size_kib) = size.and_then(|size| size.parse().ok()) else { continue };
        let pages = root.number(format!("/sys/kernel/mm/hugepages/{name}/nr_hugepages")).unwrap_or(0);
        let free = |node: &u32| {
            root.number(format!("/sys/devices/system/node/node{node}/hugepages/{name}/free_hugepages"))
        };
        if pages > 0 {
            let full_nodes = nodes.iter().filter(|node| free(node) == Some(0)).collect();
            pools.push(Pool { size_kib, pages, full_nodes });
        }
    }
    pools
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::report::Verdict::{Ok, Warn};

    #[test]
    fn thp_is_told_and_never_wrong() {
        for choice in [None, Some("always"), Some("madvise"), Some("never")] {
            let pages = Pages { transparent: choice.map(Into::into), ..Pages::default() };
            assert_eq!(pages.judge_transparent().verdict, Ok);
        }
    }

    #[test]
    fn a_node_without_free_huge_pages_takes_no_guest_of_hugetlbfs() {
        let pool = |full: &str| Pool { size_kib: 2048, pages: 8, full_nodes: full.parse().unwrap() };
        for (pools, verdict) in [(vec![], Ok), (vec![pool("")], Ok), (vec![pool(""), pool("1")], Warn)] {
            let check = Pages { pools, ..Pages::default() }.judge_pools();
            assert_eq!(check.verdict, verdict, "{check:?}");
        }
    }

    #[test]
    fn merged_pages_are_counted() {
        assert_eq!(Pages::default().judge_merged().verdict, Ok);
        let check = Pages { merged: 12, ..Pages::default() }.judge_merged();
        assert_eq!(check.verdict, Warn);
        assert!(check.text.starts_with("12 pages"));
    }
}
