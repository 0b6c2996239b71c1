// SPDX-License-Identifier: MIT OR Apache-2.0
//! The product under test: the daemon, and the CLI that asks it.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use ept_virt_core::wire::{
    Command as Ask, DEFAULT_SOCKET, DomainStatus, MemoryMap, PROTOCOL_VERSION, Reply, Request, Response,
    Status,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::host::{self, PAYLOAD};

const LOG: &str = "/run/ept-virt-daemon.log";

const START_TIMEOUT: Duration = Duration::from_secs(30);
const STOP_TIMEOUT: Duration = Duration::from_secs(25);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// A running daemon; killed when dropped.
pub struct Daemon {
    child: Child,
}

impl Daemon {
    /// Starts it and waits until it answers.
    pub fn start() -> Result<Self> {
        Self::start_looking_every("2")
    }

    /// As [`Daemon::start`]; it looks at libvirt by itself every so many seconds.
    pub fn start_looking_every(seconds: &str) -> Result<Self> {
        let mut command = Command::new(format!("{PAYLOAD}/ept-virt"));
        command.args(["daemon", "--reconcile-interval", seconds]);
        Self::launch(command, LOG, Path::new("/"))
    }

    /// Runs the command of a daemon, on the host with this root folder.
    pub fn launch(mut command: Command, log: &str, root: &Path) -> Result<Self> {
        let file = File::create(log).with_context(|| format!("creating {log}"))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .context("starting the daemon")?;
        let mut daemon = Self { child };
        host::wait_until("the daemon answers", START_TIMEOUT, || {
            if let Some(status) = daemon.child.try_wait()? {
                bail!("the daemon ended: {status}: {}", fs::read_to_string(log).unwrap_or_default());
            }
            Ok(status_on(root).is_ok())
        })?;
        Ok(daemon)
    }

    /// Ends it as a service manager does; an error unless it ends well.
    pub fn stop(mut self) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.child.id())?);
        kill(pid, Signal::SIGTERM).context("ending the daemon")?;
        let mut ended = None;
        host::wait_until("the daemon ends", STOP_TIMEOUT, || {
            ended = self.child.try_wait()?;
            Ok(ended.is_some())
        })?;
        match ended {
            Some(status) if status.success() => Ok(()),
            other => bail!("the daemon ended badly: {other:?}: {}", log_tail()),
        }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // SIGKILL, as an out-of-memory killer would.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `ept-virt status --json`.
pub fn status() -> Result<Status> {
    cli(&["status", "--json"])
}

/// What [`status`] says, straight from the socket of the daemon on the host with
/// this root folder: without a program that takes half a second to start.
pub fn status_on(root: &Path) -> Result<Status> {
    let socket = root.join(DEFAULT_SOCKET.trim_start_matches('/'));
    let mut stream =
        UnixStream::connect(&socket).with_context(|| format!("connecting to {}", socket.display()))?;
    stream.set_read_timeout(Some(ANSWER_TIMEOUT)).context("bounding the wait for the daemon")?;
    let request = Request { v: PROTOCOL_VERSION, command: Ask::Status { domain: None } };
    let line = serde_json::to_string(&request).context("writing a request")?;
    writeln!(stream, "{line}").context("asking the daemon")?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).context("reading the daemon's answer")?;
    let response: Response =
        serde_json::from_str(&answer).with_context(|| format!("the daemon answers {answer:?}"))?;
    match response.reply {
        Reply::Status(status) => Ok(*status),
        other => bail!("the daemon answers {other:?}"),
    }
}

/// One domain of [`status`], if the daemon knows it.
pub fn domain(name: &str) -> Result<Option<DomainStatus>> {
    Ok(status()?.domains.into_iter().find(|d| d.name == name))
}

/// `ept-virt map NAME --json`.
pub fn map(name: &str) -> Result<MemoryMap> {
    cli(&["map", name, "--json"])
}

/// Waits until `good` holds for a domain's status; the last status, or an error
/// that shows it.
pub fn wait_for(
    name: &str,
    what: &str,
    timeout: Duration,
    good: impl Fn(&DomainStatus) -> bool,
) -> Result<DomainStatus> {
    let mut last = None;
    let outcome = host::wait_until(what, timeout, || {
        last = domain(name)?;
        Ok(last.as_ref().is_some_and(&good))
    });
    match (outcome, last) {
        (Ok(()), Some(status)) => Ok(status),
        (Ok(()), None) => bail!("{what}: the daemon does not know {name}"),
        (Err(error), last) => Err(error).with_context(|| {
            let json = serde_json::to_string(&last).unwrap_or_default();
            format!("status {json}; daemon log: {}", log_tail())
        }),
    }
}

/// Runs the CLI; its standard output, or an error with all it said.
pub fn cli_text(args: &[&str]) -> Result<String> {
    host::succeed(Command::new(format!("{PAYLOAD}/ept-virt")).args(args))
}

/// Runs the CLI; its exit code and what it wrote to standard error.
pub fn cli_failure(args: &[&str]) -> Result<(Option<i32>, String)> {
    let out = host::run(Command::new(format!("{PAYLOAD}/ept-virt")).args(args))?;
    Ok((out.status.code(), String::from_utf8_lossy(&out.stderr).into_owned()))
}

/// Waits until `ept-virt doctor` finds nothing that fails: on an emulated host libvirt
/// does not always answer it in time. The names of the checks that warn.
pub fn doctor(timeout: Duration) -> Result<Vec<String>> {
    let mut report = Value::Null;
    let outcome = host::wait_until("doctor finds nothing that fails", timeout, || {
        let out = host::run(Command::new(format!("{PAYLOAD}/ept-virt")).args(["doctor", "--json"]))?;
        report = serde_json::from_slice(&out.stdout)
            .with_context(|| format!("doctor says {}", String::from_utf8_lossy(&out.stderr)))?;
        Ok(out.status.success())
    });
    let found = |verdict: &str, field: &str| -> Vec<String> {
        let checks = report["checks"].as_array().into_iter().flatten();
        let those = checks.filter(|check| check["verdict"] == verdict);
        those.map(|check| check[field].as_str().unwrap_or_default().to_owned()).collect()
    };
    outcome.with_context(|| {
        eprintln!("doctor says {report:#}");
        format!("doctor: {}", found("fail", "text").join(" | "))
    })?;
    Ok(found("warn", "check"))
}

/// The last lines of the daemon's log.
pub fn log_tail() -> String {
    let text = fs::read_to_string(LOG).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(12)..].join(" | ")
}

fn cli<T: DeserializeOwned>(args: &[&str]) -> Result<T> {
    let text = host::succeed(Command::new(format!("{PAYLOAD}/ept-virt")).args(args))?;
    serde_json::from_str(&text).with_context(|| format!("reading the JSON of {args:?}"))
}
