// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a host started from a snapshot is given: a raw disk whose first block
//! says how long the cpio archive behind it is. `amd/host-init` reads it.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use crate::cpio::Cpio;

/// Size of the disk; the file is sparse. A snapshot knows it.
const DISK_BYTES: u64 = 256 << 20;
const HEADER_BYTES: u64 = 4096;

/// Files for the host, unpacked to /payload there.
#[derive(Default)]
pub struct Payload {
    archive: Cpio,
}

impl Payload {
    /// A payload whose program `run` is this shell script. Its standard input
    /// and output are the second serial port.
    pub fn new(run: &str) -> Result<Self> {
        let mut archive = Cpio::default();
        archive.content("run", format!("#!/bin/busybox sh\n{run}\n").as_bytes())?;
        Ok(Self { archive })
    }

    /// Adds a file.
    pub fn file(mut self, name: &str, from: &Path) -> Result<Self> {
        self.archive.file(name, from)?;
        Ok(self)
    }

    /// Adds a file of this content.
    pub fn content(mut self, name: &str, content: &[u8]) -> Result<Self> {
        self.archive.content(name, content)?;
        Ok(self)
    }

    /// Writes the disk.
    pub fn write(self, disk: &Path) -> Result<()> {
        let archive = self.archive.finish()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let header = format!("EPT-PAYLOAD {now} {}\n", archive.len());
        if HEADER_BYTES + archive.len() as u64 > DISK_BYTES {
            bail!("the payload has {} bytes, too many for its disk", archive.len());
        }
        let file = write_empty(disk)?;
        file.write_all_at(&archive, HEADER_BYTES)
            .and_then(|()| file.write_all_at(header.as_bytes(), 0))
            .with_context(|| format!("writing {}", disk.display()))
    }
}

/// Writes a disk without a payload, for the host to be snapshotted with.
pub fn write_empty(disk: &Path) -> Result<File> {
    let file = File::create(disk).with_context(|| format!("creating {}", disk.display()))?;
    file.set_len(DISK_BYTES).with_context(|| format!("setting the length of {}", disk.display()))?;
    Ok(file)
}
