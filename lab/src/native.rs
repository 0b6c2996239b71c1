// SPDX-License-Identifier: MIT OR Apache-2.0
//! Parts of the module built for user space, from its own sources.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::Lab;
use crate::{proc, product};

const COMPILE_TIMEOUT: Duration = Duration::from_secs(120);

/// Compiles `sources` in `kmod/bench` to a program for this machine.
pub fn build(lab: &Lab, name: &str, sources: &[&str]) -> Result<PathBuf> {
    let program = product::target_dir(lab).join(name);
    proc::run(
        Command::new("cc")
            .args(["-O2", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror", "-Ishim", "-I.."])
            .args(sources)
            .arg("-o")
            .arg(&program)
            .current_dir(lab.root.join("kmod/bench")),
        &lab.log(&format!("{name}-cc")),
        COMPILE_TIMEOUT,
    )?;
    Ok(program)
}
