// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernels that the lab boots: which there are, and what boots need of one.

use std::fmt;
use std::path::PathBuf;

use anyhow::Result;

use crate::Lab;
use crate::{debian, debug_kernel};

/// Kernel lines that the module knows. docs/KERNELS.md says what runs on each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Line {
    /// Debian bookworm's.
    V6_1,
    /// Debian trixie's.
    V6_12,
    /// That of Debian's trixie-backports.
    V7_3,
    /// Debian trixie's, built with all that watches; not in CI.
    V6_12Debug,
}

/// A kernel as files, whoever built it.
#[derive(Clone)]
pub struct Kernel {
    /// Which line it is of.
    pub line: Line,
    /// The Debian tree in which modules for it are built.
    pub root: PathBuf,
    /// Its release, as `uname -r` says it.
    pub release: String,
    /// The boot image (bzImage, compressed with zstd).
    pub image: PathBuf,
    /// The folder of its modules, with modules.dep.
    pub modules: PathBuf,
    /// Headers and Kbuild for our module, as a path inside `root`.
    pub build: String,
    /// Whether its build tools read /proc, which a tree does not have.
    pub build_reads_proc: bool,
}

impl Line {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::V6_1, Self::V6_12, Self::V7_3, Self::V6_12Debug];

    /// The line that the hosts with libvirt run.
    pub const MAIN: Self = Self::V6_12;

    /// As people say it.
    pub fn name(self) -> &'static str {
        match self {
            Self::V6_1 => "6.1",
            Self::V6_12 => "6.12",
            Self::V7_3 => "7.3",
            Self::V6_12Debug => "6.12-debug",
        }
    }

    /// The kernel, fetched when it is not in the cache.
    pub fn get(self, lab: &Lab) -> Result<Kernel> {
        match self {
            Self::V6_12Debug => debug_kernel::kernel(lab),
            line => debian::kernel(lab, line),
        }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}
