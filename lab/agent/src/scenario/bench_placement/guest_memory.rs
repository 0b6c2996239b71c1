// SPDX-License-Identifier: MIT OR Apache-2.0
//! The guest's memory from the host: where its pages lie, by the page tables of its
//! QEMU, and how often each was accessed, by the guest's own counts.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ept_virt_core::bitmap;
use ept_virt_core::sampler::{Harvest, HarvestRequest, KernelSampler, MemSlot, Sampler};
use ept_virt_core::topology::NodeSet;

use super::host_memory::Span;
use crate::guest::layout::{COUNTERS_WORD, Header, MAGIC};
use crate::scenario::hammer::attach;
use crate::scenario::truth;

const PAGE_BYTES: u64 = 4096;

/// Pagemap entries: bit 63 is "present", bits 0 to 54 the frame (Linux,
/// Documentation/admin-guide/mm/pagemap.rst).
const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;

/// What the guest's kernel touches at least once in so long is hot.
const ELSEWHERE_TIME: Duration = Duration::from_secs(2);

/// A page that is in no node's memory: not present.
pub const NOWHERE: u8 = u8::MAX;

/// What the guest counted.
pub struct Counts {
    /// The workload's phase.
    pub phase: u64,
    /// Accesses of each page of the block so far; may go round.
    pub pages: Vec<u32>,
}

/// A guest with its block.
pub struct GuestMemory {
    pid: i32,
    slots: Vec<MemSlot>,
    /// Guest frames of the block, in the order of the guest's addresses.
    block: Vec<u64>,
    /// Where the counts stand: addresses in QEMU and lengths in bytes.
    tables: Vec<(u64, usize)>,
    mem: File,
    pagemap: File,
    spans: Vec<Span>,
    /// Pages that are placed together.
    pub unit_pages: u64,
    /// All of it.
    pub pages: u64,
}

impl GuestMemory {
    /// Of a machine that is there and need not run yet, with so much memory.
    pub fn new(pid: i32, pages: u64, unit_pages: u64) -> Result<Self> {
        let mut slots = attach(pid)?.memslots()?.1;
        slots.retain(|slot| !slot.read_only && slot.gfn_start + slot.page_count <= pages);
        let open = |name: &str| {
            let path = format!("/proc/{pid}/{name}");
            File::open(&path).with_context(|| format!("opening {path}"))
        };
        Ok(Self {
            pid,
            slots,
            block: Vec::new(),
            tables: Vec::new(),
            mem: open("mem")?,
            pagemap: open("pagemap")?,
            spans: Span::all()?,
            unit_pages,
            pages,
        })
    }

    /// Reads the guest's lines `frames BLOCK GFN PAGES`.
    pub fn find_blocks(&mut self, lines: &[String]) -> Result<()> {
        // The firmware has changed them since.
        self.slots = attach(self.pid)?.memslots()?.1;
        self.slots.retain(|slot| !slot.read_only && slot.gfn_start + slot.page_count <= self.pages);
        let mut tables = Vec::new();
        for (name, frames) in truth::frames(lines)? {
            match name {
                "block" => self.block.extend(frames),
                "tables" => tables.extend(frames),
                other => bail!("the guest speaks of a block {other:?}"),
            }
        }
        ensure!(!self.block.is_empty() && !tables.is_empty(), "the guest did not say where its blocks lie");
        for gfn in tables {
            let hva = self.hva(gfn)?;
            match self.tables.last_mut() {
                Some((start, length)) if *start + *length as u64 == hva => *length += PAGE_BYTES as usize,
                _ => self.tables.push((hva, PAGE_BYTES as usize)),
            }
        }
        Ok(())
    }

    /// Pages of the guest on node 0.
    pub fn fast_pages(&self) -> Result<u64> {
        Ok(self.nodes()?.iter().filter(|node| **node == 0).count() as u64)
    }

    /// Pages of the block.
    pub fn block_pages(&self) -> usize {
        self.block.len()
    }

    /// Guest frame of each page of the block.
    pub fn block(&self) -> &[u64] {
        &self.block
    }

    /// The guest's counts, as far as it has come.
    pub fn counts(&self) -> Result<Counts> {
        let wanted = COUNTERS_WORD * 8 + self.block.len() * 4;
        let mut bytes = Vec::with_capacity(wanted);
        for (hva, length) in &self.tables {
            let start = bytes.len();
            bytes.resize((start + length).min(wanted), 0);
            self.mem.read_exact_at(&mut bytes[start..], *hva).context("reading the guest's counts")?;
        }
        ensure!(bytes.len() == wanted, "the guest has counts of {} bytes, not of {wanted}", bytes.len());
        let header = |what: Header| -> Result<u64> {
            let at = what as usize * 8;
            Ok(u64::from_le_bytes(bytes[at..at + 8].try_into()?))
        };
        ensure!(header(Header::Magic)? == MAGIC, "these are not the guest's counts");
        ensure!(header(Header::Pages)? == self.block.len() as u64, "the guest counts other pages");
        let wrong = header(Header::Wrong)?;
        ensure!(wrong == 0, "the guest read {wrong} lines that it did not write: its data is damaged");
        let counters = bytes[COUNTERS_WORD * 8..].chunks_exact(4);
        let pages = counters.map(|four| u32::from_le_bytes(four.try_into().unwrap_or_default())).collect();
        Ok(Counts { phase: header(Header::Phase)?, pages })
    }

    /// The node of each guest frame, by QEMU's page tables; [`NOWHERE`] without a page.
    pub fn nodes(&self) -> Result<Vec<u8>> {
        let mut nodes = vec![NOWHERE; self.pages as usize];
        let mut bytes = Vec::new();
        for slot in &self.slots {
            bytes.resize(slot.page_count as usize * 8, 0);
            self.pagemap
                .read_exact_at(&mut bytes, slot.hva / PAGE_BYTES * 8)
                .with_context(|| format!("reading the pagemap of process {}", self.pid))?;
            let start = slot.gfn_start as usize;
            for (node, entry) in nodes[start..].iter_mut().zip(bytes.chunks_exact(8)) {
                let entry = u64::from_le_bytes(entry.try_into()?);
                if entry & PRESENT != 0 {
                    *node = Span::node_of(&self.spans, entry & FRAME)?;
                }
            }
        }
        Ok(nodes)
    }

    /// Asks move_pages(2) about each `step`th page of the block; how many it was asked
    /// about, and for how many it says what `nodes` says. Nothing may move meanwhile.
    pub fn check_nodes(&self, nodes: &[u8], step: usize) -> Result<(u64, u64)> {
        let (mut asked, mut same) = (0, 0);
        for (node, frames) in [0_u8, 1].map(|node| {
            let on = |gfn: &&u64| nodes[**gfn as usize] == node;
            (node, self.block.iter().step_by(step).filter(on).copied().collect::<Vec<u64>>())
        }) {
            let addresses: Vec<u64> = frames.iter().map(|gfn| self.hva(*gfn)).collect::<Result<_>>()?;
            asked += addresses.len() as u64;
            same += truth::count_nodes(self.pid, &addresses)?.get(&i32::from(node)).copied().unwrap_or(0);
        }
        Ok((asked, same))
    }

    /// Pages outside of the block, in whole units, that the guest accesses within two
    /// seconds: those of its kernel, and the counts.
    pub fn hot_elsewhere(&self) -> Result<u64> {
        let mut sampler = attach(self.pid)?;
        self.harvest(&mut sampler, true)?;
        thread::sleep(ELSEWHERE_TIME);
        let mut accessed = self.harvest(&mut sampler, false)?;
        let units = self.pages.div_ceil(self.unit_pages) as usize;
        let mut hot = vec![0; bitmap::words_for(units)];
        for gfn in &self.block {
            bitmap::fill(&mut accessed, *gfn as usize..*gfn as usize + 1, false);
        }
        for page in (0..self.pages as usize).filter(|page| bitmap::get(&accessed, *page)) {
            let unit = page / self.unit_pages as usize;
            bitmap::fill(&mut hot, unit..unit + 1, true);
        }
        Ok(bitmap::count(&hot) * self.unit_pages)
    }

    fn harvest(&self, sampler: &mut KernelSampler, clear: bool) -> Result<Vec<u64>> {
        let mut accessed = vec![0; bitmap::words_for(self.pages as usize)];
        for slot in &self.slots {
            let request = HarvestRequest {
                gfn_start: slot.gfn_start,
                gfn_count: slot.page_count,
                clear_accessed: clear,
                clear_dirty: false,
                flush: clear,
                // Who places by the host's own idea of age is not to lose anything.
                keep_young: clear,
            };
            let mut seen = Harvest::default();
            sampler.harvest(&request, &NodeSet::default(), &mut seen)?;
            for page in (0..slot.page_count as usize).filter(|page| bitmap::get(&seen.accessed, *page)) {
                let gfn = slot.gfn_start as usize + page;
                bitmap::fill(&mut accessed, gfn..gfn + 1, true);
            }
        }
        Ok(accessed)
    }

    fn hva(&self, gfn: u64) -> Result<u64> {
        let slot = self
            .slots
            .iter()
            .find(|slot| slot.frames().contains(&gfn))
            .with_context(|| format!("frame {gfn:x} is in no slot"))?;
        Ok(slot.hva + (gfn - slot.gfn_start) * PAGE_BYTES)
    }
}

/// Reads a small file whole.
pub fn read(path: &str) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("reading {path}"))
}
