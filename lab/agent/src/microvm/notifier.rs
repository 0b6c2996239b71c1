// SPDX-License-Identifier: MIT OR Apache-2.0
//! Hosts whose tables do not tell what a guest accessed: KVM does, by its MMU
//! notifier. What nobody can tell is refused, and the guest runs on.

use std::collections::BTreeSet;

use anyhow::{Result, bail, ensure};
use ept_virt_core::sampler::{HarvestRequest, KernelSampler, Level, SamplerError, Sources};
use ept_virt_core::samples::{AccessSet, Sampling};

use super::Outcome;
use super::huge::anon_huge_kib;
use super::machine::{
    ALL, ALL_CLEAR, Machine, Memory, PAGE, PAGES, Pages, SPREAD, Touch, expect_nothing_last, expect_same,
    gfns, harvest, round_program,
};

/// For a CPU whose EPT has no accessed and dirty bits. That accesses are exact
/// there, the same tests show as elsewhere.
pub fn no_ad_bits() -> Result<Outcome> {
    let mut machine = Machine::standard()?;
    let mut sampler = machine.observe()?;
    machine.load(&round_program(SPREAD, Touch::Write))?;
    machine.run_round()?;
    nothing_is_written_or_sampled(&machine, &mut sampler, "no accessed and dirty bits")?;
    let seen = harvest(&mut sampler, ALL_CLEAR)?;
    expect_same("accessed, after all refusals", &gfns(&seen.accessed, 0), &SPREAD.gfns_and_code())?;
    ensure!(seen.stats.sources == Sources { tables: true, notifier: true }, "{:?}", seen.stats.sources);
    // KVM gives each permission back that it took, and no others.
    let before = machine.memory.read_u32(SPREAD.base as usize);
    machine.run_round()?;
    ensure!(machine.memory.read_u32(SPREAD.base as usize) == before + 1, "a write of the guest is missing");
    Ok(Outcome::Pass("KVM tells accesses and clears; dirty and sampling refused, the guest runs on".into()))
}

/// For a KVM that shadows the guest's page tables: no tables to walk.
pub fn shadow_mmu() -> Result<Outcome> {
    let mut machine = Machine::standard()?;
    let (mut sampler, mut other) = (machine.observe()?, machine.observe()?);
    machine.load(&round_program(SPREAD, Touch::Write))?;
    let want = SPREAD.gfns_and_code();
    let mut time_ns = 0;
    for round in 1..=3 {
        machine.run_round()?;
        for session in [&mut sampler, &mut other] {
            let peek = harvest(session, ALL)?;
            expect_same(&format!("accessed in round {round}, peek"), &gfns(&peek.accessed, 0), &want)?;
            ensure!(peek.stats.entries_cleared == 0, "a peek cleared {} entries", peek.stats.entries_cleared);
        }
        let seen = harvest(&mut sampler, ALL_CLEAR)?;
        expect_same(&format!("accessed in round {round}"), &gfns(&seen.accessed, 0), &want)?;
        expect_same("mapped", &gfns(&seen.mapped, 0), &BTreeSet::new())?;
        ensure!(seen.levels[1] == Level::Page4K, "level of 2 MiB: {:?}", seen.levels[1]);
        ensure!(seen.stats.sources == Sources { tables: false, notifier: true }, "{:?}", seen.stats.sources);
        ensure!((seen.stats.accessed, seen.stats.entries_cleared) == (201, 201), "{:?}", seen.stats);
        ensure!(seen.stats.flushes == 1, "{} flushes, not 1", seen.stats.flushes);
        time_ns = seen.stats.time_ns;
        let rest = harvest(&mut sampler, ALL_CLEAR)?.stats;
        ensure!(rest.accessed == 0 && rest.flushes == 0, "while the guest rested: {rest:?}");
    }
    nothing_is_written_or_sampled(&machine, &mut sampler, "tdp_mmu=")?;
    expect_nothing_last(&mut sampler)?;
    machine.run_round()?;
    Ok(Outcome::Pass(format!(
        "201 of {PAGES} pages in each of 3 rounds, 0 at rest, by KVM alone; {time_ns} ns of emulated time a round"
    )))
}

/// As [`shadow_mmu`], with mappings of 2 MiB.
pub fn shadow_huge() -> Result<Outcome> {
    let memory = Memory::map(PAGES as usize * PAGE, 2 << 20, 0)?;
    memory.advise(0, memory.bytes(), libc::MADV_HUGEPAGE)?;
    memory.populate();
    let got_kib = anon_huge_kib(&memory)?;
    if got_kib * 1024 < memory.bytes() as u64 {
        return Ok(Outcome::Skip(format!("the host gave {got_kib} KiB of transparent huge pages, not all")));
    }
    let mut machine = Machine::new(memory)?;
    let mut sampler = machine.observe()?;
    let pages = Pages { base: 8 << 20, stride: 4 << 20, count: 3 };
    machine.load(&round_program(pages, Touch::Write))?;
    for round in 1..=3 {
        machine.run_round()?;
        // The program's page may be mapped small.
        let most = HarvestRequest { gfn_start: 512, gfn_count: PAGES - 512, ..ALL_CLEAR };
        let half = harvest(&mut sampler, HarvestRequest { gfn_start: 2048, gfn_count: 256, ..ALL_CLEAR })?;
        ensure!(half.levels == [Level::Huge2M], "levels of half a huge page: {:?}", half.levels);
        ensure!((half.stats.accessed, half.stats.entries_cleared) == (256, 0), "{:?}", half.stats);
        let seen = harvest(&mut sampler, most)?;
        let want = [2048, 3072, 4096].into_iter().flat_map(|gfn| gfn..gfn + 512).collect();
        expect_same(&format!("accessed in round {round}"), &gfns(&seen.accessed, 512), &want)?;
        ensure!(seen.stats.entries_cleared == 3, "cleared {}, not 3", seen.stats.entries_cleared);
        ensure!(harvest(&mut sampler, most)?.stats.accessed == 0, "accessed at rest in round {round}");
    }
    Ok(Outcome::Pass(
        "3 units of 2 MiB in each of 3 rounds, 0 at rest; a range that cuts one keeps its bit".into(),
    ))
}

/// Clearing dirty bits and sampling are refused, both for `reason`.
fn nothing_is_written_or_sampled(machine: &Machine, sampler: &mut KernelSampler, reason: &str) -> Result<()> {
    let seen = harvest(sampler, ALL)?;
    ensure!(seen.stats.dirty_untold && seen.dirty.iter().all(|word| *word == 0), "dirty bits are reported");
    let refused = harvest(sampler, HarvestRequest { clear_dirty: true, ..ALL_CLEAR });
    expect_refusal(refused.map(|_| ()), reason)?;
    let refused = Sampling::start(machine.observe()?, AccessSet::WRITE, 100, 0);
    expect_refusal(refused.map(|_| ()).map_err(anyhow::Error::from), reason)
}

fn expect_refusal(result: Result<()>, reason: &str) -> Result<()> {
    match result.map_err(|error| error.downcast::<SamplerError>()) {
        Err(Ok(SamplerError::Unsupported(text))) if text.contains(reason) => Ok(()),
        other => bail!("expected a refusal that says {reason:?}, got {other:?}"),
    }
}
