// SPDX-License-Identifier: MIT OR Apache-2.0
//! The host's memory: which frames each node has, what is free on it, and how it is
//! filled until only the guest's budget is left.

use std::fs;
use std::io::Error;
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result, bail, ensure};

use super::guest_memory::read;
use crate::scenario::truth;

const HUGE_PAGES: u64 = 512;

/// Huge pages that are not asked for: the kernel would have to reclaim for the last.
const KEPT_HUGE_PAGES: u64 = 2;

/// The largest pipe that anybody may have (/proc/sys/fs/pipe-max-size).
const PIPE_BYTES: usize = 1 << 20;

/// A CPU keeps this part of a zone at hand, or four batches (mm/page_alloc.c).
const HIGH_FRACTION: &str = "1000000";

/// From linux/mempolicy.h.
const MPOL_PREFERRED: i32 = 1;
const MPOL_BIND: i32 = 2;

/// How much of a zone stays free when the kernel takes memory of another node instead
/// (Documentation/mm, "watermarks").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// For single pages.
    Low,
    /// For huge pages, of which the kernel first asks the near node alone, and once
    /// more without a care (mm/mempolicy.c, alloc_pages_mpol).
    Min,
}

/// Frames of a zone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    node: u8,
    start: u64,
    end: u64,
}

/// A zone, in pages, as /proc/zoneinfo has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Zone {
    node: u8,
    free: u64,
    min: u64,
    low: u64,
    spanned: u64,
    start: u64,
    /// Kept for allocations that can only be served here.
    reserve: u64,
}

impl Zone {
    fn all() -> Result<Vec<Self>> {
        parse(&read("/proc/zoneinfo")?)
    }

    /// What the kernel hands out of it before it turns to another node.
    fn to_give(&self, mark: Mark) -> u64 {
        let mark = if mark == Mark::Low { self.low } else { self.min };
        self.free.saturating_sub(mark + self.reserve)
    }
}

impl Span {
    /// Those of all zones.
    pub fn all() -> Result<Vec<Self>> {
        let zones = Zone::all()?;
        let spans = zones.iter().filter(|zone| zone.spanned > 0);
        Ok(spans.map(|z| Self { node: z.node, start: z.start, end: z.start + z.spanned }).collect())
    }

    /// The node of a frame.
    pub fn node_of(spans: &[Self], frame: u64) -> Result<u8> {
        let span = spans.iter().find(|span| (span.start..span.end).contains(&frame));
        span.map(|span| span.node).with_context(|| format!("frame {frame:x} is in no zone"))
    }

    /// Bytes from the first to after the last frame of a node.
    pub fn bytes_of(spans: &[Self], node: u8) -> Result<(u64, u64)> {
        let own: Vec<&Self> = spans.iter().filter(|span| span.node == node).collect();
        let start = own.iter().map(|span| span.start).min().context("a node without memory")?;
        let end = own.iter().map(|span| span.end).max().context("a node without memory")?;
        Ok((start * 4096, end * 4096))
    }
}

/// Node 0 filled by what nobody can move: pages of hugetlbfs that nobody uses, which
/// neither reclaim nor DAMON touches, and where no 2 MiB are free in one piece pages
/// of pipes. Given back when dropped.
pub struct Filler {
    pipes: Vec<(OwnedFd, OwnedFd)>,
}

impl Filler {
    /// Takes all that is free on node 0.
    pub fn take_all() -> Result<Self> {
        // Pages that a CPU keeps at hand are up to an eighth of a zone, and count as
        // taken: next to none, so that what is free is what can be had.
        fs::write("/proc/sys/vm/percpu_pagelist_high_fraction", HIGH_FRACTION)
            .context("emptying lists of free pages")?;
        move_processes()?;
        fs::write("/proc/sys/vm/drop_caches", "3").context("dropping caches")?;
        fs::write("/proc/sys/vm/compact_memory", "1").context("compacting memory")?;
        let mut filler = Self { pipes: Vec::new() };
        set_pool(pool()? + (free_pages(0, Mark::Low)? / HUGE_PAGES).saturating_sub(KEPT_HUGE_PAGES))?;
        let small = free_pages(0, Mark::Low)?;
        with_memory_of_node_0(|| filler.fill_pipes(small))?;
        Ok(filler)
    }

    /// Gives back pages until so many are free. The first may only make up for what the
    /// host took below the mark at which the kernel turns to the other node.
    pub fn give_back(&self, pages: u64, mark: Mark) -> Result<()> {
        loop {
            let missing = pages.saturating_sub(free_pages(0, mark)?);
            if missing < HUGE_PAGES / 2 {
                return Ok(());
            }
            let left = pool()?.checked_sub(missing.div_ceil(HUGE_PAGES));
            set_pool(left.with_context(|| format!("{missing} pages are missing: {:?}", self.words()))?)?;
        }
    }

    /// Writes so many pages into pipes that nobody reads.
    fn fill_pipes(&mut self, pages: u64) -> Result<()> {
        let content = vec![1_u8; PIPE_BYTES];
        let mut left = usize::try_from(pages)? * 4096;
        while left > 0 {
            let (read, write) = nix::unistd::pipe().context("making a pipe")?;
            // SAFETY: the descriptor is open, and the call takes a number.
            let size = unsafe { libc::fcntl(write.as_raw_fd(), libc::F_SETPIPE_SZ, PIPE_BYTES) };
            ensure!(size as usize == PIPE_BYTES, "a pipe of {PIPE_BYTES} bytes: {}", Error::last_os_error());
            let part = left.min(PIPE_BYTES);
            let written = nix::unistd::write(&write, &content[..part]).context("filling a pipe")?;
            ensure!(written == part, "a pipe took {written} of {part} bytes");
            self.pipes.push((read, write));
            left -= part;
        }
        Ok(())
    }

    /// How node 0 stands.
    pub fn words(&self) -> Result<String> {
        let zones = Zone::all()?;
        let word = |zone: &Zone| format!("{} free, low {}, reserve {}", zone.free, zone.low, zone.reserve);
        let own: Vec<String> = zones.iter().filter(|zone| zone.node == 0).map(word).collect();
        Ok(format!(
            "node 0: {} huge pages and {} pipes taken; zones: {}",
            pool()?,
            self.pipes.len(),
            own.join("; ")
        ))
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        let _ = set_pool(0);
    }
}

/// Moves what processes have on node 0 to node 1: programs are files, and reclaim of
/// their pages would give the guest more DRAM than its budget, sooner or later.
fn move_processes() -> Result<()> {
    for entry in fs::read_dir("/proc").context("reading /proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        // Kernel threads have no memory of their own, and processes end.
        let _ = truth::migrate_pages(pid, 0, 1);
    }
    Ok(())
}

/// The memory that `work` makes the kernel take is that of node 0.
fn with_memory_of_node_0(work: impl FnOnce() -> Result<()>) -> Result<()> {
    prefer(MPOL_BIND, 0)?;
    let outcome = work();
    prefer_slow_node()?;
    outcome
}

/// This program and those that it starts take their memory from the slow node while
/// it has some: what is free in DRAM is the guest's.
pub fn prefer_slow_node() -> Result<()> {
    prefer(MPOL_PREFERRED, 1)
}

fn prefer(mode: i32, node: u32) -> Result<()> {
    let nodes = 1_u64 << node;
    // SAFETY: the mask is one word long, as the call is told.
    let result = unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, &raw const nodes, u64::BITS + 1) };
    ensure!(result == 0, "taking memory of node {node}: {}", Error::last_os_error());
    Ok(())
}

/// Pages of a node that the kernel hands out before it turns to another one.
pub fn free_pages(node: u8, mark: Mark) -> Result<u64> {
    Ok(Zone::all()?.iter().filter(|zone| zone.node == node).map(|zone| zone.to_give(mark)).sum())
}

const POOL: &str = "/sys/devices/system/node/node0/hugepages/hugepages-2048kB/nr_hugepages";

fn pool() -> Result<u64> {
    read(POOL)?.trim().parse().with_context(|| format!("{POOL} is no number"))
}

fn set_pool(pages: u64) -> Result<()> {
    fs::write(POOL, pages.to_string()).with_context(|| format!("writing {POOL}"))
}

fn parse(text: &str) -> Result<Vec<Zone>> {
    let mut zones: Vec<Zone> = Vec::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if let ["Node", node, "zone", _] = words.as_slice() {
            zones.push(Zone { node: node.trim_end_matches(',').parse()?, ..Zone::default() });
            continue;
        }
        let Some(zone) = zones.last_mut() else { continue };
        match words.as_slice() {
            ["pages", "free", count] => zone.free = count.parse()?,
            ["min", count] => zone.min = count.parse()?,
            ["low", count] => zone.low = count.parse()?,
            ["spanned", count] => zone.spanned = count.parse()?,
            ["start_pfn:", frame] => zone.start = frame.parse()?,
            ["protection:", ..] => {
                // User memory may come from any zone: the last figure is its.
                let last = line.trim_end_matches(')').rsplit([',', ' ']).next().unwrap_or_default();
                zone.reserve = last.parse().with_context(|| line.to_owned())?;
            }
            _ => {}
        }
    }
    if zones.is_empty() {
        bail!("/proc/zoneinfo names no zone");
    }
    Ok(zones)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
Node 0, zone      DMA
  per-node stats
      nr_inactive_anon 12
  pages free     2814
        boost    0
        min      67
        low      83
        high     99
        spanned  4095
        present  3998
        managed  3840
        protection: (0, 1939, 1939, 1939, 1939)
  start_pfn:           1
Node 0, zone    DMA32
  pages free     300000
        min      9000
        low      11000
        spanned  520192
        protection: (0, 0, 0, 0, 0)
              count:    9
              high:     252
              low:      7
  start_pfn:           4096
Node 1, zone   Normal
  pages free     9
        min      4000
        low      5000
        spanned  262144
        protection: (0, 0, 0, 0, 0)
  start_pfn:           1048576
";

    #[test]
    fn reads_zones() {
        let zones = parse(TEXT).unwrap();
        let give = |mark| zones.iter().map(|zone| zone.to_give(mark)).collect::<Vec<u64>>();
        assert_eq!(give(Mark::Low), [2814 - 83 - 1939, 289_000, 0]);
        assert_eq!(give(Mark::Min), [2814 - 67 - 1939, 291_000, 0]);
        assert_eq!(zones.iter().map(|zone| zone.node).collect::<Vec<u8>>(), [0, 0, 1]);
        assert!(parse("nothing").is_err());
    }

    #[test]
    fn a_frame_lies_on_one_node() {
        let zones = parse(TEXT).unwrap();
        let spans: Vec<Span> = zones
            .iter()
            .map(|zone| Span { node: zone.node, start: zone.start, end: zone.start + zone.spanned })
            .collect();
        assert_eq!(Span::node_of(&spans, 5000).unwrap(), 0);
        assert_eq!(Span::node_of(&spans, 1_048_576).unwrap(), 1);
        assert!(Span::node_of(&spans, 600_000).is_err());
        assert_eq!(Span::bytes_of(&spans, 0).unwrap(), (4096, (4096 + 520_192) * 4096));
    }
}
