// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reading a recording, whoever wrote it.

use std::io::{self, Read};
use std::time::Duration;

use crate::bitmap;
use crate::sampler::Level;

use super::{
    Frame, FrameSlot, Header, LONGEST_FRAME, LONGEST_HEADER, MAGIC, MOST_PAGES, RecordError, level_count,
};

/// LZ4's block format makes no more bytes out of one: a length grows by at most 255
/// for each byte that tells it. (lz4/doc/lz4_Block_format.md)
const MOST_UNPACKED: u64 = 255;

/// Reads a recording, frame by frame.
#[derive(Debug)]
pub struct Reader<R> {
    input: R,
    header: Header,
    frames: u64,
    /// The slots of the frame before.
    before: Vec<FrameSlot>,
    ended: bool,
}

impl<R: Read> Reader<R> {
    /// Reads the header.
    pub fn new(mut input: R) -> Result<Self, RecordError> {
        let mut magic = [0; MAGIC.len()];
        input.read_exact(&mut magic).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => RecordError::NotRecording,
            _ => RecordError::Io(error),
        })?;
        match magic {
            MAGIC => {}
            [name @ .., version] if name == MAGIC[..7] => return Err(RecordError::OtherVersion(version)),
            _ => return Err(RecordError::NotRecording),
        }
        let mut reader =
            Self { input, header: Header::default(), frames: 0, before: Vec::new(), ended: false };
        let section = reader.section(LONGEST_HEADER)?.ok_or(RecordError::CutOff(0))?;
        reader.header =
            serde_json::from_slice(&section).map_err(|_| reader.damaged("its header says something else"))?;
        Ok(reader)
    }

    /// What the recording is of.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// What is read from; for who bounds how long that takes.
    pub fn input(&mut self) -> &mut R {
        &mut self.input
    }

    /// The next frame; `None` at the end. After an error there is no other frame.
    pub fn frame(&mut self) -> Result<Option<Frame>, RecordError> {
        if self.ended {
            return Ok(None);
        }
        let frame = self.next_frame();
        self.ended = !matches!(frame, Ok(Some(_)));
        frame
    }

    fn next_frame(&mut self) -> Result<Option<Frame>, RecordError> {
        let Some(section) = self.section(LONGEST_FRAME)? else { return Ok(None) };
        let before = std::mem::take(&mut self.before);
        let frame = decode(&section, &before).map_err(|what| self.damaged(what))?;
        self.before.clone_from(&frame.slots);
        self.frames += 1;
        Ok(Some(frame))
    }

    fn damaged(&self, what: &'static str) -> RecordError {
        RecordError::Damaged { rounds: self.frames, what }
    }

    /// The content of the next section; `None` where the file ends before it.
    fn section(&mut self, longest: usize) -> Result<Option<Vec<u8>>, RecordError> {
        let mut length_bytes = Vec::new();
        self.input.by_ref().take(4).read_to_end(&mut length_bytes)?;
        let length = match <[u8; 4]>::try_from(length_bytes.as_slice()) {
            Ok(bytes) => u32::from_le_bytes(bytes),
            Err(_) if length_bytes.is_empty() => return Ok(None),
            Err(_) => return Err(RecordError::CutOff(self.frames)),
        };
        if length as usize > longest {
            return Err(self.damaged("a length makes no sense"));
        }
        // Memory is taken as bytes come, not as the length says.
        let mut section = Vec::new();
        self.input.by_ref().take(u64::from(length) + 4).read_to_end(&mut section)?;
        let Some((content, sum)) =
            section.split_last_chunk::<4>().filter(|(c, _)| c.len() == length as usize)
        else {
            return Err(RecordError::CutOff(self.frames));
        };
        let mut checksum = crc32fast::Hasher::new();
        checksum.update(&length_bytes);
        checksum.update(content);
        if u32::from_le_bytes(*sum) != checksum.finalize() {
            return Err(self.damaged("a checksum is wrong"));
        }
        section.truncate(length as usize);
        Ok(Some(section))
    }
}

/// Reads a frame whose checksum is right. What is wrong with it, whoever wrote it
/// made so.
fn decode(content: &[u8], before: &[FrameSlot]) -> Result<Frame, &'static str> {
    let mut input = Input(content);
    let time = Duration::from_micros(input.number()?);
    let count = input.length()?;
    let mut slots = Vec::new();
    let (mut end, mut pages) = (0u64, 0u64);
    for _ in 0..count {
        let slot =
            FrameSlot { gfn_start: input.number()?, page_count: input.number()?, ..FrameSlot::default() };
        pages = pages.saturating_add(slot.page_count);
        let next = slot.gfn_start.checked_add(slot.page_count).filter(|end| *end <= u64::MAX / 4096);
        end = next
            .filter(|_| slot.gfn_start >= end && slot.page_count > 0 && pages <= MOST_PAGES)
            .ok_or("its memory slots make no sense")?;
        slots.push(slot);
    }
    for slot in &mut slots {
        let none = FrameSlot::default();
        let before = before.iter().find(|before| before.is_same(slot)).unwrap_or(&none);
        let pages = slot.page_count as usize;
        slot.accessed = input.bitmap(pages, &before.accessed)?;
        slot.mapped = input.bitmap(pages, &before.mapped)?;
        slot.on_slow = input.bitmap(pages, &before.on_slow)?;
        slot.levels = input.levels(level_count(slot.gfn_start, slot.page_count), &before.levels)?;
    }
    if input.0.is_empty() { Ok(Frame { time, slots }) } else { Err("a round goes on after its end") }
}

/// What is left of a frame.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], &'static str> {
        let (taken, rest) = self.0.split_first_chunk().ok_or("a round ends early")?;
        self.0 = rest;
        Ok(*taken)
    }

    fn number(&mut self) -> Result<u64, &'static str> {
        self.take().map(u64::from_le_bytes)
    }

    fn length(&mut self) -> Result<usize, &'static str> {
        self.take().map(|bytes| u32::from_le_bytes(bytes) as usize)
    }

    /// A map of `bytes` bytes.
    fn map(&mut self, bytes: u64) -> Result<Vec<u8>, &'static str> {
        let length = self.length()?;
        let (packed, rest) = self.0.split_at_checked(length).ok_or("a round ends early")?;
        self.0 = rest;
        if bytes > (packed.len() as u64).saturating_mul(MOST_UNPACKED) {
            return Err("a memory slot is larger than what is told of it");
        }
        let mut map = vec![0; bytes as usize];
        match lz4_flex::block::decompress_into(packed, &mut map) {
            Ok(length) if length == map.len() => Ok(map),
            _ => Err("a map can not be unpacked"),
        }
    }

    fn bitmap(&mut self, pages: usize, before: &[u64]) -> Result<Vec<u64>, &'static str> {
        let words = bitmap::words_for(pages);
        let map = self.map(words as u64 * 8)?;
        let change = map
            .chunks_exact(8)
            .filter_map(|bytes| bytes.first_chunk())
            .map(|bytes| u64::from_le_bytes(*bytes));
        let mut bits: Vec<u64> =
            change.enumerate().map(|(index, change)| change ^ bitmap::word(before, index)).collect();
        match bits.last_mut() {
            Some(last) if *last & !bitmap::tail_mask(pages) != 0 => Err("a bitmap goes on after its end"),
            _ => Ok(bits),
        }
    }

    fn levels(&mut self, count: u64, before: &[Level]) -> Result<Vec<Level>, &'static str> {
        let map = self.map(count)?;
        let level = |(index, change): (usize, &u8)| {
            let byte = change ^ before.get(index).map_or(0, |level| *level as u8);
            let level = Level::from_byte(byte);
            if level as u8 == byte { Ok(level) } else { Err("a level is none") }
        };
        map.iter().enumerate().map(level).collect()
    }
}
