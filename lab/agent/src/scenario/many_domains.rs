// SPDX-License-Identifier: MIT OR Apache-2.0
//! 50 domains defined, 8 of them running: the daemon follows those 8, stays
//! small, and what happens to one is not felt by the others.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ept_virt_core::wire::{DomainState, DomainStatus, Status};
use nix::sys::signal::Signal;

use super::console::Console;
use super::daemon::{self, Daemon};
use super::domain::{self, POLICY_NAMESPACE, policy};
use super::footprint::Footprint;
use super::host::{self, virsh};
use super::tiny;
use crate::report::Outcome;

const DEFINED: usize = 50;
const RUNNING: usize = 8;

/// What the daemon has besides a thread for each domain: main, signals, the
/// socket, libvirt's events, libvirt's own for its connections, and a few clients.
const OTHER_THREADS: usize = 12;

/// For the programs and libraries, and for each domain: its thread, and two bytes
/// and a quarter for each of its 2048 pages.
const DAEMON_KIB: u64 = 24 << 10;
const DOMAIN_KIB: u64 = 1 << 10;

const TIMEOUT: Duration = Duration::from_secs(90);

/// Which of the running ones has what done to it.
const KILLED: usize = 0;
const MISCONFIGURED: usize = 1;
const FROZEN: usize = 2;

/// The scenario.
pub fn run() -> Result<Outcome> {
    let names = names();
    tiny::define(&names, policy("place", "").as_deref())?;
    let daemon = Daemon::start()?;
    let mut guests: Vec<(&str, Console)> = Vec::new();
    for name in &names[..RUNNING] {
        guests.push((name, tiny::start(name)?));
    }
    wait_all(&names[..RUNNING], |d| well(d) && d.policy_error.is_none())?;
    let defined = virsh(&["list", "--all", "--name"])?;
    ensure!(defined.split_whitespace().count() == DEFINED, "not {DEFINED} domains are defined: {defined}");
    check_list(&names[..RUNNING])?;
    let full = check_size(&daemon, RUNNING)?;
    harm(&names, &daemon)?;
    guests.remove(KILLED);
    let before = pids(&names[1..RUNNING])?;
    daemon.stop()?;
    for (name, console) in &mut guests {
        console.check_data().with_context(|| format!("{name} after the daemon has stopped"))?;
    }
    ensure!(pids(&names[1..RUNNING])? == before, "a guest runs in another process");
    for name in &names[1..RUNNING] {
        virsh(&["destroy", name])?;
    }
    Ok(Outcome::Pass(format!(
        "{RUNNING} of {DEFINED} domains: {} threads, {} KiB in memory",
        full.threads, full.resident_kib
    )))
}

/// One is killed, one misconfigured, one frozen, while the others go on.
fn harm(names: &[String], daemon: &Daemon) -> Result<()> {
    tiny::kill_qemu(&names[KILLED])?;
    host::wait_until("the killed domain is forgotten", TIMEOUT, || {
        Ok(daemon::domain(&names[KILLED])?.is_none())
    })?;
    let element = "<placement mode='plase'/>";
    let to = ["--live", "--uri", POLICY_NAMESPACE, "--key", "ev", "--set", element];
    virsh(&[&["metadata", &names[MISCONFIGURED]], to.as_slice()].concat())?;
    daemon::wait_for(&names[MISCONFIGURED], "the error is told", TIMEOUT, |d| {
        d.state == DomainState::Observing && d.policy_error.is_some()
    })?;
    domain::signal_qemu(&names[FROZEN], Signal::SIGSTOP)?;
    let others = &names[FROZEN + 1..RUNNING];
    let outcome = wait_all(others, well).and_then(|()| check_list(&names[KILLED + 1..RUNNING]));
    domain::signal_qemu(&names[FROZEN], Signal::SIGCONT)?;
    outcome?;
    wait_all(&names[FROZEN..RUNNING], well)?;
    check_size(daemon, RUNNING - 1).map(drop)
}

fn names() -> Vec<String> {
    (0..DEFINED).map(|number| format!("many-{number:02}")).collect()
}

/// Placed, and with figures that only harvests can have.
fn well(domain: &DomainStatus) -> bool {
    let hot_bytes = tiny::HOT_PAGES * 4096;
    domain.state == DomainState::Placing
        && domain.round.as_ref().is_some_and(|round| round.hot_bytes >= hot_bytes && round.accessed_bytes > 0)
}

/// Waits until all of these are as they should be, then for two more rounds of
/// each, in which they still are.
fn wait_all(names: &[String], good: impl Fn(&DomainStatus) -> bool) -> Result<()> {
    let find = |status: &Status, name: &str| status.domains.iter().find(|d| d.name == name).cloned();
    let rounds = |domain: &DomainStatus| domain.round.as_ref().map_or(0, |round| round.number);
    let mut least = vec![0; names.len()];
    for _ in 0..2 {
        let mut last = Vec::new();
        let waited = host::wait_until("rounds of all domains", TIMEOUT, || {
            let status = daemon::status_on(Path::new("/"))?;
            last = names.iter().map(|name| find(&status, name)).collect();
            let all = last.iter().zip(&least);
            Ok(all.into_iter().all(|(d, least)| d.as_ref().is_some_and(|d| good(d) && rounds(d) > *least)))
        });
        waited.with_context(|| {
            let short = |d: &DomainStatus| format!("{} {:?} {:?} {:?}", d.name, d.state, d.reason, d.round);
            let all: Vec<String> = last.iter().flatten().map(short).collect();
            format!("{}; daemon log: {}", all.join("; "), daemon::log_tail())
        })?;
        least = last.iter().flatten().map(|d| rounds(d) + 1).collect();
    }
    Ok(())
}

/// `ept-virt list` shows exactly these.
fn check_list(names: &[String]) -> Result<()> {
    let list = daemon::cli_text(&["list"])?;
    let shown: Vec<&str> = list.lines().skip(1).filter_map(|line| line.split_whitespace().next()).collect();
    ensure!(shown == names, "`ept-virt list` shows {shown:?}, not {names:?}");
    Ok(())
}

fn pids(names: &[String]) -> Result<Vec<i32>> {
    names.iter().map(|name| domain::pid(name)).collect()
}

/// The daemon keeps within what so many domains may cost it.
fn check_size(daemon: &Daemon, domains: usize) -> Result<Footprint> {
    let found = Footprint::of(daemon.pid())?;
    let (threads, kib) = (OTHER_THREADS + domains, DAEMON_KIB + DOMAIN_KIB * domains as u64);
    ensure!(
        found.threads <= threads && found.resident_kib <= kib,
        "{found:?} for {domains} domains, more than {threads} threads or {kib} KiB"
    );
    Ok(found)
}
