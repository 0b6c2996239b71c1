// SPDX-License-Identifier: MIT OR Apache-2.0
//! A line to the workload in a guest: its serial console.

use std::fs;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::host;
use super::truth::Truth;

/// From a machine's start to the workload running.
const READY_TIMEOUT: Duration = Duration::from_secs(120);

/// For a command that the workload obeys. It verifies its blocks at a few
/// hundred MiB a second, emulated twice over.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(180);

/// For a few passes over the hot block, with all else that goes on.
const PASS_TIMEOUT: Duration = Duration::from_secs(90);

/// The console of a guest: QEMU's socket, and the log that QEMU keeps of it.
pub struct Console {
    name: String,
    log: PathBuf,
    stream: UnixStream,
    /// Bytes of the log that were consumed.
    seen: usize,
}

impl Console {
    /// Connects to a guest's console: /run/NAME.sock, with the log /run/NAME.log.
    pub fn connect(name: &str) -> Result<Self> {
        Self::connect_to(name, &socket_path(name), log_path(name))
    }

    /// Connects to a console whose files lie elsewhere.
    pub fn connect_to(name: &str, socket: &Path, log: PathBuf) -> Result<Self> {
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("connecting to the console of {name} at {}", socket.display()))?;
        // What the guest says is read from the log, which has it from the start.
        // But a connection that nobody reads fills up, and then the guest waits.
        let mut unread = stream.try_clone().context("duplicating the connection")?;
        thread::spawn(move || io::copy(&mut unread, &mut io::sink()));
        Ok(Self { name: name.to_owned(), log, stream, seen: 0 })
    }

    /// Removes an old log, before QEMU starts.
    pub fn clear(name: &str) -> Result<()> {
        let log = log_path(name);
        if log.exists() {
            fs::remove_file(&log).context("removing an old console log")?;
        }
        Ok(())
    }

    /// Waits until the workload runs; where its blocks lie.
    pub fn wait_ready(&mut self) -> Result<Truth> {
        Truth::parse(&self.wait_started("ready")?)
    }

    /// Waits until the workload has come so far after the machine's start that it says
    /// `last`; what it said until then.
    pub fn wait_started(&mut self, last: &str) -> Result<Vec<String>> {
        self.read_until(last, READY_TIMEOUT)
    }

    /// Sends a command and does not wait for it to be obeyed.
    pub fn send(&mut self, command: &str) -> Result<()> {
        writeln!(self.stream, "{command}").with_context(|| format!("writing to the console of {}", self.name))
    }

    /// Has the workload obey a command; its answer up to the line `last`.
    pub fn ask(&mut self, command: &str, last: &str) -> Result<Vec<String>> {
        writeln!(self.stream, "{command}")
            .with_context(|| format!("writing to the console of {}", self.name))?;
        self.read_until(last, ANSWER_TIMEOUT)
    }

    /// Has the workload obey a command that it answers by repeating it.
    pub fn tell(&mut self, command: &str) -> Result<()> {
        self.ask(command, command).map(drop)
    }

    /// Fails unless all blocks hold what the workload wrote, and did whenever it
    /// looked.
    pub fn check_data(&mut self) -> Result<()> {
        let answer = self.ask("check", "check end")?;
        let is_bad = |line: &String| line.starts_with("check ") && line.contains(" bad ");
        ensure!(!answer.iter().any(is_bad), "the guest's data is damaged: {}", answer.join("; "));
        for what in ["hot", "idle", "running"] {
            let good = answer.contains(&format!("check {what} ok"));
            ensure!(good, "the guest says nothing of {what}: {}", answer.join("; "));
        }
        Ok(())
    }

    /// Passes over the hot block so far.
    pub fn passes(&mut self) -> Result<u64> {
        writeln!(self.stream, "passes")
            .with_context(|| format!("writing to the console of {}", self.name))?;
        let mut passes = None;
        host::wait_until(&format!("{} says its passes", self.name), ANSWER_TIMEOUT, || {
            let lines = self.new_lines()?;
            passes = lines.iter().find_map(|line| line.strip_prefix("passes ")?.parse().ok());
            Ok(passes.is_some())
        })?;
        passes.context("no passes")
    }

    /// Waits until the workload has made a few more passes.
    pub fn wait_passes(&mut self) -> Result<()> {
        let before = self.passes()?;
        let what = format!("{} goes on from pass {before}", self.name);
        host::wait_until(&what, PASS_TIMEOUT, || Ok(self.passes()? >= before + 3))
    }

    fn read_until(&mut self, last: &str, timeout: Duration) -> Result<Vec<String>> {
        let mut lines = Vec::new();
        let what = format!("{} says {last:?}", self.name);
        let outcome = host::wait_until(&what, timeout, || {
            lines.extend(self.new_lines()?);
            Ok(lines.iter().any(|line| line == last))
        });
        outcome.with_context(|| format!("so far: {}; its console: {}", lines.join("; "), self.log_tail()))?;
        Ok(lines)
    }

    /// The last lines of the console, the kernel's among them.
    fn log_tail(&self) -> String {
        let bytes = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(8)..].join(" | ")
    }

    /// What the workload said since the last call, without its mark; complete
    /// lines only.
    fn new_lines(&mut self) -> Result<Vec<String>> {
        let Ok(bytes) = fs::read(&self.log) else {
            return Ok(Vec::new());
        };
        let fresh = bytes.get(self.seen..).unwrap_or_default();
        let end = fresh.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
        self.seen += end;
        let text = String::from_utf8_lossy(&fresh[..end]).into_owned();
        let lines: Vec<String> = text
            .lines()
            .filter_map(|line| line.split_once("EPT-GUEST "))
            .map(|(_, said)| said.trim_end().to_owned())
            .collect();
        if let Some(failure) = lines.iter().find(|line| line.starts_with("failed")) {
            bail!("the workload of {} {failure}", self.name);
        }
        Ok(lines)
    }
}

/// QEMU's socket for a guest's console.
pub fn socket_path(name: &str) -> PathBuf {
    Path::new("/run").join(format!("{name}.sock"))
}

/// What QEMU keeps of a guest's console.
pub fn log_path(name: &str) -> PathBuf {
    Path::new("/run").join(format!("{name}.log"))
}
