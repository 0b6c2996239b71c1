// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sessions come and go five hundred times, and nothing of them is left.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ept_virt_core::uapi;

use super::Outcome;
use super::arguments::{module_references, open};
use super::machine::{Machine, Memory, Pages, Touch, round_program};
use crate::kernel_log::scan_for_leaks;

const CYCLES: u64 = 500;
/// What is made once only is made in these.
const WARM_UP: u64 = 50;
/// Pages of the machine, of which the guest touches one.
const PAGES: u64 = 256;

/// The cache of vmalloc areas, which stay there until somebody clears them away:
/// those in use are counted in /proc/vmallocinfo.
const UNPURGED: &str = "vmap_area";

/// What can leak, counted.
#[derive(Debug, Default)]
struct Counts {
    /// Objects in use, by slab cache.
    slabs: BTreeMap<String, i64>,
    /// KiB, by line of /proc/meminfo.
    meminfo: BTreeMap<String, i64>,
    vmalloc_areas: i64,
    references: i64,
    sessions: i64,
    descriptors: i64,
    threads: i64,
}

/// Kernel threads that sample.
fn workers() -> Result<usize> {
    let mut workers = 0;
    for entry in fs::read_dir("/proc")? {
        let comm = fs::read_to_string(entry?.path().join("comm")).unwrap_or_default();
        workers += usize::from(comm.starts_with("kes-sample"));
    }
    Ok(workers)
}

/// Fails when a kernel thread samples though nobody does.
pub fn no_worker_is_left() -> Result<()> {
    let workers = workers()?;
    ensure!(workers == 0, "{workers} threads of the module go on");
    Ok(())
}

impl Counts {
    fn now() -> Result<Counts> {
        // What was freed is freed a grace period later, by whoever has time.
        std::thread::sleep(Duration::from_millis(500));
        // Names and inodes of /proc that a look at it leaves behind.
        fs::write("/proc/sys/vm/drop_caches", "2").context("cannot drop the host's caches")?;
        for cache in fs::read_dir("/sys/kernel/slab")? {
            // A cache that can not be shrunk counts a little too much.
            let _ = fs::write(cache?.path().join("shrink"), "1");
        }
        let number = |text: Option<&str>| text.and_then(|text| text.parse().ok()).unwrap_or(0);
        let mut counts = Counts {
            // What was freed stands there until somebody clears it away.
            vmalloc_areas: fs::read_to_string("/proc/vmallocinfo")?
                .lines()
                .filter(|line| !line.contains("unpurged"))
                .count() as i64,
            references: module_references()?,
            sessions: uapi::get_info(&open()?)?.sessions.into(),
            descriptors: fs::read_dir("/proc/self/fd")?.count() as i64,
            threads: fs::read_dir("/proc")?
                .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok())
                .count() as i64,
            ..Counts::default()
        };
        for line in
            fs::read_to_string("/proc/slabinfo").context("cannot read /proc/slabinfo")?.lines().skip(2)
        {
            let mut words = line.split_whitespace();
            if let Some(name) = words.next() {
                counts.slabs.insert(name.to_owned(), number(words.next()));
            }
        }
        for line in fs::read_to_string("/proc/meminfo")?.lines() {
            if let Some((name, rest)) = line.split_once(':') {
                counts.meminfo.insert(name.to_owned(), number(rest.split_whitespace().next()));
            }
        }
        Ok(counts)
    }

    /// Fails when something grew by about as much as there were cycles.
    fn expect_no_growth(&self, before: &Counts) -> Result<()> {
        let pairs = [
            ("references", before.references, self.references, 0),
            ("sessions", before.sessions, self.sessions, 0),
            ("descriptors", before.descriptors, self.descriptors, 0),
            ("processes", before.threads, self.threads, 20),
            ("vmalloc areas", before.vmalloc_areas, self.vmalloc_areas, CYCLES as i64 / 10),
        ];
        for (what, before, after, more) in pairs {
            ensure!(after <= before + more, "{what} went from {before} to {after}");
        }
        // Half an object in each cycle, and a page in four of them.
        for (cache, after) in self.slabs.iter().filter(|(cache, _)| *cache != UNPURGED) {
            let before = before.slabs.get(cache).copied().unwrap_or(0);
            ensure!(after - before < CYCLES as i64 / 2, "{cache}: {before} objects became {after}");
        }
        for name in ["SUnreclaim", "PageTables", "SecPageTables", "KernelStack", "VmallocUsed", "Percpu"] {
            let kib = |counts: &Counts| counts.meminfo.get(name).copied().unwrap_or(0);
            ensure!(
                kib(self) - kib(before) < CYCLES as i64,
                "{name}: {} KiB became {}",
                kib(before),
                kib(self)
            );
        }
        Ok(())
    }
}

/// One VM, one session, everything that it can do, and the end in another order.
fn cycle(number: u64) -> Result<()> {
    let mut machine = Machine::new(Memory::small_pages(PAGES)?)?;
    machine.load(&round_program(Pages { base: 0x1_0000, stride: 0x1000, count: 1 }, Touch::Write))?;
    machine.run_round()?;
    let session = open()?;
    uapi::attach(&session, machine.vm_fd())?;
    let mut bits = [0; PAGES as usize / 64];
    let buffers = uapi::HarvestBuffers {
        accessed: &mut bits,
        dirty: &mut [],
        mapped: &mut [],
        on_nodes: &mut [],
        levels: &mut [],
        nodes: &[],
    };
    let flags = uapi::HARVEST_CLEAR_ACCESSED | uapi::HARVEST_FLUSH;
    uapi::harvest(&session, 0, PAGES, flags, buffers)?;
    uapi::get_memslots(&session)?;
    if number % 4 == 0 {
        uapi::sample_set(&session, uapi::ACCESS_WRITE, 50_000, 16)?;
        machine.run_round()?;
    }
    match number % 3 {
        0 => uapi::detach(&session)?,
        // The session outlives the VM's descriptors and memory.
        1 => drop(machine),
        _ => drop(session),
    }
    Ok(())
}

pub fn cycles() -> Result<Outcome> {
    for number in 0..WARM_UP {
        cycle(number)?;
    }
    // A kernel that looks for leaks by itself keeps what was freed for a while.
    let looks_itself = Path::new("/sys/kernel/debug/kmemleak").exists();
    let before = Counts::now()?;
    for number in 0..CYCLES {
        cycle(number).with_context(|| format!("cycle {number}"))?;
    }
    no_worker_is_left()?;
    if looks_itself {
        scan_for_leaks()?;
        return Ok(Outcome::Pass(format!("{CYCLES} cycles, and kmemleak finds nothing")));
    }
    let after = Counts::now()?;
    after.expect_no_growth(&before)?;
    let mut grown: Vec<_> = after
        .slabs
        .iter()
        .map(|(cache, objects)| (objects - before.slabs.get(cache).unwrap_or(&0), cache.as_str()))
        .collect();
    grown.sort_unstable();
    let most = grown.last().copied().unwrap_or_default();
    let unreclaimable =
        after.meminfo.get("SUnreclaim").unwrap_or(&0) - before.meminfo.get("SUnreclaim").unwrap_or(&0);
    Ok(Outcome::Pass(format!(
        "{CYCLES} cycles: no reference, session, descriptor or thread left; the slab cache that grew most is {} \
         by {} objects, unreclaimable slabs by {unreclaimable} KiB",
        most.1, most.0
    )))
}
