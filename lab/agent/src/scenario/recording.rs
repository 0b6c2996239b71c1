// SPDX-License-Identifier: MIT OR Apache-2.0
//! Recordings of a real guest, from the daemon's rounds and without a daemon, and what
//! the simulator makes of them.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ept_virt_core::record::{Frame, Reader};
use ept_virt_core::units::PAGE_BYTES;
use serde_json::Value;

use super::daemon::{self, Daemon};
use super::domain::{Domain, DomainSpec, Memory};
use super::truth::Truth;
use crate::report::Outcome;

const TIMEOUT: Duration = Duration::from_secs(60);

const BY_DAEMON: &str = "/run/by-daemon.rec";
const ALONE: &str = "/run/alone.rec";

/// Both recordings find what the guest does; the daemon misses nothing meanwhile.
pub fn run() -> Result<Outcome> {
    let daemon = Daemon::start()?;
    let mut guest = DomainSpec { memory: Memory::Memfd, ..DomainSpec::default() }.start()?;
    let truth = guest.wait_ready()?;
    let hot = |d: &ept_virt_core::wire::DomainStatus| d.round.as_ref().map_or(0, |round| round.hot_bytes);
    // In a round the guest may not come around to all of its hot block.
    let block_bytes = truth.hot.len() as u64 * PAGE_BYTES * 9 / 10;
    daemon::wait_for(guest.name, "hot memory", 3 * TIMEOUT, |d| hot(d) >= block_bytes)?;
    let (code, refusal) =
        daemon::cli_failure(&["record", guest.name, BY_DAEMON, "--rounds", "1", "--interval", "2s"])?;
    ensure!(code == Some(1) && refusal.contains("--interval"), "exit code {code:?}: {refusal}");
    ensure!(!Path::new(BY_DAEMON).exists(), "an empty file is left");
    let by_daemon = record(&guest, &truth, BY_DAEMON, &["--rounds", "6"])?;
    let after = daemon::domain(guest.name)?.context("the daemon lost the domain")?;
    // The heat stays; what else was hot while the guest booted need not.
    ensure!(hot(&after) >= block_bytes, "{} bytes hot, of the block's {block_bytes}", hot(&after));
    daemon.stop()?;
    let alone = record(&guest, &truth, ALONE, &["--rounds", "6", "--interval", "1s"])?;
    let ratio = simulate()?;
    guest.check_data()?;
    Ok(Outcome::Pass(format!(
        "of the hot block {by_daemon:.3} accessed in a round by the daemon's, {alone:.3} alone; simulated with half of the memory: {ratio:.3} of accessed pages in DRAM"
    )))
}

/// Records; the least share of the hot block that was accessed in a round.
fn record(guest: &Domain, truth: &Truth, file: &str, args: &[&str]) -> Result<f64> {
    daemon::cli_text(&[&["record", guest.name, file], args].concat())?;
    let mut reader = Reader::new(BufReader::new(File::open(file)?)).context("reading the recording")?;
    ensure!(reader.header().domain == guest.name, "the recording is of {:?}", reader.header());
    let mut frames = Vec::new();
    while let Some(frame) = reader.frame()? {
        frames.push(frame);
    }
    ensure!(frames.len() == 6, "{} rounds in {file}", frames.len());
    let mut least: f64 = 1.0;
    // What the first says is of another time.
    for pair in frames.windows(2) {
        ensure!(pair[0].time < pair[1].time, "times do not grow: {:?} {:?}", pair[0].time, pair[1].time);
        let share = |block: &std::collections::BTreeSet<u64>| {
            block.iter().filter(|gfn| accessed(&pair[1], **gfn)).count() as f64 / block.len() as f64
        };
        let (hot, idle) = (share(&truth.hot), share(&truth.idle));
        ensure!(hot >= 0.9 && idle <= 0.1, "{hot:.3} of the hot block accessed, {idle:.3} of the idle one");
        least = least.min(hot);
    }
    Ok(least)
}

fn accessed(frame: &Frame, gfn: u64) -> bool {
    let slot =
        frame.slots.iter().find(|slot| (slot.gfn_start..slot.gfn_start + slot.page_count).contains(&gfn));
    slot.is_some_and(|slot| ept_virt_core::bitmap::get(&slot.accessed, (gfn - slot.gfn_start) as usize))
}

/// What the simulator says of both.
fn simulate() -> Result<f64> {
    let text = daemon::cli_text(&["simulate", "--recording", BY_DAEMON, ALONE, "--dram", "50%", "--json"])?;
    let report: Value = serde_json::from_str(&text).context("reading the simulator's JSON")?;
    ensure!(
        report["basis"] == "bits" && report["runs"][0]["rounds"].as_array().is_some_and(|r| r.len() == 6)
    );
    report["runs"][0]["summary"]["hit_ratio"].as_f64().context("no hit ratio")
}
