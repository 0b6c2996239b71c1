// SPDX-License-Identifier: MIT OR Apache-2.0
//! Wakes an emulated CPU that sleeps through its own interrupts.
//!
//! Seen once in some hours with QEMU 7.2 (TCG, SVM), as a VM ended on the host: the CPU
//! halted with interrupts enabled, and the timer's vector in its local APIC's IRR. That
//! timer fires once, so nothing comes any more, and the host stands still for good. A key
//! that is pressed is one more interrupt, and with it the CPU finds both.

use std::fs;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use super::qmp::Monitor;

/// How long the emulator may do nothing.
const PERIOD: Duration = Duration::from_secs(5);

/// Nothing: fewer ticks (USER_HZ: 10 ms) of CPU time in that than a host takes whose
/// daemons rest.
const STANDSTILL_TICKS: u64 = 2;

/// How often that was needed.
static WAKES: AtomicU32 = AtomicU32::new(0);

/// How often an emulator was woken since this program began.
pub fn wakes() -> u32 {
    WAKES.load(Ordering::Relaxed)
}

/// Watches an emulator until it is dropped.
pub struct Waker {
    /// Its end tells the thread.
    _watched: Sender<()>,
}

impl Waker {
    /// Watches the emulator with this process id, and says `woken` when it had to act.
    pub fn watch(pid: u32, woken: impl Fn() + Send + 'static) -> Self {
        let (watched, end) = mpsc::channel();
        thread::spawn(move || {
            let mut before = None;
            while end.recv_timeout(PERIOD) == Err(RecvTimeoutError::Timeout) {
                // An emulator that has ended is its owner's to notice.
                let Ok(ticks) = cpu_ticks(pid) else { return };
                if before.is_some_and(|before| ticks < before + STANDSTILL_TICKS) && wake(pid).is_ok() {
                    WAKES.fetch_add(1, Ordering::Relaxed);
                    woken();
                }
                before = Some(ticks);
            }
        });
        Self { _watched: watched }
    }
}

/// Presses a key that means nothing.
fn wake(pid: u32) -> Result<()> {
    let path = format!("/proc/{pid}/cwd/qmp");
    let stream = UnixStream::connect(&path).with_context(|| format!("connecting to {path}"))?;
    Monitor::new(stream)?.press("shift")
}

/// The CPU time that a process has taken.
fn cpu_ticks(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    ticks_in(&stat).with_context(|| format!("{path} has another form"))
}

/// utime and stime of a line of proc_stat(5); its name may hold anything.
fn ticks_in(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split(' ').skip(11);
    Some(fields.next()?.parse::<u64>().ok()? + fields.next()?.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_says_what_it_has_taken() {
        let stat = "6564 (q (x) y) S 1 6564 6564 0 -1 4194560 9 8 7 6 15588 152 3 4 20 0 6 0 114 42 9 18";
        assert_eq!(ticks_in(stat), Some(15588 + 152));
        assert_eq!(ticks_in("6564 (qemu"), None);
        assert!(cpu_ticks(std::process::id()).is_ok());
    }
}
