// SPDX-License-Identifier: MIT OR Apache-2.0
//! A file of heat: what outlives the daemon's restart. Only the form; where files
//! lie, and which are still good, others know.
//!
//! # Form, version 1
//!
//! | bytes | what |
//! |---|---|
//! | 8 | [`MAGIC`], whose last byte is the version |
//! | 4 | length of the header |
//! | ... | the header: a [`Header`] as JSON |
//! | 4 | checksum of all before |
//! | ... | slot after slot, as the header lists them: blocks of at most [`BLOCK_CELLS`] cells |
//! | 4 | checksum of all before |
//!
//! A block is its length in 4 bytes and its cells, two bytes each, in LZ4's block
//! format: most memory of most guests is as cold as its neighbour. Numbers are
//! little-endian, checksums CRC-32 (IEEE), which misses no burst of up to 32 bits.
//!
//! Nothing is believed before its checksum was right: the header before its
//! lengths are used, the cells before they are handed over.

use std::io::{self, Read, Write};
use std::time::Duration;

use crc32fast::Hasher;
use serde::{Deserialize, Serialize};

use crate::process::ProcessIdentity;
use crate::sampler::MemSlot;

/// What a file begins with.
pub const MAGIC: [u8; 8] = *b"EPTHEAT\x01";

/// Most cells in a block: what is copied while others wait, 128 KiB.
pub const BLOCK_CELLS: usize = 1 << 16;

/// No header is longer: KVM has at most 32764 slots.
const LONGEST_HEADER: usize = 4 << 20;

/// What a file is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Header {
    /// The domain's UUID.
    pub uuid: String,
    /// Its QEMU. Another process of the same domain has other memory.
    pub process: ProcessIdentity,
    /// When the last round was, by CLOCK_MONOTONIC: time in which the host slept
    /// is none for its guests. The clock is the boot's, as the process is.
    pub harvested_at: Duration,
    /// Whose cells follow, in this order.
    pub slots: Vec<SlotRange>,
}

/// A memory slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotRange {
    /// First guest frame number.
    pub gfn_start: u64,
    /// Length in 4 KiB pages.
    pub page_count: u64,
}

impl From<&MemSlot> for SlotRange {
    fn from(slot: &MemSlot) -> Self {
        Self { gfn_start: slot.gfn_start, page_count: slot.page_count }
    }
}

/// Why a file can not be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It is not one of ours.
    #[error("it is no file of heat")]
    NotHeat,
    /// It is one of another version.
    #[error("it has version {0} of the format, and this program writes version {ours}", ours = MAGIC[7])]
    OtherVersion(u8),
    /// It was damaged, or not written to its end.
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
    /// It can not be read.
    #[error("it can not be read: {0}")]
    Io(io::Error),
}

impl From<io::Error> for StoreError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Damaged("its end is missing"),
            _ => Self::Io(error),
        }
    }
}

/// Writes a file.
pub struct Encoder<W> {
    output: W,
    checksum: Hasher,
    written: u64,
}

impl<W: Write> Encoder<W> {
    /// Begins with the header.
    pub fn new(output: W, header: &Header) -> io::Result<Self> {
        let mut encoder = Self { output, checksum: Hasher::new(), written: 0 };
        let header = serde_json::to_vec(header)?;
        encoder.put(&MAGIC)?;
        encoder.put_length(header.len())?;
        encoder.put(&header)?;
        encoder.put_checksum()?;
        Ok(encoder)
    }

    /// The next cells of the slot whose turn it is: [`BLOCK_CELLS`], or all that
    /// are left of it.
    pub fn block(&mut self, cells: &[u16]) -> io::Result<()> {
        let bytes: Vec<u8> = cells.iter().flat_map(|cell| cell.to_le_bytes()).collect();
        let packed = lz4_flex::block::compress(&bytes);
        self.put_length(packed.len())?;
        self.put(&packed)
    }

    /// Ends the file; its length in bytes.
    pub fn finish(mut self) -> io::Result<(W, u64)> {
        self.put_checksum()?;
        self.output.flush()?;
        Ok((self.output, self.written))
    }

    fn put_length(&mut self, length: usize) -> io::Result<()> {
        let length = u32::try_from(length).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        self.put(&length.to_le_bytes())
    }

    fn put_checksum(&mut self) -> io::Result<()> {
        let sum = self.checksum.clone().finalize();
        self.put(&sum.to_le_bytes())
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.checksum.update(bytes);
        self.written += bytes.len() as u64;
        self.output.write_all(bytes)
    }
}

/// Reads a file.
pub struct Decoder<R> {
    input: R,
    checksum: Hasher,
    header: Header,
}

impl<R: Read> Decoder<R> {
    /// Reads the header. Look at it before the cells are asked for.
    pub fn new(mut input: R) -> Result<Self, StoreError> {
        let mut checksum = Hasher::new();
        let mut magic = [0; MAGIC.len()];
        input.read_exact(&mut magic)?;
        checksum.update(&magic);
        match magic {
            MAGIC => {}
            [name @ .., version] if name == MAGIC[..7] => return Err(StoreError::OtherVersion(version)),
            _ => return Err(StoreError::NotHeat),
        }
        let length = take_length(&mut input, &mut checksum, LONGEST_HEADER)?;
        let header = take(&mut input, &mut checksum, length)?;
        take_checksum(&mut input, &mut checksum)?;
        let header = serde_json::from_slice(&header)
            .map_err(|_| StoreError::Damaged("its header says something else"))?;
        Ok(Self { input, checksum, header })
    }

    /// What the file is about.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Reads to the end. The cells of each slot of the header that `wanted` wants.
    pub fn cells(
        mut self,
        wanted: impl Fn(&SlotRange) -> bool,
    ) -> Result<Vec<(SlotRange, Vec<u16>)>, StoreError> {
        let mut found = Vec::new();
        let mut bytes = Vec::new();
        for slot in &self.header.slots {
            let keep = wanted(slot);
            let mut cells = Vec::new();
            let mut left = slot.page_count;
            while left > 0 {
                let count = usize::try_from(left).unwrap_or(usize::MAX).min(BLOCK_CELLS);
                left -= count as u64;
                bytes.resize(2 * count, 0);
                let longest = lz4_flex::block::get_maximum_output_size(bytes.len());
                let length = take_length(&mut self.input, &mut self.checksum, longest)?;
                let packed = take(&mut self.input, &mut self.checksum, length)?;
                if keep {
                    match lz4_flex::block::decompress_into(&packed, &mut bytes) {
                        Ok(length) if length == bytes.len() => {}
                        _ => return Err(StoreError::Damaged("a block can not be unpacked")),
                    }
                    cells.extend(bytes.chunks_exact(2).map(|cell| u16::from_le_bytes([cell[0], cell[1]])));
                }
            }
            if keep {
                found.push((*slot, cells));
            }
        }
        take_checksum(&mut self.input, &mut self.checksum)?;
        match self.input.read(&mut [0])? {
            0 => Ok(found),
            _ => Err(StoreError::Damaged("it goes on after its end")),
        }
    }
}

fn take(input: &mut impl Read, checksum: &mut Hasher, length: usize) -> Result<Vec<u8>, StoreError> {
    let mut bytes = vec![0; length];
    input.read_exact(&mut bytes)?;
    checksum.update(&bytes);
    Ok(bytes)
}

fn take_length(input: &mut impl Read, checksum: &mut Hasher, most: usize) -> Result<usize, StoreError> {
    let mut bytes = [0; 4];
    input.read_exact(&mut bytes)?;
    checksum.update(&bytes);
    let length = u32::from_le_bytes(bytes) as usize;
    if length > most { Err(StoreError::Damaged("a length makes no sense")) } else { Ok(length) }
}

fn take_checksum(input: &mut impl Read, checksum: &mut Hasher) -> Result<(), StoreError> {
    let mut bytes = [0; 4];
    input.read_exact(&mut bytes)?;
    let right = u32::from_le_bytes(bytes) == checksum.clone().finalize();
    checksum.update(&bytes);
    if right { Ok(()) } else { Err(StoreError::Damaged("a checksum is wrong")) }
}
