// SPDX-License-Identifier: MIT OR Apache-2.0
//! A live migration between two libvirtd, each with a daemon of ours: the policy
//! travels in the domain's XML, placement pauses while writes are logged, the source
//! forgets the domain, the target places it, and no byte is lost.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ept_virt_core::wire::{DomainState, DomainStatus};

use super::console::Console;
use super::daemon::{self, Daemon};
use super::domain::{Domain, DomainSpec, policy};
use super::hook_calls::{self, Call, Recorder};
use super::host::{self, PAYLOAD};
use super::second_host::SecondHost;
use crate::report::Outcome;

/// Moves whatever is idle for a second, down to what the workload keeps hot.
const SQUEEZE: &str = "<ev:sampling><ev:interval unit='ms'>500</ev:interval></ev:sampling>\
    <ev:dram><ev:max unit='MiB'>40</ev:max></ev:dram>\
    <ev:migration><ev:delay unit='s'>2</ev:delay>\
    <ev:bandwidth unit='MiB/s'>8</ev:bandwidth></ev:migration>";

/// Slow enough that the source holds rounds meanwhile.
const BANDWIDTH_MIB: &str = "12";

/// The workload writes faster than that: libvirt suspends the guest when it has
/// tried for so long.
const SUSPEND_AFTER_S: &str = "40";

const ADDRESS: &str = "tcp://127.0.0.1:49300";

const SECOND_LOG: &str = "/run/ept-virt-second.log";

const TIMEOUT: Duration = Duration::from_secs(90);
const MIGRATION_TIMEOUT: Duration = Duration::from_secs(150);

const START: [&str; 3] = ["prepare begin -", "start begin -", "started begin -"];

/// The scenario.
pub fn run() -> Result<Outcome> {
    let recorder = Recorder::install()?;
    // Has the recorder as well: its hooks are copies.
    let second = SecondHost::start()?;
    let source = Daemon::start()?;
    let mut command = second.command(&format!("{PAYLOAD}/ept-virt"));
    command.args(["daemon", "--reconcile-interval", "2"]);
    let target = Daemon::launch(command, SECOND_LOG, SecondHost::root())?;
    let spec =
        DomainSpec { policy: policy("place", SQUEEZE), hot_mib: 16, idle_mib: 48, ..DomainSpec::default() };
    let mut guest = spec.start()?;
    guest.wait_ready()?;
    guest.tell("patrol 64")?;
    let placed = daemon::wait_for(guest.name, "the source places", TIMEOUT, |d| {
        d.state == DomainState::Placing && d.moves.demoted_bytes > 8 << 20
    })?;
    ensure!(second_domain(guest.name)?.is_none(), "the second daemon sees the first host's domain");
    let source_calls = recorder.calls()?.len();
    let rounds = migrate(&guest)?;
    let arrived = wait_second(guest.name, "the target places", |d| {
        d.state == DomainState::Placing && d.moves.demoted_bytes > 8 << 20
    })?;
    ensure!(
        arrived.pid == Some(SecondHost::pid(guest.name)?),
        "the target observes another process: {arrived:?}"
    );
    ensure!(
        arrived.policy == placed.policy && arrived.policy_from == "domain XML",
        "the policy was {:?} and is {:?} from {}",
        placed.policy,
        arrived.policy,
        arrived.policy_from
    );
    host::wait_until("the source forgets the domain", TIMEOUT, || Ok(daemon::domain(guest.name)?.is_none()))?;
    check_data(&mut guest)?;
    check_calls("source", &recorder.calls()?[source_calls..], &source_end()?)?;
    check_calls("target", &hook_calls::calls_on(SecondHost::root())?, &target_begin())?;
    second.virsh(&["destroy", guest.name])?;
    host::wait_until("the target forgets the domain", TIMEOUT, || Ok(second_domain(guest.name)?.is_none()))?;
    target.stop()?;
    source.stop()?;
    Ok(Outcome::Pass(format!(
        "{rounds} rounds with placement paused, {} MiB demoted at the source, {} MiB at the target",
        placed.moves.demoted_bytes >> 20,
        arrived.moves.demoted_bytes >> 20
    )))
}

/// Migrates the guest; how many rounds the source held with placement paused.
fn migrate(guest: &Domain) -> Result<u64> {
    let uri = SecondHost::uri();
    let mut command = Command::new("virsh");
    command
        .args(["--quiet", "migrate", "--live", "--p2p", "--persistent", "--undefinesource"])
        .args(["--bandwidth", BANDWIDTH_MIB, "--timeout", SUSPEND_AFTER_S, "--timeout-suspend"])
        .args([guest.name, &uri, ADDRESS])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    eprintln!("running {command:?}");
    let mut child = command.spawn().context("starting virsh migrate")?;
    let outcome = watch_migration(guest, &mut child);
    if outcome.is_err() {
        let _ = child.kill();
        let _ = child.wait();
    }
    outcome
}

fn watch_migration(guest: &Domain, child: &mut Child) -> Result<u64> {
    let (mut paused, mut last) = (0, 0);
    let mut ended = None;
    host::wait_until("the migration is done", MIGRATION_TIMEOUT, || {
        ended = child.try_wait().context("waiting for virsh migrate")?;
        let domains = daemon::status_on(Path::new("/"))?.domains;
        let Some(domain) = domains.iter().find(|d| d.name == guest.name) else { return Ok(ended.is_some()) };
        let number = domain.round.as_ref().map_or(0, |round| round.number);
        // For libvirt's job, which begins first, or for the logging of writes.
        if number != last && domain.reason.as_ref().is_some_and(|reason| reason.contains("pauses")) {
            paused += 1;
        }
        last = number;
        Ok(ended.is_some())
    })?;
    if !ended.is_some_and(|status| status.success()) {
        let said = child.stderr.take().map(std::io::read_to_string);
        bail!("virsh migrate: {ended:?}: {said:?}; the daemon: {}", daemon::log_tail());
    }
    ensure!(paused > 0, "the source held no round with placement paused");
    Ok(paused)
}

/// What the guest holds at the target.
fn check_data(guest: &mut Domain) -> Result<()> {
    let file = |end: &str| SecondHost::root().join(format!("run/{}.{end}", guest.name));
    guest.console = Console::connect_to(guest.name, &file("sock"), file("log"))?;
    guest.console.wait_passes()?;
    guest.check_data()
}

fn check_calls(side: &str, calls: &[Call], expected: &[&str]) -> Result<()> {
    let words: Vec<&str> = calls.iter().map(|call| call.words.as_str()).collect();
    ensure!(words == expected, "hook calls at the {side}: {words:?}, not {expected:?}");
    ensure!(
        calls.iter().all(|call| call.has_policy),
        "hook calls at the {side} without the policy: {calls:?}"
    );
    Ok(())
}

fn source_end() -> Result<[&'static str; 2]> {
    let reason = if host::libvirt_major()? >= 11 { "release end migrated" } else { "release end -" };
    Ok(["stopped end -", reason])
}

fn target_begin() -> Vec<&'static str> {
    ["migrate begin -"].into_iter().chain(START).collect()
}

fn second_domain(name: &str) -> Result<Option<DomainStatus>> {
    Ok(daemon::status_on(SecondHost::root())?.domains.into_iter().find(|d| d.name == name))
}

fn wait_second(name: &str, what: &str, good: impl Fn(&DomainStatus) -> bool) -> Result<DomainStatus> {
    let mut last = None;
    let waited = host::wait_until(what, TIMEOUT, || {
        last = second_domain(name)?;
        Ok(last.as_ref().is_some_and(&good))
    });
    waited.with_context(|| {
        let log = std::fs::read_to_string(SECOND_LOG).unwrap_or_default();
        format!("status {last:?}; daemon log: {log}")
    })?;
    last.context("no status")
}
