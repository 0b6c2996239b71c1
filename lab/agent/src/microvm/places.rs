// SPDX-License-Identifier: MIT OR Apache-2.0
//! Addresses of every kind that a program can hand to the kernel.

use std::ptr::NonNull;

use anyhow::{Context, Result};

use super::machine::PAGE;

/// A kind of address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Readable and writable, aligned.
    Good,
    /// Readable and writable, at an odd address.
    Unaligned,
    /// Readable only.
    ReadOnly,
    /// All but its last byte is there.
    Cut,
    /// A page that is mapped without any right.
    Forbidden,
    Null,
    /// In the first page, which nobody can map.
    Low,
    /// In the kernel's half: its direct map of memory.
    Kernel,
    /// The kernel's half, its text.
    KernelText,
    /// Neither half.
    NonCanonical,
    /// The first address that is not the program's any more.
    End,
    /// -1.
    Minus,
}

impl Place {
    pub const ALL: [Place; 12] = [
        Place::Good,
        Place::Unaligned,
        Place::ReadOnly,
        Place::Cut,
        Place::Forbidden,
        Place::Null,
        Place::Low,
        Place::Kernel,
        Place::KernelText,
        Place::NonCanonical,
        Place::End,
        Place::Minus,
    ];

    pub fn readable(self) -> bool {
        matches!(self, Place::Good | Place::Unaligned | Place::ReadOnly)
    }

    pub fn writable(self) -> bool {
        matches!(self, Place::Good | Place::Unaligned)
    }

    /// Whether read(2) refuses it before it asks the file.
    pub fn in_kernel(self) -> bool {
        matches!(self, Place::Kernel | Place::KernelText | Place::Minus)
    }
}

/// What the room around an argument is filled with: a call that writes too much,
/// or leaves out what it should write, shows.
pub const FILL: u8 = 0xA5;
/// The room for one argument.
const ROOM: usize = 4 * PAGE;

/// Room for arguments, each at a place of its own.
pub struct Places {
    // Pages: [room][nothing][read only room][nothing]
    start: NonNull<u8>,
}

// SAFETY: the mapping belongs to this value alone.
unsafe impl Send for Places {}

impl Places {
    /// Below 4 GiB when `low`, for calls of 32-bit programs.
    pub fn new(low: bool) -> Result<Places> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | if low { libc::MAP_32BIT } else { 0 };
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), 2 * (ROOM + PAGE), 3, flags, -1, 0) };
        anyhow::ensure!(start != libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
        let places = Places { start: NonNull::new(start.cast()).context("mapped at zero")? };
        for hole in [ROOM, 2 * ROOM + PAGE] {
            places.protect(hole, PAGE, libc::PROT_NONE)?;
        }
        Ok(places)
    }

    fn protect(&self, offset: usize, bytes: usize, rights: i32) -> Result<()> {
        // SAFETY: pages of this value's own mapping, which nothing borrows from.
        let result = unsafe { libc::mprotect(self.start.as_ptr().add(offset).cast(), bytes, rights) };
        anyhow::ensure!(result == 0, "mprotect: {}", std::io::Error::last_os_error());
        Ok(())
    }

    fn room(&mut self, offset: usize) -> &mut [u8] {
        // SAFETY: writable pages of this value's own mapping, borrowed as `self` is.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().add(offset), ROOM) }
    }

    /// An address of this kind with room behind it; nothing is put there.
    pub fn address(&self, place: Place) -> u64 {
        let base = self.start.as_ptr() as u64;
        match place {
            Place::Good => base + 256,
            Place::Unaligned => base + 257,
            Place::ReadOnly => base + (ROOM + PAGE) as u64,
            // What is cut off is all there is.
            Place::Cut | Place::Forbidden => base + ROOM as u64,
            Place::Null => 0,
            Place::Low => 8,
            Place::Kernel => 0xffff_8880_0000_1000,
            Place::KernelText => 0xffff_ffff_8100_0000,
            Place::NonCanonical => 1 << 62,
            Place::End => (1 << 47) - 4096,
            Place::Minus => u64::MAX,
        }
    }

    /// Puts `content` at a place of this kind, as far as it can lie there, and
    /// returns its address.
    pub fn put(&mut self, place: Place, content: &[u8]) -> Result<u64> {
        let base = self.start.as_ptr() as u64;
        let offset = match place {
            Place::Good | Place::Unaligned => (self.address(place) - base) as usize,
            Place::Cut => ROOM + 1 - content.len().max(1),
            Place::ReadOnly => {
                let page = ROOM + PAGE;
                self.protect(page, ROOM, libc::PROT_READ | libc::PROT_WRITE)?;
                self.room(page)[..content.len()].copy_from_slice(content);
                self.protect(page, ROOM, libc::PROT_READ)?;
                return Ok(self.address(place));
            }
            other => return Ok(self.address(other)),
        };
        let room = self.room(0);
        room.fill(FILL);
        let end = (offset + content.len()).min(ROOM);
        room[offset..end].copy_from_slice(&content[..end - offset]);
        Ok(base + offset as u64)
    }

    /// What `bytes` at the good or unaligned place hold now; fails when a byte
    /// around them was written.
    pub fn get(&mut self, place: Place, bytes: usize) -> Result<Vec<u8>> {
        let offset = if place == Place::Unaligned { 257 } else { 256 };
        let room = self.room(0);
        let content = room[offset..offset + bytes].to_vec();
        room[offset..offset + bytes].fill(FILL);
        anyhow::ensure!(room.iter().all(|byte| *byte == FILL), "the kernel wrote beyond {bytes} bytes");
        Ok(content)
    }
}

impl Drop for Places {
    fn drop(&mut self) {
        // SAFETY: this value's own mapping; nothing borrows from it.
        unsafe { libc::munmap(self.start.as_ptr().cast(), 2 * (ROOM + PAGE)) };
    }
}

/// The bytes of a structure of the ABI.
pub fn bytes_of<T: Copy>(value: &T) -> Vec<u8> {
    // SAFETY: the ABI's structures have explicit padding only, so that each of
    // their bytes is initialised.
    unsafe { std::slice::from_raw_parts(std::ptr::from_ref(value).cast(), size_of::<T>()) }.to_vec()
}

/// A structure of the ABI from its bytes.
pub fn from_bytes<T: Copy>(bytes: &[u8]) -> T {
    assert_eq!(bytes.len(), size_of::<T>());
    // SAFETY: as many bytes as the structure has, of which all patterns are valid.
    unsafe { bytes.as_ptr().cast::<T>().read_unaligned() }
}
