// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the flush is for: a vCPU that never leaves the guest keeps using cached
//! translations, and the CPU does not set an accessed bit that it has cached as
//! set. Without a flush such a guest looks idle.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ept_virt_core::sampler::{HarvestRequest, KernelSampler};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::Outcome;
use super::machine::{
    ALL, ALL_CLEAR, CODE_GFN, COUNTER, KvmCounter, Machine, Memory, PAGE, Pages, expect_same, gfns, harvest,
    spin_program,
};

/// Eight pages that the guest writes without end.
const EIGHT: Pages = Pages { base: 0x20_0000, stride: 0x1000, count: 8 };
/// Rounds of the guest between clearing and looking.
const GUEST_ROUNDS: u32 = 100;
/// The host's timer interrupts the guest now and then; a window without an exit
/// is found within this many.
const WINDOWS: u32 = 200;

pub fn proof() -> Result<Outcome> {
    if std::thread::available_parallelism()?.get() < 2 {
        return Ok(Outcome::Skip("needs two CPUs: one for the guest that never exits".into()));
    }
    // Bochs ties the timer to instructions; elsewhere its interrupts make the
    // guest exit too often for a window without one.
    if !fs::read_to_string("/proc/cpuinfo")?.contains("GenuineIntel") {
        return Ok(Outcome::Skip(
            "proved on the Intel host: here the timer interrupts the guest too often".into(),
        ));
    }
    let mut machine = Machine::standard()?;
    machine.load(&spin_program(EIGHT))?;
    let sampler = machine.observe()?;
    let exits = KvmCounter::new(&machine, "exits")?;
    let Machine { mut vcpu, vm, memory } = machine;
    let (stop, begin) = (AtomicBool::new(false), Barrier::new(2));
    let outcome = std::thread::scope(|scope| {
        let guest = scope.spawn(|| -> Result<()> {
            pin_to(1)?;
            begin.wait();
            while !stop.load(Ordering::Relaxed) {
                match vcpu.run() {
                    Err(error) if error.errno() != libc::EINTR => return Err(error).context("KVM_RUN"),
                    _ => {}
                }
            }
            Ok(())
        });
        begin.wait();
        let outcome = pin_to(0).and_then(|()| observe(&memory, &exits, sampler));
        stop.store(true, Ordering::Relaxed);
        // Dropping EIGHT's program: an instruction that leaves the guest.
        memory.write(CODE_GFN as usize * PAGE, &[0xF4; 64]);
        guest.join().map_err(|_| anyhow::anyhow!("the guest's thread panicked"))??;
        outcome
    });
    drop(vm);
    outcome
}

fn observe(memory: &Memory, exits: &KvmCounter, mut sampler: KernelSampler) -> Result<Outcome> {
    wait_guest_rounds(memory, GUEST_ROUNDS)?;
    let want: BTreeSet<u64> = EIGHT.gfns();
    let eight = HarvestRequest { gfn_start: u64::from(EIGHT.base) / PAGE as u64, gfn_count: 8, ..ALL };
    let young = |bitmap: &[u64]| gfns(bitmap, eight.gfn_start);

    let (mut stale, mut windows) = (None, 0);
    while stale.is_none() && windows < WINDOWS {
        windows += 1;
        // Counted from before the clearing: an exit right after it would refill
        // the translations.
        let before = exits.count()?;
        harvest(&mut sampler, HarvestRequest { clear_accessed: true, ..eight })?;
        wait_guest_rounds(memory, GUEST_ROUNDS)?;
        let seen = young(&harvest(&mut sampler, eight)?.accessed);
        if exits.count()? == before {
            stale = Some(seen.len());
        }
    }
    let Some(stale) = stale else {
        bail!("no window of {GUEST_ROUNDS} guest rounds without an exit in {WINDOWS} tries");
    };
    ensure!(
        stale == 0,
        "{stale} of 8 pages young without a flush: this CPU did not cache, so it proves nothing"
    );

    for time in 1..=10 {
        harvest(&mut sampler, HarvestRequest { gfn_start: eight.gfn_start, gfn_count: 8, ..ALL_CLEAR })?;
        wait_guest_rounds(memory, GUEST_ROUNDS)?;
        expect_same(
            &format!("young after flush {time}"),
            &young(&harvest(&mut sampler, eight)?.accessed),
            &want,
        )?;
    }
    Ok(Outcome::Pass(format!(
        "0 of 8 young without a flush after {GUEST_ROUNDS} guest rounds without an exit (window {windows}), 8 of 8 with, 10 times"
    )))
}

fn pin_to(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("cannot run on CPU {cpu}"))
}

/// Waits until the guest's counter has gone up by `rounds`, without a system call.
fn wait_guest_rounds(memory: &Memory, rounds: u32) -> Result<()> {
    let offset = CODE_GFN as usize * PAGE + COUNTER;
    let (start, from) = (Instant::now(), memory.read_u32(offset));
    while memory.read_u32(offset).wrapping_sub(from) < rounds {
        ensure!(start.elapsed() < Duration::from_secs(60), "the guest does not run");
        std::hint::spin_loop();
    }
    Ok(())
}
