// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel's log, and whether it speaks of a bug.

use std::fs::OpenOptions;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result, bail, ensure};

/// A record is at most this long (Linux, PRINTKRB_RECORD_MAX and its prefix).
const RECORD_BYTES: usize = 8192;

/// Words of which each is a bug's, or a stall's.
const COMPLAINTS: &[&str] = &[
    "BUG:",
    "BUG at",
    "Bad page map",
    "Bad rss-counter",
    "Call Trace:",
    "KASAN",
    "Kernel panic",
    "Oops",
    "RIP: 0010:",
    "UBSAN",
    "WARNING:",
    "blocked for more than",
    "general protection",
    "hard LOCKUP",
    "hung task",
    "hung_task:",
    "leaked percpu",
    "list_add corruption",
    "list_del corruption",
    "possible circular locking",
    "possible recursive locking",
    "rcu: INFO",
    "rcu_preempt self-detected",
    "refcount_t:",
    "scheduling while atomic",
    "self-detected stall",
    "soft lockup",
    "suspicious RCU usage",
    "unable to handle",
    "workqueue lockup",
];

/// How many complaints a report shows.
const SHOWN: usize = 12;

/// The kernel's log from some moment on.
pub struct KernelLog {
    /// Number of the first record that counts.
    from: u64,
}

impl KernelLog {
    /// Also of what was said before.
    pub fn whole() -> Self {
        Self { from: 0 }
    }

    /// Fails, and shows what it says, if there is a complaint. Later calls look
    /// only at what comes later.
    pub fn judge(&mut self) -> Result<()> {
        let records = read_all()?;
        let first = records.first().map_or(self.from, |(number, _)| *number);
        ensure!(first <= self.from, "the kernel's log is full: records {} to {first} are lost", self.from);
        let fresh = records.iter().filter(|(number, _)| *number >= self.from);
        let complaints: Vec<&str> =
            fresh.map(|(_, text)| text.as_str()).filter(|text| is_complaint(text)).collect();
        self.from = records.last().map_or(self.from, |(number, _)| number + 1);
        if complaints.is_empty() {
            return Ok(());
        }
        bail!(
            "the kernel's log has {} complaints: {}",
            complaints.len(),
            complaints[..complaints.len().min(SHOWN)].join(" | ")
        );
    }
}

/// Whether a line of the kernel's log speaks of a bug.
pub fn is_complaint(line: &str) -> bool {
    COMPLAINTS.iter().any(|word| line.contains(word))
}

/// All records that the kernel still has: their numbers and texts.
fn read_all() -> Result<Vec<(u64, String)>> {
    const PATH: &str = "/dev/kmsg";
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(PATH)
        .with_context(|| format!("opening {PATH}"))?;
    let mut records = Vec::new();
    let mut buffer = vec![0; RECORD_BYTES];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(records),
            Ok(length) => records.extend(parse(&String::from_utf8_lossy(&buffer[..length]))),
            // The next read goes on with the oldest that is left.
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => return Ok(records),
            Err(error) => return Err(error).with_context(|| format!("reading {PATH}")),
        }
    }
}

/// Reads `PRIORITY,NUMBER,TIME,FLAGS;TEXT`; what programs wrote is not the
/// kernel's (Linux, Documentation/ABI/testing/dev-kmsg).
fn parse(record: &str) -> Option<(u64, String)> {
    let (head, text) = record.split_once(';')?;
    let mut fields = head.split(',');
    let priority: u32 = fields.next()?.parse().ok()?;
    let number = fields.next()?.parse().ok()?;
    let is_kernel = priority >> 3 == 0;
    let text = if is_kernel { text.lines().next().unwrap_or_default() } else { "" };
    Some((number, text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_bugs_from_other_lines() {
        for bug in [
            "WARNING: CPU: 0 PID: 1 at arch/x86/kvm/mmu/tdp_mmu.c:340",
            "rcu: INFO: rcu_preempt self-detected stall on CPU",
            "watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [qemu]",
            "INFO: task qemu:12 blocked for more than 120 seconds.",
        ] {
            assert!(is_complaint(bug), "{bug}");
        }
        for other in [
            "rcu: Hierarchical RCU implementation.",
            "kvm_ept_sample: loading out-of-tree module taints kernel.",
            "clocksource: Switched to clocksource tsc",
        ] {
            assert!(!is_complaint(other), "{other}");
        }
    }

    #[test]
    fn reads_records_of_the_kernel_and_counts_those_of_others() {
        assert_eq!(parse("4,1234,5678,-;BUG: a\n SUBSYSTEM=x\n"), Some((1234, "BUG: a".into())));
        assert_eq!(parse("12,1235,5679,-;BUG: said by a program\n"), Some((1235, String::new())));
        assert_eq!(parse("nonsense"), None);
    }
}
