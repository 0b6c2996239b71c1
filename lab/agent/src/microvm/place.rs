// SPDX-License-Identifier: MIT OR Apache-2.0
//! The harvest's second answer: which pages lie on given NUMA nodes.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use ept_virt_core::sampler::{Harvest, KernelSampler, Sampler};
use ept_virt_core::topology::NodeSet;

use super::Outcome;
use super::machine::{ALL, Machine, Memory, PAGE, PAGES, SPREAD, Touch, expect_same, gfns, round_program};

const BY_PAGE: &str = "/sys/module/kvm_ept_sample/parameters/nodes_by_page";

/// Sets of nodes to ask for; those of more than two nodes have more boundaries.
const SETS: [&str; 9] = ["0", "1", "0-1", "7", "2", "1,3", "0,2", "1-2", "0-3"];

/// Spreads the touched pages over the host's nodes and asks for sets of them.
pub fn on_nodes() -> Result<Outcome> {
    let nodes = (0..4).take_while(|node| Path::new(&format!("/sys/devices/system/node/node{node}")).exists());
    let nodes = nodes.count() as u64;
    if nodes < 2 {
        return Ok(Outcome::Skip("this host has one NUMA node".into()));
    }
    let memory = Memory::small_pages(PAGES)?;
    let mut placed: Vec<BTreeSet<u64>> = vec![BTreeSet::new(); nodes as usize];
    for (index, gfn) in SPREAD.gfns_and_code().into_iter().enumerate() {
        let node = index as u64 % nodes;
        bind(&memory, gfn as usize * PAGE, node as u32)?;
        placed[node as usize].insert(gfn);
    }
    memory.populate();
    let mut machine = Machine::new(memory)?;
    let mut sampler = machine.observe()?;
    machine.load(&round_program(SPREAD, Touch::Write))?;
    machine.run_round()?;

    compare(&mut sampler, &placed, "by range")?;
    // Hosts whose nodes interleave look up each frame; here that is asked for.
    fs::write(BY_PAGE, "Y").with_context(|| format!("cannot write {BY_PAGE}"))?;
    let by_page = compare(&mut sampler, &placed, "by page");
    fs::write(BY_PAGE, "N").with_context(|| format!("cannot write {BY_PAGE}"))?;
    by_page?;
    Ok(Outcome::Pass(format!(
        "201 pages on {nodes} nodes, {} sets of them, by range and by page",
        SETS.len()
    )))
}

/// Asks about several sets of nodes; `placed` is what lies on each node.
fn compare(sampler: &mut KernelSampler, placed: &[BTreeSet<u64>], how: &str) -> Result<()> {
    let mut seen = Harvest::default();
    for nodes in SETS {
        let set: NodeSet = nodes.parse()?;
        let want: BTreeSet<u64> = placed
            .iter()
            .enumerate()
            .filter(|(node, _)| set.words().first().is_some_and(|word| word >> node & 1 == 1))
            .flat_map(|(_, gfns)| gfns.iter().copied())
            .collect();
        sampler.harvest(&ALL, &set, &mut seen)?;
        expect_same(&format!("on nodes {nodes}, {how}"), &gfns(&seen.on_slow, 0), &want)?;
        ensure!(seen.stats.on_slow == want.len() as u64, "the statistics differ: {:?}", seen.stats);
    }
    Ok(())
}

/// Binds one page that is not resident yet.
fn bind(memory: &Memory, offset: usize, node: u32) -> Result<()> {
    let mask: u64 = 1 << node;
    // SAFETY: sets a policy for a page of `memory`; the kernel only reads `mask`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            memory.address() + offset as u64,
            PAGE,
            libc::MPOL_BIND,
            &mask,
            u64::BITS as u64,
            0,
        )
    };
    ensure!(result == 0, "mbind to node {node}: {}", std::io::Error::last_os_error());
    Ok(())
}
