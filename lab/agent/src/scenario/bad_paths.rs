// SPDX-License-Identifier: MIT OR Apache-2.0
//! What goes wrong on real hosts: the guest must run on, and the product must
//! say what is wrong and find its way back.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ept_virt_core::wire::{DomainState, DomainStatus};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::daemon::{self, Daemon};
use super::domain::{DomainSpec, policy};
use super::host;
use crate::report::Outcome;

const TIMEOUT: Duration = Duration::from_secs(60);

/// Moves everything that is idle for a second.
const SQUEEZE: &str = "<ev:sampling><ev:interval unit='ms'>500</ev:interval></ev:sampling>\
    <ev:dram><ev:max unit='MiB'>4</ev:max></ev:dram>\
    <ev:migration><ev:delay unit='s'>1</ev:delay></ev:migration>";

/// Without the module, status says so; with it, observing begins by itself.
pub fn no_module() -> Result<Outcome> {
    host::remove_module()?;
    let _daemon = Daemon::start()?;
    let guest = DomainSpec::default().start()?;
    let status = daemon::wait_for(guest.name, "unobserved without module", TIMEOUT, |d| {
        d.state == DomainState::Unobserved
    })?;
    let reason = status.reason.unwrap_or_default();
    ensure!(reason.contains("kvm_ept_sample"), "the reason does not name the module: {reason:?}");
    let error = daemon::status()?.daemon.module_error;
    ensure!(error.is_some(), "the daemon's status does not speak of the module");
    host::insert_module()?;
    wait_observed(guest.name)?;
    Ok(Outcome::Pass(format!("status said: {reason}")))
}

/// Without a daemon the CLI says what to do and exits with 2.
pub fn no_daemon() -> Result<Outcome> {
    let (code, message) = daemon::cli_failure(&["status"])?;
    ensure!(code == Some(2), "exit code {code:?}: {message}");
    ensure!(message.contains("daemon"), "the message is {message:?}");
    Ok(Outcome::Pass(message.trim().replace('\n', " ")))
}

/// A guest without KVM is left alone, and status says why.
pub fn tcg_guest() -> Result<Outcome> {
    let _daemon = Daemon::start()?;
    let spec = DomainSpec { kvm: false, ..DomainSpec::default() };
    let guest = spec.start()?;
    let status = daemon::wait_for(guest.name, "unobserved without KVM", TIMEOUT, |d| {
        d.state == DomainState::Unobserved
    })?;
    let reason = status.reason.unwrap_or_default();
    ensure!(reason.contains("KVM"), "the reason is {reason:?}");
    ensure!(guest.state()? == "running", "the guest does not run");
    Ok(Outcome::Pass(reason))
}

/// A policy that can not be read does not stop the guest; status says what is
/// wrong where, and the guest is observed by default.
pub fn broken_policy() -> Result<Outcome> {
    let _daemon = Daemon::start()?;
    let spec = DomainSpec { policy: policy("plase", ""), ..DomainSpec::default() };
    let guest = spec.start()?;
    let status = wait_observed(guest.name)?;
    let error = status.policy_error.context("status shows no policy error")?;
    ensure!(
        error.contains("plase") && error.contains("place") && error.contains("line"),
        "the policy error is {error:?}"
    );
    ensure!(status.moves.demote_tried_bytes == 0, "pages were moved");
    Ok(Outcome::Pass(error))
}

/// A guest bound to a node: the kernel refuses the moves, status says why.
pub fn strict_numatune() -> Result<Outcome> {
    let _daemon = Daemon::start()?;
    let spec = DomainSpec { policy: policy("place", SQUEEZE), strict_node: Some(0), ..DomainSpec::default() };
    let mut guest = spec.start()?;
    guest.wait_ready()?;
    let status = daemon::wait_for(guest.name, "moves are refused", TIMEOUT, |d| !d.moves.refused.is_empty())?;
    let refusal = &status.moves.refused[0];
    ensure!(refusal.reason == "not-permitted" && !refusal.explanation.is_empty(), "refused with {refusal:?}");
    ensure!(status.moves.demoted_bytes == 0, "pages were moved: {:?}", status.moves);
    guest.check_data()?;
    Ok(Outcome::Pass(format!("{} MiB refused: {}", refusal.bytes >> 20, refusal.explanation)))
}

/// A daemon that was killed finds its domains again, and what was asked for them.
pub fn daemon_killed() -> Result<Outcome> {
    let first = Daemon::start()?;
    let mut guest = DomainSpec::default().start()?;
    wait_observed(guest.name)?;
    let killed = first.pid();
    drop(first);
    let second = Daemon::start()?;
    wait_observed(guest.name)?;
    ensure!(second.pid() != killed, "the same daemon answers");
    let is_off = |d: &DomainStatus| d.state == DomainState::Off;
    daemon::cli_text(&["stop", guest.name])?;
    daemon::wait_for(guest.name, "nobody observes the domain", TIMEOUT, is_off)?;
    second.stop()?;
    let second = Daemon::start()?;
    let stopped = daemon::wait_for(guest.name, "the domain is known", TIMEOUT, |_| true)?;
    ensure!(is_off(&stopped), "a domain that was stopped is {:?} after a restart", stopped.state);
    daemon::cli_text(&["start", guest.name])?;
    wait_observed(guest.name)?;
    guest.wait_ready()?;
    guest.check_data()?;
    second.stop()?;
    Ok(Outcome::Pass(String::new()))
}

/// A daemon that is stopped, as for an upgrade, leaves the heat with which the next
/// one goes on.
pub fn daemon_restarted() -> Result<Outcome> {
    let first = Daemon::start()?;
    let mut guest = DomainSpec::default().start()?;
    guest.wait_ready()?;
    daemon::wait_for(guest.name, "hot memory", 3 * TIMEOUT, |d| hot(d) > 0)?;
    first.stop()?;
    let second = Daemon::start()?;
    let back = daemon::wait_for(guest.name, "a round", TIMEOUT, |d| rounds(d) > 0)?;
    let age = back.restored_s.context("the heat of the daemon that was stopped did not come back")?;
    ensure!(hot(&back) > 0, "of hot memory none came back");
    second.stop()?;
    guest.check_data()?;
    Ok(Outcome::Pass(format!("{} KiB hot after {age} s", hot(&back) >> 10)))
}

/// While libvirtd is away rounds go on; when it is back all is as before.
pub fn libvirtd_restarted() -> Result<Outcome> {
    let _daemon = Daemon::start()?;
    let guest = DomainSpec::default().start()?;
    let before = rounds(&wait_observed(guest.name)?);
    host::stop_libvirtd()?;
    let away = daemon::wait_for(guest.name, "rounds without libvirtd", TIMEOUT, |d| rounds(d) > before + 2)?;
    host::start_libvirtd()?;
    host::wait_until("the daemon is connected again", TIMEOUT, || {
        Ok(daemon::status()?.daemon.libvirt == "connected")
    })?;
    daemon::wait_for(guest.name, "rounds with libvirtd", TIMEOUT, |d| rounds(d) > rounds(&away) + 2)?;
    ensure!(guest.state()? == "running", "the guest does not run");
    Ok(Outcome::Pass(format!("{} rounds meanwhile", rounds(&away) - before)))
}

/// The module can not go while it is used; afterwards it can, under a running
/// guest, which does not notice.
pub fn module_removed() -> Result<Outcome> {
    let first = Daemon::start()?;
    let mut guest = DomainSpec::default().start()?;
    guest.wait_ready()?;
    wait_observed(guest.name)?;
    let Err(refused) = host::remove_module() else {
        bail!("the module was removed while the daemon used it");
    };
    first.stop()?;
    host::remove_module()?;
    guest.check_data()?;
    host::insert_module()?;
    let _second = Daemon::start()?;
    wait_observed(guest.name)?;
    Ok(Outcome::Pass(format!("{refused}")))
}

/// A guest that dies in mid-round is forgotten, and holds nothing.
pub fn guest_dies() -> Result<Outcome> {
    let daemon = Daemon::start()?;
    let guest = DomainSpec::default().start()?;
    wait_observed(guest.name)?;
    kill(Pid::from_raw(guest.pid()?), Signal::SIGKILL).context("killing the guest's QEMU")?;
    host::wait_until("the domain is forgotten", TIMEOUT, || Ok(daemon::domain(guest.name)?.is_none()))?;
    let next = DomainSpec { name: "next", ..DomainSpec::default() };
    let next = next.start()?;
    wait_observed(next.name)?;
    daemon.stop()?;
    host::remove_module().context("something still holds the module")?;
    Ok(Outcome::Pass(String::new()))
}

fn wait_observed(name: &str) -> Result<DomainStatus> {
    daemon::wait_for(name, "the domain is observed", TIMEOUT, |d| {
        d.state == DomainState::Observing && rounds(d) > 0
    })
}

fn rounds(domain: &DomainStatus) -> u64 {
    domain.round.as_ref().map_or(0, |round| round.number)
}

/// Bytes that are not cold.
fn hot(domain: &DomainStatus) -> u64 {
    domain.round.as_ref().map_or(0, |round| round.hot_bytes + round.warm_bytes)
}
