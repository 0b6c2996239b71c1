// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel's log as a judge: whatever a test saw, a kernel that complained
//! while it ran has failed it.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

const PATH: &str = "/dev/kmsg";

/// A record is at most this long (Linux, PRINTKRB_RECORD_MAX and its prefix).
const RECORD_BYTES: usize = 8192;

/// What the kernel, its sanitizers and its lock checker say of a bug, or a stall.
const COMPLAINTS: &[&str] = &[
    "BUG:",
    "BUG at",
    "Bad page map",
    "Bad rss-counter",
    "Call Trace",
    "INFO: task",
    "KASAN",
    "KCSAN",
    "KFENCE",
    "Kernel panic",
    "ODEBUG:",
    "Object already free",
    "Oops",
    "RIP: 0010:",
    "UBSAN",
    "WARNING:",
    "bad unlock balance",
    "blocked for more than",
    "circular locking",
    "corrupted stack end",
    "detected expedited stalls",
    "detected stalls",
    "general protection",
    "hard LOCKUP",
    "hung task",
    "hung_task:",
    "inconsistent lock state",
    "leaked percpu",
    "list_add corruption",
    "list_del corruption",
    "lock held when returning",
    "non-static key",
    "page allocation failure",
    "possible recursive locking",
    "rcu: INFO",
    "refcount_t:",
    "scheduling while atomic",
    "self-detected stall",
    "sleeping function called",
    "soft lockup",
    "suspicious RCU usage",
    "unable to handle",
    "usercopy:",
    "workqueue lockup",
];

/// How many lines a report shows, from the first complaint on.
const SHOWN: usize = 40;

const LEAKS: &str = "/sys/kernel/debug/kmemleak";

/// The kernel's log from some moment on.
pub struct KernelLog {
    records: File,
    /// Number of the record that must come next, where it is known.
    next: Option<u64>,
}

impl KernelLog {
    /// Also of what was said before.
    pub fn whole() -> Result<Self> {
        Ok(Self { records: open()?, next: Some(0) })
    }

    /// From this moment on.
    pub fn from_now() -> Result<Self> {
        let mut records = open()?;
        records.seek(SeekFrom::End(0)).with_context(|| format!("going to the end of {PATH}"))?;
        Ok(Self { records, next: None })
    }

    /// What the kernel said since the last call. Fails when records were lost,
    /// because they were overwritten before they were read.
    pub fn lines(&mut self) -> Result<Vec<String>> {
        let (mut lines, mut buffer, mut lost) = (Vec::new(), [0; RECORD_BYTES], None);
        loop {
            match self.records.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => {
                    let Some((number, text)) = parse(&String::from_utf8_lossy(&buffer[..length])) else {
                        continue;
                    };
                    if let Some(next) = self.next.filter(|next| *next != number) {
                        lost = Some((next, number));
                    }
                    self.next = Some(number + 1);
                    lines.extend(text);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // The next read goes on with the oldest that is left.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).with_context(|| format!("reading {PATH}")),
            }
        }
        match lost {
            None => Ok(lines),
            Some((from, to)) => bail!("the kernel's log is full: records {from} to {to} are lost"),
        }
    }

    /// Fails, and shows what it says, if there is a complaint, or if the module
    /// says an address of the kernel. Later calls look only at what comes later.
    pub fn judge(&mut self) -> Result<()> {
        let lines = self.lines()?;
        if lines.iter().any(|line| line.contains("suspected memory leaks")) {
            nothing_of_ours_leaked()?;
        }
        judge(&lines)
    }
}

fn open() -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_NONBLOCK);
    options.open(PATH).with_context(|| format!("opening {PATH}"))
}

fn judge(lines: &[String]) -> Result<()> {
    if let Some(first) = lines.iter().position(|line| is_complaint(line)) {
        let end = lines.len().min(first + SHOWN);
        bail!("the kernel complained:\n{}", lines[first..end].join("\n"));
    }
    for line in lines.iter().filter(|line| line.contains("kvm_ept_sample")) {
        ensure!(!has_kernel_address(line), "the module's log shows a kernel address: {line}");
    }
    Ok(())
}

fn is_complaint(line: &str) -> bool {
    line.starts_with("BUG ") || COMPLAINTS.iter().any(|words| line.contains(words))
}

/// Reads `PRIORITY,NUMBER,TIME,FLAGS;TEXT`, then lines of details. What programs
/// wrote is not the kernel's (Linux, Documentation/ABI/testing/dev-kmsg).
fn parse(record: &str) -> Option<(u64, Option<String>)> {
    let (head, text) = record.split_once(';')?;
    let mut fields = head.split(',');
    let priority: u32 = fields.next()?.parse().ok()?;
    let number = fields.next()?.parse().ok()?;
    let is_kernel = priority >> 3 == 0;
    Some((number, is_kernel.then(|| text.lines().next().unwrap_or_default().to_owned())))
}

/// Whether `text` has a number of 16 hexadecimal digits in the kernel's half.
pub fn has_kernel_address(text: &str) -> bool {
    text.split(|c: char| !c.is_ascii_hexdigit())
        .filter(|word| word.len() == 16)
        .any(|word| u64::from_str_radix(word, 16).is_ok_and(|value| value >> 47 == (1 << 17) - 1))
}

/// Asks a kernel that looks for leaks (kmemleak) for all it knows. One that does
/// not look finds nothing.
pub fn scan_for_leaks() -> Result<()> {
    if !Path::new(LEAKS).exists() {
        return Ok(());
    }
    // What was freed a moment ago may still be found in a register or stack, and
    // is told only when it has been there for some seconds.
    for pause in [0, 6] {
        std::thread::sleep(Duration::from_secs(pause));
        fs::write(LEAKS, "scan").with_context(|| format!("writing to {LEAKS}"))?;
    }
    nothing_of_ours_leaked()
}

/// Others may: the module's functions are not among those that allocated.
fn nothing_of_ours_leaked() -> Result<()> {
    let found = fs::read_to_string(LEAKS).with_context(|| format!("reading {LEAKS}"))?;
    ensure!(!found.contains("[kvm_ept_sample]"), "memory was leaked:\n{found}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clean(lines: &[&str]) -> bool {
        judge(&lines.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>()).is_ok()
    }

    #[test]
    fn knows_bugs_from_other_lines() {
        for bug in [
            "BUG kmalloc-64 (Not tainted): Poison overwritten",
            "BUG: KASAN: slab-use-after-free in x",
            "WARNING: suspicious RCU usage",
            "WARNING: CPU: 0 PID: 1 at arch/x86/kvm/mmu/tdp_mmu.c:340",
            "WARNING: possible circular locking dependency detected",
            "rcu: INFO: rcu_preempt self-detected stall on CPU",
            "watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [qemu]",
            "INFO: task qemu:12 blocked for more than 120 seconds.",
        ] {
            assert!(!clean(&["fine", bug]), "{bug}");
        }
        for other in [
            "rcu: Hierarchical RCU implementation.",
            "kvm_ept_sample: loading out-of-tree module taints kernel.",
            "kvm_ept_sample: a VM (process 7) is sampled by another session already",
            "clocksource: Switched to clocksource tsc",
        ] {
            assert!(clean(&[other]), "{other}");
        }
    }

    #[test]
    fn reads_records_of_the_kernel_and_counts_those_of_others() {
        assert_eq!(parse("4,1234,5678,-;BUG: a\n SUBSYSTEM=x\n"), Some((1234, Some("BUG: a".into()))));
        assert_eq!(parse("12,1235,5679,-;BUG: said by a program\n"), Some((1235, None)));
        assert_eq!(parse("nonsense"), None);
    }

    #[test]
    fn finds_kernel_addresses() {
        assert!(has_kernel_address("at ffff888012345678,"));
        assert!(has_kernel_address("0xffffffffc0000000"));
        assert!(!has_kernel_address("0x00007fffffffffff ffff8880 ffff88801234567g"));
        assert!(!clean(&["kvm_ept_sample: at ffff888012345678"]));
    }
}
