// SPDX-License-Identifier: MIT OR Apache-2.0
//! The daemon as a service manager sees it.

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const PROGRAM: &str = env!("CARGO_BIN_EXE_ept-virt");

/// A daemon that follows libvirt's own test driver, and what it tells.
struct Daemon {
    dir: PathBuf,
    child: Child,
    manager: UnixDatagram,
}

impl Daemon {
    fn start(name: &str, config: &str) -> Self {
        let dir = env::temp_dir().join(format!("ept-virt-service-{}-{name}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("ept-virt.toml"), config).unwrap();
        let manager = UnixDatagram::bind(dir.join("notify")).unwrap();
        manager.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let child = Command::new(PROGRAM)
            .arg("daemon")
            .args(["--connect", "test:///default", "--socket"])
            .arg(dir.join("socket"))
            .arg("--config-file")
            .arg(dir.join("ept-virt.toml"))
            .env("STATE_DIRECTORY", dir.join("state"))
            .env("NOTIFY_SOCKET", dir.join("notify"))
            .env("WATCHDOG_USEC", "300000")
            .env_remove("WATCHDOG_PID")
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { dir, child, manager }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// The next message that says `wanted`; those before it.
    fn hear(&self, wanted: &str) -> Vec<String> {
        let mut before = Vec::new();
        loop {
            let mut buffer = [0; 4096];
            let length = self.manager.recv(&mut buffer).unwrap();
            let message = String::from_utf8_lossy(&buffer[..length]).into_owned();
            if message.lines().any(|line| line == wanted) {
                return before;
            }
            before.push(message);
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

#[test]
fn tells_that_it_is_ready_alive_reloads_and_stops() {
    let mut daemon = Daemon::start("tells", "");
    assert_eq!(daemon.hear("READY=1"), [""; 0]);
    let seen = "STATUS=0 of 1 domains observed; libvirt: connected";
    daemon.hear(seen);
    daemon.hear("WATCHDOG=1");
    let mode = || fs::metadata(daemon.dir.join("socket")).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(), 0o600);
    fs::write(daemon.dir.join("ept-virt.toml"), "group = \"root\"").unwrap();
    daemon.signal(Signal::SIGHUP);
    daemon.hear("RELOADING=1");
    daemon.hear("READY=1");
    assert_eq!(mode(), 0o660);
    // A configuration that can not be read changes nothing, and ends nothing.
    fs::write(daemon.dir.join("ept-virt.toml"), "nonsense").unwrap();
    daemon.signal(Signal::SIGHUP);
    daemon.hear("RELOADING=1");
    daemon.hear("READY=1");
    daemon.hear("WATCHDOG=1");
    daemon.signal(Signal::SIGTERM);
    daemon.hear("STOPPING=1");
    assert_eq!(daemon.child.wait().unwrap().code(), Some(0));
    assert!(daemon.dir.join("state").is_dir());
    assert!(!daemon.dir.join("socket").exists());
}

#[test]
fn is_never_ready_with_a_configuration_that_can_not_be_read() {
    let mut daemon = Daemon::start("broken", "nonsense");
    assert_eq!(daemon.child.wait().unwrap().code(), Some(2));
    daemon.manager.set_nonblocking(true).unwrap();
    assert!(daemon.manager.recv(&mut [0; 64]).is_err(), "nobody was told anything");
}

/// Guests that libvirt starts at boot find the daemon's socket.
#[test]
fn the_unit_is_started_before_guests_are() {
    let unit = include_str!("../dist/ept-virt.service");
    let units = |key: &str| -> Vec<&str> {
        unit.lines().filter_map(|line| line.strip_prefix(key)).flat_map(str::split_whitespace).collect()
    };
    assert_eq!(units("Before="), ["libvirtd.service", "virtqemud.service", "libvirt-guests.service"]);
    assert_eq!(units("After="), ["modprobe@kvm_ept_sample.service"]);
}

/// The unit leaves an attacker little: at most 3.0 of 10.
#[test]
fn the_unit_is_hardened() {
    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("dist/ept-virt.service");
    let analysis = Command::new("systemd-analyze")
        .args(["security", "--offline=true", "--threshold=30", "--no-pager"])
        .arg(&unit)
        .output();
    match analysis {
        Err(error) => eprintln!("SKIP the_unit_is_hardened: systemd-analyze can not be run: {error}"),
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{text}");
            assert!(text.contains("Overall exposure level"), "{text}");
        }
    }
}
