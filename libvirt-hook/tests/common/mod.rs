// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs the hook beside daemons good and bad.

// Each test program uses a part of this.
#![allow(dead_code)]

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, connect, listen, socket};

/// Above the hook's own limit, for a machine that is busy.
pub const GENEROUS: Duration = Duration::from_secs(5);

/// A directory that goes away with the test: the root of a host that has nothing.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("ept-virt-hook-{}-{count}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub fn socket(&self) -> PathBuf {
        self.path("sock")
    }

    pub fn hook(&self) -> Hook {
        Hook { root: self.0.clone(), socket: self.socket() }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub fn words<'a>(words: &'a [&'a str]) -> Vec<&'a OsStr> {
    words.iter().map(OsStr::new).collect()
}

/// The hook on a host, with the socket that it will look for.
pub struct Hook {
    pub root: PathBuf,
    pub socket: PathBuf,
}

impl Hook {
    pub fn command(&self, arguments: &[&OsStr]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ept-virt-hook"));
        command.args(arguments).env("EPT_VIRT_SOCKET", &self.socket).env("EPT_VIRT_ROOT", &self.root);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs it to its end, and checks what holds always.
    pub fn end(&self, arguments: &[&OsStr], xml: &[u8]) -> Output {
        let started = Instant::now();
        let mut child = self.command(arguments).spawn().unwrap();
        // The hook may end before it has read all.
        let _ = child.stdin.take().unwrap().write_all(xml);
        let output = child.wait_with_output().unwrap();
        assert!(started.elapsed() < GENEROUS, "took {:?}", started.elapsed());
        assert_eq!(output.stdout, b"");
        output
    }

    /// The same for all that is not refused.
    pub fn run(&self, arguments: &[&OsStr], xml: &[u8]) -> Output {
        let output = self.end(arguments, xml);
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{told}");
        output
    }

    /// Before a start: the exit code, and what virsh shows of it.
    pub fn prepare(&self, xml: &str) -> (Option<i32>, String) {
        let output = self.end(&words(&["vm1", "prepare", "begin", "-"]), xml.as_bytes());
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    }
}

/// What may be at the daemon's socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Nothing.
    None,
    /// A socket that a killed daemon left.
    Dead,
    /// A daemon that accepts, and neither reads nor answers.
    Silent,
    /// A daemon that never accepts, with room for those who wait.
    Stuck,
    /// The same without room.
    Full,
}

pub const DAEMONS: [Kind; 5] = [Kind::None, Kind::Dead, Kind::Silent, Kind::Stuck, Kind::Full];

impl Kind {
    /// Whether a nudge gets at least into the socket.
    pub fn takes(self) -> bool {
        matches!(self, Kind::Silent | Kind::Stuck)
    }
}

/// Such a daemon.
pub struct Daemon {
    scratch: Scratch,
    /// Waits with the others, or for them.
    _held: (Option<UnixListener>, Vec<OwnedFd>),
}

impl Daemon {
    pub fn new(kind: Kind) -> Self {
        let scratch = Scratch::new();
        let bind = || UnixListener::bind(scratch.socket()).unwrap();
        let held = match kind {
            Kind::None => (None, Vec::new()),
            Kind::Dead => {
                drop(bind());
                (None, Vec::new())
            }
            Kind::Silent => {
                let listener = bind();
                // Keeps what it accepts; nobody reads or closes it.
                thread::spawn(move || {
                    let mut clients = Vec::new();
                    while let Ok((client, _)) = listener.accept() {
                        clients.push(client);
                    }
                });
                (None, Vec::new())
            }
            Kind::Stuck => (Some(bind()), Vec::new()),
            Kind::Full => {
                let listener = bind();
                listen(&listener, Backlog::new(0).unwrap()).unwrap();
                let waiting = fill(&scratch.socket());
                (Some(listener), waiting)
            }
        };
        Self { scratch, _held: held }
    }

    pub fn hook(&self) -> Hook {
        self.scratch.hook()
    }
}

/// Connects until one more would have to wait.
fn fill(path: &Path) -> Vec<OwnedFd> {
    let address = UnixAddr::new(path).unwrap();
    let mut waiting = Vec::new();
    loop {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let client = socket(AddressFamily::Unix, SockType::Stream, flags, None).unwrap();
        match connect(client.as_raw_fd(), &address) {
            Ok(()) => waiting.push(client),
            Err(Errno::EAGAIN) => return waiting,
            Err(error) => panic!("{error}"),
        }
    }
}
