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

/// Backs every second touched page by node 1 and asks for node 1, 0 and both.
pub fn on_nodes() -> Result<Outcome> {
    if !Path::new("/sys/devices/system/node/node1").exists() {
        return Ok(Outcome::Skip("this host has one NUMA node".into()));
    }
    let memory = Memory::small_pages(PAGES)?;
    let far: BTreeSet<u64> = SPREAD.gfns().into_iter().step_by(2).collect();
    for gfn in &far {
        bind(&memory, *gfn as usize * PAGE, 1)?;
    }
    for gfn in SPREAD.gfns_and_code().difference(&far) {
        bind(&memory, *gfn as usize * PAGE, 0)?;
    }
    memory.populate();
    let mut machine = Machine::new(memory)?;
    let mut sampler = machine.observe()?;
    machine.load(&round_program(SPREAD, Touch::Write))?;
    machine.run_round()?;

    compare(&mut sampler, &far, "by range")?;
    // Hosts whose nodes interleave look up each frame; here that is asked for.
    fs::write(BY_PAGE, "Y").with_context(|| format!("cannot write {BY_PAGE}"))?;
    let by_page = compare(&mut sampler, &far, "by page");
    fs::write(BY_PAGE, "N").with_context(|| format!("cannot write {BY_PAGE}"))?;
    by_page?;
    Ok(Outcome::Pass(format!("{} pages on node 1 and the others on node 0, by range and by page", far.len())))
}

/// Asks about several sets of nodes; `far` is what lies on node 1.
fn compare(sampler: &mut KernelSampler, far: &BTreeSet<u64>, how: &str) -> Result<()> {
    let all = SPREAD.gfns_and_code();
    let near: BTreeSet<u64> = all.difference(far).copied().collect();
    let mut seen = Harvest::default();
    for (nodes, want) in [("1", far), ("0", &near), ("0-1", &all), ("7", &BTreeSet::new())] {
        let set: NodeSet = nodes.parse()?;
        sampler.harvest(&ALL, &set, &mut seen)?;
        expect_same(&format!("on nodes {nodes}, {how}"), &gfns(&seen.on_slow, 0), want)?;
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
