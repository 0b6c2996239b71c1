// SPDX-License-Identifier: MIT OR Apache-2.0
//! The daemon under its own unit and real systemd: what the sandbox leaves it is
//! enough, and a restart of anything costs neither guest nor heat.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use ept_virt_core::wire::{DEFAULT_SOCKET, DomainState, DomainStatus};
use nix::unistd::{Group, Pid};

use super::daemon;
use super::domain::{DomainSpec, Memory, policy};
use super::host;
use super::placement;
use super::systemd::{self, Unit, journal, systemctl};
use crate::report::Outcome;

const STATE: &str = "/var/lib/ept-virt";

/// CAP_CHOWN 0, CAP_DAC_READ_SEARCH 2, CAP_SYS_PTRACE 19, CAP_SYS_ADMIN 21
/// (linux/capability.h): what the unit's file says is needed.
const CAPABILITIES: u64 = 1 << 0 | 1 << 2 | 1 << 19 | 1 << 21;

/// Of prctl(2): a filter of system calls is in force.
const SECCOMP_FILTER: u64 = 2;

/// The unit's own minute is long for a test.
const SHORT_WATCHDOG: &str = "WatchdogSec=10";

/// Heat is written twice in it, and must outlive the watchdog's time and a restart.
const HALF_LIFE: &str = "<ev:temperature><ev:half-life unit='s'>60</ev:half-life></ev:temperature>";

const TIMEOUT: Duration = Duration::from_secs(90);

/// Started by systemd, which loads the module for it, the daemon sees and places a
/// guest from within the sandbox, and takes in its configuration anew.
pub fn places() -> Result<Outcome> {
    if let Some(skip) = without_systemd()? {
        return Ok(skip);
    }
    host::remove_module()?;
    let unit = Unit::start("")?;
    ensure!(host::module_loaded(), "the unit did not have the module loaded: {}", journal());
    check_sandbox(unit.pid()?)?;
    let (mut guest, truth) =
        placement::start(Memory::Memfd, placement::MEMFD_POLICY).with_context(journal)?;
    let placed = placement::wait_placed(&guest, &truth).with_context(journal)?;
    let text = unit.show("StatusText")?;
    ensure!(text == "1 of 1 domains observed; libvirt: connected", "systemd is told {text:?}");
    check_reload(&unit)?;
    guest.check_data()?;
    unit.stop()?;
    ensure!(!Path::new(DEFAULT_SOCKET).exists(), "the socket is still there");
    guest.console.wait_passes()?;
    guest.check_data()?;
    Ok(Outcome::Pass(placed))
}

/// The heat of a daemon that was restarted, or hung until the watchdog ended it, comes
/// back; libvirt's own restart by systemd is none of the daemon's.
pub fn restarts() -> Result<Outcome> {
    if let Some(skip) = without_systemd()? {
        return Ok(skip);
    }
    let unit = Unit::start(SHORT_WATCHDOG)?;
    let spec = DomainSpec { policy: policy("observe", HALF_LIFE), ..DomainSpec::default() };
    let mut guest = spec.start()?;
    guest.wait_ready()?;
    observed(guest.name, "hot memory", |d| d.round.as_ref().is_some_and(|r| r.hot_bytes + r.warm_bytes > 0))?;
    unit.restart()?;
    let restored = |d: &DomainStatus| d.restored_s.is_some();
    let restart = observed(guest.name, "heat after a restart", restored)?;
    let began = SystemTime::now();
    host::wait_until("heat is written", TIMEOUT, || Ok(newest_heat()?.is_some_and(|at| at > began)))?;
    let mode = fs::metadata(STATE).with_context(|| format!("asking for {STATE}"))?.permissions().mode();
    ensure!(mode & 0o777 == 0o700, "{STATE} has mode {mode:o}");
    let frozen = unit.freeze()?;
    ensure!(journal().contains("Watchdog timeout"), "{}", journal());
    let hang = observed(guest.name, "heat after a hang", restored)?;

    let qemu = guest.pid()?;
    systemctl(&["restart", "libvirtd.service"])?;
    host::wait_until("the daemon is connected again", TIMEOUT, || {
        Ok(daemon::status()?.daemon.libvirt == "connected")
    })?;
    let before = hang.round.as_ref().map_or(0, |r| r.number);
    let after = observed(guest.name, "rounds after libvirt's restart", |d| {
        d.round.as_ref().is_some_and(|r| r.number > before + 2)
    })?;
    ensure!(after.pid == Some(qemu), "process {:?} is observed, not {qemu}", after.pid);
    unit.stop()?;
    guest.console.wait_passes()?;
    guest.check_data()?;
    Ok(Outcome::Pass(format!(
        "heat came back after {} s by a restart, after {} s by the watchdog, which took {} s",
        restart.restored_s.unwrap_or_default(),
        hang.restored_s.unwrap_or_default(),
        frozen.as_secs()
    )))
}

fn without_systemd() -> Result<Option<Outcome>> {
    let why = "process 1 of this host is not systemd: use --systemd";
    Ok((!systemd::runs()?).then(|| Outcome::Skip(why.to_owned())))
}

/// The daemon has the rights of the unit's file and no others.
fn check_sandbox(pid: Pid) -> Result<()> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let field = |name: &str, radix| {
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
        let value = value.with_context(|| format!("{path} has no {name}"))?;
        u64::from_str_radix(value, radix).with_context(|| format!("{path}: {name} is {value}"))
    };
    for set in ["CapEff", "CapPrm", "CapBnd"] {
        let has = field(set, 16)?;
        ensure!(has == CAPABILITIES, "{set} is {has:x}, not {CAPABILITIES:x}");
    }
    ensure!(field("NoNewPrivs", 10)? == 1, "the daemon may get new rights");
    ensure!(field("Seccomp", 10)? == SECCOMP_FILTER, "no filter of system calls is in force");
    Ok(())
}

/// A good configuration takes effect, one that can not be read changes nothing.
fn check_reload(unit: &Unit) -> Result<()> {
    let before = unit.pid()?;
    let group = Group::from_name("libvirt").context("looking for a group")?.context("no group libvirt")?;
    let is_groups = || -> Result<bool> {
        let socket = fs::metadata(DEFAULT_SOCKET).context("asking for the socket")?;
        Ok(socket.gid() == group.gid.as_raw() && socket.permissions().mode() & 0o777 == 0o660)
    };
    ensure!(!is_groups()?, "the socket is the group's before anybody said so");
    unit.reload("group = \"libvirt\"\n")?;
    host::wait_until("the socket is given to the group", TIMEOUT, is_groups).with_context(journal)?;
    unit.reload("nonsense\n")?;
    host::wait_until("the daemon says what is wrong", TIMEOUT, || {
        Ok(journal().contains("/etc/ept-virt/ept-virt.toml"))
    })
    .with_context(journal)?;
    ensure!(is_groups()?, "a broken configuration took effect");
    ensure!(unit.pid()? == before, "a broken configuration ended the daemon: {}", journal());
    Ok(())
}

fn observed(name: &str, what: &str, good: impl Fn(&DomainStatus) -> bool) -> Result<DomainStatus> {
    daemon::wait_for(name, what, TIMEOUT, |d| {
        d.state == DomainState::Observing && d.round.is_some() && good(d)
    })
    .with_context(journal)
}

/// When heat was last written.
fn newest_heat() -> Result<Option<SystemTime>> {
    let mut newest = None;
    for entry in fs::read_dir(STATE).with_context(|| format!("reading {STATE}"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|end| end == "heat") {
            let written = fs::metadata(&path).and_then(|file| file.modified());
            newest = newest.max(Some(written.with_context(|| format!("asking for {}", path.display()))?));
        }
    }
    Ok(newest)
}
