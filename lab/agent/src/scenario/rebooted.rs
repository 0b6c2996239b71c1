// SPDX-License-Identifier: MIT OR Apache-2.0
//! A host that came up with a second kernel, after the packages were installed under the
//! first: all is there by itself.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::sys::utsname::uname;

use super::domain::DomainSpec;
use super::host;
use super::packages::{check_observed, place, unit_pid};
use super::systemd::{self, systemctl};
use crate::report::Outcome;

/// The module is loaded, the daemon up, and libvirt calls the hook, before anybody came.
pub fn run() -> Result<Outcome> {
    let kernels = fs::read_dir("/lib/modules").context("listing kernels")?;
    let kernels: Vec<String> = kernels
        .map(|kernel| Ok(kernel?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    if !systemd::runs()? || kernels.len() < 2 {
        return Ok(Outcome::Skip("this host has not had a second kernel installed: use --upgraded".into()));
    }
    let release =
        uname().context("asking for the kernel's release")?.release().to_string_lossy().into_owned();
    let newest = kernels.iter().max_by_key(|kernel| line(kernel));
    ensure!(newest == Some(&release), "Linux {release} runs, of {kernels:?}");
    let file = host::succeed(Command::new("modinfo").args(["--field", "filename", "kvm_ept_sample"]))?;
    ensure!(file.contains("dkms"), "the module of {} is not DKMS's", file.trim());
    let result = systemctl(&["show", "modprobe@kvm_ept_sample.service", "--value", "--property", "Result"])?;
    ensure!(host::module_loaded() && result.trim() == "success", "loading the module: {result}");
    unit_pid()?;
    let mut guest = DomainSpec::default().start()?;
    let truth = guest.wait_ready()?;
    check_observed(guest.name)?;
    let moved = place(&mut guest, &truth)?;
    drop(guest);
    systemctl(&["stop", "ept-virt.service"])?;
    Ok(Outcome::Pass(format!("Linux {release} is the newest of {}: {moved}", kernels.len())))
}

/// Major and minor number of a release.
fn line(release: &str) -> Vec<u32> {
    release.split('.').take(2).filter_map(|number| number.parse().ok()).collect()
}
