// SPDX-License-Identifier: MIT OR Apache-2.0
//! Blocks of the guest's memory whose content is known.

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous};

pub const PAGE_BYTES: usize = 4096;
const HUGE_BYTES: usize = 2 << 20;
const WORDS_PER_PAGE: usize = PAGE_BYTES / 8;

/// One word of each cache line holds the content: the guest is emulated twice
/// over, and all words would take it minutes to verify.
const CONTENT_STRIDE: usize = 8;

/// The word of each page that passes rewrite; not one of the content.
const COUNTER_WORD: usize = 1;

/// Pagemap entries: bit 63 is "present", bits 0 to 54 the frame (Linux,
/// Documentation/admin-guide/mm/pagemap.rst).
const PAGEMAP_PRESENT: u64 = 1 << 63;
const PAGEMAP_FRAME: u64 = (1 << 55) - 1;

/// What stands in a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// No two pages are the same.
    Distinct,
    /// All pages are the same, but for their counters.
    Twins,
}

impl Content {
    /// A word that a stray write would not make.
    fn word(self, page: usize, line: usize) -> u64 {
        let page = if self == Content::Distinct { page } else { 0 };
        let position = (page * WORDS_PER_PAGE + line) as u64;
        position.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0x5555_AAAA_0F0F_F0F0
    }
}

/// Memory that is never freed, shared with the threads that use it.
#[derive(Clone, Copy)]
pub struct Block {
    pub name: &'static str,
    content: Content,
    words: &'static [AtomicU64],
}

impl Block {
    /// Maps and fills a block, aligned to 2 MiB and made of huge pages where
    /// the kernel has them, so that it lies in few runs of guest frames.
    pub fn new(name: &'static str, bytes: usize, content: Content) -> Result<Self> {
        let block = Self { content, ..Self::plain(name, bytes)? };
        block.fill();
        Ok(block)
    }

    /// As [`Block::new`], of zeros: it has no content to be verified.
    pub fn plain(name: &'static str, bytes: usize) -> Result<Self> {
        let length = NonZeroUsize::new(bytes + HUGE_BYTES).with_context(|| format!("block {name}"))?;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice.
        let map = unsafe {
            mmap_anonymous(None, length, ProtFlags::PROT_READ | ProtFlags::PROT_WRITE, MapFlags::MAP_PRIVATE)
        }
        .with_context(|| format!("mapping {bytes} bytes for block {name}"))?;
        let aligned = map.as_ptr() as usize;
        let aligned = aligned.next_multiple_of(HUGE_BYTES) - aligned;
        // SAFETY: the mapping is longer than `bytes` by one huge page, so the
        // aligned start and `bytes` behind it lie inside it.
        let start: NonNull<u64> = unsafe { map.byte_add(aligned).cast() };
        // SAFETY: the range lies inside the mapping; the advice changes no content.
        unsafe { madvise(start.cast(), bytes, MmapAdvise::MADV_HUGEPAGE) }
            .with_context(|| format!("asking for huge pages for block {name}"))?;
        // SAFETY: `bytes` zeroed, aligned bytes that are never unmapped and that
        // only these atomics refer to.
        let words = unsafe { std::slice::from_raw_parts(start.as_ptr().cast::<AtomicU64>(), bytes / 8) };
        for page in words.chunks_exact(WORDS_PER_PAGE) {
            page[0].store(0, Ordering::Relaxed);
        }
        Ok(Self { name, content: Content::Twins, words })
    }

    /// All of its memory.
    pub fn words(&self) -> &'static [AtomicU64] {
        self.words
    }

    /// Whether a line of a page holds what was written; any number names a line.
    pub fn is_line_good(&self, page: usize, line: usize) -> bool {
        let line = line % (WORDS_PER_PAGE / CONTENT_STRIDE);
        let word = &self.words[page * WORDS_PER_PAGE + line * CONTENT_STRIDE];
        word.load(Ordering::Relaxed) == self.content.word(page, line)
    }

    /// Length in pages.
    pub fn len(&self) -> usize {
        self.words.len() / WORDS_PER_PAGE
    }

    /// Pages whose content is not what was written.
    pub fn bad_pages(&self) -> usize {
        self.bad_pages_in(0, self.len())
    }

    /// As [`Block::bad_pages`], of `count` pages from `first` on.
    pub fn bad_pages_in(&self, first: usize, count: usize) -> usize {
        let is_good = |(page, words): (usize, &[AtomicU64])| {
            words
                .iter()
                .step_by(CONTENT_STRIDE)
                .enumerate()
                .all(|(line, word)| word.load(Ordering::Relaxed) == self.content.word(page, line))
        };
        self.pages().enumerate().skip(first).take(count).filter(|page| !is_good(*page)).count()
    }

    /// Sets the counters of all pages to `pass`; how many did not hold `before`.
    pub fn count_pass(&self, before: u64, pass: u64) -> usize {
        let mut wrong = 0;
        for page in self.pages() {
            wrong += usize::from(page[COUNTER_WORD].load(Ordering::Relaxed) != before);
            page[COUNTER_WORD].store(pass, Ordering::Relaxed);
        }
        wrong
    }

    /// Numbers the counters of the first `count` pages, from 1 on; how many of
    /// all pages had another value than 0 or their number.
    pub fn number_pages(&self, count: usize) -> usize {
        let mut wrong = 0;
        for (number, page) in (1..).zip(self.pages()) {
            let counter = &page[COUNTER_WORD];
            wrong += usize::from(![0, number].contains(&counter.load(Ordering::Relaxed)));
            if number <= count as u64 {
                counter.store(number, Ordering::Relaxed);
            }
        }
        wrong
    }

    /// Reads each of the first `count` pages.
    pub fn touch(&self, count: usize) {
        for page in self.pages().take(count) {
            std::hint::black_box(page[0].load(Ordering::Relaxed));
        }
    }

    /// Runs of guest frames, as (first frame, pages); frame 0 for what is not
    /// present.
    pub fn runs(&self) -> Result<Vec<(u64, u64)>> {
        let pagemap = File::open("/proc/self/pagemap").context("opening pagemap")?;
        let mut entries = vec![0u8; self.len() * 8];
        let first_page = self.words.as_ptr() as u64 / PAGE_BYTES as u64;
        pagemap
            .read_exact_at(&mut entries, first_page * 8)
            .with_context(|| format!("reading pagemap of block {}", self.name))?;
        let mut runs: Vec<(u64, u64)> = Vec::new();
        for entry in entries.chunks_exact(8) {
            let entry = u64::from_le_bytes(entry.try_into()?);
            let frame = if entry & PAGEMAP_PRESENT != 0 { entry & PAGEMAP_FRAME } else { 0 };
            match runs.last_mut() {
                Some((start, count)) if *start + *count == frame => *count += 1,
                _ => runs.push((frame, 1)),
            }
        }
        Ok(runs)
    }

    fn fill(&self) {
        for (page, words) in self.pages().enumerate() {
            for (line, word) in words.iter().step_by(CONTENT_STRIDE).enumerate() {
                word.store(self.content.word(page, line), Ordering::Relaxed);
            }
        }
    }

    fn pages(&self) -> std::slice::ChunksExact<'static, AtomicU64> {
        self.words.chunks_exact(WORDS_PER_PAGE)
    }
}
