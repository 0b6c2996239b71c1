// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask`: emulated Intel and AMD hosts, and what runs on them.

mod apt;
mod cache;
mod proc;
mod progress;
mod verdict;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use cache::Cache;
use progress::Progress;

/// What all parts of the lab share.
pub struct Lab {
    /// The project's root folder.
    pub root: PathBuf,
    /// Built images.
    pub cache: Cache,
    /// What is shown.
    pub progress: Progress,
}

impl Lab {
    fn new() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .context("the lab's folder has no parent")?
            .to_path_buf();
        let cache = Cache::open(&root.join(".lab-cache"))?;
        Ok(Self { root, cache, progress: Progress::new() })
    }

    /// The file that the output of a command goes to. Logs of the last run
    /// stay; the next run replaces them.
    pub fn log(&self, name: &str) -> PathBuf {
        self.cache.dir().join("logs").join(format!("{name}.log"))
    }
}

fn main() -> Result<()> {
    proc::end_children_on_signals()?;
    let _lab = Lab::new()?;
    Ok(())
}
