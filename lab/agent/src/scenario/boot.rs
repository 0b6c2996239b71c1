// SPDX-License-Identifier: MIT OR Apache-2.0
//! The ground that all other scenarios stand on.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::domain::DomainSpec;
use crate::report::Outcome;

/// A guest starts under libvirt, runs under KVM, and its data is whole.
pub fn guest_runs_under_kvm() -> Result<Outcome> {
    let mut guest = DomainSpec::default().start()?;
    let truth = guest.wait_ready()?;
    let exits = kvm_exits(guest.pid()?)?;
    if exits == 0 {
        bail!("KVM counts no exit of the guest");
    }
    guest.check_data()?;
    Ok(Outcome::Pass(format!(
        "{exits} KVM exits, {} hot and {} idle pages",
        truth.hot.len(),
        truth.idle.len()
    )))
}

/// Exits of all vCPUs of a process's VM.
pub fn kvm_exits(pid: i32) -> Result<u64> {
    let debugfs = Path::new("/sys/kernel/debug/kvm");
    let mut exits = 0;
    for entry in fs::read_dir(debugfs).context("reading KVM's debugfs folder")? {
        let path = entry?.path();
        // One folder for each VM: PID-FD.
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if !name.starts_with(&format!("{pid}-")) {
            continue;
        }
        let file = path.join("exits");
        let text = fs::read_to_string(&file).with_context(|| format!("{}", file.display()))?;
        exits += text.trim().parse::<u64>().context("KVM's exit count")?;
    }
    Ok(exits)
}
