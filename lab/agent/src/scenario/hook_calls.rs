// SPDX-License-Identifier: MIT OR Apache-2.0
//! A hook of libvirt that writes down how it is called, beside the product's own.
//! It is this program, under a name that says what it is for.

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::domain::POLICY_NAMESPACE;
use super::host::PAYLOAD;

/// This program's name as a hook.
pub const NAME: &str = "recorder";

/// Where it is installed; libvirt sees new files there at once.
const HOOK: &str = "/etc/libvirt/hooks/qemu.d/recorder";

/// A line for each call. Under /run, as each libvirtd has one of its own.
const CALLS: &str = "/run/hook-calls";

/// One call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Call {
    /// The domain's name.
    pub domain: String,
    /// Operation, sub-operation and extra argument.
    pub words: String,
    /// Whether a policy stood in the XML that came with it.
    pub has_policy: bool,
}

/// Writes down this call. Nothing on stdout: that would replace a domain's XML.
pub fn record(arguments: &[&str]) -> Result<()> {
    let [domain, words @ ..] = arguments else { bail!("a hook call without a domain") };
    let mut xml = Vec::new();
    std::io::stdin().read_to_end(&mut xml).context("reading the domain's XML")?;
    let xml = String::from_utf8_lossy(&xml);
    let policy = if xml.contains(POLICY_NAMESPACE) { "policy" } else { "bare" };
    let line = format!("{domain}\t{}\t{policy}\n", words.join(" "));
    let file = OpenOptions::new().create(true).append(true).open(CALLS);
    file.and_then(|mut file| file.write_all(line.as_bytes())).with_context(|| format!("writing {CALLS}"))
}

/// The installed recorder, which is removed when this is dropped.
pub struct Recorder {
    calls: PathBuf,
}

impl Recorder {
    /// Installs it, with no calls so far.
    pub fn install() -> Result<Self> {
        // What an earlier run left, perhaps; what matters shows below.
        let _ = fs::remove_file(HOOK);
        let _ = fs::remove_file(CALLS);
        symlink(format!("{PAYLOAD}/lab-agent"), HOOK).with_context(|| format!("installing {HOOK}"))?;
        Ok(Self { calls: CALLS.into() })
    }

    /// All calls so far.
    pub fn calls(&self) -> Result<Vec<Call>> {
        calls(&self.calls)
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        let _ = fs::remove_file(HOOK);
    }
}

/// All calls that a recorder on the host with this root folder was given.
pub fn calls_on(root: &Path) -> Result<Vec<Call>> {
    calls(&root.join(CALLS.trim_start_matches('/')))
}

fn calls(path: &Path) -> Result<Vec<Call>> {
    // Without a call there is no file.
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines()
        .map(|line| match line.split('\t').collect::<Vec<_>>().as_slice() {
            [domain, words, policy] => Ok(Call {
                domain: (*domain).to_owned(),
                words: (*words).to_owned(),
                has_policy: *policy == "policy",
            }),
            _ => bail!("{}: {line:?} is no call", path.display()),
        })
        .collect()
}
