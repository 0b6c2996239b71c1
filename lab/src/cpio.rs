// SPDX-License-Identifier: MIT OR Apache-2.0
//! Archives of the cpio "newc" kind, which the kernel takes as initramfs
//! (Documentation/driver-api/early-userspace/buffer-format.rst) and busybox
//! unpacks. Everything belongs to root and is executable.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

const FILE: u32 = 0o100_755;
const DIRECTORY: u32 = 0o040_755;

/// An archive being written.
#[derive(Default)]
pub struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
}

impl Cpio {
    /// Adds the file at `from` under `name`.
    pub fn file(&mut self, name: &str, from: &Path) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("reading {}", from.display()))?;
        self.content(name, &content)
    }

    /// Adds a file of this content under `name`.
    pub fn content(&mut self, name: &str, content: &[u8]) -> Result<()> {
        self.entry(name, FILE, content)
    }

    /// Adds a folder; it must come before what lies in it.
    pub fn directory(&mut self, name: &str) -> Result<()> {
        self.entry(name, DIRECTORY, &[])
    }

    /// The finished archive.
    pub fn finish(mut self) -> Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.bytes)
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.entries += 1;
        let size = u32::try_from(content.len()).with_context(|| format!("{name}: too long"))?;
        let name_size = u32::try_from(name.len() + 1).context("a name is too long")?;
        let links = 1;
        // inode, mode, uid, gid, links, mtime, size, device (2), rdevice (2), name, check
        let inode = self.entries;
        let fields = [inode, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
        Ok(())
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
