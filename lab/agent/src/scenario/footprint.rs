// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a process takes of the host.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// Threads, memory and time so far.
#[derive(Clone, Copy, Debug)]
pub struct Footprint {
    /// Threads.
    pub threads: usize,
    /// Memory that is resident.
    pub resident_kib: u64,
    /// Of it, what is not a file's.
    pub anonymous_kib: u64,
    /// On a processor, all threads that still live.
    pub cpu: Duration,
}

impl Footprint {
    /// Of the process of this number.
    pub fn of(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/status");
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        let number = |key: &str| -> Result<u64> {
            let Some(line) = text.lines().find_map(|line| line.strip_prefix(key)) else {
                bail!("{path} has no {key}");
            };
            line.trim().trim_end_matches(" kB").parse().with_context(|| format!("{path}: {line}"))
        };
        Ok(Self {
            threads: usize::try_from(number("Threads:")?)?,
            resident_kib: number("VmRSS:")?,
            anonymous_kib: number("RssAnon:")?,
            cpu: cpu(pid)?,
        })
    }
}

/// From the scheduler's own account, in nanoseconds: that of `stat` is in ticks.
fn cpu(pid: u32) -> Result<Duration> {
    let tasks = format!("/proc/{pid}/task");
    let mut total = 0;
    for task in fs::read_dir(&tasks).with_context(|| format!("reading {tasks}"))? {
        // A thread may end between the two calls.
        let text = fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
        let time = text.split_whitespace().next().and_then(|word| word.parse::<u64>().ok());
        total += time.unwrap_or(0);
    }
    Ok(Duration::from_nanos(total))
}
