// SPDX-License-Identifier: MIT OR Apache-2.0
//! End-to-end tests inside the emulated AMD host: real libvirt, real guests,
//! the product as it is installed.

mod bad_paths;
mod bench;
mod bench_libvirt;
mod bench_placement;
mod boot;
mod console;
mod daemon;
mod demo;
mod domain;
mod excluded;
mod fire_huge;
mod fire_life;
mod fire_memory;
mod fire_migrate;
mod footprint;
mod foreign;
mod hammer;
mod hook_calls;
mod hook_table;
mod host;
mod hotplug;
mod kill;
mod many_domains;
mod packages;
mod placement;
mod policies;
mod qemu;
mod readme;
mod rebooted;
mod recording;
mod sampled;
mod second_host;
mod session;
mod shared_dram;
mod split;
mod systemd;
mod tiny;
mod truth;
mod two_libvirtd;
mod unit;
mod virtqemud;

use std::process::Command;

use anyhow::{Context, Result};

use crate::kernel_log::KernelLog;
use crate::report::{self, Outcome};

pub use bench::run as bench;
pub use bench_libvirt::run as bench_libvirt;
pub use bench_placement::run as bench_placement;
pub use demo::{example, run as demo};
pub use hook_calls::{NAME as RECORDER, record};
pub use second_host::become_second;

/// A scenario's code.
type Test = fn() -> Result<Outcome>;

/// All scenarios by name.
const SCENARIOS: &[(&str, Test)] = &[
    ("boot", boot::guest_runs_under_kvm),
    ("e2e-memfd", placement::memfd),
    ("e2e-thp", placement::huge_pages),
    ("e2e-split", split::run),
    ("e2e-excluded", excluded::run),
    ("e2e-sampled", sampled::run),
    ("e2e-slowed", placement::slowed),
    ("bad-no-module", bad_paths::no_module),
    ("bad-no-daemon", bad_paths::no_daemon),
    ("bad-tcg-guest", bad_paths::tcg_guest),
    ("bad-policy", bad_paths::broken_policy),
    ("bad-numatune", bad_paths::strict_numatune),
    ("bad-daemon-killed", bad_paths::daemon_killed),
    ("bad-daemon-restarted", bad_paths::daemon_restarted),
    ("bad-libvirtd-restarted", bad_paths::libvirtd_restarted),
    ("bad-module-removed", bad_paths::module_removed),
    ("bad-guest-dies", bad_paths::guest_dies),
    ("recording", recording::run),
    ("policy-live", policies::live),
    ("policy-required", policies::required),
    ("hook-table", hook_table::run),
    ("two-libvirtd", two_libvirtd::run),
    ("many-domains", many_domains::run),
    ("session", session::run),
    ("memory-added", hotplug::added),
    ("memory-removed", hotplug::removed),
    ("virtqemud", virtqemud::run),
    ("unit", unit::places),
    ("unit-restarts", unit::restarts),
    ("packages", packages::run),
    ("kernel-upgraded", rebooted::run),
    ("shared-dram", shared_dram::run),
    ("fire-life", fire_life::run),
    ("fire-hugetlbfs", fire_huge::run),
    ("fire-memory", fire_memory::run),
    ("fire-migrate", fire_migrate::run),
];

/// Runs the scenarios named and prints a verdict for each, then `EPT-DONE`. Their
/// names begin with `prefix` there. Whatever else a scenario tests, it must leave nothing that holds the module,
/// and nothing in the kernel's log.
pub fn run(prefix: &str, names: &[&str]) -> Result<()> {
    let mut log = KernelLog::whole()?;
    let foreign = too_new()?;
    for name in names {
        let test = find(name)?;
        let shown = format!("{prefix}{name}");
        let verdict = report::judge(&shown, || {
            if let Some(why) = &foreign {
                return Ok(Outcome::Skip(why.clone()));
            }
            let outcome = host::reset().and_then(|()| test()).and_then(|outcome| {
                host::release_module()?;
                Ok(outcome)
            });
            match (outcome, log.judge()) {
                (outcome, Ok(())) => outcome,
                (Ok(_), Err(complaints)) => Err(complaints),
                (Err(error), Err(complaints)) => Err(error.context(complaints)),
            }
        });
        println!("{}", verdict.line());
    }
    // Left-over guests end with the host.
    println!("EPT-DONE");
    Ok(())
}

/// Why the command line can not run here, if the machine that built it has a newer
/// C library than this host.
fn too_new() -> Result<Option<String>> {
    let out = host::run(Command::new(format!("{}/ept-virt", host::PAYLOAD)).arg("--version"))?;
    let said = String::from_utf8_lossy(&out.stderr).into_owned();
    let newer = !out.status.success() && said.contains("version `GLIBC_");
    Ok(newer.then(|| format!("ept-virt was built for a newer C library than this host's: {}", said.trim())))
}

fn find(name: &str) -> Result<Test> {
    let (_, test) = SCENARIOS
        .iter()
        .find(|(known, _)| *known == name)
        .with_context(|| format!("no scenario is called {name}"))?;
    Ok(*test)
}
