// SPDX-License-Identifier: MIT OR Apache-2.0
//! KVM's NX huge pages are switched on and off while huge mappings are armed:
//! each time they are split, or dropped, under the guest's own fetches.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ept_virt_core::samples::{Access, AccessSet, Sampling};

use super::Outcome;
use super::machine::{Machine, Memory, PAGE, Pages, RETURN, Touch, round_program};
use super::sampling::{OFTEN_HZ, drain, while_running};

const PARAMETER: &str = "/sys/module/kvm/parameters/nx_huge_pages";
const HUGE: usize = 2 << 20;
/// A page in each of six huge ones.
const SIX: Pages = Pages { base: HUGE as u32 + 0x5000, stride: HUGE as u32 + 0x7000, count: 6 };
const SWITCHES: u32 = 20;

pub fn switched() -> Result<Outcome> {
    let before = fs::read_to_string(PARAMETER).with_context(|| format!("cannot read {PARAMETER}"))?;
    let memory = Memory::map(8 * HUGE, HUGE, 0)?;
    memory.advise(0, memory.bytes(), libc::MADV_HUGEPAGE)?;
    memory.populate();
    for gfn in SIX.gfns() {
        memory.write(gfn as usize * PAGE, &RETURN);
    }
    let mut machine = Machine::new(memory)?;
    machine.load(&round_program(SIX, Touch::Exec))?;
    machine.run_round()?;
    let mut sampling = Sampling::start(machine.observe()?, AccessSet::ALL, OFTEN_HZ, 0)?;
    let (rounds, ()) = while_running(&mut machine, || {
        for _ in 0..SWITCHES {
            for value in ["force", "off"] {
                switch(value)?;
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    })?;
    switch(if before.trim() == "Y" { "force" } else { "off" })?;
    let samples = drain(&mut sampling)?;
    let stats = sampling.stats()?;
    let fetches = samples.iter().filter(|sample| sample.access == Access::Exec).count();
    ensure!(fetches > 50, "{fetches} fetches were sampled: {stats:?}");
    machine.run_round().context("after the last switch")?;
    Ok(Outcome::Pass(format!(
        "switched on and off {SWITCHES} times: {fetches} fetches sampled, the guest did {rounds} rounds"
    )))
}

fn switch(value: &str) -> Result<()> {
    fs::write(PARAMETER, value).with_context(|| format!("cannot write {value} to {PARAMETER}"))
}
