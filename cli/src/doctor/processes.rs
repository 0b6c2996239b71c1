// SPDX-License-Identifier: MIT OR Apache-2.0
//! Processes of the host that matter: libvirt's daemons, and DAMON's threads.

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
    /// When it started, in seconds since 1970.
    pub started: u64,
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
                found.libvirt = started(root, &pid).map(|started| LibvirtDaemon { name, started });
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
