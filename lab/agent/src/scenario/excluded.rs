// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory that a policy excludes stays where it is, by the word of the host's kernel,
//! while what lies beside it goes.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::daemon::{self, Daemon};
use super::domain::{Domain, DomainSpec, policy};
use super::{host, truth};
use crate::report::Outcome;

/// Short times, and far less DRAM than is hot: all that is idle has to go.
const SQUEEZE: &str = "<ev:sampling><ev:interval unit='ms'>500</ev:interval></ev:sampling>\
    <ev:temperature><ev:half-life unit='s'>3</ev:half-life></ev:temperature>\
    <ev:dram><ev:max unit='MiB'>8</ev:max></ev:dram>\
    <ev:migration><ev:delay unit='s'>2</ev:delay></ev:migration>";

const POLICY: &str = "/run/excluded-policy.xml";
const PAGE_BYTES: u64 = 4096;

/// What moves as a whole where the host has huge pages.
const UNIT_PAGES: u64 = 512;

const TIMEOUT: Duration = Duration::from_secs(120);

/// The scenario.
pub fn run() -> Result<Outcome> {
    let _daemon = Daemon::start()?;
    let mut guest = DomainSpec::default().start()?;
    let truth = guest.wait_ready()?;
    let idle: Vec<u64> = truth.idle.iter().copied().collect();
    let (stays, rest) = idle.split_at(idle.len() / 2);
    let stays: BTreeSet<u64> = stays.iter().copied().collect();
    let units: BTreeSet<u64> = stays.iter().map(|gfn| gfn / UNIT_PAGES).collect();
    let goes = rest.iter().copied().filter(|gfn| !units.contains(&(gfn / UNIT_PAGES))).collect();
    let far = "<ev:range start='0xfff000000000' end='0xfff000001000'/><ev:memory alias='dimm7'/>";
    let exclude = format!("{SQUEEZE}<ev:exclude>{}{far}</ev:exclude>", ranges(&stays));
    let element = policy("place", &exclude).unwrap_or_default();
    fs::write(POLICY, element).with_context(|| format!("writing {POLICY}"))?;
    daemon::cli_text(&["policy", "set", guest.name, "--file", POLICY, "--live"])?;
    let mut gone = 0.0;
    host::wait_until("what is not excluded leaves", TIMEOUT, || {
        gone = share_slow(&guest, &goes)?;
        Ok(gone >= 0.9)
    })
    .with_context(|| format!("{gone:.2} of it left; {}", daemon::log_tail()))?;
    // As long again: what is excluded would have been next.
    std::thread::sleep(Duration::from_secs(5));
    let moved = share_slow(&guest, &stays)?;
    ensure!(moved == 0.0, "{:.2} % of the excluded memory lies on the slow node", moved * 100.0);
    let status = daemon::domain(guest.name)?.context("the daemon lost the domain")?;
    let least = stays.len() as u64 * PAGE_BYTES;
    ensure!(
        status.excluded_bytes >= least,
        "{} of {least} bytes are shown as excluded",
        status.excluded_bytes
    );
    let warned = |word: &str| status.policy_warnings.iter().any(|warning| warning.contains(word));
    ensure!(warned("0xfff000000000") && warned("\"dimm7\""), "{:?}", status.policy_warnings);
    guest.check_data()?;
    Ok(Outcome::Pass(format!(
        "{} MiB excluded, none of it moved; {:.0} % of {} MiB beside it left",
        least >> 20,
        gone * 100.0,
        (goes.len() as u64 * PAGE_BYTES) >> 20
    )))
}

/// An element for each run of frames.
fn ranges(frames: &BTreeSet<u64>) -> String {
    let mut text = String::new();
    let mut frames = frames.iter().copied().peekable();
    while let Some(start) = frames.next() {
        let mut end = start + 1;
        while frames.next_if_eq(&end).is_some() {
            end += 1;
        }
        let [start, end] = [start, end].map(|frame| frame * PAGE_BYTES);
        text += &format!("<ev:range start='{start:#x}' end='{end:#x}'/>");
    }
    text
}

fn share_slow(guest: &Domain, frames: &BTreeSet<u64>) -> Result<f64> {
    let nodes = truth::pages_by_node(guest.pid()?, &daemon::map(guest.name)?, frames)?;
    Ok(nodes.get(&1).copied().unwrap_or(0) as f64 / frames.len().max(1) as f64)
}
