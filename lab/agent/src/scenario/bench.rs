// SPDX-License-Identifier: MIT OR Apache-2.0
//! What it costs to learn which pages of a guest were accessed and where they
//! lie, by the ways that a host has. Emulated: only the ratios mean something.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use anyhow::{Context, Result};
use ept_virt_core::process::{Process, find_vm_fd};
use ept_virt_core::sampler::{Harvest, HarvestRequest, KernelSampler, MemSlot, Sampler};
use ept_virt_core::topology::NodeSet;

use super::domain::{DomainSpec, Memory};
use super::host;
use super::truth;

const PAGE_BYTES: u64 = 4096;
const ROUNDS: u32 = 10;

/// Measures and prints a table, then `EPT-DONE`.
pub fn run() -> Result<()> {
    let outcome = host::reset().and_then(|()| measure());
    if let Err(error) = &outcome {
        println!("The bench failed: {error:#}");
    }
    println!("EPT-DONE");
    outcome
}

fn measure() -> Result<()> {
    println!("{:<46} {:>12} {:>12}", "", "4 KiB pages", "huge pages");
    let small = costs(Memory::Memfd)?;
    let huge = costs(Memory::Anonymous)?;
    for ((what, small), (_, huge)) in small.iter().zip(&huge) {
        println!("{what:<46} {small:>9.0} ns {huge:>9.0} ns");
    }
    println!("time per page of guest memory, mean of {ROUNDS} rounds, emulated: compare, do not quote");
    Ok(())
}

/// Nanoseconds for each page of the guest's memory, by what was done.
fn costs(memory: Memory) -> Result<Vec<(&'static str, f64)>> {
    let spec = DomainSpec { memory, ..DomainSpec::default() };
    let mut guest = spec.start()?;
    guest.wait_ready()?;
    let pid = guest.pid()?;
    let process = Process::open(pid)?;
    let mut sampler = KernelSampler::open()?;
    sampler.attach(find_vm_fd(&process)?.as_fd())?;
    let (_, slots) = sampler.memslots()?;
    let slot = slots
        .iter()
        .filter(|slot| !slot.read_only)
        .max_by_key(|slot| slot.page_count)
        .context("the guest has no memory")?;
    let slow: NodeSet = "1".parse()?;
    let mut costs = Vec::new();
    for (what, clear_accessed, flush) in [
        ("harvest: accessed, dirty, mapped, place", false, false),
        ("harvest and clear", true, false),
        ("harvest, clear and flush", true, true),
    ] {
        let request = HarvestRequest {
            gfn_start: slot.gfn_start,
            gfn_count: slot.page_count,
            clear_accessed,
            clear_dirty: false,
            flush,
            keep_young: false,
        };
        let mut seen = Harvest::default();
        let cost = time_per_page(slot, || Ok(sampler.harvest(&request, &slow, &mut seen)?))?;
        costs.push((what, cost));
    }
    let addresses: Vec<u64> = (0..slot.page_count).map(|page| slot.hva + page * PAGE_BYTES).collect();
    let cost = time_per_page(slot, || truth::count_nodes(pid, &addresses).map(drop))?;
    costs.push(("move_pages without targets: place only", cost));
    let pagemap = File::open(format!("/proc/{pid}/pagemap")).context("opening pagemap")?;
    let mut entries = vec![0; usize::try_from(slot.page_count * 8)?];
    let offset = slot.hva / PAGE_BYTES * 8;
    let cost = time_per_page(slot, || Ok(pagemap.read_exact_at(&mut entries, offset)?))?;
    costs.push(("read of /proc/PID/pagemap: frame numbers only", cost));
    Ok(costs)
}

fn time_per_page(slot: &MemSlot, mut work: impl FnMut() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    for _ in 0..ROUNDS {
        work()?;
    }
    let pages = slot.page_count * u64::from(ROUNDS);
    Ok(start.elapsed().as_nanos() as f64 / pages as f64)
}
