// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask bench placement`, the part on the AMD host: contestants place the
//! memory of the same guest, one after the other, and the guest's own counts say
//! which share of its accesses DRAM served.
//!
//! Each contestant gets a fresh guest. Node 0 is filled, and when the guest has booted
//! just the budget is given back: the workload's memory goes to DRAM first and then to
//! the slow node, in the order in which it is first written to. Nobody's share is measured by what a
//! contestant says: accesses are the guest's counts, places are those of the host's
//! page tables, moves those of the kernel's counters.

#[path = "../../../src/bench_placement/cell.rs"]
mod cell;
mod contestant;
mod damon;
mod guest_memory;
mod host_memory;
mod meters;
mod oracle;
mod record;

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use self::cell::{Cell, MARK};
use self::contestant::{Contestant, Running};
use self::guest_memory::GuestMemory;
use self::host_memory::{Filler, Mark};
use self::meters::Meters;
use self::record::Record;
use super::domain::{Domain, DomainSpec, Memory, policy};
use super::host::{self, PAYLOAD};

/// What stands in `<placement>` when the lab gives no file `bench-policy`.
const POLICY: &str = "<ev:sampling><ev:interval unit='ms'>1000</ev:interval></ev:sampling>\
    <ev:temperature><ev:half-life unit='s'>10</ev:half-life></ev:temperature>\
    <ev:migration><ev:bandwidth unit='MiB/s'>256</ev:bandwidth></ev:migration>";

const PERIOD: Duration = Duration::from_millis(1000);

/// For the guest's kernel, and what it wrote before the workload began.
const REST_MIB: u32 = 112;

/// Of the block, in hundredths.
const BUDGET_PERCENT: u64 = 30;

/// One page in so many is asked for with move_pages(2) too.
const CHECK_STEP: usize = 32;

/// Accesses in a second for each page of the block: what a guest of 64 GiB makes
/// with 50 million accesses that miss its caches.
const RATE_PER_PAGE: u64 = 3;

/// For so many pages of a block in huge pages there is one access in a second: about 50
/// for each huge page. A host of the same accesses as above makes 1500, and tells them
/// apart within a millisecond. The emulated guest makes its own in bursts, 20 ms apart,
/// and with as many all huge pages would be accessed in each.
const HUGE_RATE_DIVISOR: u64 = 10;

/// The guest first goes on for so long without a contestant.
const WARM_UP: Duration = Duration::from_secs(2);

/// What one run of the program measures.
struct Setup {
    workload: String,
    memory_name: String,
    memory: Memory,
    policy: String,
    /// Before the workload's next phase, and after it; the second is nothing for
    /// workloads without phases.
    periods: [u32; 2],
}

/// Measures `WORKLOAD MEMORY PERIODS PERIODS CONTESTANT...`: prints a line with a cell
/// for each contestant, then `EPT-DONE`.
pub fn run(words: &[&str]) -> Result<()> {
    let outcome = host::reset().and_then(|()| measure(words));
    if let Err(error) = &outcome {
        println!("The bench-placement failed: {error:#}");
    }
    println!("EPT-DONE");
    outcome
}

fn measure(words: &[&str]) -> Result<()> {
    let [workload, memory_name, first, second, contestants @ ..] = words else {
        bail!("bench-placement WORKLOAD MEMORY PERIODS PERIODS CONTESTANT..., not {words:?}");
    };
    host_memory::prefer_slow_node()?;
    contestant::stop_balancing()?;
    let setup = Setup {
        workload: (*workload).to_owned(),
        memory_name: (*memory_name).to_owned(),
        memory: match *memory_name {
            "memfd" => Memory::Memfd,
            "thp" => Memory::Anonymous,
            other => bail!("no memory is called {other:?}"),
        },
        policy: fs::read_to_string(format!("{PAYLOAD}/bench-policy")).unwrap_or_else(|_| POLICY.to_owned()),
        periods: [first.parse()?, second.parse()?],
    };
    for name in contestants {
        let contestant = Contestant::parse(name)?;
        let mut cell =
            setup.cell(contestant).with_context(|| format!("{workload}, {memory_name}, {name}"))?;
        cell.contestant = (*name).to_owned();
        println!("{MARK}{}", serde_json::to_string(&cell)?);
    }
    Ok(())
}

impl Setup {
    /// Sizes by kind of memory. Huge pages are few: the block is larger, and more of
    /// them are made hot by the guest's kernel.
    fn block_mib(&self) -> u32 {
        if self.memory == Memory::Memfd { 128 } else { 256 }
    }

    fn unit_pages(&self) -> u64 {
        if self.memory == Memory::Memfd { 1 } else { 512 }
    }

    /// What the guest's kernel keeps hot beside the block, about; measured in each run.
    fn kernel_mib(&self) -> u64 {
        if self.memory == Memory::Memfd { 2 } else { 60 }
    }

    fn block_pages(&self) -> u64 {
        u64::from(self.block_mib()) << 8
    }

    /// Accesses in a second.
    fn rate(&self) -> u64 {
        match self.memory {
            Memory::Memfd => self.block_pages() * RATE_PER_PAGE,
            _ => self.block_pages() / HUGE_RATE_DIVISOR,
        }
    }

    fn budget_pages(&self) -> u64 {
        // Whole huge pages, so that they can be had.
        (self.block_pages() * BUDGET_PERCENT / 100 + (self.kernel_mib() << 8)).next_multiple_of(512)
    }

    fn policy(&self) -> String {
        let max = self.budget_pages() >> 8;
        format!("{}<ev:dram><ev:max unit='MiB'>{max}</ev:max></ev:dram>", self.policy)
    }

    fn spec(&self) -> DomainSpec {
        let block = self.block_mib();
        DomainSpec {
            memory: self.memory,
            policy: policy("place", &self.policy()),
            hot_mib: 0,
            idle_mib: 0,
            rest_mib: block + REST_MIB,
            words: format!(
                "WORKLOAD={} BLOCK_MIB={block} GRAIN={} RATE={} SEED=1",
                self.workload,
                self.unit_pages(),
                self.rate()
            ),
            ..DomainSpec::default()
        }
    }

    /// Starts a guest whose workload runs, with the budget filled.
    fn guest(&self) -> Result<Stage> {
        let spec = self.spec();
        let mut guest = spec.start_paused()?;
        let pages = u64::from(spec.memory_mib()) << 8;
        let mut memory = GuestMemory::new(guest.pid()?, pages, self.unit_pages())?;
        // QEMU has what it needs for itself by now, and the guest boots in slow memory:
        // what its kernel touches once would take much of a budget as small as this.
        let filler = Filler::take_all()?;
        guest.resume()?;
        guest.console.wait_started("booted")?;
        let booted = memory.fast_pages()?;
        let mark = if self.memory == Memory::Memfd { Mark::Low } else { Mark::Min };
        filler.give_back(self.budget_pages().saturating_sub(booted), mark)?;
        guest.console.send("go")?;
        memory.find_blocks(&guest.console.wait_started("ready")?)?;
        ensure!(memory.block_pages() as u64 == self.block_pages(), "the block is incomplete");
        let filled = memory.fast_pages()?;
        // Where a run that looks odd is looked at.
        eprintln!("in DRAM {filled} pages, {booted} before the block; {}", filler.words()?);
        ensure!(
            filled.abs_diff(self.budget_pages()) <= self.budget_pages() / 20,
            "the guest has {filled} pages of DRAM and not {}; {}",
            self.budget_pages(),
            filler.words()?
        );
        thread::sleep(WARM_UP);
        Ok(Stage { guest, memory, _filler: filler })
    }

    fn cell(&self, contestant: Contestant) -> Result<Cell> {
        let Stage { mut guest, memory, _filler } = self.guest()?;
        let elsewhere_pages = memory.hot_elsewhere()?;
        let mut cell = Cell {
            workload: self.workload.clone(),
            memory: self.memory_name.clone(),
            block_pages: self.block_pages(),
            guest_pages: memory.pages,
            unit_pages: self.unit_pages(),
            budget_pages: self.budget_pages(),
            elsewhere_pages,
            oracle_pages: self.budget_pages().saturating_sub(elsewhere_pages),
            period_ms: PERIOD.as_millis() as u64,
            ..Cell::default()
        };
        ensure!(cell.oracle_pages > 0, "the guest's kernel keeps {elsewhere_pages} pages hot");
        let mut record = Record::begin(&memory)?;
        let before = Meters::read(guest.pid()?, None)?;
        let running = contestant.start(&self.policy())?;
        cell.settings.clone_from(&running.settings);
        self.watch(&mut guest, &memory, &running, &mut record)?;
        let spent = Meters::read(guest.pid()?, running.process())?.since(&before);
        (cell.counters, cell.cpu_ms, cell.exits) = (spent.counters, spent.cpu_ms, spent.exits);
        cell.own_moved_bytes = running.progress(guest.name)?.1;
        cell.settings.extend(running.stop()?);
        check_places(&memory, &mut cell)?;
        record.finish(&memory, &mut cell);
        Ok(cell)
    }

    fn watch(
        &self,
        guest: &mut Domain,
        memory: &GuestMemory,
        running: &Running,
        record: &mut Record,
    ) -> Result<()> {
        let [first, second] = self.periods;
        let begun = Instant::now();
        for number in 0..first + second {
            if number == first {
                guest.console.send("phase")?;
            }
            let end = PERIOD * (number + 1);
            thread::sleep(end.saturating_sub(begun.elapsed()));
            let (round, _) = running.progress(guest.name)?;
            record.take(memory, round.as_ref())?;
        }
        Ok(())
    }
}

/// A guest whose workload runs.
struct Stage {
    guest: Domain,
    memory: GuestMemory,
    _filler: Filler,
}

/// Asks the kernel for places in another way: nothing is moved any more.
fn check_places(memory: &GuestMemory, cell: &mut Cell) -> Result<()> {
    let nodes = memory.nodes()?;
    (cell.places_asked, cell.places_agree) = memory.check_nodes(&nodes, CHECK_STEP)?;
    // The kernel may still move some by itself.
    ensure!(
        cell.places_asked > 0 && cell.places_agree * 100 >= cell.places_asked * 98,
        "move_pages and pagemap agree on {} of {} pages",
        cell.places_agree,
        cell.places_asked
    );
    Ok(())
}
