// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest in huge pages of the host, of which KVM maps what is executed by 4 KiB, as it
//! does on CPUs with the erratum of ITLB multihits: a page that moves takes the 2 MiB
//! around it along.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::daemon::{self, Daemon};
use super::domain::{Domain, Memory};
use super::placement::{self, HUGE_POLICY};
use super::truth::{self, Truth};
use crate::report::Outcome;

const PARAMETER: &str = "/sys/module/kvm/parameters/nx_huge_pages";
const SPLITS: &str = "/sys/kernel/debug/kvm/nx_lpage_splits";

/// The daemon's sums may differ from the kernel's by what the guest freed meanwhile.
const SLACK_BYTES: u64 = 1 << 20;

/// For how long the guest is watched after it was placed: dozens of rounds.
const WATCH: Duration = Duration::from_secs(20);

/// What may move in that time: one region comes, one goes, twice.
const RESTLESS_BYTES: u64 = 8 << 20;

/// NX huge pages, forced until this is dropped.
struct Forced(String);

impl Forced {
    fn new() -> Result<Self> {
        let before = fs::read_to_string(PARAMETER).with_context(|| format!("reading {PARAMETER}"))?;
        fs::write(PARAMETER, "force").with_context(|| format!("writing {PARAMETER}"))?;
        Ok(Self(if before.trim() == "Y" { "force".into() } else { "off".into() }))
    }
}

impl Drop for Forced {
    fn drop(&mut self) {
        if let Err(error) = fs::write(PARAMETER, &self.0) {
            eprintln!("{PARAMETER} stays as it is: {error}");
        }
    }
}

pub fn run() -> Result<Outcome> {
    let _forced = Forced::new()?;
    let _daemon = Daemon::start()?;
    let (mut guest, truth) = placement::start(Memory::Anonymous, HUGE_POLICY)?;
    let placed = placement::wait_placed(&guest, &truth)?;
    let splits = splits()?;
    ensure!(splits > 0, "KVM has split nothing: there is nothing to see");
    let (first, _) = at_rest(&guest)?;
    watch(&guest, &truth)?;
    let (last, slow) = at_rest(&guest)?;
    let moved = last.moved() - first.moved();
    let sums = format!(
        "{} KiB demoted less {} KiB promoted, {} KiB lie on the slow node by numa_maps",
        last.demoted >> 10,
        last.promoted >> 10,
        slow >> 10
    );
    ensure!((last.demoted - last.promoted).abs_diff(slow) <= SLACK_BYTES, "{sums}");
    ensure!(moved <= RESTLESS_BYTES, "{} KiB moved in {WATCH:?} after it was placed", moved >> 10);
    guest.check_data()?;
    Ok(Outcome::Pass(format!(
        "{splits} huge mappings split; {placed}; {sums}; {} KiB moved in the last {} s",
        moved >> 10,
        WATCH.as_secs()
    )))
}

/// Bytes that moved since the daemon came.
#[derive(Clone, Copy, PartialEq)]
struct Sums {
    demoted: u64,
    promoted: u64,
}

impl Sums {
    fn of(guest: &Domain) -> Result<Self> {
        let moves = daemon::domain(guest.name)?.context("the daemon lost the domain")?.moves;
        Ok(Self { demoted: moves.demoted_bytes, promoted: moves.promoted_bytes })
    }

    fn moved(self) -> u64 {
        self.demoted + self.promoted
    }
}

/// Bytes moved by the daemon's count, and those on the slow node by the kernel's, of a
/// moment in which nothing moves.
fn at_rest(guest: &Domain) -> Result<(Sums, u64)> {
    let until = Instant::now() + WATCH * 3;
    loop {
        let before = Sums::of(guest)?;
        let nodes = truth::numa_maps(guest.pid()?, &daemon::map(guest.name)?)?;
        if before == Sums::of(guest)? {
            return Ok((before, nodes.get(&(placement::SLOW as u32)).copied().unwrap_or(0)));
        }
        ensure!(Instant::now() < until, "it never rests: {}", daemon::log_tail());
    }
}

/// What is hot stays where it is.
fn watch(guest: &Domain, truth: &Truth) -> Result<()> {
    let until = Instant::now() + WATCH;
    while Instant::now() < until {
        let share = placement::share_on(placement::FAST, guest, &truth.hot)?;
        ensure!(share >= 0.9, "only {share:.2} of the hot block is on the fast node");
        std::thread::sleep(Duration::from_secs(1));
    }
    Ok(())
}

/// Huge mappings that KVM keeps split now, of all VMs.
fn splits() -> Result<u64> {
    let text = fs::read_to_string(SPLITS).with_context(|| format!("reading {SPLITS}"))?;
    text.trim().parse().with_context(|| format!("{SPLITS} says {text:?}"))
}
