// SPDX-License-Identifier: MIT OR Apache-2.0
//! Hosts on which nothing can be observed: refused, and the guest runs on.

use anyhow::{Result, bail};
use ept_virt_core::sampler::SamplerError;

use super::Outcome;
use super::machine::{ALL_CLEAR, Machine, SPREAD, Touch, harvest, round_program};

/// For a CPU whose EPT has no accessed and dirty bits.
pub fn no_ad_bits() -> Result<Outcome> {
    let mut machine = Machine::standard()?;
    // Tables to look at are there only after the guest has run.
    let mut sampler = machine.observe()?;
    machine.load(&round_program(SPREAD, Touch::Write))?;
    machine.run_round()?;
    let refused = harvest(&mut sampler, ALL_CLEAR).map(|_| ());
    expect_refusal(refused, "no accessed and dirty bits")?;
    machine.run_round()?;
    Ok(Outcome::Pass("harvest refused, the guest runs on".into()))
}

/// For a KVM that shadows page tables in place of walking second-level ones.
pub fn shadow_mmu() -> Result<Outcome> {
    let mut machine = Machine::standard()?;
    machine.load(&round_program(SPREAD, Touch::Write))?;
    machine.run_round()?;
    expect_refusal(machine.observe().map(|_| ()), "shadows this guest's page tables")?;
    machine.run_round()?;
    Ok(Outcome::Pass("attach refused, the guest runs on".into()))
}

fn expect_refusal(result: Result<()>, reason: &str) -> Result<()> {
    match result.map_err(|error| error.downcast::<SamplerError>()) {
        Err(Ok(SamplerError::Unsupported(text))) if text.contains(reason) => Ok(()),
        other => bail!("expected a refusal that says {reason:?}, got {other:?}"),
    }
}
