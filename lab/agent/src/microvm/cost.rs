// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a harvest costs, in ticks of the time-stamp counter for each page.
//!
//! On the Intel host a tick is an instruction, so the figures repeat exactly and
//! compare two ways of doing a thing. They say nothing of nanoseconds: an
//! emulator has neither caches nor memory latency.

use std::fmt::Write as _;
use std::fs::File;

use anyhow::{Context, Result, ensure};
use ept_virt_core::sampler::KernelSampler;
use ept_virt_core::topology::NodeSet;
use ept_virt_core::uapi::{self, HarvestBuffers};

use super::Outcome;
use super::machine::{ALL_CLEAR, Machine, Memory, PAGE, Pages, Touch, harvest, round_program};

/// 256 MiB, two chunks of the module.
const PAGES_MEASURED: u64 = 65536;
/// The program's page lies below what is measured.
const FIRST_GFN: u64 = 512;

/// Ticks per page by share of young pages, and by the bitmaps asked for.
pub fn harvest_cost() -> Result<Outcome> {
    // It unmaps pages now and then, to see who touches them.
    std::fs::write("/proc/sys/kernel/numa_balancing", "0").context("cannot turn off NUMA balancing")?;
    let memory = Memory::small_pages(FIRST_GFN + PAGES_MEASURED)?;
    memory.populate();
    let mut machine = Machine::new(memory)?;
    let mut sampler = machine.observe()?;
    let session = File::options().read(true).write(true).open(uapi::PROC_PATH)?;
    uapi::attach(&session, machine.vm_fd())?;
    let mut report = String::from("ticks per 4 KiB page");
    // The first round maps every page.
    touch(&mut machine, 1)?;
    for (young_percent, stride_pages) in [(0, 0), (10, 10), (50, 2), (100, 1)] {
        write!(report, "; {young_percent} % young:")?;
        for bitmaps in [&["accessed"][..], &["accessed", "dirty"], &["accessed", "dirty", "on-nodes"]] {
            clear(&mut sampler)?;
            if stride_pages > 0 {
                touch(&mut machine, stride_pages)?;
            }
            let ticks = measure(&session, bitmaps, young_pages(stride_pages))?;
            write!(report, " {:.1} ({})", ticks as f64 / PAGES_MEASURED as f64, bitmaps.join("+"))?;
        }
    }
    Ok(Outcome::Pass(report))
}

fn young_pages(stride_pages: u32) -> u64 {
    if stride_pages == 0 { 0 } else { u64::from(touched(stride_pages).count) }
}

fn touched(stride_pages: u32) -> Pages {
    Pages {
        base: FIRST_GFN as u32 * PAGE as u32,
        stride: stride_pages * PAGE as u32,
        count: (PAGES_MEASURED as u32).div_ceil(stride_pages),
    }
}

fn touch(machine: &mut Machine, stride_pages: u32) -> Result<()> {
    machine.load(&round_program(touched(stride_pages), Touch::Write))?;
    machine.run_round()
}

fn clear(sampler: &mut KernelSampler) -> Result<()> {
    let all = ept_virt_core::sampler::HarvestRequest {
        gfn_start: FIRST_GFN,
        gfn_count: PAGES_MEASURED,
        ..ALL_CLEAR
    };
    harvest(sampler, all).map(|_| ())
}

/// Ticks from before the ioctl to after it, which clears what it reads.
fn measure(session: &File, bitmaps: &[&str], young: u64) -> Result<u64> {
    let words = (PAGES_MEASURED / 64) as usize;
    let bitmap = |name: &str| vec![0_u64; if bitmaps.contains(&name) { words } else { 0 }];
    let (mut accessed, mut dirty, mut on_nodes) = (bitmap("accessed"), bitmap("dirty"), bitmap("on-nodes"));
    let nodes: NodeSet = "0".parse()?;
    let buffers = HarvestBuffers {
        accessed: &mut accessed,
        dirty: &mut dirty,
        mapped: &mut [],
        on_nodes: &mut on_nodes,
        levels: &mut [],
        nodes: nodes.words(),
    };
    let before = ticks();
    let result = uapi::harvest(session, FIRST_GFN, PAGES_MEASURED, uapi::HARVEST_CLEAR_ACCESSED, buffers)
        .context("harvest")?;
    let after = ticks();
    ensure!(result.stats.mapped_4k == PAGES_MEASURED, "{} pages mapped", result.stats.mapped_4k);
    ensure!(result.stats.accessed == young, "{} pages young, expected {young}", result.stats.accessed);
    Ok(after - before)
}

/// The time-stamp counter.
pub fn ticks() -> u64 {
    // SAFETY: reading the counter has no effect on memory; every x86-64 CPU has
    // it, and Linux lets user space read it.
    unsafe { std::arch::x86_64::_rdtsc() }
}
