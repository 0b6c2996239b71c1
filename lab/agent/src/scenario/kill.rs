// SPDX-License-Identifier: MIT OR Apache-2.0
//! QEMU processes that die, and others that get their numbers.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::domain::Domain;
use super::host;

const LAST_PID: &str = "/proc/sys/kernel/ns_last_pid";

/// Other processes may take the number first.
const REUSE_TRIES: usize = 200;

const TIMEOUT: Duration = Duration::from_secs(20);

/// Kills a domain's QEMU and waits until its number is free; the number.
pub fn qemu(guest: &Domain) -> Result<i32> {
    let pid = guest.pid()?;
    kill(Pid::from_raw(pid), Signal::SIGKILL).context("killing the guest's QEMU")?;
    host::wait_until("the process is gone", TIMEOUT, || Ok(!Path::new(&format!("/proc/{pid}")).exists()))?;
    Ok(pid)
}

/// A process; killed when dropped.
pub struct Impostor(Child);

impl Impostor {
    /// Lets go of it if somebody killed it, as its number names it until then.
    pub fn reap(&mut self) -> Result<()> {
        self.0.try_wait().context("waiting for a process").map(drop)
    }
}

impl Drop for Impostor {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A process of this number that calls itself the QEMU of another domain.
pub fn reuse_pid(pid: i32, uuid: &str) -> Result<Impostor> {
    for _ in 0..REUSE_TRIES {
        fs::write(LAST_PID, (pid - 1).to_string()).with_context(|| format!("writing {LAST_PID}"))?;
        let child = Command::new("busybox")
            .arg0("sh")
            .args(["-c", "read forever", "qemu-system-x86_64", "-uuid", uuid])
            .stdin(Stdio::piped())
            .spawn()
            .context("starting a process")?;
        let child = Impostor(child);
        if child.0.id() == pid as u32 {
            return Ok(child);
        }
    }
    bail!("no process got the number {pid}");
}
