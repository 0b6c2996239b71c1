// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest of `cargo xtask bench placement`: one block of memory, accessed as a
//! [`Pattern`] says, and every access counted.
//!
//! The kernel command line says `WORKLOAD=static BLOCK_MIB=128 GRAIN=1 RATE=100000
//! SEED=1`: what is done, the block's size, the pages of a grain, accesses in a
//! second. Each access reads one cache line of a page and verifies it. The counts
//! stand in a block of their own, `tables`, which the host reads (its layout is
//! [`layout`](super::layout)). The guest makes them when it was told `go`. The console
//! tells where both lie, and obeys `phase`: the next phase begins.

use std::io::{BufRead, stdin};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::block::{Block, Content};
use super::choose::{Chooser, Pattern};
use super::layout::{COUNTERS_WORD, Header, MAGIC, TABLES_BYTES};
use super::{bytes, number_from_env};

/// Accesses are made in bursts, so that a pause between two is long beside what
/// ending it costs in a guest that is emulated twice over.
const BURSTS_PER_SECOND: u64 = 50;

/// Who falls behind by more does not catch up.
const MAX_LAG: Duration = Duration::from_millis(200);

static PHASE: AtomicU64 = AtomicU64::new(0);

/// Runs the workload, whose name is given; returns only when something failed.
pub fn run(name: &str) -> Result<()> {
    let pattern = Pattern::parse(name)?;
    let mut commands = stdin().lock().lines();
    // What the guest has touched until now is no part of the bench: the host makes
    // room in DRAM, and says so.
    println!("EPT-GUEST booted");
    commands.next().context("the console has no other end")?.context("reading a command")?;
    let tables = Block::plain("tables", TABLES_BYTES)?;
    let block = Block::new("block", bytes(number_from_env("BLOCK_MIB", 128)?)?, Content::Distinct)?;
    let grain = number_from_env("GRAIN", 1)?;
    let chooser = Chooser::new(pattern, block.len() as u64, grain, number_from_env("SEED", 1)?)?;
    let rate = number_from_env("RATE", 100_000)?.max(BURSTS_PER_SECOND);
    let counts = Counts::new(tables, block.len())?;
    for block in [&tables, &block] {
        for (frame, pages) in block.runs()? {
            println!("EPT-GUEST frames {} {frame:x} {pages:x}", block.name);
        }
    }
    thread::spawn(move || access(block, &counts, chooser, rate));
    println!("EPT-GUEST ready");
    for line in commands {
        match line.context("reading a command")?.trim() {
            "" => continue,
            "phase" => PHASE.fetch_add(1, Ordering::Relaxed),
            other => bail!("unknown command: {other}"),
        };
        println!("EPT-GUEST phase");
    }
    loop {
        thread::park();
    }
}

/// The counts that the host reads.
struct Counts {
    words: &'static [AtomicU64],
}

impl Counts {
    fn new(tables: Block, pages: usize) -> Result<Self> {
        let words = tables.words();
        if words.len() < COUNTERS_WORD + pages.div_ceil(2) {
            bail!("{pages} pages are too many for the counters");
        }
        words[Header::Pages as usize].store(pages as u64, Ordering::Relaxed);
        words[Header::Magic as usize].store(MAGIC, Ordering::Release);
        Ok(Self { words })
    }

    /// Two counters of 32 bits to a word, which may go round.
    fn count(&self, page: u64) {
        let word = &self.words[COUNTERS_WORD + page as usize / 2];
        let old = word.load(Ordering::Relaxed);
        let new = if page % 2 == 0 {
            (old & !0xffff_ffff) | u64::from((old as u32).wrapping_add(1))
        } else {
            old.wrapping_add(1 << 32)
        };
        word.store(new, Ordering::Relaxed);
    }

    fn set(&self, what: Header, value: u64) {
        self.words[what as usize].store(value, Ordering::Relaxed);
    }
}

fn access(block: Block, counts: &Counts, mut chooser: Chooser, rate: u64) {
    let burst = rate / BURSTS_PER_SECOND;
    let pause = Duration::from_secs(1) / BURSTS_PER_SECOND as u32;
    let mut wrong = 0;
    let mut next = Instant::now();
    loop {
        let phase = PHASE.load(Ordering::Relaxed);
        chooser.set_phase(phase);
        counts.set(Header::Phase, phase);
        for _ in 0..burst {
            let (page, random) = chooser.next();
            wrong += u64::from(!block.is_line_good(page as usize, random as usize));
            counts.count(page);
        }
        counts.set(Header::Wrong, wrong);
        next += pause;
        let now = Instant::now();
        match next.checked_duration_since(now) {
            Some(rest) => thread::sleep(rest),
            None if now.duration_since(next) > MAX_LAG => next = now,
            None => {}
        }
    }
}

/// The workload that the kernel command line names, if any.
pub fn wanted() -> Option<String> {
    std::env::var("WORKLOAD").ok()
}
