// SPDX-License-Identifier: MIT OR Apache-2.0
//! Recordings of rounds: what harvests said, round after round, to be simulated
//! later. Only the form; who records is in `cli/src/record.rs` and the daemon.
//!
//! # Form, version 1
//!
//! | bytes | what |
//! |---|---|
//! | 8 | [`MAGIC`], whose last byte is the version |
//! | ... | the first section: a [`Header`] as JSON |
//! | ... | a section for each [`Frame`], until the file ends |
//!
//! A section is the length of its content in 4 bytes, the content, and 4 bytes of
//! checksum over both. A file that was cut off in a section is good up to there.
//!
//! The content of a frame:
//!
//! | bytes | what |
//! |---|---|
//! | 8 | its time in microseconds |
//! | 4 | number of memory slots |
//! | 16 each | first guest frame number and length in pages of each slot |
//! | ... | slot after slot, four maps: accessed, mapped, on the slow tier, levels |
//!
//! A map is a bit for each page, in words of 8 bytes, or for levels a byte for each
//! 2 MiB of guest-physical space that the slot touches (0: nothing mapped, 1: 4 KiB,
//! 2: 2 MiB, 3: 1 GiB). It is combined by exclusive or with the same map of the frame
//! before, if that had the same slot: most of it is zero then. It is packed as LZ4's
//! block format, and stands behind its packed length in 4 bytes. Numbers are
//! little-endian, checksums CRC-32 (IEEE).
//!
//! # Who reads it is not at its mercy
//!
//! Nothing is believed before its checksum was right. LZ4 makes at most 255 bytes out
//! of one, so a slot that claims more than its packed maps can hold is refused before
//! memory is taken for it; a frame has at most [`MOST_PAGES`] pages.

mod read;
mod write;

use std::io;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::bitmap::WORD_BITS;
use crate::sampler::{Harvest, Level, MemSlot};
use crate::units::PAGES_PER_2M;

pub use read::Reader;
pub use write::Writer;

/// What a recording begins with.
pub const MAGIC: [u8; 8] = *b"EPTREC\0\x01";

/// Most pages in a frame: 16 TiB.
pub const MOST_PAGES: u64 = 1 << 32;

/// No header is longer.
const LONGEST_HEADER: usize = 64 << 10;

/// No frame is longer: packed maps of [`MOST_PAGES`] pages that LZ4 made no smaller.
const LONGEST_FRAME: usize = 1 << 31;

/// What a recording is of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The domain's name.
    pub domain: String,
    /// Its UUID.
    pub uuid: String,
    /// When the recording began, in seconds since 1970.
    pub began: u64,
    /// The program that wrote it, and its version.
    pub program: String,
}

/// What one round found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    /// When it was harvested, on a clock that stands still while the host sleeps;
    /// kept to the microsecond. Only differences mean something.
    pub time: Duration,
    /// The slots, in order of address, without overlaps.
    pub slots: Vec<FrameSlot>,
}

/// A memory slot in a frame. Bitmaps are as a harvest's: a bit for each page from
/// `gfn_start` on, those past the end zero.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FrameSlot {
    /// First guest frame number.
    pub gfn_start: u64,
    /// Length in 4 KiB pages.
    pub page_count: u64,
    /// Accessed since the frame before; in the first, ever since who knows when.
    pub accessed: Vec<u64>,
    /// Mapped for the guest.
    pub mapped: Vec<u64>,
    /// Mapped, and on the slow tier.
    pub on_slow: Vec<u64>,
    /// One for each 2 MiB that the slot touches.
    pub levels: Vec<Level>,
}

impl FrameSlot {
    /// Of `slot`, nothing is known yet.
    pub fn new(slot: &MemSlot) -> Self {
        Self { gfn_start: slot.gfn_start, page_count: slot.page_count, ..Self::default() }
    }

    /// Takes in what was harvested of the next pages. Each part but the last is a whole
    /// number of words long.
    pub fn extend(&mut self, harvest: &Harvest) {
        let first = self.gfn_start + (self.accessed.len() * WORD_BITS) as u64;
        self.accessed.extend_from_slice(&harvest.accessed);
        self.mapped.extend_from_slice(&harvest.mapped);
        self.on_slow.extend_from_slice(&harvest.on_slow);
        let mut levels = harvest.levels.iter();
        // Two parts may meet within 2 MiB: the larger mapping counts.
        if let Some(last) = self.levels.last_mut().filter(|_| first % PAGES_PER_2M != 0) {
            let next = levels.next().copied().unwrap_or_default();
            *last = if next as u8 > *last as u8 { next } else { *last };
        }
        self.levels.extend(levels);
    }

    /// Whether both are the same piece of memory.
    pub fn is_same(&self, other: &FrameSlot) -> bool {
        (self.gfn_start, self.page_count) == (other.gfn_start, other.page_count)
    }
}

impl Frame {
    /// Takes over the accesses of an earlier frame that is not kept: they belong to
    /// the time that this one tells about.
    pub fn absorb(&mut self, earlier: &Frame) {
        for slot in &mut self.slots {
            let Some(before) = earlier.slots.iter().find(|before| before.is_same(slot)) else { continue };
            slot.accessed.iter_mut().zip(&before.accessed).for_each(|(word, before)| *word |= before);
        }
    }

    /// Pages in all slots.
    pub fn pages(&self) -> u64 {
        self.slots.iter().fold(0, |sum: u64, slot| sum.saturating_add(slot.page_count))
    }
}

/// Why a recording can not be read, or not further.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// It is not one of ours.
    #[error("it is no recording")]
    NotRecording,
    /// It is one of another version.
    #[error("it has version {0} of the format, and this program reads version {ours}", ours = MAGIC[7])]
    OtherVersion(u8),
    /// It ends within a section; what comes before is good.
    #[error("it was cut off after {0} whole rounds")]
    CutOff(u64),
    /// It was damaged; what comes before is good.
    #[error("it is damaged after {rounds} good rounds: {what}")]
    Damaged {
        /// Rounds before the damage.
        rounds: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// It can not be read.
    #[error("it can not be read: {0}")]
    Io(#[from] io::Error),
}

/// Levels of a slot, as the harvest counts them.
fn level_count(gfn_start: u64, page_count: u64) -> u64 {
    (gfn_start + page_count).div_ceil(PAGES_PER_2M) - gfn_start / PAGES_PER_2M
}
