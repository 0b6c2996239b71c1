// SPDX-License-Identifier: MIT OR Apache-2.0
//! Debian packages of the build machine, and files from its mirror.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::Lab;
use crate::proc;

/// Long enough for a slow mirror; a hang still ends.
const APT_TIMEOUT: Duration = Duration::from_secs(15 * 60);

/// A package that must be installed, and what it is needed for.
#[derive(Clone, Copy)]
pub struct Need {
    /// Debian's package name.
    pub package: &'static str,
    /// For the person who sees it being installed.
    pub why: &'static str,
}

/// Shorthand for [`Need`].
pub const fn need(package: &'static str, why: &'static str) -> Need {
    Need { package, why }
}

/// Installs those of `needs` that are missing. Without anything missing it
/// touches neither the network nor the package database.
pub fn ensure(lab: &Lab, needs: &[Need]) -> Result<()> {
    let mut missing = Vec::new();
    for need in needs {
        if !installed(need.package)? {
            missing.push(need);
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = missing.iter().map(|n| n.package).collect();
    let list = names.join(" ");
    if !nix::unistd::geteuid().is_root() {
        bail!(
            "packages are missing and only root can install them: {list}\n\
             Run this command as root, or install them first: sudo apt-get install {list}"
        );
    }
    for need in &missing {
        lab.progress.line(&format!("installing {}: {}", need.package, need.why));
    }
    let step = lab.progress.step(format!("apt-get install {list}"));
    let log = lab.log("apt");
    // The lists may be missing (container images) or stale: only then update.
    if install(&names, &log).is_err() {
        step.note("refreshing the package lists");
        proc::run(apt_get().args(["--quiet", "update"]), &lab.log("apt-update"), APT_TIMEOUT)?;
        install(&names, &log).with_context(|| format!("installing {list}"))?;
    }
    step.done("");
    Ok(())
}

/// The URI of the mirror that this machine takes its own Debian packages from,
/// with a slash at the end.
pub fn mirror(lab: &Lab) -> Result<String> {
    if let Some(uri) = configured_mirror()? {
        return Ok(uri);
    }
    proc::run(apt_get().args(["--quiet", "update"]), &lab.log("apt-update"), APT_TIMEOUT)?;
    configured_mirror()?.context(
        "no Debian mirror found in this machine's apt configuration (apt-get indextargets): \
         add Debian's main archive to /etc/apt/sources.list.d",
    )
}

/// Downloads `path` (relative to the mirror's root) to `to` and checks its
/// SHA-256. Goes through apt, so proxies and certificates are those of apt.
pub fn download(lab: &Lab, path: &str, sha256: &str, to: &Path) -> Result<()> {
    let uri = format!("{}{path}", mirror(lab)?);
    proc::run(
        Command::new("/usr/lib/apt/apt-helper")
            .arg("download-file")
            .arg(&uri)
            .arg(to)
            .arg(format!("SHA256:{sha256}")),
        &lab.log("download"),
        APT_TIMEOUT,
    )
    .with_context(|| format!("downloading {uri}"))
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive");
    command
}

fn install(names: &[&str], log: &Path) -> Result<()> {
    proc::run(
        apt_get().args(["--quiet", "--yes", "--no-install-recommends", "install"]).args(names),
        log,
        APT_TIMEOUT,
    )
}

fn installed(package: &str) -> Result<bool> {
    let out = Command::new("dpkg-query")
        .args(["--show", "--showformat=${db:Status-Status}", package])
        .output()
        .context("running dpkg-query: the lab needs a Debian system with dpkg and apt")?;
    Ok(out.status.success() && out.stdout == b"installed")
}

fn configured_mirror() -> Result<Option<String>> {
    let out = Command::new("apt-get")
        .args([
            "indextargets",
            "--format",
            "$(ORIGIN)|$(LABEL)|$(COMPONENT)|$(REPO_URI)",
            "Created-By: Packages",
        ])
        .output()
        .context("running apt-get indextargets: the lab needs a Debian system with apt")?;
    let text = String::from_utf8_lossy(&out.stdout);
    Ok(text
        .lines()
        .find_map(|line| line.strip_prefix("Debian|Debian|main|"))
        .map(|uri| format!("{}/", uri.trim_end_matches('/'))))
}
