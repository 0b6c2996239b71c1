// SPDX-License-Identifier: MIT OR Apache-2.0
//! Child processes that never outlive us, never run for ever, and whose output
//! is at hand when they fail.
//!
//! Each child leads a process group of its own. The group is killed when the
//! [`Child`] is dropped and when we get SIGINT, SIGTERM or SIGHUP. When we are
//! killed outright, the kernel kills the child (PR_SET_PDEATHSIG); as that is
//! tied to the thread that spawned it, spawn from threads that live as long as
//! their children.

use std::fs::{self, File};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::prctl;
use nix::sys::signal::{SigSet, SigmaskHow, Signal, killpg, pthread_sigmask};
use nix::unistd::Pid;

/// Process groups to kill when a signal ends us.
static GROUPS: Mutex<Vec<Pid>> = Mutex::new(Vec::new());

/// What to do before a signal ends us, after the groups are killed.
static AT_EXIT: Mutex<Vec<fn()>> = Mutex::new(Vec::new());

/// How often a wait looks again.
const POLL: Duration = Duration::from_millis(20);

/// Lines of a log that an error shows.
const TAIL_LINES: usize = 25;

/// A running child.
pub struct Child {
    child: std::process::Child,
    group: Pid,
    name: String,
    log: PathBuf,
}

/// Makes SIGINT, SIGTERM and SIGHUP end the children, then us. Call once, first
/// thing in main: threads that exist before would still take the signals.
pub fn end_children_on_signals() -> Result<()> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    pthread_sigmask(SigmaskHow::SIG_BLOCK, Some(&signals), None).context("blocking signals")?;
    thread::spawn(move || {
        let Ok(signal) = signals.wait() else { return };
        if let Ok(groups) = GROUPS.lock() {
            for group in groups.iter() {
                let _ = killpg(*group, Signal::SIGKILL);
            }
        }
        if let Ok(hooks) = AT_EXIT.lock() {
            hooks.iter().for_each(|hook| hook());
        }
        eprintln!("\nended by {signal}");
        std::process::exit(128 + signal as i32);
    });
    Ok(())
}

/// Adds something to do when a signal ends us.
pub fn at_signal_exit(hook: fn()) {
    if let Ok(mut hooks) = AT_EXIT.lock() {
        hooks.push(hook);
    }
}

/// Starts `command` with standard output and error going to `log` (replaced)
/// and standard input empty, unless the command set its own before.
pub fn spawn(command: &mut Command, log: &Path) -> Result<Child> {
    let name = command.get_program().to_string_lossy().into_owned();
    if let Some(dir) = log.parent() {
        fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    }
    let file = File::create(log).with_context(|| format!("creating log {}", log.display()))?;
    let parent = nix::unistd::getpid();
    command
        .stdin(Stdio::null())
        .stdout(file.try_clone().context("duplicating a descriptor")?)
        .stderr(file)
        .process_group(0);
    // SAFETY: between fork and exec only async-signal-safe calls are made
    // (prctl, getppid, sigprocmask), and nothing is allocated: errno values
    // become io::Error without a heap payload.
    unsafe {
        command.pre_exec(move || {
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            if nix::unistd::getppid() != parent {
                return Err(nix::errno::Errno::ESRCH.into());
            }
            // The mask that end_children_on_signals set is inherited.
            SigSet::empty().thread_set_mask()?;
            Ok(())
        });
    }
    // Held over the spawn, so that a signal can not fall between it and the entry.
    let mut groups = GROUPS.lock().unwrap_or_else(|e| e.into_inner());
    let child = command.spawn().with_context(|| format!("starting {name}"))?;
    let group = Pid::from_raw(child.id() as i32);
    groups.push(group);
    Ok(Child { child, group, name, log: log.into() })
}

/// Runs `command` to its end; an error unless it exits with 0 within `timeout`.
pub fn run(command: &mut Command, log: &Path, timeout: Duration) -> Result<()> {
    let mut child = spawn(command, log)?;
    let status = child.wait(timeout)?;
    if status.success() {
        return Ok(());
    }
    bail!("{} {}\n{}", child.name, describe(status), log_tail(log));
}

impl Child {
    /// The exit status, if it has ended.
    pub fn try_wait(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("waiting for {}", self.name))
    }

    /// Waits for the end; after `timeout` kills the group and fails.
    pub fn wait(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                self.kill();
                bail!(
                    "{} took more than {} s and was ended\n{}",
                    self.name,
                    timeout.as_secs(),
                    log_tail(&self.log)
                );
            }
            thread::sleep(POLL);
        }
    }

    /// Kills the whole group and reaps the child.
    pub fn kill(&mut self) {
        let _ = killpg(self.group, Signal::SIGKILL);
        let _ = self.child.wait();
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Where its output goes.
    pub fn log(&self) -> &Path {
        &self.log
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
        if let Ok(mut groups) = GROUPS.lock() {
            groups.retain(|g| *g != self.group);
        }
    }
}

/// How a process ended, in words.
pub fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with {code}"),
        (None, Some(signal)) => format!("was killed by signal {signal}"),
        (None, None) => "ended".into(),
    }
}

/// The last lines of a log and where the rest is, for an error message.
pub fn log_tail(log: &Path) -> String {
    let bytes = fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().collect();
    let tail = lines[lines.len().saturating_sub(TAIL_LINES)..].join("\n    ");
    format!("    {tail}\nThe whole log: {}", log.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("ept-virt-proc-{name}-{}.log", std::process::id()))
    }

    #[test]
    fn a_failure_shows_the_end_of_the_log() {
        let log = log("fail");
        let error =
            run(Command::new("sh").args(["-c", "echo the reason; exit 3"]), &log, Duration::from_secs(10))
                .unwrap_err()
                .to_string();
        assert!(error.contains("exited with 3"), "{error}");
        assert!(error.contains("the reason"), "{error}");
        fs::remove_file(log).unwrap();
    }

    #[test]
    fn a_timeout_ends_grandchildren_too() {
        let log = log("timeout");
        let mut child = spawn(Command::new("sh").args(["-c", "sleep 600 & echo $!; wait"]), &log).unwrap();
        assert!(child.wait(Duration::from_millis(500)).is_err());
        let grandchild: i32 = fs::read_to_string(&log).unwrap().trim().parse().unwrap();
        thread::sleep(Duration::from_millis(100));
        let stat = fs::read_to_string(format!("/proc/{grandchild}/stat")).unwrap_or_default();
        assert!(stat.is_empty() || stat.contains(") Z"), "still there: {stat}");
        fs::remove_file(log).unwrap();
    }
}
