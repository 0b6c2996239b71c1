// SPDX-License-Identifier: MIT OR Apache-2.0
//! A live migration from one QEMU to another on this host, while the module
//! harvests, clears dirty bits and samples at the source. A write that the dirty
//! log misses is old data at the target, and its workload says so.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ept_virt_core::sampler::{Harvest, HarvestRequest, KernelSampler, Sampler};
use ept_virt_core::topology::NodeSet;
use serde_json::json;

use super::hammer::{self, Hammer};
use super::host;
use super::qemu::Qemu;
use super::truth::Truth;
use crate::report::Outcome;

const SOCKET: &str = "/run/migration.sock";

/// Slow enough that much of the hot block is dirty again before it is sent.
const SLOW_BYTES: u64 = 24 << 20;

/// How often the dirty log is read: at least, and before the migration may end.
const LEAST_SYNCS: u64 = 3;
const MOST_SYNCS: u64 = 8;

const TIMEOUT: Duration = Duration::from_secs(90);

/// The scenario.
pub fn run() -> Result<Outcome> {
    let mut source = Qemu::start("source", None)?;
    let truth = source.console.wait_ready()?;
    source.console.tell("patrol 64")?;
    let hammer = Hammer::start(source.pid()?)?;
    hammer.wait_seen()?;
    let mut target = Qemu::start("target", Some(SOCKET))?;
    let syncs = migrate(&mut source, &hammer)?;
    // The workload's last word at the source was before it was frozen.
    target.console.wait_passes()?;
    target.console.check_data()?;
    // The source is frozen now: its VM is there, and nothing is left to see.
    hammer.check_running()?;
    source.kill()?;
    let seen = hammer.wait_gone()?;
    let hammer = Hammer::start(target.pid()?)?;
    hammer.wait_seen()?;
    upgrade(hammer)?;
    find_hot(&mut hammer::attach(target.pid()?)?, &truth)?;
    target.console.check_data()?;
    Ok(Outcome::Pass(format!(
        "{} of {} harvests under dirty logging, {} samples, {syncs} passes of the dirty log",
        seen.logged_rounds, seen.rounds, seen.samples
    )))
}

/// The module goes as soon as its last session is closed, not before, and comes
/// back.
fn upgrade(hammer: Hammer) -> Result<()> {
    ensure!(host::remove_module().is_err(), "the module was removed while sessions were open");
    hammer.wait_seen()?;
    hammer.stop()?;
    host::remove_module().context("right after the last session was closed")?;
    host::insert_module()
}

/// Migrates from `source` to who listens at the socket; how often the dirty log
/// was read. The bandwidth is low, so that it is read several times; it is set
/// free if the guest goes on writing faster than that.
fn migrate(source: &mut Qemu, hammer: &Hammer) -> Result<u64> {
    let before = hammer.seen();
    let slow = json!({"max-bandwidth": SLOW_BYTES, "downtime-limit": 1});
    source.execute("migrate-set-parameters", slow)?;
    source.execute("migrate", json!({ "uri": format!("unix:{SOCKET}") }))?;
    let mut syncs = 0;
    let mut free = false;
    host::wait_until("the migration is done", TIMEOUT, || {
        hammer.check_running()?;
        let answer = source.execute("query-migrate", json!({}))?;
        syncs = answer["ram"]["dirty-sync-count"].as_u64().unwrap_or(syncs);
        if syncs >= MOST_SYNCS && !free {
            let fast = json!({"max-bandwidth": 1_u64 << 40, "downtime-limit": 60_000});
            source.execute("migrate-set-parameters", fast)?;
            free = true;
        }
        match answer["status"].as_str() {
            Some("completed") => Ok(true),
            Some("failed" | "cancelled") => bail!("the migration failed: {answer}"),
            _ => Ok(false),
        }
    })?;
    let after = hammer.seen();
    ensure!(syncs >= LEAST_SYNCS, "the dirty log was read {syncs} times only");
    ensure!(
        after.logged_rounds >= before.logged_rounds + 50 && after.samples >= before.samples + 100,
        "the module did little while the dirty log was on: {before:?}, then {after:?}"
    );
    Ok(syncs)
}

/// Waits for harvests that find all of the hot block accessed.
fn find_hot(sampler: &mut KernelSampler, truth: &Truth) -> Result<()> {
    let mut found = BTreeSet::new();
    let mut seen = Harvest::default();
    host::wait_until("harvests of the target find the hot block", TIMEOUT, || {
        for slot in sampler.memslots()?.1.iter().filter(|slot| !slot.read_only) {
            let request = HarvestRequest {
                gfn_start: slot.gfn_start,
                gfn_count: slot.page_count,
                clear_accessed: true,
                clear_dirty: false,
                flush: true,
                keep_young: true,
            };
            sampler.harvest(&request, &NodeSet::default(), &mut seen)?;
            let bits = (0..slot.page_count).filter(|i| seen.accessed[(i / 64) as usize] >> (i % 64) & 1 == 1);
            found.extend(bits.map(|i| slot.gfn_start + i));
        }
        Ok(truth.hot.is_subset(&found))
    })
    .with_context(|| format!("{} of {} pages", truth.hot.intersection(&found).count(), truth.hot.len()))
}
