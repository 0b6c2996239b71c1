// SPDX-License-Identifier: MIT OR Apache-2.0
//! Processes of the host that matter: libvirt's daemons, and DAMON's threads.

use std::process::Command;

use ept_virt_core::process::start_time;

use super::root::Root;

/// libvirt's daemons that run QEMU, and so call its hooks.
const LIBVIRT_DAEMONS: [&str; 2] = ["libvirtd", "virtqemud"];

/// Of the kernel's clock in `/proc/PID/stat`: USER_HZ of x86-64.
const TICKS_A_SECOND: u64 = 100;

/// A daemon of libvirt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LibvirtDaemon {
    /// libvirtd or virtqemud: also the name of its unit.
    pub name: String,
    /// When it last looked for hooks, in seconds since 1970: as it started, or was told
    /// to reload.
    pub looked: u64,
}

impl LibvirtDaemon {
    /// The same, which systemd may have told to reload. Asks systemd when the unit's state
    /// changed last, as it does at a reload: of the reload's command itself it forgets the
    /// time whenever it reads its units anew.
    pub fn after_reload(self) -> Self {
        let mut command = Command::new("systemctl");
        command.args(["show", &self.name, "--property=StateChangeTimestamp", "--timestamp=unix"]);
        let shown = command.output().map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        let reloaded = shown.ok().and_then(|shown| change_time(&shown));
        Self { looked: self.looked.max(reloaded.unwrap_or(0)), ..self }
    }
}

/// When a unit was last started or told to reload, in seconds since 1970, as `systemctl
/// show` says it; none when it never was, or by a systemd that writes it otherwise.
fn change_time(shown: &str) -> Option<u64> {
    shown.trim().strip_prefix("StateChangeTimestamp=@")?.parse().ok()
}

/// What was found in `/proc`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Processes {
    /// The first of libvirt's daemons.
    pub libvirt: Option<LibvirtDaemon>,
    /// DAMON's threads.
    pub damon_threads: usize,
}

impl Processes {
    /// Looks through `/proc` once.
    pub fn read(root: &Root) -> Self {
        let mut found = Self::default();
        let pids =
            root.names("/proc").into_iter().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit()));
        for pid in pids {
            let Some(name) = root.text(format!("/proc/{pid}/comm")) else { continue };
            if name.starts_with("kdamond") {
                found.damon_threads += 1;
            } else if LIBVIRT_DAEMONS.contains(&name.as_str()) && found.libvirt.is_none() {
                found.libvirt = started(root, &pid).map(|looked| LibvirtDaemon { name, looked });
            }
        }
        found
    }
}

/// When a process started, in seconds since 1970 (proc_stat(5)).
fn started(root: &Root, pid: &str) -> Option<u64> {
    let ticks = start_time(&root.bytes(format!("/proc/{pid}/stat"))?)?;
    let boot = root.text("/proc/stat")?;
    let boot = boot.lines().find_map(|line| line.strip_prefix("btime "))?;
    Some(boot.trim().parse::<u64>().ok()? + ticks / TICKS_A_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systemd_says_when_it_had_a_daemon_reload() {
        assert_eq!(change_time("StateChangeTimestamp=@1764201936\n"), Some(1_764_201_936));
        for other in ["StateChangeTimestamp=\n", "StateChangeTimestamp=Fri 2026-11-27 00:25:36 UTC\n", ""] {
            assert_eq!(change_time(other), None, "{other}");
        }
    }
}
