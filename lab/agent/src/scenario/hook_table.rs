// SPDX-License-Identifier: MIT OR Apache-2.0
//! All that can happen to a domain, against a table: how libvirt calls its hooks
//! then, what the daemon makes of it, and what `ept-virt list` shows. The daemon
//! never looks by itself here; hooks and events have to tell it.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ept_virt_core::wire::DomainState;

use super::console::Console;
use super::daemon::{self, Daemon};
use super::domain::{self, POLICY_NAMESPACE};
use super::hook_calls::{Call, Recorder};
use super::host::{self, virsh};
use super::tiny;
use crate::report::Outcome;

/// Far above the time that this test takes.
const NEVER_S: &str = "3600";

const FIRST_NAME: &str = "guest";
const SECOND_NAME: &str = "renamed";
/// The console's files keep their name.
const CONSOLE: &str = FIRST_NAME;
const SAVED: &str = "/run/guest.saved";

const TIMEOUT: Duration = Duration::from_secs(60);

/// What the daemon and the command line make of the domain after a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    /// There is no daemon to ask.
    NoDaemon,
    /// The daemon knows no such domain.
    Absent,
    /// It goes on with rounds of the domain's process, in this state.
    Rounds(DomainState),
    /// It observes the domain's process, and waits for its CPUs to go on.
    Suspended,
}

/// One line of the table.
struct Step {
    what: &'static str,
    act: fn(&mut Stage) -> Result<()>,
    /// OPERATION SUB-OPERATION EXTRA of each call, as libvirt 11.3 makes them. 9.0
    /// makes the same, but does not say at `release` why the domain has ended.
    calls: &'static [&'static str],
    after: After,
}

const fn step(
    what: &'static str,
    act: fn(&mut Stage) -> Result<()>,
    calls: &'static [&'static str],
    after: After,
) -> Step {
    Step { what, act, calls, after }
}

const NO_DAEMON: After = After::NoDaemon;
const ABSENT: After = After::Absent;
const OBSERVING: After = After::Rounds(DomainState::Observing);
const PLACING: After = After::Rounds(DomainState::Placing);

const START: &[&str] = &["prepare begin -", "start begin -", "started begin -"];
const RESTORE: &[&str] = &["restore begin -", "prepare begin -", "start begin -", "started begin -"];
const DESTROYED: &[&str] = &["stopped end -", "release end destroyed"];
const SAVED_AWAY: &[&str] = &["stopped end -", "release end saved"];
const SHUT_DOWN: &[&str] = &["stopped end -", "release end shutdown"];
const KILLED: &[&str] = &["stopped end -", "release end crashed"];
const RECONNECT: &[&str] = &["reconnect begin -"];
const NOTHING: &[&str] = &[];

const TABLE: &[Step] = &[
    step("define", define, NOTHING, NO_DAEMON),
    step("start without a daemon", start, START, NO_DAEMON),
    step("save without a daemon", save, SAVED_AWAY, NO_DAEMON),
    step("restore without a daemon", restore, RESTORE, NO_DAEMON),
    step("libvirtd restarts without a daemon", restart_libvirtd, RECONNECT, NO_DAEMON),
    step("the daemon comes", start_daemon, NOTHING, OBSERVING),
    step("suspend", suspend, NOTHING, After::Suspended),
    step("resume", resume, NOTHING, OBSERVING),
    step("reset", reset, NOTHING, OBSERVING),
    step("metadata", set_policy, NOTHING, PLACING),
    step("save", save, SAVED_AWAY, ABSENT),
    step("restore", restore, RESTORE, PLACING),
    step("libvirtd restarts", restart_libvirtd, RECONNECT, PLACING),
    step("managedsave", managed_save, SAVED_AWAY, ABSENT),
    step("start what managedsave kept", start_saved, RESTORE, PLACING),
    step("the guest powers off", power_off, SHUT_DOWN, ABSENT),
    step("rename", rename, NOTHING, ABSENT),
    step("start under the new name", start, START, PLACING),
    step("the daemon is killed and comes back", start_daemon, NOTHING, PLACING),
    step("QEMU is killed", kill_qemu, KILLED, ABSENT),
    step("start", start, START, PLACING),
    step("destroy", destroy, DESTROYED, ABSENT),
    step("undefine", undefine, NOTHING, ABSENT),
];

/// What the steps work on.
struct Stage {
    name: &'static str,
    console: Option<Console>,
    daemon: Option<Daemon>,
    has_policy: bool,
    /// What the daemon must have heard so far.
    nudges: u64,
}

/// The scenario.
pub fn run() -> Result<Outcome> {
    let tells_reasons = host::libvirt_major()? >= 11;
    let recorder = Recorder::install()?;
    let mut stage = Stage { name: FIRST_NAME, console: None, daemon: None, has_policy: false, nudges: 0 };
    let mut calls = 0;
    for step in TABLE {
        eprintln!("step: {}", step.what);
        let checked = (step.act)(&mut stage).and_then(|()| {
            stage.nudges += nudged(step.calls);
            check(step, &stage, &recorder, calls, tells_reasons)
        });
        calls += checked.with_context(|| format!("step {:?}", step.what))?;
    }
    if let Some(daemon) = stage.daemon.take() {
        daemon.stop()?;
    }
    Ok(Outcome::Pass(format!("{} operations, {calls} hook calls", TABLE.len())))
}

/// How many of the calls the product's hook tells the daemon of.
fn nudged(calls: &[&str]) -> u64 {
    let told = ["started ", "stopped ", "release ", "reconnect "];
    calls.iter().filter(|call| told.iter().any(|word| call.starts_with(word))).count() as u64
}

/// Holds what happened to a line of the table; the number of hook calls.
fn check(
    step: &Step,
    stage: &Stage,
    recorder: &Recorder,
    before: usize,
    tells_reasons: bool,
) -> Result<usize> {
    let expected: Vec<Call> = step
        .calls
        .iter()
        .map(|call| Call {
            domain: stage.name.to_owned(),
            words: match call.strip_prefix("release end ") {
                Some(_) if !tells_reasons => "release end -".to_owned(),
                _ => (*call).to_owned(),
            },
            has_policy: stage.has_policy,
        })
        .collect();
    let calls = || -> Result<Vec<Call>> { Ok(recorder.calls()?.split_off(before)) };
    let waited = host::wait_until("the hooks are called", TIMEOUT, || Ok(calls()?.len() >= expected.len()));
    waited.with_context(|| format!("{:?}, not {expected:?}", calls()))?;
    check_daemon(step.after, stage.name, stage.nudges)?;
    // Last, so that calls that should not come have had their time.
    let calls = calls()?;
    ensure!(calls == expected, "hook calls {calls:?}, not {expected:?}");
    Ok(calls.len())
}

/// Holds the daemon's and the command line's view to what is expected.
fn check_daemon(after: After, name: &str, nudges: u64) -> Result<()> {
    match after {
        After::NoDaemon => {
            let (code, message) = daemon::cli_failure(&["list"])?;
            ensure!(code == Some(2), "`ept-virt list` without a daemon: {code:?} {message}");
            return Ok(());
        }
        After::Absent => {
            host::wait_until("the domain is forgotten", TIMEOUT, || Ok(daemon::domain(name)?.is_none()))?;
            let list = daemon::cli_text(&["list"])?;
            ensure!(list == "no domain is running\n", "`ept-virt list` says {list:?}");
        }
        After::Suspended => {
            let pid = domain::pid(name)?;
            daemon::wait_for(name, "the daemon knows that the guest rests", TIMEOUT, |d| {
                let says_so = d.reason.as_ref().is_some_and(|reason| reason.contains("suspended"));
                d.state == DomainState::Observing && d.pid == Some(pid) && says_so
            })?;
            check_list(name, DomainState::Observing, pid)?;
        }
        After::Rounds(state) => {
            let pid = domain::pid(name)?;
            let what = format!("rounds of process {pid}, {state:?}");
            let round = |number: u64| {
                daemon::wait_for(name, &what, TIMEOUT, |d| {
                    let rounds = d.round.as_ref().map_or(0, |round| round.number);
                    d.state == state && d.pid == Some(pid) && rounds > number
                })
            };
            let first = round(0)?;
            ensure!(first.policy_error.is_none(), "the policy is refused: {first:?}");
            let from = if state == DomainState::Placing { "domain XML" } else { "default" };
            ensure!(first.policy_from == from, "the policy is from {:?}, not {from:?}", first.policy_from);
            round(first.round.map_or(0, |round| round.number))?;
            check_list(name, state, pid)?;
        }
    }
    let mut seen = 0;
    let waited = host::wait_until("the daemon hears of all calls", TIMEOUT, || {
        seen = daemon::status()?.daemon.nudges;
        Ok(seen >= nudges)
    });
    waited.with_context(|| format!("{seen} nudges, not {nudges}"))?;
    ensure!(seen == nudges, "{seen} nudges, not {nudges}");
    Ok(())
}

/// The one line of `ept-virt list`.
fn check_list(name: &str, state: DomainState, pid: i32) -> Result<()> {
    let list = daemon::cli_text(&["list"])?;
    let rows: Vec<Vec<&str>> = list
        .lines()
        .map(|line| line.split("  ").map(str::trim).filter(|cell| !cell.is_empty()).collect())
        .collect();
    let [_, row] = rows.as_slice() else { bail!("`ept-virt list` has not one domain: {list}") };
    let word = match state {
        DomainState::Placing => "placing",
        DomainState::Observing => "observing",
        other => bail!("the table has no word for {other:?}"),
    };
    let (id, pid) = (virsh(&["domid", name])?, pid.to_string());
    let wanted = [name, word, id.trim(), &pid];
    ensure!(row.starts_with(&wanted), "`ept-virt list` says {row:?}, not {wanted:?}");
    ensure!(row.len() == 10 && !row.contains(&"-"), "`ept-virt list` lacks figures: {row:?}");
    Ok(())
}

impl Stage {
    /// The guest answers, and its data is whole.
    fn meet_guest(&mut self) -> Result<()> {
        let mut console = Console::connect(CONSOLE)?;
        console.check_data()?;
        self.console = Some(console);
        Ok(())
    }

    fn console(&mut self) -> Result<&mut Console> {
        self.console.as_mut().context("the domain does not run")
    }
}

fn define(stage: &mut Stage) -> Result<()> {
    tiny::define(&[stage.name.to_owned()], None)
}

fn start(stage: &mut Stage) -> Result<()> {
    Console::clear(CONSOLE)?;
    virsh(&["start", stage.name])?;
    let mut console = Console::connect(CONSOLE)?;
    console.wait_ready()?;
    stage.console = Some(console);
    Ok(())
}

fn start_saved(stage: &mut Stage) -> Result<()> {
    virsh(&["start", stage.name])?;
    stage.meet_guest()
}

fn start_daemon(stage: &mut Stage) -> Result<()> {
    // The one before, if any, gets no chance to end well.
    drop(stage.daemon.take());
    stage.daemon = Some(Daemon::start_looking_every(NEVER_S)?);
    stage.nudges = 0;
    stage.console()?.check_data()
}

fn suspend(stage: &mut Stage) -> Result<()> {
    virsh(&["suspend", stage.name]).map(drop)
}

fn resume(stage: &mut Stage) -> Result<()> {
    virsh(&["resume", stage.name])?;
    stage.console()?.check_data()
}

fn reset(stage: &mut Stage) -> Result<()> {
    virsh(&["reset", stage.name])?;
    stage.console()?.wait_ready()?;
    stage.console()?.check_data()
}

fn set_policy(stage: &mut Stage) -> Result<()> {
    let element = "<placement mode='place'/>";
    let both = ["--live", "--config"];
    let to = ["--uri", POLICY_NAMESPACE, "--key", "ev", "--set", element];
    virsh(&[&["metadata", stage.name], both.as_slice(), &to].concat())?;
    stage.has_policy = true;
    Ok(())
}

fn save(stage: &mut Stage) -> Result<()> {
    virsh(&["save", stage.name, SAVED])?;
    stage.console = None;
    Ok(())
}

fn restore(stage: &mut Stage) -> Result<()> {
    virsh(&["restore", SAVED])?;
    fs::remove_file(SAVED).with_context(|| format!("removing {SAVED}"))?;
    stage.meet_guest()
}

fn managed_save(stage: &mut Stage) -> Result<()> {
    virsh(&["managedsave", stage.name])?;
    stage.console = None;
    Ok(())
}

fn restart_libvirtd(stage: &mut Stage) -> Result<()> {
    host::stop_libvirtd()?;
    host::start_libvirtd()?;
    stage.console()?.check_data()
}

fn power_off(stage: &mut Stage) -> Result<()> {
    stage.console()?.tell("poweroff")?;
    wait_shut_off(stage)
}

fn kill_qemu(stage: &mut Stage) -> Result<()> {
    tiny::kill_qemu(stage.name)?;
    wait_shut_off(stage)
}

fn wait_shut_off(stage: &mut Stage) -> Result<()> {
    stage.console = None;
    let name = stage.name;
    host::wait_until("the domain is shut off", TIMEOUT, || {
        Ok(virsh(&["domstate", name])?.trim() == "shut off")
    })
}

fn rename(stage: &mut Stage) -> Result<()> {
    virsh(&["domrename", FIRST_NAME, SECOND_NAME])?;
    stage.name = SECOND_NAME;
    Ok(())
}

fn destroy(stage: &mut Stage) -> Result<()> {
    virsh(&["destroy", stage.name])?;
    stage.console = None;
    Ok(())
}

fn undefine(stage: &mut Stage) -> Result<()> {
    virsh(&["undefine", stage.name])?;
    ensure!(
        !Path::new(&format!("/etc/libvirt/qemu/{}.xml", stage.name)).exists(),
        "its definition is still there"
    );
    Ok(())
}
