// SPDX-License-Identifier: MIT OR Apache-2.0
//! Writing a recording, a frame at a time.

use std::io::{self, Write};

use crate::bitmap;

use super::{Frame, FrameSlot, Header, LONGEST_FRAME, MAGIC, level_count};

/// Writes a recording. Each frame is flushed when it is whole, so that a writer that
/// is killed leaves all frames but perhaps the last.
#[derive(Debug)]
pub struct Writer<W> {
    output: W,
    /// What maps are combined with.
    before: Vec<FrameSlot>,
    section: Vec<u8>,
}

impl<W: Write> Writer<W> {
    /// Begins with the header.
    pub fn new(mut output: W, header: &Header) -> io::Result<Self> {
        output.write_all(&MAGIC)?;
        let mut writer = Self { output, before: Vec::new(), section: Vec::new() };
        writer.section = serde_json::to_vec(header)?;
        writer.put_section()?;
        Ok(writer)
    }

    /// Appends a frame; missing words of its maps are zero. Its bytes in the file.
    pub fn append(&mut self, frame: Frame) -> io::Result<u64> {
        self.section.clear();
        let micros = u64::try_from(frame.time.as_micros()).unwrap_or(u64::MAX);
        self.section.extend(micros.to_le_bytes());
        self.put_length(frame.slots.len())?;
        for slot in &frame.slots {
            self.section.extend(slot.gfn_start.to_le_bytes());
            self.section.extend(slot.page_count.to_le_bytes());
        }
        let none = FrameSlot::default();
        let before = std::mem::take(&mut self.before);
        for slot in &frame.slots {
            let before = before.iter().find(|before| before.is_same(slot)).unwrap_or(&none);
            self.put_slot(slot, before)?;
        }
        self.before = frame.slots;
        self.put_section()
    }

    fn put_slot(&mut self, slot: &FrameSlot, before: &FrameSlot) -> io::Result<()> {
        let pages = slot.page_count as usize;
        let words = bitmap::words_for(pages);
        for (now, before) in [
            (&slot.accessed, &before.accessed),
            (&slot.mapped, &before.mapped),
            (&slot.on_slow, &before.on_slow),
        ] {
            let change = (0..words).flat_map(|index| {
                let mask = if index + 1 == words { bitmap::tail_mask(pages) } else { !0 };
                let change = (bitmap::word(now, index) ^ bitmap::word(before, index)) & mask;
                change.to_le_bytes()
            });
            self.put_map(&change.collect::<Vec<u8>>())?;
        }
        let level = |levels: &[crate::sampler::Level], index: usize| {
            levels.get(index).map_or(0, |level| *level as u8)
        };
        let count = level_count(slot.gfn_start, slot.page_count) as usize;
        let change = (0..count).map(|index| level(&slot.levels, index) ^ level(&before.levels, index));
        self.put_map(&change.collect::<Vec<u8>>())
    }

    fn put_map(&mut self, map: &[u8]) -> io::Result<()> {
        let packed = lz4_flex::block::compress(map);
        self.put_length(packed.len())?;
        self.section.extend(packed);
        Ok(())
    }

    fn put_length(&mut self, length: usize) -> io::Result<()> {
        let length = u32::try_from(length).map_err(|_| io::Error::from(io::ErrorKind::FileTooLarge))?;
        self.section.extend(length.to_le_bytes());
        Ok(())
    }

    fn put_section(&mut self) -> io::Result<u64> {
        if self.section.len() > LONGEST_FRAME {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        // At most LONGEST_FRAME, which fits.
        let length = (self.section.len() as u32).to_le_bytes();
        let mut checksum = crc32fast::Hasher::new();
        checksum.update(&length);
        checksum.update(&self.section);
        self.output.write_all(&length)?;
        self.output.write_all(&self.section)?;
        self.output.write_all(&checksum.finalize().to_le_bytes())?;
        self.output.flush()?;
        Ok(self.section.len() as u64 + 8)
    }

    /// What was written to.
    pub fn into_inner(self) -> W {
        self.output
    }
}
