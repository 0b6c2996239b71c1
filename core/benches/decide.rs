// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a round of decisions costs on one core of this machine: taking in what was
//! accessed, and planning what to move. Beside it, in the same run, a plain pass over
//! the same bytes. `cargo bench -p ept-virt-core --bench decide [GiB of the guest]`.

use std::hint::black_box;
use std::ops::Range;
use std::time::Duration;

use ept_virt_core::bitmap;
use ept_virt_core::budget::{Claim, settle};
use ept_virt_core::heat::{HeatMap, HeatParams, Span};
use ept_virt_core::memory::GuestMemory;
use ept_virt_core::policy::Policy;
use ept_virt_core::sampler::{Harvest, Level, MemSlot};
use ept_virt_core::units::{Bytes, PAGE_BYTES, Share};
use ept_virt_core::working_set::WorkingSet;
use nix::time::{ClockId, clock_gettime};

/// 64 GiB: larger than any cache.
const PAGES: usize = 16 << 20;
const TRIES: usize = 9;
const ROUND: Duration = Duration::from_secs(1);
const PARAMS: HeatParams = HeatParams { half_life: Duration::from_secs(30), delay: Duration::from_secs(5) };

/// 1 GiB in a round.
const QUOTA_PAGES: u64 = (1 << 30) / PAGE_BYTES;

/// Guests under one budget, and the memory of each.
const GUESTS: usize = 500;
const GUEST_PAGES: usize = 4 << 20;

/// The guest of the table of rounds, unless another size is asked for.
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
    [false, true].into_iter().for_each(many_guests);
}

/// Time of this thread on a CPU: what others do on the machine is not measured, but for
/// the cache and the memory that they use.
struct Cpu(Duration);

impl Cpu {
    fn now() -> Self {
        Cpu(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from))
    }

    fn elapsed(&self) -> Duration {
        Self::now().0.saturating_sub(self.0)
    }
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
            let started = Cpu::now();
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
    let mut guest =
        Fake { harvest: Harvest::default(), pages, scattered: false, state: 88_172_645_463_325_252 };
    guest.round(&mut memory, None);
    println!(
        "{:>6} {:>12} {:>12} {:>12} {:>14}",
        "round", "taken in, ms", "plan, ms", "both, ms", "moved, MiB"
    );
    let target = Some(Bytes(pages as u64 * PAGE_BYTES * 3 / 10));
    // The last ones of a guest that has settled.
    for round in 1..=12 {
        let taken = guest.round(&mut memory, Some(ROUND));
        let started = Cpu::now();
        let plan = memory.plan(target, Share::from_percent(10), QUOTA_PAGES);
        let planned = started.elapsed();
        memory.accept(&plan, QUOTA_PAGES);
        let moved: u64 = plan.demote.iter().chain(&plan.promote).map(|unit| u64::from(unit.pages)).sum();
        println!(
            "{round:>6} {:>12} {:>12} {:>12} {:>14}",
            taken.as_millis(),
            planned.as_millis(),
            (taken + planned).as_millis(),
            (moved * PAGE_BYTES) >> 20
        );
    }
    let used = resident_bytes().saturating_sub(before);
    println!("\nIn memory: {:.2} bytes per page of the guest.", used as f64 / pages as f64);
}

/// A host's guests share its DRAM, round after round: what each uses and claims, and
/// what all are granted. All of them are in memory, far more than any cache holds.
fn many_guests(scattered: bool) {
    let gib = (GUEST_PAGES * 4096) >> 30;
    let places = if scattered { "page by page, at random" } else { "in one piece" };
    println!("\n{GUESTS} guests of {gib} GiB share DRAM, which each has {places}:\n");
    let policies = [1, 10, 100].map(|weight| {
        let mut policy = Policy::default();
        policy.dram.weight = weight;
        policy
    });
    let mut guests: Vec<(GuestMemory, WorkingSet)> =
        (0..GUESTS).map(|index| a_guest(index, scattered)).collect();
    let total = Bytes::of_pages((GUESTS * GUEST_PAGES / 4) as u64);
    println!(
        "{:>6} {:>12} {:>12} {:>12} {:>18}",
        "round", "claims, ms", "settled, ms", "both, ms", "used, ms per guest"
    );
    for round in 1..=8 {
        // The end of each guest's own round: a pass over its heat.
        let started = Cpu::now();
        for (memory, used) in &mut guests {
            used.observe(memory.classes().used(), ROUND, PARAMS.half_life);
        }
        let looked = started.elapsed() / GUESTS as u32;
        let started = Cpu::now();
        let claims: Vec<Claim> = guests
            .iter()
            .zip(policies.iter().cycle())
            .map(|((memory, used), policy)| {
                let ceiling = policy.dram_target(memory.bytes());
                Claim::of(policy, memory, used.bytes(PARAMS.half_life), ceiling, true)
            })
            .collect();
        let claimed = started.elapsed();
        let settlement = black_box(settle(total, &claims));
        let both = started.elapsed();
        let [claimed, settled, both, looked] =
            [claimed, both - claimed, both, looked].map(|time| time.as_secs_f64() * 1e3);
        println!("{round:>6} {claimed:>12.3} {settled:>12.3} {both:>12.3} {looked:>18.3}");
        assert_eq!(settlement.grants.len(), GUESTS);
    }
}

/// A guest as the large one, after two rounds.
fn a_guest(index: usize, scattered: bool) -> (GuestMemory, WorkingSet) {
    let mut memory = GuestMemory::new(PARAMS);
    let (page_count, hva) = (GUEST_PAGES as u64, 1 << 44);
    let slot = MemSlot { gfn_start: 0, page_count, hva, id: 0, read_only: false, dirty_log: false };
    memory.adopt(1, vec![slot]);
    let (harvest, state) = (Harvest::default(), 1 + index as u64);
    let mut guest = Fake { harvest, pages: GUEST_PAGES, scattered, state };
    guest.round(&mut memory, None);
    guest.round(&mut memory, Some(ROUND));
    let mut used = WorkingSet::default();
    used.recall(PARAMS.half_life);
    (memory, used)
}

/// What is harvested of the guest, in parts as the daemon does.
struct Fake {
    harvest: Harvest,
    pages: usize,
    /// Each page lies on any tier; else a third of them, in one piece, in DRAM.
    scattered: bool,
    state: u64,
}

impl Fake {
    /// As large as the daemon's.
    const PART_PAGES: usize = 1 << 20;

    /// Hands a round over; the time that this took, without making it up.
    fn round(&mut self, memory: &mut GuestMemory, elapsed: Option<Duration>) -> Duration {
        let mut taken = Duration::ZERO;
        for start in (0..self.pages).step_by(Self::PART_PAGES) {
            let pages = start..(start + Self::PART_PAGES).min(self.pages);
            self.make_up(pages.clone());
            let started = Cpu::now();
            memory.observe_part(0, pages, &self.harvest, elapsed.map(Span::from));
            taken += started.elapsed();
        }
        let started = Cpu::now();
        memory.end_round(elapsed.map(Span::from));
        taken + started.elapsed()
    }

    fn make_up(&mut self, pages: Range<usize>) {
        self.harvest.reset(pages.start as u64, pages.len() as u64);
        self.harvest.mapped.fill(!0);
        self.harvest.levels.fill(Level::Page4K);
        for word in &mut self.harvest.accessed {
            let some = random(&mut self.state) & random(&mut self.state);
            *word = if random(&mut self.state) % 5 == 0 { some } else { 0 };
        }
        let within = |range: Range<usize>| {
            let start = range.start.clamp(pages.start, pages.end);
            start - pages.start..range.end.clamp(start, pages.end) - pages.start
        };
        bitmap::fill(&mut self.harvest.on_slow, within(self.pages * 3 / 10..self.pages), true);
        if self.scattered {
            self.harvest.on_slow.fill_with(|| random(&mut self.state));
        }
        bitmap::fill(&mut self.harvest.accessed, within(self.pages / 5..self.pages / 5 * 2), true);
    }
}

/// What of this process is in memory.
fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = text.split_whitespace().nth(1).and_then(|word| word.parse::<u64>().ok());
    pages.unwrap_or(0) * PAGE_BYTES
}
