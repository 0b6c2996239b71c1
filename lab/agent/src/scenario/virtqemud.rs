// SPDX-License-Identifier: MIT OR Apache-2.0
//! virtqemud in libvirtd's place, as where libvirt is split into a daemon for each of
//! its drivers.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ept_virt_core::wire::{DomainState, DomainStatus};
use nix::sys::signal::{Signal, kill};

use super::daemon::{self, Daemon};
use super::domain::DomainSpec;
use super::host::{self, PAYLOAD, virsh};
use crate::report::Outcome;

const PROGRAM: &str = "/usr/sbin/virtqemud";
const PID_FILE: &str = "/run/virtqemud.pid";
const SOCKET: &str = "/run/libvirt/virtqemud-sock";

/// Clients' own; Debian's libvirt asks libvirtd unless this says otherwise, and finds
/// no other daemon by itself.
const CLIENT_CONFIG: &str = "/etc/libvirt/libvirt.conf";
const DIRECT: &str = "remote_mode = \"direct\"\nuri_default = \"qemu:///system\"";

const TIMEOUT: Duration = Duration::from_secs(60);

/// virtqemud instead of libvirtd, until this is dropped.
struct Virtqemud {
    /// What the clients' configuration said before.
    config: String,
}

/// The scenario.
pub fn run() -> Result<Outcome> {
    let built = format!("{PAYLOAD}/virtqemud");
    if !Path::new(&built).exists() {
        let why = "virtqemud is in no package of Debian's: `cargo xtask lab build-virtqemud` builds it";
        return Ok(Outcome::Skip(why.to_owned()));
    }
    fs::copy(&built, PROGRAM).with_context(|| format!("copying {built}"))?;
    let virtqemud = Virtqemud::replace_libvirtd()?;
    let daemon = Daemon::start()?;
    let mut guest = DomainSpec::default().start()?;
    guest.wait_ready()?;
    let first = observed(guest.name, 0)?;
    ensure!(first.pid == Some(guest.pid()?), "process {:?} is observed", first.pid);
    let nudges = daemon::status()?.daemon.nudges;
    ensure!(nudges > 0, "virtqemud did not call the hook at virsh start");
    daemon::doctor(TIMEOUT)?;
    let uri = format!("qemu+unix:///system?socket={SOCKET}");
    let list = daemon::cli_text(&["--connect", &uri, "list"])?;
    ensure!(list.contains(guest.name), "by {uri}: {list}");

    virtqemud.stop()?;
    let away = observed(guest.name, rounds(&first))?;
    start()?;
    host::wait_until("the daemon is connected again", TIMEOUT, || {
        Ok(daemon::status()?.daemon.libvirt == "connected")
    })?;
    let back = observed(guest.name, rounds(&away))?;
    ensure!(back.pid == first.pid, "another process is observed: {back:?}");
    guest.check_data()?;
    let name = guest.name;
    drop(guest);
    host::wait_until("the domain is forgotten", TIMEOUT, || Ok(daemon::domain(name)?.is_none()))?;
    daemon.stop()?;
    let version = host::succeed(Command::new(PROGRAM).arg("--version"))?;
    Ok(Outcome::Pass(format!(
        "{}: {nudges} nudges, {} rounds while it was away",
        version.trim(),
        rounds(&away) - rounds(&first)
    )))
}

impl Virtqemud {
    fn replace_libvirtd() -> Result<Self> {
        let config = fs::read_to_string(CLIENT_CONFIG).unwrap_or_default();
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .open(CLIENT_CONFIG)
            .with_context(|| format!("opening {CLIENT_CONFIG}"))?;
        writeln!(file, "{DIRECT}").with_context(|| format!("writing {CLIENT_CONFIG}"))?;
        host::stop_libvirtd()?;
        let virtqemud = Self { config };
        start()?;
        Ok(virtqemud)
    }

    fn stop(&self) -> Result<()> {
        let pid = host::read_pid(Path::new(PID_FILE))?;
        kill(pid, Signal::SIGTERM).context("ending virtqemud")?;
        host::wait_until("virtqemud ends", TIMEOUT, || Ok(!Path::new(&format!("/proc/{pid}")).exists()))
    }
}

impl Drop for Virtqemud {
    fn drop(&mut self) {
        // What is left of this shows in the next scenario's reset.
        let _ = self.stop();
        let _ = fs::write(CLIENT_CONFIG, &self.config);
        let _ = host::start_libvirtd();
        let _ = host::wait_until("libvirtd answers", TIMEOUT, || Ok(virsh(&["list"]).is_ok()));
    }
}

/// Starts it and waits until it answers.
fn start() -> Result<()> {
    host::succeed(Command::new(PROGRAM).arg("-d"))?;
    let mut last = String::new();
    host::wait_until("virtqemud answers", TIMEOUT, || {
        let answer = virsh(&["list"]);
        last = answer.as_ref().err().map_or(String::new(), |error| format!("{error:#}"));
        Ok(answer.is_ok())
    })
    .context(last)
}

/// The domain's status some rounds after round `number`.
fn observed(name: &str, number: u64) -> Result<DomainStatus> {
    daemon::wait_for(name, "rounds", TIMEOUT, |d| d.state == DomainState::Observing && rounds(d) > number + 2)
}

fn rounds(domain: &DomainStatus) -> u64 {
    domain.round.as_ref().map_or(0, |round| round.number)
}
