// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory that a running domain gets is observed as the rest is.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::console::Console;
use super::daemon::{self, Daemon};
use super::host::virsh;
use super::tiny;
use crate::report::Outcome;

const NAME: &str = "guest";
const ADDED_MIB: u64 = 64;
const DIMM: &str = "/run/dimm.xml";
const TIMEOUT: Duration = Duration::from_secs(60);

/// The scenario.
pub fn run() -> Result<Outcome> {
    let path = tiny::write(NAME, None)?;
    let xml = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    fs::write(&path, with_room(&xml)?).with_context(|| format!("writing {path}"))?;
    virsh(&["define", &path])?;
    let daemon = Daemon::start()?;
    Console::clear(NAME)?;
    virsh(&["start", NAME])?;
    let mut console = Console::connect(NAME)?;
    console.wait_ready()?;
    let before =
        daemon::wait_for(NAME, "a round", TIMEOUT, |d| d.round.as_ref().is_some_and(|r| r.number > 1))?;

    let dimm = format!(
        "<memory model='dimm'><target><size unit='MiB'>{ADDED_MIB}</size><node>0</node></target></memory>"
    );
    fs::write(DIMM, dimm).with_context(|| format!("writing {DIMM}"))?;
    virsh(&["attach-device", NAME, DIMM, "--live"])?;
    let wanted = before.memory_bytes + (ADDED_MIB << 20);
    let after = daemon::wait_for(NAME, "the memory that was added", TIMEOUT, |d| d.memory_bytes == wanted)?;
    let number = after.round.as_ref().map_or(0, |round| round.number);
    let later = daemon::wait_for(NAME, "rounds of it", TIMEOUT, |d| {
        d.round.as_ref().is_some_and(|r| r.number > number + 1)
    })?;
    ensure!(later.pid == before.pid && later.slots == before.slots + 1, "{later:?}, before {before:?}");
    // The guest's accesses to the rest are seen as before.
    let accessed = later.round.as_ref().map_or(0, |round| round.accessed_bytes);
    ensure!(accessed > 0, "nothing is seen accessed any more: {later:?}");
    console.check_data()?;
    daemon.stop()?;
    Ok(Outcome::Pass(format!(
        "{} MiB in {} slots, then {} in {}",
        before.memory_bytes >> 20,
        before.slots,
        later.memory_bytes >> 20,
        later.slots
    )))
}

/// A domain that can get memory: what it may have at most, and a node to put it in.
fn with_room(xml: &str) -> Result<String> {
    let memory = format!("<memory unit='MiB'>{}</memory>", tiny::MEMORY_MIB);
    let most = format!("<maxMemory slots='2' unit='MiB'>256</maxMemory>{memory}");
    let cell = format!(
        "<numa><cell id='0' cpus='0' memory='{}' unit='MiB' memAccess='shared'/></numa></cpu>",
        tiny::MEMORY_MIB
    );
    ensure!(xml.contains(&memory) && xml.contains("</cpu>"), "the tiny guest's XML is another: {xml}");
    Ok(xml.replace(&memory, &most).replace("</cpu>", &cell))
}
