// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the guest knows about its own memory, against what ept-virt and the
//! host's kernel say.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;

use anyhow::{Context, Result, bail, ensure};
use ept_virt_core::wire::{Class, MapRun, MemoryMap};

const PAGE_BYTES: u64 = 4096;

/// Pages asked about in one call.
const CHUNK: usize = 4096;

/// Move pages that only this process maps (linux/mempolicy.h).
const MPOL_MF_MOVE: i32 = 1 << 1;

/// Guest frames of the workload's blocks.
#[derive(Debug, Default)]
pub struct Truth {
    /// Rewritten all the time.
    pub hot: BTreeSet<u64>,
    /// Written once.
    pub idle: BTreeSet<u64>,
}

/// How well a set of pages was found.
#[derive(Clone, Copy, Debug)]
pub struct Score {
    /// Share of the true pages that were found.
    pub recall: f64,
    /// Share of the found pages that are true.
    pub precision: f64,
}

impl Truth {
    /// Reads the lines `frames BLOCK GFN PAGES`.
    pub fn parse(lines: &[String]) -> Result<Self> {
        let mut truth = Self::default();
        for (block, frames) in frames(lines)? {
            match block {
                "hot" => truth.hot.extend(frames),
                "idle" => truth.idle.extend(frames),
                other => bail!("the guest speaks of a block {other:?}"),
            }
        }
        if truth.hot.is_empty() || truth.idle.is_empty() {
            bail!("the guest did not say where its blocks lie");
        }
        Ok(truth)
    }
}

/// The guest's lines `frames BLOCK GFN PAGES`: names of blocks, and frames of each.
pub fn frames(lines: &[String]) -> Result<Vec<(&str, Range<u64>)>> {
    let mut found = Vec::new();
    for line in lines {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["frames", block, start, pages] = words.as_slice() else { continue };
        let start = u64::from_str_radix(start, 16).with_context(|| line.clone())?;
        let pages = u64::from_str_radix(pages, 16).with_context(|| line.clone())?;
        ensure!(start != 0, "the guest does not know its frames: {line}");
        found.push((*block, start..start + pages));
    }
    Ok(found)
}

/// Compares what the map calls hot with the true hot pages. With `unit` pages
/// to a mapping, a true unit is one in which any page is hot.
pub fn score_hot(truth: &Truth, map: &MemoryMap, unit: u64) -> Score {
    let units =
        |pages: &mut dyn Iterator<Item = u64>| -> BTreeSet<u64> { pages.map(|gfn| gfn / unit).collect() };
    let real = units(&mut truth.hot.iter().copied());
    let found = units(
        &mut map
            .runs
            .iter()
            .filter(|run| run.class == Class::Hot)
            .flat_map(|run| run.gfn..run.gfn + run.pages),
    );
    let both = real.intersection(&found).count() as f64;
    Score { recall: both / real.len().max(1) as f64, precision: both / found.len().max(1) as f64 }
}

/// How many of the guest frames lie on which node of the host, by the host's
/// kernel.
pub fn pages_by_node(pid: i32, map: &MemoryMap, frames: &BTreeSet<u64>) -> Result<BTreeMap<i32, u64>> {
    let addresses: Vec<u64> = frames.iter().filter_map(|gfn| address(&map.runs, *gfn)).collect();
    count_nodes(pid, &addresses)
}

/// How many of the pages at these addresses of a process lie on which node; a
/// negative node is an errno, as for a page that is not there. move_pages(2)
/// without targets only asks.
pub fn count_nodes(pid: i32, addresses: &[u64]) -> Result<BTreeMap<i32, u64>> {
    let mut nodes = BTreeMap::new();
    for chunk in addresses.chunks(CHUNK) {
        let mut status = vec![0_i32; chunk.len()];
        // SAFETY: both arrays have as many entries as the call is told; the
        // addresses are those of the other process and are not followed here.
        let result = unsafe {
            libc::syscall(
                libc::SYS_move_pages,
                pid,
                chunk.len(),
                chunk.as_ptr().cast::<*const libc::c_void>(),
                std::ptr::null::<i32>(),
                status.as_mut_ptr(),
                0,
            )
        };
        if result != 0 {
            return Err(std::io::Error::last_os_error())
                .with_context(|| format!("asking where pages of process {pid} lie"));
        }
        for node in status {
            *nodes.entry(node).or_insert(0) += 1;
        }
    }
    Ok(nodes)
}

/// Moves the pages at these addresses of a process to a node. Pages that are not
/// there or in use stay; the call says only whether it could be made.
pub fn move_pages(pid: i32, addresses: &[u64], node: i32) -> Result<()> {
    for chunk in addresses.chunks(CHUNK) {
        let nodes = vec![node; chunk.len()];
        let mut status = vec![0_i32; chunk.len()];
        // SAFETY: all three arrays have as many entries as the call is told; the
        // addresses are those of the other process and are not followed here.
        let result = unsafe {
            libc::syscall(
                libc::SYS_move_pages,
                pid,
                chunk.len(),
                chunk.as_ptr().cast::<*const libc::c_void>(),
                nodes.as_ptr(),
                status.as_mut_ptr(),
                MPOL_MF_MOVE,
            )
        };
        if result < 0 {
            return Err(std::io::Error::last_os_error())
                .with_context(|| format!("moving pages of process {pid} to node {node}"));
        }
    }
    Ok(())
}

/// Moves all pages of a process that lie on one node to another, as
/// migratepages(8) does.
pub fn migrate_pages(pid: i32, from: i32, to: i32) -> Result<()> {
    let (old, new) = (1_u64 << from, 1_u64 << to);
    // SAFETY: both masks are one word long, as the call is told.
    let result =
        unsafe { libc::syscall(libc::SYS_migrate_pages, pid, u64::BITS + 1, &raw const old, &raw const new) };
    if result < 0 {
        return Err(std::io::Error::last_os_error())
            .with_context(|| format!("moving process {pid} from node {from} to {to}"));
    }
    Ok(())
}

/// Bytes of guest memory on each node by numa_maps: all mappings that hold an
/// address of the map's runs.
pub fn numa_maps(pid: i32, map: &MemoryMap) -> Result<BTreeMap<u32, u64>> {
    let starts = mapping_starts(pid, map)?;
    let path = format!("/proc/{pid}/numa_maps");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let mut bytes = BTreeMap::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let start = words.next().unwrap_or_default();
        if !u64::from_str_radix(start, 16).is_ok_and(|start| starts.contains(&start)) {
            continue;
        }
        for word in words {
            let Some((node, pages)) = word.strip_prefix('N').and_then(|w| w.split_once('=')) else {
                continue;
            };
            let (node, pages): (u32, u64) = (node.parse()?, pages.parse()?);
            *bytes.entry(node).or_insert(0) += pages * PAGE_BYTES;
        }
    }
    Ok(bytes)
}

/// Start addresses of the mappings that hold guest memory.
fn mapping_starts(pid: i32, map: &MemoryMap) -> Result<BTreeSet<u64>> {
    let path = format!("/proc/{pid}/maps");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let mut starts = BTreeSet::new();
    for line in text.lines() {
        let range = line.split_whitespace().next().unwrap_or_default();
        let Some((start, end)) = range.split_once('-') else {
            continue;
        };
        let start = u64::from_str_radix(start, 16)?;
        let end = u64::from_str_radix(end, 16)?;
        if map.runs.iter().any(|r| r.hva < end && r.hva + r.pages * PAGE_BYTES > start) {
            starts.insert(start);
        }
    }
    Ok(starts)
}

fn address(runs: &[MapRun], gfn: u64) -> Option<u64> {
    let after = runs.partition_point(|run| run.gfn <= gfn);
    let run = runs.get(after.checked_sub(1)?)?;
    (gfn < run.gfn + run.pages).then(|| run.hva + (gfn - run.gfn) * PAGE_BYTES)
}
