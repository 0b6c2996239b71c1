// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a harvest costs, in ticks of the time-stamp counter for each page of
//! 4 KiB, from before the ioctl to after it.
//!
//! On the Intel host a tick is an instruction, so the figures repeat to a few
//! hundredths and compare ways of doing a thing. They say nothing of
//! nanoseconds: an emulator has neither caches nor memory latency. As they are
//! counts, they are held to limits: a figure above its own is a failure.

use std::ffi::CString;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, ensure};
use ept_virt_core::sampler::{HarvestRequest, KernelSampler};
use ept_virt_core::topology::NodeSet;
use ept_virt_core::uapi::{self, HarvestBuffers};
use nix::kmod::{DeleteModuleFlags, ModuleInitFlags, delete_module, finit_module};

use super::Outcome;
use super::machine::{ALL_CLEAR, Machine, Memory, PAGE, PAGES, Pages, Touch, harvest, round_program};

/// 256 MiB, two chunks of the module.
const PAGES_MEASURED: u64 = 65536;
/// In entries of 2 MiB: 512 MiB.
const PAGES_2M: u64 = 2 * PAGES_MEASURED;
/// The program's page lies below what is measured.
const FIRST_GFN: u64 = 512;
const HUGE_2M: usize = 2 << 20;
/// What is asked for: each column has one bitmap more.
const BITMAPS: [&str; 4] = ["accessed", "dirty", "on-nodes", "mapped"];
/// The least of so many counts is taken: a timer interrupt of the host would show.
const REPEAT: usize = 3;
/// What each bitmap after the first may add.
const LIMIT_FURTHER: f64 = 3.0;
/// What a page may cost that an entry of 2 MiB maps, for the accessed bitmap
/// alone, and what each further bitmap may add.
const LIMIT_2M: f64 = 0.2;
const LIMIT_2M_FURTHER: f64 = 0.15;

/// Built for the bench from kmod/bench.
const CLEAR_YOUNG_MODULE: &str = "/modules/clear_young.ko";
/// How much more asking page by page must cost.
const RATIO_AT_LEAST: f64 = 50.0;

const HOLDS: &str = "/proc/kvm_ept_sample_stats";
/// A millisecond of the host's CPU, which does 50 million instructions in a second.
const LIMIT_HOLD_US: f64 = 1000.0;

/// A share of young pages: how far apart they lie, and what the accessed bitmap
/// alone may cost.
struct Share {
    young_percent: u32,
    stride_pages: u32,
    limit: f64,
}

const SHARES: [Share; 4] = [
    Share { young_percent: 0, stride_pages: 0, limit: 10.0 },
    Share { young_percent: 10, stride_pages: 10, limit: 13.0 },
    Share { young_percent: 50, stride_pages: 2, limit: 20.0 },
    Share { young_percent: 100, stride_pages: 1, limit: 30.0 },
];

/// A machine with pages to measure, all mapped.
struct Bench {
    machine: Machine,
    sampler: KernelSampler,
    session: File,
    first_gfn: u64,
    pages: u64,
    unit_pages: u32,
}

impl Bench {
    fn new(machine: Machine, first_gfn: u64, pages: u64, unit_pages: u32) -> Result<Bench> {
        let sampler = machine.observe()?;
        let session = File::options().read(true).write(true).open(uapi::PROC_PATH)?;
        uapi::attach(&session, machine.vm_fd())?;
        let mut bench = Bench { machine, sampler, session, first_gfn, pages, unit_pages };
        // The first round maps every page.
        bench.touch(unit_pages)?;
        Ok(bench)
    }

    fn touch(&mut self, stride_pages: u32) -> Result<()> {
        let pages = Pages {
            base: self.first_gfn as u32 * PAGE as u32,
            stride: stride_pages * PAGE as u32,
            count: (self.pages as u32).div_ceil(stride_pages),
        };
        self.machine.load(&round_program(pages, Touch::Write))?;
        self.machine.run_round()
    }

    /// Leaves the pages young that lie `stride_pages` apart, or none for 0.
    /// Returns how many that are.
    fn make_young(&mut self, stride_pages: u32) -> Result<u64> {
        let all = HarvestRequest { gfn_start: self.first_gfn, gfn_count: self.pages, ..ALL_CLEAR };
        harvest(&mut self.sampler, all)?;
        if stride_pages == 0 {
            return Ok(0);
        }
        self.touch(stride_pages)?;
        Ok(self.pages.div_ceil(u64::from(stride_pages)) * u64::from(self.unit_pages))
    }

    /// Ticks per page of a harvest that clears what it reads, for the first
    /// `count` of [`BITMAPS`].
    fn ticks_per_page(&mut self, count: usize, stride_pages: u32) -> Result<f64> {
        let young = self.make_young(stride_pages)?;
        // Resident, as those of a program that harvests again and again.
        let bitmap = |index| vec![u64::MAX; if index < count { (self.pages / 64) as usize } else { 0 }];
        let mut bitmaps = [bitmap(0), bitmap(1), bitmap(2), bitmap(3)];
        let [accessed, dirty, on_nodes, mapped] = &mut bitmaps;
        // The upper half: one boundary, as on a host with slow memory above DRAM.
        let nodes: NodeSet = "2-3".parse()?;
        let buffers =
            HarvestBuffers { accessed, dirty, mapped, on_nodes, levels: &mut [], nodes: nodes.words() };
        let flags = uapi::HARVEST_CLEAR_ACCESSED;
        let before = ticks();
        let result = uapi::harvest(&self.session, self.first_gfn, self.pages, flags, buffers)?;
        let after = ticks();
        let stats = result.stats;
        ensure!(stats.mapped_4k + stats.mapped_2m == self.pages, "not all pages are mapped: {stats:?}");
        ensure!(self.unit_pages == 1 || stats.mapped_4k == 0, "not all pages are mapped huge: {stats:?}");
        ensure!(stats.accessed == young, "{} pages young, expected {young}", stats.accessed);
        Ok((after - before) as f64 / self.pages as f64)
    }
}

/// Ticks per page of the same question through KVM's MMU notifier, page by page:
/// what DAMON and idle page tracking ask. The module measures as it is loaded.
fn ticks_by_notifier(bench: &mut Bench, stride_pages: u32) -> Result<f64> {
    let young = bench.make_young(stride_pages)?;
    let file = File::open(CLEAR_YOUNG_MODULE).with_context(|| format!("cannot open {CLEAR_YOUNG_MODULE}"))?;
    let fd = bench.machine.vm_fd().as_raw_fd();
    let parameters = CString::new(format!("fd={fd} gfn={} pages={PAGES_MEASURED}", bench.first_gfn))?;
    finit_module(&file, &parameters, ModuleInitFlags::empty()).context("cannot load clear_young")?;
    let result = |name: &str| -> Result<u64> {
        let path = format!("/sys/module/clear_young/parameters/{name}");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
        Ok(text.trim().parse()?)
    };
    let (ticks, seen) = (result("ticks")?, result("young")?);
    delete_module(c"clear_young", DeleteModuleFlags::empty()).context("cannot unload clear_young")?;
    ensure!(seen == young, "the notifier says {seen} pages are young, expected {young}");
    Ok(ticks as f64 / PAGES_MEASURED as f64)
}

/// The figures, as a table, and those above their limits.
struct Report {
    text: String,
    failures: Vec<String>,
}

impl Report {
    fn new(title: &str) -> Report {
        Report { text: title.to_owned(), failures: Vec::new() }
    }

    /// A share of young pages: the accessed bitmap alone, then what each further
    /// one adds, with the limits of both. Returns the first figure.
    fn row(&mut self, bench: &mut Bench, percent: u32, stride_pages: u32, limits: (f64, f64)) -> Result<f64> {
        write!(self.text, "\n  {percent:3} % young:")?;
        let (mut last, mut alone) = (0.0, 0.0);
        for (index, name) in BITMAPS.iter().enumerate() {
            let mut figure = f64::INFINITY;
            for _ in 0..REPEAT {
                figure = figure.min(bench.ticks_per_page(index + 1, stride_pages)?);
            }
            let (limit, sign) = if index == 0 { (limits.0, "") } else { (limits.1, "+") };
            write!(self.text, "  {name} {sign}{:.3} (limit {sign}{limit})", figure - last)?;
            self.check(&format!("{percent} % young, {name}"), figure - last, limit);
            alone = if index == 0 { figure } else { alone };
            last = figure;
        }
        Ok(alone)
    }

    fn check(&mut self, what: &str, figure: f64, limit: f64) {
        if figure > limit {
            self.failures.push(format!("{what}: {figure:.2}, limit {limit}"));
        }
    }

    fn outcome(self) -> Result<Outcome> {
        ensure!(self.failures.is_empty(), "{}\nabove their limits: {}", self.text, self.failures.join("; "));
        Ok(Outcome::Pass(self.text))
    }
}

/// Pages of 4 KiB, by share of young ones and by the bitmaps asked for.
pub fn harvest_cost() -> Result<Outcome> {
    let memory = Memory::small_pages(FIRST_GFN + PAGES_MEASURED)?;
    memory.populate();
    let mut bench = Bench::new(Machine::new(memory)?, FIRST_GFN, PAGES_MEASURED, 1)?;
    let mut report = Report::new("ticks per page, entries of 4 KiB:");
    for share in &SHARES {
        let percent = share.young_percent;
        let harvest = report.row(&mut bench, percent, share.stride_pages, (share.limit, LIMIT_FURTHER))?;
        let notifier = ticks_by_notifier(&mut bench, share.stride_pages)?;
        let ratio = notifier / harvest;
        write!(report.text, "  page by page {notifier:.0}: {ratio:.0} x")?;
        if percent <= 10 && ratio < RATIO_AT_LEAST {
            report.failures.push(format!("page by page only {ratio:.0} x, expected {RATIO_AT_LEAST}"));
        }
    }
    report.outcome()
}

/// Pages that entries of 2 MiB map: none young, and all.
pub fn harvest_cost_2m() -> Result<Outcome> {
    let huge = Memory::map(PAGES_2M as usize * PAGE, HUGE_2M, 0)?;
    huge.advise(0, huge.bytes(), libc::MADV_HUGEPAGE)?;
    huge.populate();
    let machine = Machine::standard()?;
    let base = PAGES * PAGE as u64;
    machine.set_slot(1, base, &huge, huge.bytes())?;
    let mut bench = Bench::new(machine, PAGES, PAGES_2M, (HUGE_2M / PAGE) as u32)?;
    let mut report = Report::new("ticks per page, entries of 2 MiB:");
    for (percent, stride_pages) in [(0, 0), (100, bench.unit_pages)] {
        report.row(&mut bench, percent, stride_pages, (LIMIT_2M, LIMIT_2M_FURTHER))?;
    }
    bench.machine.set_slot(1, base, &huge, 0)?;
    report.outcome()
}

/// For how long the module holds a CPU before others may run: what the tests
/// before this one did, and harvests that clear dirty bits as well.
pub fn holds() -> Result<Outcome> {
    let memory = Memory::small_pages(FIRST_GFN + PAGES_MEASURED)?;
    memory.populate();
    let mut bench = Bench::new(Machine::new(memory)?, FIRST_GFN, PAGES_MEASURED, 1)?;
    for _ in 0..3 {
        bench.touch(1)?;
        let all = HarvestRequest {
            gfn_start: FIRST_GFN,
            gfn_count: PAGES_MEASURED,
            clear_dirty: true,
            ..ALL_CLEAR
        };
        let seen = harvest(&mut bench.sampler, all)?;
        ensure!(seen.stats.dirty == PAGES_MEASURED, "{} pages dirty", seen.stats.dirty);
    }
    let text = fs::read_to_string(HOLDS).with_context(|| format!("cannot read {HOLDS}"))?;
    let mut report = Report::new("how often, by what, and for how long CPUs were held:");
    for line in text.lines().filter(|line| line.contains("_holds_")) {
        let (name, value) = line.split_once(' ').with_context(|| format!("{line:?} in {HOLDS}"))?;
        let value: f64 = value.parse()?;
        if value > 0.0 {
            write!(report.text, "\n  {name} {value}")?;
        }
        if name.ends_with("_longest_us") {
            report.check(name, value, LIMIT_HOLD_US);
        }
    }
    report.outcome()
}

/// The time-stamp counter.
pub fn ticks() -> u64 {
    // SAFETY: reading the counter has no effect on memory; every x86-64 CPU has
    // it, and Linux lets user space read it.
    unsafe { std::arch::x86_64::_rdtsc() }
}
