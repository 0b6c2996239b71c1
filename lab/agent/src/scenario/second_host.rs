// SPDX-License-Identifier: MIT OR Apache-2.0
//! A second libvirt on the same emulated host, which takes itself for another
//! host: a mount namespace with /run, /etc/libvirt and all else of libvirt's own,
//! another host name, another UUID. Kernel, module, memory and network are shared,
//! and so are process ids.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::host::{self, PAYLOAD};

/// What it sees as its own, and under which name it lies here.
const FOLDERS: [(&str, &str); 5] = [
    ("/run", "run"),
    ("/etc/libvirt", "etc"),
    ("/var/lib/libvirt", "lib"),
    ("/var/log/libvirt", "log"),
    ("/var/cache/libvirt", "cache"),
];

/// Where these lie.
const ROOT: &str = "/second";

/// libvirt refuses to migrate a domain to the host on which it is.
const HOST_NAME: &str = "second";
const HOST_UUID: &str = "22222222-3333-4444-8555-666666666666";

const START_TIMEOUT: Duration = Duration::from_secs(90);
const END_TIMEOUT: Duration = Duration::from_secs(30);

/// The second host; its libvirt ends when this is dropped.
pub struct SecondHost {
    libvirtd: Pid,
}

impl SecondHost {
    /// Starts it, and waits until its libvirt answers.
    pub fn start() -> Result<Self> {
        host::succeed(Command::new(format!("{PAYLOAD}/lab-agent")).arg("second-host"))?;
        let libvirtd = host::read_pid(Path::new(&format!("{ROOT}/run/libvirtd.pid")))?;
        let second = Self { libvirtd };
        host::wait_until("the second libvirtd answers", START_TIMEOUT, || {
            Ok(second.virsh(&["list"]).is_ok())
        })?;
        Ok(second)
    }

    /// A path of its own, as it is seen from here; for those below /run.
    pub fn root() -> &'static Path {
        Path::new(ROOT)
    }

    /// The URI of its libvirt, as it is called from here.
    pub fn uri() -> String {
        format!("qemu+unix:///system?socket={ROOT}/run/libvirt/libvirt-sock")
    }

    /// A command that runs there.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &self.libvirtd.to_string(), "--mount", "--uts", "--", program]);
        command
    }

    /// Runs virsh there.
    pub fn virsh(&self, args: &[&str]) -> Result<String> {
        host::succeed(self.command("virsh").arg("--quiet").args(args))
    }

    /// The process id of a domain's QEMU there.
    pub fn pid(name: &str) -> Result<i32> {
        host::read_pid(Path::new(&format!("{ROOT}/run/libvirt/qemu/{name}.pid"))).map(Pid::as_raw)
    }
}

impl Drop for SecondHost {
    fn drop(&mut self) {
        for domain in self.virsh(&["list", "--name"]).unwrap_or_default().split_whitespace() {
            let _ = self.virsh(&["destroy", domain]);
        }
        for file in ["libvirtd.pid", "virtlogd.pid"] {
            if let Ok(pid) = host::read_pid(Path::new(&format!("{ROOT}/run/{file}"))) {
                let _ = kill(pid, Signal::SIGTERM);
                let gone = || Ok(!Path::new(&format!("/proc/{pid}")).exists());
                let _ = host::wait_until("a daemon of the second host ends", END_TIMEOUT, gone);
            }
        }
    }
}

/// Becomes the second host, starts libvirt there, and ends. A program of its own,
/// as a thread among others can not get a mount namespace.
pub fn become_second() -> Result<()> {
    for (_, name) in FOLDERS {
        let path = PathBuf::from(ROOT).join(name);
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).with_context(|| format!("creating {}", path.display()))?;
    }
    for (theirs, name) in FOLDERS.iter().filter(|(theirs, _)| *theirs != "/run") {
        // Owners too: part of it is QEMU's user's.
        let (from, to) = (format!("{theirs}/."), format!("{ROOT}/{name}"));
        host::succeed(Command::new("busybox").args(["cp", "-a", &from, &to]))?;
    }
    // The domains of the first host are none of ours.
    for rest in ["etc/qemu", "lib/qemu/save"] {
        let path = PathBuf::from(ROOT).join(rest);
        for file in fs::read_dir(&path).into_iter().flatten().flatten() {
            if file.path().is_file() {
                fs::remove_file(file.path())
                    .with_context(|| format!("removing {}", file.path().display()))?;
            }
        }
    }
    let config = format!("{ROOT}/etc/libvirtd.conf");
    let file = OpenOptions::new().create(true).append(true).open(&config);
    file.and_then(|mut file| writeln!(file, "host_uuid = \"{HOST_UUID}\""))
        .with_context(|| format!("writing {config}"))?;
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS).context("leaving the host's namespaces")?;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).context("making mounts private")?;
    for (theirs, name) in FOLDERS {
        let from = format!("{ROOT}/{name}");
        mount(Some(from.as_str()), theirs, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .with_context(|| format!("mounting {from} on {theirs}"))?;
    }
    // Domains of one name would share a group. Without groups libvirt does not
    // make any.
    umount2("/sys/fs/cgroup", MntFlags::MNT_DETACH).context("taking away control groups")?;
    fs::write("/proc/sys/kernel/hostname", HOST_NAME).context("naming the second host")?;
    fs::create_dir_all("/run/lock").context("creating /run/lock")?;
    for daemon in ["virtlogd", "libvirtd"] {
        host::succeed(Command::new(daemon).arg("-d"))?;
    }
    Ok(())
}
