// SPDX-License-Identifier: MIT OR Apache-2.0
//! Counts that must be exact to the page.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use ept_virt_core::sampler::{HarvestRequest, Level};

use super::Outcome;
use super::machine::{
    ALL, ALL_CLEAR, CODE_GFN, Machine, PAGES, SPREAD, Touch, expect_same, gfns, harvest, round_program,
};

const ROUNDS: u32 = 5;

/// 200 pages and the program's, of 16384, in every round; none while the guest rests.
pub fn rounds() -> Result<Outcome> {
    let mut machine = Machine::standard()?;
    let mut sampler = machine.observe()?;
    machine.load(&round_program(SPREAD, Touch::Write))?;
    let want = SPREAD.gfns_and_code();
    let (mut time_ns, mut entries) = (0, 0);
    for round in 1..=ROUNDS {
        machine.run_round()?;
        let seen = harvest(&mut sampler, ALL_CLEAR)?;
        expect_same(&format!("accessed in round {round}"), &gfns(&seen.accessed, 0), &want)?;
        expect_same(&format!("mapped in round {round}"), &gfns(&seen.mapped, 0), &want)?;
        let stats = seen.stats;
        ensure!(stats.accessed == 201 && stats.mapped_4k == 201, "the statistics differ: {stats:?}");
        ensure!(stats.entries_cleared == 201, "cleared {} entries, not 201", stats.entries_cleared);
        ensure!(stats.flushes == 1, "{} flushes in a round, not 1", stats.flushes);
        ensure!(seen.levels[1] == Level::Page4K, "level of 2 MiB: {:?}", seen.levels[1]);
        (time_ns, entries) = (time_ns + stats.time_ns, entries + stats.entries_read);

        let rest = harvest(&mut sampler, ALL_CLEAR)?;
        ensure!(rest.stats.accessed == 0, "{} pages accessed while the guest rested", rest.stats.accessed);
        ensure!(rest.stats.flushes == 0, "a flush although nothing was cleared");
    }
    Ok(Outcome::Pass(format!(
        "201 of {PAGES} pages in each of {ROUNDS} rounds, 0 at rest; {} entries and {} ns of emulated time a round",
        entries / u64::from(ROUNDS),
        time_ns / u64::from(ROUNDS)
    )))
}

/// Reading without clearing changes nothing.
pub fn peek() -> Result<Outcome> {
    let mut machine = Machine::standard()?;
    let (mut one, mut other) = (machine.observe()?, machine.observe()?);
    machine.load(&round_program(SPREAD, Touch::Write))?;
    machine.run_round()?;
    let want = SPREAD.gfns_and_code();
    for time in 1..=3 {
        let seen = harvest(&mut one, ALL)?;
        expect_same(&format!("accessed, peek {time}"), &gfns(&seen.accessed, 0), &want)?;
        ensure!(seen.stats.entries_cleared == 0, "a peek cleared {} entries", seen.stats.entries_cleared);
    }
    expect_same("accessed, to another session", &gfns(&harvest(&mut other, ALL)?.accessed, 0), &want)?;
    Ok(Outcome::Pass("three peeks and one by a second session saw the same 201 pages".into()))
}

/// A range may start and end anywhere; pieces add up to the whole.
pub fn unaligned_ranges() -> Result<Outcome> {
    let mut machine = Machine::standard()?;
    let mut sampler = machine.observe()?;
    machine.load(&round_program(SPREAD, Touch::Write))?;
    machine.run_round()?;
    let mut pieces = BTreeSet::new();
    let mut gfn_start = 0;
    // Odd lengths, so that every alignment to a word and to 2 MiB occurs.
    for gfn_count in (1..).step_by(74).map(|length: u64| length | 1) {
        let gfn_count = gfn_count.min(PAGES - gfn_start);
        let seen = harvest(&mut sampler, HarvestRequest { gfn_start, gfn_count, ..ALL })?;
        pieces.extend(gfns(&seen.accessed, gfn_start));
        gfn_start += gfn_count;
        if gfn_start == PAGES {
            break;
        }
    }
    expect_same("pieces", &pieces, &SPREAD.gfns_and_code())?;
    let beyond = harvest(&mut sampler, HarvestRequest { gfn_start: (1 << 36) - 64, gfn_count: 128, ..ALL })?;
    ensure!(beyond.stats.mapped_4k == 0, "pages beyond what the tables can map are reported as mapped");
    Ok(Outcome::Pass("odd pieces of 16384 pages add up to the same 201".into()))
}

/// Dirty apart from accessed: reading rounds leave no dirty bit, writing ones do.
pub fn dirty() -> Result<Outcome> {
    let clear_both = HarvestRequest { clear_dirty: true, ..ALL_CLEAR };
    let mut machine = Machine::standard()?;
    let mut sampler = machine.observe()?;
    machine.load(&round_program(SPREAD, Touch::Write))?;
    machine.run_round()?;
    harvest(&mut sampler, clear_both)?;

    machine.load(&round_program(SPREAD, Touch::Read))?;
    machine.run_round()?;
    let read = harvest(&mut sampler, clear_both)?;
    expect_same("accessed by reads", &gfns(&read.accessed, 0), &SPREAD.gfns_and_code())?;
    expect_same("dirty by reads", &gfns(&read.dirty, 0), &BTreeSet::new())?;

    machine.load(&round_program(SPREAD, Touch::Write))?;
    machine.run_round()?;
    let written = harvest(&mut sampler, clear_both)?;
    expect_same("accessed by writes", &gfns(&written.accessed, 0), &SPREAD.gfns_and_code())?;
    expect_same("dirty by writes", &gfns(&written.dirty, 0), &SPREAD.gfns())?;
    ensure!(!gfns(&written.dirty, 0).contains(&CODE_GFN), "the program's page was only executed");
    Ok(Outcome::Pass("201 accessed and 0 dirty by reads, 200 dirty by writes".into()))
}
