// SPDX-License-Identifier: MIT OR Apache-2.0
//! systemd as process 1 of the host, and the daemon's unit under it, installed as a
//! package would.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::sys::utsname::uname;
use nix::unistd::Pid;

use super::host::{self, PAYLOAD};

/// The daemon's unit.
const UNIT: &str = "ept-virt.service";
const UNIT_PATH: &str = "/usr/lib/systemd/system/ept-virt.service";
const CONFIG: &str = "/etc/ept-virt/ept-virt.toml";
const PROGRAM: &str = "/usr/bin/ept-virt";
const DROP_IN: &str = "/run/systemd/system/ept-virt.service.d/lab.conf";

/// Of a service manager that is emulated.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// Whether systemd is process 1 here.
pub fn runs() -> Result<bool> {
    Ok(fs::read_to_string("/proc/1/comm").context("reading the name of process 1")?.trim() == "systemd")
}

/// Runs systemctl; its output, or an error with what it said.
pub fn systemctl(args: &[&str]) -> Result<String> {
    host::succeed(Command::new("systemctl").args(args))
}

/// The daemon as a unit that was started; stopped when dropped.
pub struct Unit(());

impl Unit {
    /// Installs all that the unit needs, the module where modprobe finds it, and starts
    /// it. It is up when this returns: systemctl waits for its word.
    ///
    /// `more` are lines for its section `[Service]`, besides those it has.
    pub fn start(more: &str) -> Result<Self> {
        for (name, path, mode) in [
            ("ept-virt", PROGRAM, 0o755),
            ("ept-virt.service", UNIT_PATH, 0o644),
            ("ept-virt.toml", CONFIG, 0o644),
        ] {
            install(name, Path::new(path), mode)?;
        }
        let release = uname().context("asking for the kernel's release")?.release().to_owned();
        let modules = PathBuf::from("/lib/modules").join(release);
        install("kvm_ept_sample.ko", &modules.join("updates/kvm_ept_sample.ko"), 0o644)?;
        host::succeed(Command::new("depmod").arg("--all"))?;
        make_folder(Path::new(DROP_IN))?;
        fs::write(DROP_IN, format!("[Service]\n{more}\n")).with_context(|| format!("writing {DROP_IN}"))?;
        systemctl(&["daemon-reload"])?;
        let unit = Self(());
        systemctl(&["start", UNIT]).with_context(journal)?;
        ensure!(unit.show("ActiveState")? == "active", "it is {}: {}", unit.show("ActiveState")?, journal());
        Ok(unit)
    }

    /// A property, as `systemctl show` has it.
    pub fn show(&self, property: &str) -> Result<String> {
        Ok(systemctl(&["show", UNIT, "--value", "--property", property])?.trim().to_owned())
    }

    /// The daemon's process.
    pub fn pid(&self) -> Result<Pid> {
        let text = self.show("MainPID")?;
        match text.parse() {
            Ok(pid) if pid > 0 => Ok(Pid::from_raw(pid)),
            _ => bail!("the unit has no process: MainPID is {text:?}: {}", journal()),
        }
    }

    /// Has the daemon read this configuration.
    pub fn reload(&self, config: &str) -> Result<()> {
        fs::write(CONFIG, config).with_context(|| format!("writing {CONFIG}"))?;
        systemctl(&["reload", UNIT]).with_context(journal).map(drop)
    }

    /// Restarts the daemon.
    pub fn restart(&self) -> Result<()> {
        systemctl(&["restart", UNIT]).with_context(journal).map(drop)
    }

    /// Stops the daemon from running, and waits until the watchdog has put another in
    /// its place; how long that took.
    pub fn freeze(&self) -> Result<Duration> {
        let frozen = self.pid()?;
        let restarts = self.show("NRestarts")?;
        kill(frozen, Signal::SIGSTOP).context("stopping the daemon from running")?;
        let began = std::time::Instant::now();
        host::wait_until("the watchdog restarts the daemon", START_TIMEOUT, || {
            Ok(self.show("NRestarts")? != restarts && self.show("ActiveState")? == "active")
        })
        .with_context(journal)?;
        ensure!(self.pid()? != frozen, "the daemon that hung is still there");
        Ok(began.elapsed())
    }

    /// Stops the unit; an error unless it ends well.
    pub fn stop(self) -> Result<()> {
        systemctl(&["stop", UNIT]).with_context(journal)?;
        let end = (self.show("ActiveState")?, self.show("Result")?, self.show("ExecMainStatus")?);
        ensure!(end == ("inactive".into(), "success".into(), "0".into()), "{end:?}: {}", journal());
        Ok(())
    }
}

impl Drop for Unit {
    fn drop(&mut self) {
        let _ = systemctl(&["stop", UNIT]);
        let _ = fs::remove_file(DROP_IN);
    }
}

/// What the unit said, and what systemd said of it.
pub fn journal() -> String {
    let mut command = Command::new("journalctl");
    command.args(["--unit", UNIT, "--output=cat", "--no-pager", "--lines=30"]);
    match host::succeed(&mut command) {
        Ok(text) => format!("journal: {}", text.trim().replace('\n', " | ")),
        Err(error) => format!("no journal: {error:#}"),
    }
}

fn install(name: &str, to: &Path, mode: u32) -> Result<()> {
    make_folder(to)?;
    let from = format!("{PAYLOAD}/{name}");
    // A new file: the old one may be running.
    let _ = fs::remove_file(to);
    fs::copy(&from, to)
        .and_then(|_| fs::set_permissions(to, fs::Permissions::from_mode(mode)))
        .with_context(|| format!("copying {from} to {}", to.display()))
}

fn make_folder(file: &Path) -> Result<()> {
    let folder = file.parent().with_context(|| format!("{} is in no folder", file.display()))?;
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))
}
