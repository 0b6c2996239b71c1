// SPDX-License-Identifier: MIT OR Apache-2.0
//! The whole way: libvirt starts a guest, the daemon finds what is hot, the
//! rest moves to the slow node, and the guest does not notice.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ept_virt_core::wire::DomainState;

use super::daemon::{self, Daemon};
use super::domain::{Domain, DomainSpec, Memory, policy};
use super::host;
use super::truth::{self, Score, Truth};
use crate::report::Outcome;

/// Short times, so that a test sees the end of what takes minutes elsewhere.
const TIMES: &str = "<ev:sampling><ev:interval unit='ms'>500</ev:interval></ev:sampling>\
    <ev:temperature><ev:half-life unit='s'>3</ev:half-life></ev:temperature>\
    <ev:migration><ev:delay unit='s'>2</ev:delay></ev:migration>";

/// The hot block and a little for the guest's kernel; what is above that stays
/// with whatever is there, idle pages among it.
pub const MEMFD_POLICY: &str = "<ev:dram><ev:max unit='MiB'>37</ev:max></ev:dram>";

/// In units of 2 MiB the guest's kernel makes about 56 MiB look hot beside the
/// block's 32, all of the same heat: what does not fit stays where it is, whosever
/// it is. Of what fits besides, up to a tenth of the idle block's 64 MiB may be
/// idle. So this holds for 84 to 93 MiB of hot units.
pub const HUGE_POLICY: &str = "<ev:dram><ev:max unit='MiB'>90</ev:max></ev:dram>";

/// Half of what will be hot; later more, while that slows the guest down.
const SLOWED_POLICY: &str = "<ev:dram share='6%'/>";
const SLOWED_LIMIT: &str = "dram.max-slowdown=0.1%";

const OBSERVE_TIMEOUT: Duration = Duration::from_secs(60);
const FIND_TIMEOUT: Duration = Duration::from_secs(60);
const PLACE_TIMEOUT: Duration = Duration::from_secs(150);

/// Node numbers of the emulated host.
pub const FAST: i32 = 0;
pub const SLOW: i32 = 1;

const HUGE_PAGES: u64 = 512;

/// Guest memory in 4 KiB pages: exact truth.
pub fn memfd() -> Result<Outcome> {
    let _daemon = Daemon::start()?;
    let (mut guest, truth) = start(Memory::Memfd, MEMFD_POLICY)?;
    let placed = wait_placed(&guest, &truth)?;
    let score = wait_found(&guest, &truth, 1, 0.90)?;
    let map = daemon::map(guest.name)?;
    let slow = truth::numa_maps(guest.pid()?, &map)?;
    let slow = slow.get(&(SLOW as u32)).copied().unwrap_or(0);
    let idle = truth.idle.len() as u64 * 4096;
    ensure!(slow * 10 >= idle * 9, "numa_maps has {slow} bytes on the slow node, the idle block has {idle}");
    let back = promote(&mut guest, &truth)?;
    let moves = daemon::domain(guest.name)?.context("the daemon lost the domain")?.moves;
    let (verified, wrong) = (moves.places_verified, moves.places_wrong);
    ensure!(verified > 1000 && wrong * 200 <= verified, "{wrong} of {verified} places were wrong");
    guest.check_data()?;
    check_nudged()?;
    Ok(Outcome::Pass(format!(
        "recall {:.3}, precision {:.3}; {placed}; {back}; {wrong} of {verified} places wrong",
        score.recall, score.precision
    )))
}

/// Anonymous guest memory: huge pages are judged and moved whole.
pub fn huge_pages() -> Result<Outcome> {
    let _daemon = Daemon::start()?;
    let (mut guest, truth) = start(Memory::Anonymous, HUGE_POLICY)?;
    let placed = wait_placed(&guest, &truth)?;
    // No bound on precision: the guest's kernel has some hot page in most of
    // its units of 2 MiB, and they are truly hot.
    let score = wait_found(&guest, &truth, HUGE_PAGES, 0.0)?;
    let round = daemon::domain(guest.name)?.and_then(|d| d.round).context("the daemon lost the domain")?;
    ensure!(
        round.mapped_huge_bytes * 2 > round.mapped_bytes,
        "only {} of {} mapped bytes are in huge pages after placement",
        round.mapped_huge_bytes,
        round.mapped_bytes
    );
    guest.check_data()?;
    Ok(Outcome::Pass(format!(
        "recall {:.3}, precision {:.3} at 2 MiB, {} of {} MiB in huge pages; {placed}",
        score.recall,
        score.precision,
        round.mapped_huge_bytes >> 20,
        round.mapped_bytes >> 20
    )))
}

/// A guest to which more becomes hot than its share has room for gets as much as it
/// needs, because it is slowed down otherwise.
pub fn slowed() -> Result<Outcome> {
    let _daemon = Daemon::start()?;
    let (mut guest, truth) = start(Memory::Memfd, SLOWED_POLICY)?;
    guest.tell("heat off")?;
    // All is equally cold then, and what stays may be of any block: 11.5 MiB, which is 18 %
    // of the idle one. What becomes hot is a part of that.
    host::wait_until("the idle block leaves", PLACE_TIMEOUT, || {
        Ok(share_on(SLOW, &guest, &truth.idle)? >= 0.8)
    })
    .with_context(|| {
        format!("status {:?}; daemon log: {}", daemon::domain(guest.name), daemon::log_tail())
    })?;
    // No sooner: what is given to a guest is taken back in minutes only.
    daemon::cli_text(&["policy", "set", guest.name, SLOWED_LIMIT])?;
    let back = promote(&mut guest, &truth)?;
    let status = daemon::domain(guest.name)?.context("the daemon lost the domain")?;
    let slowdown = status.slowdown.context("no slowdown is shown")?;
    ensure!(slowdown.given_bytes >= 8 << 20, "{slowdown:?}");
    ensure!(slowdown.gap_from == "ACPI's HMAT" && slowdown.gap_ns > 0, "{slowdown:?}");
    guest.check_data()?;
    Ok(Outcome::Pass(format!(
        "{} MiB given beyond the share; {} ns by {}; {back}",
        slowdown.given_bytes >> 20,
        slowdown.gap_ns,
        slowdown.gap_from
    )))
}

/// Starts a guest that is placed under this element of a policy, and waits until it
/// is.
pub fn start(memory: Memory, dram: &str) -> Result<(Domain, Truth)> {
    let policy = policy("place", &format!("{TIMES}{dram}"));
    let spec = DomainSpec { memory, policy, ..DomainSpec::default() };
    let mut guest = spec.start()?;
    let truth = guest.wait_ready()?;
    daemon::wait_for(guest.name, "the daemon places", OBSERVE_TIMEOUT, |d| {
        d.state == DomainState::Placing && d.round.as_ref().is_some_and(|r| r.number >= 4)
    })?;
    Ok((guest, truth))
}

/// Waits until nine tenths of the idle block lie on the slow node and nine
/// tenths of the hot block on the fast one, by the host's kernel.
pub fn wait_placed(guest: &Domain, truth: &Truth) -> Result<String> {
    let mut seen = String::new();
    let outcome = host::wait_until("the guest is placed", PLACE_TIMEOUT, || {
        let idle = share_on(SLOW, guest, &truth.idle)?;
        let hot = share_on(FAST, guest, &truth.hot)?;
        seen = format!("{:.1} % of idle slow, {:.1} % of hot fast", idle * 100.0, hot * 100.0);
        eprintln!("{seen}");
        Ok(idle >= 0.9 && hot >= 0.9)
    });
    outcome.with_context(|| {
        let status = daemon::domain(guest.name).map(|d| serde_json::to_string(&d));
        format!("{seen}; status {status:?}; daemon log: {}", daemon::log_tail())
    })?;
    Ok(seen)
}

/// Waits until the map calls hot what is hot: temperature takes some half-lives
/// to rise. `unit` is the number of pages to a mapping.
fn wait_found(guest: &Domain, truth: &Truth, unit: u64, precision: f64) -> Result<Score> {
    let mut score = None;
    host::wait_until("the hot block is found", FIND_TIMEOUT, || {
        let now = truth::score_hot(truth, &daemon::map(guest.name)?, unit);
        eprintln!("{now:?}");
        score = Some(now);
        Ok(now.recall >= 0.99 && now.precision >= precision)
    })
    .with_context(|| format!("{score:?}, wanted recall 0.99 and precision {precision}"))?;
    score.context("no score")
}

/// Half of the idle block becomes hot in place of the hot block, and comes back.
fn promote(guest: &mut Domain, truth: &Truth) -> Result<String> {
    guest.tell("heat off")?;
    guest.tell("touch-idle 24")?;
    let mut seen = 0.0;
    host::wait_until("what became hot comes back", PLACE_TIMEOUT, || {
        seen = share_on(FAST, guest, &truth.idle)?;
        // 24 of 64 MiB, with a tenth left to go.
        Ok(seen >= 0.9 * 24.0 / 64.0)
    })
    .with_context(|| format!("share on the fast node {seen:.2}; {}", daemon::log_tail()))?;
    Ok(format!("{:.0} of 24 MiB came back", seen * 64.0))
}

/// Share of these frames that lie on a node, by the host's kernel.
pub fn share_on(node: i32, guest: &Domain, frames: &BTreeSet<u64>) -> Result<f64> {
    let nodes = truth::pages_by_node(guest.pid()?, &daemon::map(guest.name)?, frames)?;
    let on = nodes.get(&node).copied().unwrap_or(0);
    Ok(on as f64 / frames.len() as f64)
}

/// The hook's word must have arrived.
fn check_nudged() -> Result<()> {
    let daemon = daemon::status()?.daemon;
    if daemon.nudges == 0 {
        bail!("the hook did not nudge the daemon at virsh start");
    }
    Ok(())
}
