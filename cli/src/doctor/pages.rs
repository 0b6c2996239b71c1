// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sizes and sharing of pages: what can be told apart, and what can be moved.

use ept_virt_core::topology::NodeSet;
use ept_virt_core::units::{Bytes, PAGE_BYTES};

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
    /// Pages that KSM saves now: so many would be needed to part all (ksm.rst of
    /// the kernel's admin-guide).
    pub merged: u64,
    /// KSM goes on merging.
    pub merges: bool,
    /// Memory that processes can have without swapping, in bytes, where known.
    pub available: Option<u64>,
}

impl Pages {
    /// Reads it; `nodes` are those of both tiers.
    pub fn read(root: &Root, nodes: &NodeSet) -> Self {
        Self {
            transparent: root.choice("/sys/kernel/mm/transparent_hugepage/enabled"),
            pools: pools(root, nodes),
            // Merged with the kernel's zero page, pages are counted apart.
            merged: ["pages_sharing", "ksm_zero_pages"]
                .into_iter()
                .filter_map(|name| root.number(format!("/sys/kernel/mm/ksm/{name}")))
                .fold(0, u64::saturating_add),
            merges: root.number("/sys/kernel/mm/ksm/run") == Some(1),
            available: available(root),
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
        const NAME: &str = "KSM";
        if self.merged == 0 {
            return Check::ok(NAME, "no page is merged");
        }
        let stop = match self.merges {
            true => {
                "nothing, if merging saves more than placing; else `echo 0 > /sys/kernel/mm/ksm/run` \
                     (and stop ksmtuned, where it runs): no more is merged, and pages part as they are written to"
            }
            false => "nothing: no more is merged, and pages part as they are written to",
        };
        let need = Bytes(self.merged.saturating_mul(PAGE_BYTES));
        let known = self.available.map_or("how much is available is not known".into(), |available| {
            format!("{} are available now", Bytes(available))
        });
        Check::warn(
            NAME,
            format!("{} pages of 4 KiB are merged with others; merged pages are not moved", self.merged),
            format!(
                "{stop}. `echo 2` would part them all at once: that takes {need} of memory ({known}), \
                 and where it runs out the kernel kills guests"
            ),
        )
    }
}

/// MemAvailable of `/proc/meminfo`, in bytes.
fn available(root: &Root) -> Option<u64> {
    let text = root.text("/proc/meminfo")?;
    let kib = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    kib.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
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
    fn merged_pages_are_counted_and_parted_with_care() {
        assert_eq!(Pages::default().judge_merged().verdict, Ok);
        let merged = Pages { merged: 3 << 18, merges: true, available: Some(2 << 30), ..Pages::default() };
        let judge = |pages: &Pages| {
            let check = pages.judge_merged();
            assert_eq!(check.verdict, Warn);
            assert!(check.text.starts_with("786432 pages"), "{check:?}");
            check.mend.unwrap()
        };
        let mend = judge(&merged);
        // What is to be typed stops merging, and parts nothing.
        assert!(mend.contains("`echo 0 > /sys/kernel/mm/ksm/run`"), "{mend}");
        assert!(!mend.contains("echo 2 >"), "{mend}");
        assert!(mend.contains("takes 3 GiB of memory (2 GiB are available now)"), "{mend}");
        assert!(mend.ends_with("the kernel kills guests"), "{mend}");
        let unknown = judge(&Pages { available: None, ..merged.clone() });
        assert!(unknown.contains("takes 3 GiB of memory (how much is available is not known)"), "{unknown}");
        let stopped = judge(&Pages { merges: false, ..merged });
        assert!(
            stopped.starts_with("nothing: no more is merged") && !stopped.contains("echo 0"),
            "{stopped}"
        );
    }
}
