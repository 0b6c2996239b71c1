// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a round of decisions costs on one core of this machine: taking in what was
//! accessed, and planning what to move. Beside it, in the same run, a plain pass over
//! the same bytes. `cargo bench -p ept-virt-core --bench decide [GiB of the guest]`.

use std::hint::black_box;
use std::time::{Duration, Instant};

use ept_virt_core::bitmap;
use ept_virt_core::heat::{HeatMap, HeatParams};
use ept_virt_core::memory::GuestMemory;
use ept_virt_core::sampler::{Harvest, Level, MemSlot};
use ept_virt_core::units::{Bytes, PAGE_BYTES, Share};

/// 64 GiB: larger than any cache.
const PAGES: usize = 16 << 20;
const TRIES: usize = 9;
const ROUND: Duration = Duration::from_secs(1);
const PARAMS: HeatParams = HeatParams { half_life: Duration::from_secs(30), delay: Duration::from_secs(5) };

/// The guest of the last table, unless another size is asked for.
const LARGE_GIB: u64 = 1024;

fn main() {
    let asked = std::env::args().skip(1).find_map(|word| word.parse().ok());
    println!("Taking in a round, 64 GiB of guest in 4 KiB pages, ns per page (x: beside a plain pass):\n");
    let plain = plain_pass();
    println!("{:>8} {:>16} {:>16}", "young", "scattered", "in one piece");
    for percent in [0, 10, 50, 100] {
        let [scattered, piece] = [true, false].map(|scattered| step(percent, scattered));
        let row = |ns: f64| format!("{ns:.3} ({:.2} x)", ns / plain);
        println!("{percent:>6} % {:>16} {:>16}", row(scattered), row(piece));
    }
    println!("\nA plain pass, reading and writing the same bytes: {plain:.3} ns per page.");
    large_guest(asked.unwrap_or(LARGE_GIB));
}

/// Xorshift.
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// A bitmap of which `percent` of the pages are set.
fn young(pages: usize, percent: u64, scattered: bool) -> Vec<u64> {
    let mut words = vec![0; bitmap::words_for(pages)];
    let mut state = 88_172_645_463_325_252;
    if scattered {
        for page in 0..pages {
            words[page / 64] |= u64::from(random(&mut state) % 100 < percent) << (page % 64);
        }
    } else {
        bitmap::fill(&mut words, 0..pages / 100 * percent as usize, true);
    }
    words
}

/// The median of some tries, in ns per page.
fn median(pages: usize, mut work: impl FnMut()) -> f64 {
    let mut times: Vec<f64> = (0..TRIES)
        .map(|_| {
            let started = Instant::now();
            work();
            started.elapsed().as_secs_f64() * 1e9 / pages as f64
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[TRIES / 2]
}

fn plain_pass() -> f64 {
    let mut cells = vec![1_u16; PAGES];
    median(PAGES, || {
        cells.iter_mut().for_each(|cell| *cell = cell.wrapping_add(1));
        black_box(&mut cells);
    })
}

fn step(percent: u64, scattered: bool) -> f64 {
    let accessed = young(PAGES, percent, scattered);
    let mut heat = HeatMap::new(PAGES, PARAMS);
    for _ in 0..3 {
        heat.step(&accessed, ROUND);
    }
    median(PAGES, || {
        black_box(heat.step(&accessed, ROUND));
    })
}

/// Round after round of one guest of which a fifth is hot and a hundredth of the rest
/// accessed in each.
fn large_guest(gib: u64) {
    let pages = (gib << 30 >> 12) as usize;
    println!("\nRounds of a guest of {gib} GiB, a fifth of it hot, DRAM for 30 %, 1 GiB/s:\n");
    let before = resident_bytes();
    let mut memory = GuestMemory::new(PARAMS);
    let (page_count, hva) = (pages as u64, 1 << 44);
    let slot = MemSlot { gfn_start: 0, page_count, hva, id: 0, read_only: false, dirty_log: false };
    memory.adopt(1, vec![slot]);
    let mut harvest = Harvest::default();
    harvest.reset(0, page_count);
    harvest.mapped.fill(!0);
    harvest.levels.fill(Level::Page4K);
    // What lies where it should, and for the first rounds what does not.
    bitmap::fill(&mut harvest.on_slow, pages * 3 / 10..pages, true);
    memory.observe(0, &harvest, None);
    memory.end_round(None);
    let used = resident_bytes().saturating_sub(before).saturating_sub(bytes_of(&harvest));
    println!("{:.2} bytes per page\n", used as f64 / pages as f64);
    println!(
        "{:>6} {:>12} {:>12} {:>12} {:>14}",
        "round", "taken in, ms", "plan, ms", "both, ms", "moved, MiB"
    );
    let target = Some(Bytes(pages as u64 * PAGE_BYTES * 3 / 10));
    let mut state = 88_172_645_463_325_252;
    for round in 1..=8 {
        for word in &mut harvest.accessed {
            *word = if random(&mut state).is_multiple_of(5) {
                random(&mut state) & random(&mut state)
            } else {
                0
            };
        }
        bitmap::fill(&mut harvest.accessed, pages / 5..pages / 5 * 2, true);
        let started = Instant::now();
        memory.observe(0, &harvest, Some(ROUND));
        memory.end_round(Some(ROUND));
        let taken = started.elapsed();
        let plan = memory.plan(target, Share::from_percent(10), (1 << 30) / PAGE_BYTES);
        let both = started.elapsed();
        let moved: u64 = plan.demote.iter().chain(&plan.promote).map(|unit| u64::from(unit.pages)).sum();
        println!(
            "{round:>6} {:>12} {:>12} {:>12} {:>14}",
            taken.as_millis(),
            (both - taken).as_millis(),
            both.as_millis(),
            (moved * PAGE_BYTES) >> 20
        );
    }
}

fn bytes_of(harvest: &Harvest) -> u64 {
    let words = [&harvest.accessed, &harvest.dirty, &harvest.mapped, &harvest.on_slow].map(Vec::len);
    // Bitmaps of zeros were never touched, which is why `dirty` is left out.
    ((words[0] + words[2] + words[3]) * 8 + 2 * harvest.levels.len()) as u64
}

/// What of this process is in memory.
fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = text.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok());
    pages.unwrap_or(0) * PAGE_BYTES
}
