// SPDX-License-Identifier: MIT OR Apache-2.0
//! Two guests with more to do than the host's DRAM holds: it is shared by their
//! weights, a minimum is kept, and both by the account of the host's kernel.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ept_virt_core::topology::node_memory_and_reclaimable;
use ept_virt_core::wire::DomainStatus;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::daemon::{self, Daemon};
use super::domain::{Domain, DomainSpec, POLICY_NAMESPACE, policy};
use super::host::{self, virsh};
use super::truth;
use crate::report::Outcome;

const CONFIG: &str = "/etc/ept-virt/ept-virt.toml";

/// Node numbers of the emulated host.
const FAST: u32 = 0;
const SLOW: u32 = 1;

const MIB: u64 = 1 << 20;

/// What the host leaves to both guests, which use a little more than 200 MiB.
const SHARED: u64 = 128 * MIB;

/// The minimum that the light guest gets in the end.
const MINIMUM: u64 = 56 * MIB;

/// Small beside the rest, so that a pass is short.
const HOT_MIB: u32 = 4;
const IDLE_MIB: u32 = 96;

/// Of the idle block, in each pass: all of it in some seconds.
const PATROL_PAGES: u32 = 160;

/// What is used every few seconds is in use, and can leave DRAM all the same.
const TIMES: &str = "<ev:sampling><ev:interval unit='ms'>1000</ev:interval></ev:sampling>\
    <ev:temperature><ev:half-life unit='s'>6</ev:half-life></ev:temperature>\
    <ev:migration><ev:delay unit='ms'>500</ev:delay></ev:migration>";

const OBSERVE_TIMEOUT: Duration = Duration::from_secs(60);
const SHARE_TIMEOUT: Duration = Duration::from_secs(90);

/// The host's configuration, for the time of the test.
struct Config;

impl Config {
    /// So much DRAM is to stay free that of what the guests hold [`SHARED`] is left:
    /// guests give back until seven eighths of it are free.
    fn with_shortage(daemon: &Daemon, held: u64) -> Result<Self> {
        let (node, reclaimable) = node_memory_and_reclaimable(Path::new("/sys"), FAST)?;
        let free = node.free_bytes + reclaimable + held.saturating_sub(SHARED);
        let hundredths = free * 8 / 7 * 10_000 / node.total_bytes;
        ensure!(hundredths <= 10_000, "too much of node {FAST} is free: {node:?}");
        let text = format!("[host]\ndram-reserve = \"{}.{:02}%\"\n", hundredths / 100, hundredths % 100);
        fs::create_dir_all("/etc/ept-virt").context("creating /etc/ept-virt")?;
        fs::write(CONFIG, &text).with_context(|| format!("writing {CONFIG}"))?;
        kill(Pid::from_raw(i32::try_from(daemon.pid())?), Signal::SIGHUP).context("reloading the daemon")?;
        Ok(Self)
    }
}

impl Drop for Config {
    fn drop(&mut self) {
        // The next scenario begins with a host that has none.
        let _ = fs::remove_file(CONFIG);
    }
}

/// The scenario.
pub fn run() -> Result<Outcome> {
    let daemon = Daemon::start()?;
    let mut guests = [start("light", 100)?, start("heavy", 300)?];
    for guest in &mut guests {
        guest.wait_ready()?;
        guest.tell(&format!("patrol {PATROL_PAGES}"))?;
    }
    wait("the guests' working sets are known", OBSERVE_TIMEOUT, |[light, heavy]| {
        [light, heavy].iter().all(|d| d.budget.as_ref().is_some_and(|b| b.working_set_bytes.is_some()))
    })?;
    let before = on_nodes(&guests)?;
    let _config = Config::with_shortage(&daemon, before.iter().sum())?;
    let by_weight = wait_held(&guests, "DRAM is shared by weight", |[light, heavy]| {
        // Other programs of the host come and go. A third, give or take an eighth of it.
        light + heavy <= SHARED / 8 * 9 && light * 3 * 8 <= heavy * 9 && light * 3 * 8 >= heavy * 7
    })?;
    set_minimum(guests[0].name)?;
    let with_minimum = wait_held(&guests, "the minimum is kept", |[light, _]| light * 10 >= MINIMUM * 9)?;
    let [Some(light), Some(heavy)] = [daemon::domain("light")?, daemon::domain("heavy")?] else {
        anyhow::bail!("the daemon lost a domain");
    };
    let granted = |d: &DomainStatus| d.budget.as_ref().map_or(0, |budget| budget.grant_bytes);
    ensure!(granted(&light) >= MINIMUM, "the light guest is granted {:?}", light.budget);
    ensure!(granted(&heavy) < by_weight[1], "the heavy guest is granted {:?}", heavy.budget);
    for guest in &mut guests {
        guest.check_data()?;
    }
    let show = |held: [u64; 2]| format!("{} and {} MiB", held[0] / MIB, held[1] / MIB);
    Ok(Outcome::Pass(format!(
        "on the fast node {} at first, {} by weights of 1 to 3, {} with a minimum of {} MiB for the first",
        show(before),
        show(by_weight),
        show(with_minimum),
        MINIMUM / MIB
    )))
}

fn start(name: &'static str, weight: u32) -> Result<Domain> {
    let policy = policy("place", &format!("{TIMES}<ev:dram weight='{weight}'/>"));
    DomainSpec { name, policy, hot_mib: HOT_MIB, idle_mib: IDLE_MIB, ..DomainSpec::default() }.start()
}

fn set_minimum(name: &str) -> Result<()> {
    let element = format!(
        "<placement mode='place'>{}<dram weight='100'><min unit='bytes'>{MINIMUM}</min></dram></placement>",
        TIMES.replace("ev:", "")
    );
    virsh(&["metadata", name, "--live", "--uri", POLICY_NAMESPACE, "--key", "ev", "--set", &element])
        .map(drop)
}

/// Waits until it is good what the daemon says of both guests.
fn wait(what: &str, timeout: Duration, good: impl Fn([&DomainStatus; 2]) -> bool) -> Result<()> {
    let mut last = Vec::new();
    let outcome = host::wait_until(what, timeout, || {
        last = daemon::status_on(Path::new("/"))?.domains;
        let find = |name: &str| last.iter().find(|domain| domain.name == name);
        Ok(matches!((find("light"), find("heavy")), (Some(light), Some(heavy)) if good([light, heavy])))
    });
    outcome.with_context(|| format!("{}; daemon log: {}", shown(&last), daemon::log_tail()))
}

/// Waits until it is good what both guests have on the fast node, in bytes.
fn wait_held(guests: &[Domain; 2], what: &str, good: impl Fn([u64; 2]) -> bool) -> Result<[u64; 2]> {
    let mut held = [0; 2];
    let outcome = host::wait_until(what, SHARE_TIMEOUT, || {
        held = on_nodes(guests)?;
        eprintln!("{} and {} MiB on the fast node", held[0] / MIB, held[1] / MIB);
        Ok(good(held))
    });
    outcome.with_context(|| {
        let domains = daemon::status_on(Path::new("/")).map(|status| status.domains).unwrap_or_default();
        format!("{held:?} bytes on the fast node; {}; daemon log: {}", shown(&domains), daemon::log_tail())
    })?;
    Ok(held)
}

/// Bytes of each guest's memory on the fast node, by numa_maps; none is lost.
fn on_nodes(guests: &[Domain; 2]) -> Result<[u64; 2]> {
    let mut held = [0; 2];
    for (guest, held) in guests.iter().zip(&mut held) {
        let nodes = truth::numa_maps(guest.pid()?, &daemon::map(guest.name)?)?;
        let on = |node: u32| nodes.get(&node).copied().unwrap_or(0);
        let least = u64::from(HOT_MIB + IDLE_MIB) * MIB;
        ensure!(on(FAST) + on(SLOW) >= least, "{} has {nodes:?} bytes by node", guest.name);
        *held = on(FAST);
    }
    Ok(held)
}

fn shown(domains: &[DomainStatus]) -> String {
    let short =
        |d: &DomainStatus| format!("{} {:?} {:?} {:?} {:?}", d.name, d.reason, d.round, d.budget, d.moves);
    domains.iter().map(short).collect::<Vec<_>>().join("; ")
}
