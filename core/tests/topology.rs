// SPDX-License-Identifier: MIT OR Apache-2.0
//! Hosts as their sysfs and procfs show them; see `fixtures/topology`.

use std::path::{Path, PathBuf};

use ept_virt_core::topology::{
    Latencies, NodeMemory, NodeSet, NumaBalancing, Tiers, node_memory, node_memory_and_reclaimable,
    numa_balancing, reclaims,
};

fn host(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/topology").join(name)
}

fn tiers(name: &str) -> Tiers {
    Tiers::detect(&host(name).join("sys")).unwrap()
}

fn nodes(text: &str) -> NodeSet {
    text.parse().unwrap()
}

#[test]
fn latencies_come_from_the_hmat_else_from_distances() {
    for (name, fast, slow, from) in [
        ("hmat", 80, 250, "ACPI's HMAT"),
        ("cpu-less", 80, 160, "the nodes' distances, and 80 ns assumed for DRAM"),
        ("fake", 80, 250, "nothing on this host: 80 and 250 ns assumed"),
    ] {
        let latencies = Latencies::detect(&host(name).join("sys"), &tiers(name));
        let ns = [latencies.fast, latencies.slow].map(|time| time.as_nanos());
        assert_eq!((ns, latencies.from), ([fast, slow], from), "{name}");
        assert_eq!(latencies.gap().as_nanos(), slow - fast);
    }
}

#[test]
fn tiers_come_from_the_kernel_else_from_cpus_and_distances() {
    for (name, fast, slow, from) in [
        // The order is by number: as text, memory_tier4 would be after memory_tier22.
        ("hmat", "0", "1", "memory tiers of the kernel"),
        ("three-tiers", "0-1", "2,4-5", "memory tiers of the kernel"),
        ("cpu-less", "0", "1", "nodes without CPUs"),
        (
            "fake",
            "0-1",
            "",
            "one tier: the kernel knows no slower memory tier, and no node with memory of its own is without CPUs",
        ),
        (
            "local-cpu-less",
            "0-1",
            "",
            "one tier: the kernel knows no slower memory tier, and no node with memory of its own is without CPUs",
        ),
        ("one-node", "0", "", "one tier: the host has one NUMA node with memory"),
    ] {
        let expected = Tiers { fast: nodes(fast), slow: nodes(slow), from: from.into() };
        assert_eq!(tiers(name), expected, "{name}");
    }
}

#[test]
fn a_policy_names_either_tier_or_both() {
    let detected = tiers("three-tiers");
    let with = |fast: Option<&str>, slow: Option<&str>| {
        let tiers = detected.with_policy(fast.map(nodes).as_ref(), slow.map(nodes).as_ref());
        (tiers.fast.to_string(), tiers.slow.to_string(), tiers.from)
    };
    let policy = "the domain's policy".to_owned();
    assert_eq!(with(None, None).2, detected.from);
    assert_eq!(with(Some("0"), Some("5")), ("0".into(), "5".into(), policy.clone()));
    assert_eq!(with(Some("0"), None), ("0".into(), "1-2,4-5".into(), policy.clone()));
    assert_eq!(with(None, Some("5")), ("0-2,4".into(), "5".into(), policy));
    let unknown = detected.with_policy(Some(&nodes("0,3")), Some(&nodes("9"))).unknown_nodes(&detected);
    assert_eq!(unknown, nodes("3,9"));
}

#[test]
fn memory_of_a_node_is_in_bytes() {
    let memory = node_memory(&host("hmat").join("sys"), 1).unwrap();
    assert_eq!(memory, NodeMemory { total_bytes: 1_031_832 * 1024, free_bytes: 1_029_864 * 1024 });
}

#[test]
fn what_the_kernel_caches_counts_as_reclaimable() {
    let sys = host("hmat").join("sys");
    assert_eq!(node_memory_and_reclaimable(&sys, 0).unwrap().1, (41_208 + 80_124 + 8_012) * 1024);
}

#[test]
fn numa_balancing_is_told_apart() {
    for (name, expected) in [
        ("hmat", NumaBalancing::Normal),
        ("cpu-less", NumaBalancing::Off),
        ("three-tiers", NumaBalancing::Tiering),
        // A kernel without NUMA balancing has no such file.
        ("one-node", NumaBalancing::Off),
    ] {
        assert_eq!(numa_balancing(&host(name).join("proc")).unwrap(), expected, "{name}");
    }
}

#[test]
fn a_host_that_takes_memory_away_is_known() {
    // The first has swap, the second demotes; the third could swap and has nowhere to.
    for (name, expected) in [("hmat", true), ("three-tiers", true), ("one-node", false), ("fake", false)] {
        let host = host(name);
        assert_eq!(reclaims(&host.join("proc"), &host.join("sys")), expected, "{name}");
    }
}

#[test]
fn what_can_not_be_read_names_file_and_content() {
    let broken = host("broken");
    let message = |error: &dyn std::error::Error| error.to_string().replace(broken.to_str().unwrap(), "");
    assert_eq!(
        message(&Tiers::detect(&broken.join("sys")).unwrap_err()),
        "/sys/devices/system/node/has_memory holds \"zero\" where a list of nodes was expected"
    );
    assert_eq!(
        message(&node_memory(&broken.join("sys"), 0).unwrap_err()),
        "/sys/devices/system/node/node0/meminfo has no line \"MemFree:\""
    );
    assert_eq!(
        message(&node_memory(&broken.join("sys"), 7).unwrap_err()),
        "cannot read /sys/devices/system/node/node7/meminfo: No such file or directory (os error 2)"
    );
    assert_eq!(
        message(&numa_balancing(&broken.join("proc")).unwrap_err()),
        "/proc/sys/kernel/numa_balancing holds \"on\" where a number was expected"
    );
}
