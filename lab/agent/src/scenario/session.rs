// SPDX-License-Identifier: MIT OR Apache-2.0
//! Domains of a user's own libvirt, which no hook tells of: a daemon of root's follows
//! them by the socket of that libvirt.

use std::fs;
use std::os::unix::fs::{DirBuilderExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ept_virt_core::wire::DomainState;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::console::Console;
use super::daemon::{self, Daemon};
use super::host::{self, PAYLOAD};
use super::tiny;
use crate::report::Outcome;

/// Who else there is in the host's image; it has no home that it may write to.
const USER: &str = "libvirt-qemu";

const NAME: &str = "guest";
const LOG: &str = "/run/ept-virt-daemon.log";
const TIMEOUT: Duration = Duration::from_secs(60);

/// A libvirt of a user's own. Ends with all its domains when dropped.
struct Session {
    uid: u32,
    gid: u32,
    folder: PathBuf,
}

impl Session {
    fn start() -> Result<Self> {
        let uid = field("/etc/passwd", USER)?;
        let folder = PathBuf::from(format!("/run/user/{uid}"));
        // QEMU needs /dev/kvm.
        let session = Self { uid, gid: field("/etc/group", "kvm")?, folder };
        let config = session.folder.join("config/libvirt");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(&config)
            .with_context(|| format!("creating {}", config.display()))?;
        // Logs by QEMU itself, without another daemon.
        fs::write(config.join("qemu.conf"), "stdio_handler = \"file\"\n").context("writing qemu.conf")?;
        for folder in [&session.folder, &session.folder.join("config"), &config] {
            chown(folder, Some(session.uid), Some(session.gid))
                .with_context(|| format!("giving away {}", folder.display()))?;
        }
        host::succeed(session.command("libvirtd").arg("-d"))?;
        host::wait_until("the user's libvirtd answers", TIMEOUT, || Ok(session.virsh(&["list"]).is_ok()))?;
        Ok(session)
    }

    /// A command that the user runs.
    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .uid(self.uid)
            .gid(self.gid)
            .current_dir("/")
            .env("HOME", &self.folder)
            .env("XDG_RUNTIME_DIR", &self.folder)
            .env("XDG_CONFIG_HOME", self.folder.join("config"));
        command
    }

    fn virsh(&self, args: &[&str]) -> Result<String> {
        host::succeed(self.command("virsh").args(["--quiet", "--connect", "qemu:///session"]).args(args))
    }

    /// A file of the user's libvirt.
    fn file(&self, name: &str) -> PathBuf {
        self.folder.join("libvirt").join(name)
    }

    fn qemu(&self) -> Result<Pid> {
        host::read_pid(&self.file(&format!("qemu/run/{NAME}.pid")))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let _ = self.virsh(&["destroy", NAME]);
        let Ok(pid) = host::read_pid(&self.file("libvirtd.pid")) else { return };
        let _ = kill(pid, Signal::SIGTERM);
        let gone = || Ok(!Path::new(&format!("/proc/{pid}")).exists());
        let _ = host::wait_until("the user's libvirtd ends", TIMEOUT, gone);
    }
}

/// The scenario.
pub fn run() -> Result<Outcome> {
    let session = Session::start()?;
    let path = tiny::write(NAME, None)?;
    let theirs = session.folder.join("guest.xml");
    let xml = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    // What QEMU writes to must be the user's.
    let files = format!("{}/{NAME}.", session.folder.display());
    fs::write(&theirs, xml.replace(&format!("/run/{NAME}."), &files)).context("writing the domain's XML")?;
    session.virsh(&["define", &theirs.to_string_lossy()])?;
    session.virsh(&["start", NAME])?;
    let pid = session.qemu()?;

    let mut command = Command::new(format!("{PAYLOAD}/ept-virt"));
    let uri = format!("qemu+unix:///session?socket={}", session.file("libvirt-sock").display());
    command.args(["-c", &uri, "daemon", "--reconcile-interval", "2"]);
    let daemon = Daemon::launch(command, LOG, Path::new("/"))?;
    let status = daemon::wait_for(NAME, "rounds of a user's domain", TIMEOUT, |d| {
        d.state == DomainState::Observing && d.round.as_ref().is_some_and(|round| round.number >= 3)
    })?;
    ensure!(status.pid == Some(pid.as_raw()), "process {:?} is observed, not {pid}", status.pid);
    let (socket, log) = (PathBuf::from(format!("{files}sock")), PathBuf::from(format!("{files}log")));
    Console::connect_to(NAME, &socket, log)?.check_data()?;
    session.virsh(&["destroy", NAME])?;
    host::wait_until("the domain is forgotten", TIMEOUT, || Ok(daemon::domain(NAME)?.is_none()))?;
    daemon.stop()?;
    Ok(Outcome::Pass(format!("process {pid} of user {}, by {uri}", session.uid)))
}

/// The number of a user or group: the third field of its line.
fn field(file: &str, name: &str) -> Result<u32> {
    let text = fs::read_to_string(file).with_context(|| format!("reading {file}"))?;
    let prefix = format!("{name}:");
    let line = text.lines().find(|line| line.starts_with(&prefix));
    let number =
        line.and_then(|line| line.split(':').nth(2)).with_context(|| format!("no {name} in {file}"))?;
    number.parse().with_context(|| format!("{file}: {number:?} is no number"))
}
