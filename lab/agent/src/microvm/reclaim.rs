// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the host's page reclaim learns of accesses whose bits a harvest cleared.

use std::fs;

use anyhow::{Context, Result, ensure};
use ept_virt_core::sampler::{HarvestRequest, Sampler};
use ept_virt_core::uapi::{self, KesHarvest, number};

use super::Outcome;
use super::abi::{errno, expect};
use super::arguments::open;
use super::machine::{ALL_CLEAR, Machine, Memory, SPREAD, Touch, harvest, round_program};

/// With the flag, and only then, the kernel takes the pages that were reported for
/// referenced: exactly these.
pub fn keep_young() -> Result<Outcome> {
    let mut machine = Machine::standard()?;
    machine.load(&round_program(SPREAD, Touch::Write))?;
    // From here on all is mapped: no fault tells the kernel of an access.
    machine.run_round()?;
    let mut sampler = machine.observe()?;
    harvest(&mut sampler, ALL_CLEAR)?;
    if !sampler.info().keep_young {
        return refused(&machine);
    }
    for (keep_young, want) in [(false, 0), (true, 201), (false, 0)] {
        // All types of pages (Documentation/filesystems/proc.rst, clear_refs).
        fs::write("/proc/self/clear_refs", "1").context("forgetting what was referenced")?;
        machine.run_round()?;
        let seen = harvest(&mut sampler, HarvestRequest { keep_young, ..ALL_CLEAR })?;
        ensure!(seen.stats.accessed == 201, "{} pages accessed", seen.stats.accessed);
        let referenced = referenced_pages(&machine.memory)?;
        ensure!(referenced == want, "{referenced} pages referenced with keep_young {keep_young}, not {want}");
    }
    Ok(Outcome::Pass("201 pages harvested and referenced; without the flag none".into()))
}

/// A kernel that has nothing to note it in says so.
fn refused(machine: &Machine) -> Result<Outcome> {
    let session = open()?;
    uapi::attach(&session, machine.vm_fd())?;
    let flags = uapi::HARVEST_CLEAR_ACCESSED | uapi::HARVEST_KEEP_YOUNG;
    let mut request = KesHarvest { gfn_count: 64, flags, ..Default::default() };
    expect("KEEP_YOUNG", errno(&session, number::HARVEST, &mut request), libc::EOPNOTSUPP)?;
    Ok(Outcome::Pass("refused: this kernel can not note it".into()))
}

/// Pages of a mapping that the kernel takes for referenced.
fn referenced_pages(memory: &Memory) -> Result<u64> {
    let (start, end) = (memory.address(), memory.address() + memory.bytes() as u64);
    let smaps = fs::read_to_string("/proc/self/smaps").context("reading smaps")?;
    let (mut inside, mut kib) = (false, 0);
    for line in smaps.lines() {
        if let Some(range) = line.split_once(' ').and_then(|(range, _)| range.split_once('-')) {
            let address = |text| u64::from_str_radix(text, 16).with_context(|| line.to_owned());
            inside = address(range.0)? < end && address(range.1)? > start;
        } else if let Some(text) = line.strip_prefix("Referenced:").filter(|_| inside) {
            kib += text.trim().trim_end_matches(" kB").parse::<u64>().with_context(|| line.to_owned())?;
        }
    }
    Ok(kib / 4)
}
