// SPDX-License-Identifier: MIT OR Apache-2.0
//! KVM with the patch of kernel_patch, and without.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ept_virt_core::sampler::Sampler;
use ept_virt_core::samples::{AccessSet, Sampling};

use super::Outcome;
use super::admin::Stats;
use super::cost::ticks;
use super::machine::{CODE_GFN, KvmCounter, Machine, PAGE, Pages, SPREAD, Touch, round_program};
use super::sampling::{OFTEN_HZ, expect_counted, while_running};
use super::settings;

/// The module says which KVM it found, and it is the one that this host was given
/// (`ept.patched=1`).
pub fn back_end() -> Result<Outcome> {
    let machine = Machine::standard()?;
    let given = settings::number("patched")?.unwrap_or(0) == 1;
    let found = machine.observe()?.info().patched_kvm;
    ensure!(found == given, "KVM is patched: {given}, but the module says {found}");
    let stats = Stats::read()?;
    let word = stats.word("kvm")?;
    ensure!(word == if given { "patched" } else { "stock" }, "the statistics say {word}");
    Ok(Outcome::Pass(format!("{word} KVM")))
}

/// On patched KVM every armed entry that the guest faults on is restored where it
/// is: KVM's slow path, which asks the VMM's page tables, has nothing to do. On stock
/// KVM it is the other way around, but for writing alone.
pub fn in_place() -> Result<Outcome> {
    let patched = Machine::standard()?.observe()?.info().patched_kvm;
    let mut report = Vec::new();
    for (name, touch, access) in [
        ("reads", Touch::Read, AccessSet::ALL),
        ("reads and writes", Touch::Write, AccessSet::ALL),
        ("writes alone", Touch::Store, AccessSet::WRITE),
    ] {
        let mut machine = Machine::standard()?;
        machine.load(&round_program(SPREAD, touch))?;
        machine.run_round()?;
        let counters = ["pf_taken", "pf_fast", "pf_fixed", "exits"];
        let counters: Vec<KvmCounter> =
            counters.into_iter().map(|name| KvmCounter::new(&machine, name)).collect::<Result<_>>()?;
        let read = || counters.iter().map(KvmCounter::count).collect::<Result<Vec<u64>>>();
        let before = read()?;
        let sampling = Sampling::start(machine.observe()?, access, OFTEN_HZ, 0)?;
        let (rounds, ()) = while_running(&mut machine, || {
            std::thread::sleep(Duration::from_millis(1500));
            Ok(())
        })?;
        let (stats, after) = (sampling.stats()?, read()?);
        let [taken, fast, fixed, exits] = [0, 1, 2, 3].map(|index| after[index] - before[index]);
        let faults = stats.samples + stats.dropped + stats.unwanted;
        if touch == Touch::Write {
            // It held 1, and there was a round before.
            expect_counted(&machine.memory, SPREAD, 2, rounds)?;
        }
        ensure!(faults > 100, "only {faults} faults: {stats:?}");
        // An event that is delivered through an armed page goes the long way.
        ensure!(!patched || fixed * 100 <= faults, "KVM's slow path fixed {fixed} of {faults} faults");
        ensure!(
            !patched || (fast * 100 >= faults * 99 && taken >= fast),
            "{faults} faults, of which KVM restored {fast} in place, and took {taken}"
        );
        report.push(format!("{name}: {faults} faults, {fast} in place, {fixed} not, {exits} exits"));
    }
    Ok(Outcome::Pass(report.join("; ")))
}

/// Ticks of a fault of KVM's own, with no sampler: the first access to a page, and
/// a write to a page whose writes are logged. With one sampler of another VM as well.
pub fn of_a_fault() -> Result<Outcome> {
    const PAGES: Pages = Pages { base: 0x20_0000, stride: PAGE as u32, count: 8192 };
    let mut machine = Machine::standard()?;
    machine.memory.populate();
    machine.load(&round_program(PAGES, Touch::Store))?;
    let mut report = "ticks of a round of faults for each page:".to_owned();
    let mut measure = |when: &str| -> Result<()> {
        let (first, logged) = (first_accesses(&mut machine, PAGES)?, logged_writes(&mut machine, PAGES)?);
        report += &format!(" {when}: first access {first:.1}, logged write {logged:.1};");
        Ok(())
    };
    measure("no sampler")?;
    let mut other = Machine::standard()?;
    other.load(&round_program(SPREAD, Touch::Write))?;
    other.run_round()?;
    let sampling = Sampling::start(other.observe()?, AccessSet::ALL, 1, 0)?;
    measure("another VM sampled")?;
    drop(sampling);
    measure("no sampler again")?;
    Ok(Outcome::Pass(report))
}

/// The least of a few, as interrupts of the host would show.
fn least(mut measure: impl FnMut() -> Result<f64>) -> Result<f64> {
    (0..4).try_fold(f64::INFINITY, |least, _| Ok(measure()?.min(least)))
}

fn first_accesses(machine: &mut Machine, pages: Pages) -> Result<f64> {
    least(|| {
        // KVM forgets all that it mapped.
        machine.set_slot(0, 0, &machine.memory, 0)?;
        machine.set_slot(0, 0, &machine.memory, machine.memory.bytes())?;
        faults_of_a_round(machine, pages)
    })
}

fn logged_writes(machine: &mut Machine, pages: Pages) -> Result<f64> {
    machine.log_dirty(true)?;
    machine.run_round()?;
    let ticks = least(|| {
        // What was written is write-protected again.
        machine.vm.get_dirty_log(0, machine.memory.bytes()).context("KVM_GET_DIRTY_LOG")?;
        faults_of_a_round(machine, pages)
    })?;
    machine.log_dirty(false)?;
    Ok(ticks)
}

/// Ticks of a round for each page, every one of which faults.
fn faults_of_a_round(machine: &mut Machine, pages: Pages) -> Result<f64> {
    let taken = KvmCounter::new(machine, "pf_taken")?;
    let (before, start) = (taken.count()?, ticks());
    machine.run_round()?;
    let spent = ticks() - start;
    let faults = taken.count()? - before;
    ensure!(faults >= u64::from(pages.count), "{faults} faults of {} pages", pages.count);
    ensure!(faults <= u64::from(pages.count) + 4 + CODE_GFN, "{faults} faults of {} pages", pages.count);
    Ok(spent as f64 / f64::from(pages.count))
}
