// SPDX-License-Identifier: MIT OR Apache-2.0
//! What placing costs the host, by the kernel's own accounts.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};

use super::guest_memory::read;
use crate::scenario::boot;
use crate::scenario::footprint::Footprint;

/// Counters of /proc/vmstat that tell of migration and of its reasons.
const COUNTERS: [&str; 13] = [
    "pgmigrate_success",
    "pgmigrate_fail",
    "thp_migration_success",
    "thp_split_page",
    "pgpromote_success",
    "pgpromote_candidate",
    "pgdemote_kswapd",
    "pgdemote_direct",
    "pgdemote_khugepaged",
    "numa_pages_migrated",
    "numa_pte_updates",
    "numa_huge_pte_updates",
    "numa_hint_faults",
];

/// Beginnings of the names of kernel threads that place memory or help with it.
const KERNEL_THREADS: [&str; 4] = ["kdamond", "kswapd", "kcompactd", "khugepaged"];

/// Ticks of /proc/PID/stat in a second (USER_HZ).
const TICK_MS: f64 = 10.0;

/// A reading of everything.
pub struct Meters {
    counters: BTreeMap<String, u64>,
    cpu_ms: BTreeMap<String, f64>,
    exits: u64,
}

/// What came to pass between two readings.
pub struct Spent {
    /// Changes of counters.
    pub counters: BTreeMap<String, u64>,
    /// Milliseconds on the CPU by thread.
    pub cpu_ms: BTreeMap<String, f64>,
    /// VM exits.
    pub exits: u64,
}

impl Meters {
    /// Reads all, with the guest of this QEMU and the contestant's own process.
    pub fn read(qemu: i32, process: Option<(&str, u32)>) -> Result<Self> {
        let mut cpu_ms = kernel_threads()?;
        let (system, guest) = qemu_times(qemu)?;
        cpu_ms.insert("QEMU in the kernel".into(), system);
        cpu_ms.insert("guest".into(), guest);
        if let Some((name, pid)) = process {
            cpu_ms.insert(name.into(), Footprint::of(pid)?.cpu.as_secs_f64() * 1e3);
        }
        Ok(Self { counters: counters()?, cpu_ms, exits: boot::kvm_exits(qemu)? })
    }

    /// What was spent since. A thread that was not there then began with nothing.
    pub fn since(&self, before: &Self) -> Spent {
        let counters = self.counters.iter().map(|(name, now)| {
            let then = before.counters.get(name).copied().unwrap_or(0);
            (name.clone(), now.saturating_sub(then))
        });
        let cpu_ms = self.cpu_ms.iter().map(|(name, now)| {
            let then = before.cpu_ms.get(name).copied().unwrap_or(0.0);
            (name.clone(), (now - then).max(0.0))
        });
        Spent {
            counters: counters.collect(),
            cpu_ms: cpu_ms.collect(),
            exits: self.exits.saturating_sub(before.exits),
        }
    }
}

/// Pages that the kernel has migrated so far.
pub fn migrated_pages() -> Result<u64> {
    Ok(counters()?.get("pgmigrate_success").copied().unwrap_or(0))
}

fn counters() -> Result<BTreeMap<String, u64>> {
    let text = read("/proc/vmstat")?;
    let pairs = text.lines().filter_map(|line| line.split_once(' '));
    let chosen = pairs.filter(|(name, _)| COUNTERS.contains(name));
    chosen.map(|(name, count)| Ok((name.to_owned(), count.parse().context("/proc/vmstat")?))).collect()
}

/// Time of kernel threads, those of one name together.
fn kernel_threads() -> Result<BTreeMap<String, f64>> {
    let mut times = BTreeMap::new();
    for entry in fs::read_dir("/proc").context("reading /proc")? {
        let path = entry?.path();
        // Processes end while they are looked at.
        let Ok(name) = fs::read_to_string(path.join("comm")) else { continue };
        let Some(known) = KERNEL_THREADS.iter().find(|known| name.starts_with(**known)) else { continue };
        let Ok(text) = fs::read_to_string(path.join("schedstat")) else { continue };
        let ns: u64 = text.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0);
        *times.entry((*known).to_owned()).or_insert(0.0) += ns as f64 / 1e6;
    }
    Ok(times)
}

/// Milliseconds that a QEMU spent in the kernel, and in its guest.
fn qemu_times(pid: i32) -> Result<(f64, f64)> {
    let path = format!("/proc/{pid}/stat");
    let text = read(&path)?;
    // The name, in brackets, may hold anything. Fields from the third on (proc(5)).
    let rest = text.rsplit_once(')').with_context(|| format!("{path}: {text}"))?.1;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let field = |number: usize| -> Result<f64> {
        let word = fields.get(number - 3).with_context(|| format!("{path} has no field {number}"))?;
        Ok(word.parse::<f64>().with_context(|| format!("{path}: {word}"))? * TICK_MS)
    };
    Ok((field(15)?, field(43)?))
}
