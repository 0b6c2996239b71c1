// SPDX-License-Identifier: MIT OR Apache-2.0
//! Leaves of 2 MiB and 1 GiB: one bit of the hardware stands for all pages.

use std::fs;

use anyhow::{Result, ensure};
use ept_virt_core::sampler::{HarvestRequest, KernelSampler, Level};

use super::Outcome;
use super::machine::{ALL, ALL_CLEAR, Machine, Memory, Pages, Touch, harvest, round_program};

const HUGE_2M: usize = 2 << 20;
const HUGE_1G: usize = 1 << 30;

/// Touches 3 of 4 units of 2 MiB in a slot of transparent huge pages.
pub fn levels_2m() -> Result<Outcome> {
    let huge = Memory::map(4 * HUGE_2M, HUGE_2M, 0)?;
    huge.advise(0, huge.bytes(), libc::MADV_HUGEPAGE)?;
    huge.populate();
    let got_kib = anon_huge_kib(&huge)?;
    if got_kib < 8192 {
        return Ok(Outcome::Skip(format!("the host gave {got_kib} KiB of transparent huge pages, not 8192")));
    }
    let base = 64 << 20;
    let pages = Pages { base, stride: HUGE_2M as u32, count: 3 };
    huge_rounds(
        &huge,
        u64::from(base),
        pages,
        Level::Huge2M,
        &[Level::Huge2M, Level::Huge2M, Level::Huge2M, Level::None],
    )
}

/// One page of 1 GiB from the host's pool of huge pages.
pub fn levels_1g() -> Result<Outcome> {
    let Some(huge) = huge_1g() else {
        return Ok(Outcome::Skip("the host has no free huge page of 1 GiB and could not make one".into()));
    };
    let base = 1 << 30;
    let pages = Pages { base, stride: 0x10_0000, count: 3 };
    huge_rounds(&huge, u64::from(base), pages, Level::Huge1G, &[Level::Huge1G; 512])
}

/// Maps a page of 1 GiB, after asking the host for one.
fn huge_1g() -> Option<Memory> {
    const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages";
    fs::write(POOL, "1").ok()?;
    Memory::map(HUGE_1G, HUGE_1G, libc::MAP_HUGETLB | (30 << libc::MAP_HUGE_SHIFT)).ok()
}

fn huge_rounds(
    huge: &Memory,
    base: u64,
    pages: Pages,
    level: Level,
    want_levels: &[Level],
) -> Result<Outcome> {
    let mut machine = Machine::standard()?;
    machine.set_slot(1, base, huge, huge.bytes())?;
    let outcome = huge_rounds_on(&mut machine, huge, base, pages, level, want_levels);
    // Before the memory goes away under the guest.
    machine.set_slot(1, base, huge, 0)?;
    outcome
}

fn huge_rounds_on(
    machine: &mut Machine,
    huge: &Memory,
    base: u64,
    pages: Pages,
    level: Level,
    want_levels: &[Level],
) -> Result<Outcome> {
    let mut sampler = machine.observe()?;
    let slot = HarvestRequest { gfn_start: base >> 12, gfn_count: huge.bytes() as u64 >> 12, ..ALL_CLEAR };
    machine.load(&round_program(pages, Touch::Write))?;
    let unit_pages: u64 = if level == Level::Huge2M { 512 } else { 512 * 512 };
    let units = want_levels.iter().filter(|found| **found == level).count() as u64;
    let touched = units * 512;
    for round in 1..=3 {
        machine.run_round()?;
        let seen = harvest(&mut sampler, slot)?;
        ensure!(seen.levels == want_levels, "levels in round {round}: {:?}", &seen.levels[..4]);
        let mapped = if level == Level::Huge2M { seen.stats.mapped_2m } else { seen.stats.mapped_1g };
        ensure!(mapped == touched, "round {round}: {mapped} pages mapped huge, expected {touched}");
        ensure!(seen.stats.mapped_4k == 0, "round {round}: {} small pages", seen.stats.mapped_4k);
        ensure!(seen.stats.accessed == touched, "round {round}: {} pages accessed", seen.stats.accessed);
        ensure!(
            seen.stats.entries_cleared == touched / unit_pages,
            "round {round}: {} entries cleared for {touched} pages",
            seen.stats.entries_cleared
        );
        ensure!(harvest(&mut sampler, slot)?.stats.accessed == 0, "round {round}: accessed at rest");
    }
    let cut = partial_range_keeps_the_bit(machine, &mut sampler, slot)?;
    Ok(Outcome::Pass(format!("{touched} pages under {} entries, 0 at rest; {cut}", touched / unit_pages)))
}

/// A range that cuts a huge mapping reads its bit and leaves it set.
fn partial_range_keeps_the_bit(
    machine: &mut Machine,
    sampler: &mut KernelSampler,
    slot: HarvestRequest,
) -> Result<&'static str> {
    machine.run_round()?;
    let first_half = HarvestRequest { gfn_count: 256, ..slot };
    for _ in 0..2 {
        let seen = harvest(sampler, first_half)?;
        ensure!(seen.stats.accessed == 256 && seen.stats.entries_cleared == 0, "{:?}", seen.stats);
    }
    ensure!(harvest(sampler, slot)?.stats.accessed > 0, "the bit was lost");
    ensure!(
        harvest(sampler, HarvestRequest { gfn_count: 512, ..ALL })?.levels == [Level::Page4K],
        "slot 0 is small"
    );
    Ok("a range that cuts a mapping keeps its bit")
}

/// AnonHugePages of the mapping that holds `memory`, from /proc/self/smaps.
pub(super) fn anon_huge_kib(memory: &Memory) -> Result<u64> {
    let smaps = fs::read_to_string("/proc/self/smaps")?;
    let address = |digits| u64::from_str_radix(digits, 16).ok();
    let mut inside = false;
    let mut kib = 0;
    for line in smaps.lines() {
        let range = line.split_whitespace().next().and_then(|word| word.split_once('-'));
        let range = range.and_then(|(start, end)| Some((address(start)?, address(end)?)));
        if let Some((start, end)) = range {
            inside = start < memory.address() + memory.bytes() as u64 && memory.address() < end;
        } else if let Some(rest) = line.strip_prefix("AnonHugePages:").filter(|_| inside) {
            kib += rest.trim().trim_end_matches(" kB").parse::<u64>()?;
        }
    }
    Ok(kib)
}
