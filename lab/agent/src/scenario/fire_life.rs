// SPDX-License-Identifier: MIT OR Apache-2.0
//! What happens in the life of a domain, all of it under harvests, sampling and
//! a daemon that places: the guest is suspended, gives memory away and
//! takes it back, has its writes logged, gets processors, is saved and restored,
//! and its QEMU is killed and another process gets the number.

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ept_virt_core::process::{Process, ProcessError, find_vm_fd};
use ept_virt_core::sampler::{Sampler, SamplerError};
use ept_virt_core::wire::{DomainState, DomainStatus};
use serde_json::{Value, json};

use super::console::Console;
use super::daemon::{self, Daemon};
use super::domain::{Domain, DomainSpec, policy};
use super::hammer::{self, Hammer, Seen};
use super::host::{self, virsh};
use super::kill;
use crate::report::Outcome;

/// Moves whatever is idle for a second: with the hammer at work, nearly all. Not
/// so fast that the one emulated processor does little else.
const SQUEEZE: &str = "<ev:sampling><ev:interval unit='ms'>500</ev:interval></ev:sampling>\
    <ev:dram><ev:max unit='MiB'>16</ev:max></ev:dram>\
    <ev:migration><ev:delay unit='s'>1</ev:delay>\
    <ev:bandwidth unit='MiB/s'>8</ev:bandwidth></ev:migration>";

const SPARE_CPUS: u32 = 7;

/// Given away by the balloon: much more than the few MiB that the guest never used.
const BALLOON_MIB: u32 = 48;

const SAVED: &str = "/run/guest.saved";
const SINK: &str = "/run/migration.sink";

/// How fast a migration goes that must not end.
const SINK_BYTES: u64 = 2 << 20;

const OTHER_UUID: &str = "11111111-2222-4333-8444-555555555555";

const TIMEOUT: Duration = Duration::from_secs(60);

/// The scenario.
pub fn run() -> Result<Outcome> {
    let daemon = Daemon::start()?;
    let spec = DomainSpec {
        policy: policy("place", SQUEEZE),
        hot_mib: 16,
        idle_mib: 48,
        rest_mib: 96 + 64,
        spare_cpus: SPARE_CPUS,
        balloon: true,
        ..DomainSpec::default()
    };
    let mut guest = spec.start()?;
    guest.wait_ready()?;
    guest.tell("patrol 64")?;
    let hammer = Hammer::start(guest.pid()?)?;
    wait_placing(&guest)?;
    let mut said = Vec::new();
    for fire in [suspend, inflate, log_writes, add_cpus] {
        said.push(fire(&mut guest, &hammer)?);
        guest.check_data()?;
        hammer.wait_seen()?;
    }
    let first = save_and_restore(&mut guest, hammer)?;
    let hammer = Hammer::start(guest.pid()?)?;
    hammer.wait_seen()?;
    wait_placing(&guest)?;
    guest.console.wait_passes()?;
    guest.check_data()?;
    said.push(kill_and_replace(guest)?);
    let second = hammer.wait_gone()?;
    daemon.stop()?;
    Ok(Outcome::Pass(format!(
        "{}; {} harvests, {} samples",
        said.join("; "),
        first.rounds + second.rounds,
        first.samples + second.samples
    )))
}

/// A guest that is suspended accesses nothing, and goes on.
fn suspend(guest: &mut Domain, hammer: &Hammer) -> Result<String> {
    virsh(&["suspend", guest.name])?;
    // What it did before it stood still.
    let before = hammer.wait_rounds(8)?;
    let after = hammer.wait_rounds(8)?;
    ensure!(
        after.accessed == before.accessed && after.samples == before.samples,
        "a suspended guest accesses memory: {before:?}, then {after:?}"
    );
    virsh(&["resume", guest.name])?;
    guest.console.wait_passes()?;
    Ok(format!("{} harvests of the suspended guest saw nothing", after.rounds - before.rounds))
}

/// Processors are added one by one; each one's accesses are sampled.
fn add_cpus(guest: &mut Domain, hammer: &Hammer) -> Result<String> {
    let cpus = 1 + SPARE_CPUS;
    virsh(&["setvcpus", guest.name, &cpus.to_string(), "--live"])?;
    guest.tell(&format!("cpus {cpus}"))?;
    let mut seen = 0;
    host::wait_until("samples of all vCPUs", TIMEOUT, || {
        seen = hammer.vcpus();
        Ok(seen == cpus)
    })
    .with_context(|| format!("{seen} of {cpus} vCPUs were sampled"))?;
    Ok(format!("{cpus} vCPUs"))
}

/// The balloon takes memory that the guest used and freed; nobody brings it back
/// before the guest does.
fn inflate(guest: &mut Domain, _: &Hammer) -> Result<String> {
    guest.tell("insmod virtio_balloon")?;
    // Whichever free pages the balloon takes, the guest used them before.
    guest.tell("scratch free")?;
    let pid = guest.pid()?;
    let full = resident_kib(pid)?;
    let all = memory_kib(guest)?;
    set_memory(guest, all - u64::from(BALLOON_MIB << 10))?;
    let less = resident_kib(pid)?;
    ensure!(
        full.saturating_sub(less) * 10 >= u64::from(BALLOON_MIB << 10) * 6,
        "a balloon of {BALLOON_MIB} MiB left {less} of {full} KiB resident"
    );
    let number = rounds(&wait_placing(guest)?);
    daemon::wait_for(guest.name, "rounds with the balloon", TIMEOUT, |d| rounds(d) >= number + 4)?;
    let later = resident_kib(pid)?;
    ensure!(later < less + 4096, "{later} KiB are resident, {less} when the balloon was full");
    set_memory(guest, all)?;
    guest.tell(&format!("scratch {BALLOON_MIB}"))?;
    Ok(format!("balloon took {} of {BALLOON_MIB} MiB", (full - less) >> 10))
}

/// Migrations that begin and are cancelled switch dirty logging on and off.
/// Placement pauses meanwhile, and says why.
fn log_writes(guest: &mut Domain, hammer: &Hammer) -> Result<String> {
    let listener = UnixListener::bind(SINK).context("listening for a migration")?;
    // QEMU has another user's rights.
    fs::set_permissions(SINK, fs::Permissions::from_mode(0o777)).context("opening the socket to QEMU")?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            thread::spawn(move || drain(stream));
        }
    });
    monitor(guest, "migrate-set-parameters", json!({"max-bandwidth": SINK_BYTES, "downtime-limit": 1}))?;
    for _ in 0..2 {
        let logged = hammer.seen().logged_rounds;
        monitor(guest, "migrate", json!({ "uri": format!("unix:{SINK}") }))?;
        let paused = daemon::wait_for(guest.name, "placement pauses", TIMEOUT, |d| {
            d.reason.as_ref().is_some_and(|reason| reason.contains("logged"))
        })?;
        let later =
            daemon::wait_for(guest.name, "rounds meanwhile", TIMEOUT, |d| rounds(d) >= rounds(&paused) + 3)?;
        ensure!(
            moved(&paused) == moved(&later),
            "pages moved under dirty logging: {:?}, then {:?}",
            paused.moves,
            later.moves
        );
        monitor(guest, "migrate_cancel", json!({}))?;
        ensure!(hammer.seen().logged_rounds > logged, "no harvest met dirty logging");
        daemon::wait_for(guest.name, "placement goes on", TIMEOUT, |d| {
            !d.reason.as_ref().is_some_and(|reason| reason.contains("logged"))
        })?;
    }
    fs::remove_file(SINK).context("removing a socket")?;
    Ok("placement paused under dirty logging".into())
}

/// The guest's process ends and another one goes on with its memory.
fn save_and_restore(guest: &mut Domain, hammer: Hammer) -> Result<Seen> {
    let before = guest.pid()?;
    virsh(&["save", guest.name, SAVED])?;
    let seen = hammer.wait_gone()?;
    host::wait_until("the daemon forgets the domain", TIMEOUT, || {
        Ok(daemon::domain(guest.name)?.is_none_or(|d| d.pid.is_none()))
    })?;
    virsh(&["restore", SAVED])?;
    fs::remove_file(SAVED).context("removing the saved guest")?;
    guest.console = Console::connect(guest.name)?;
    ensure!(guest.pid()? != before, "the same process runs");
    Ok(seen)
}

/// QEMU dies; a process that gets its number is not taken for it.
fn kill_and_replace(guest: Domain) -> Result<String> {
    let uuid = virsh(&["domuuid", guest.name])?;
    let old = Process::open_qemu(guest.pid()?, uuid.trim())?;
    let mut session = hammer::attach(old.pid())?;
    let pid = kill::qemu(&guest)?;
    let mut impostor = kill::reuse_pid(pid, OTHER_UUID)?;
    ensure!(!old.is_alive(), "a dead process is taken for a living one of the same number");
    match find_vm_fd(&old) {
        Err(ProcessError::Gone { .. }) => {}
        other => bail!("the dead process's VM was looked for in another one: {other:?}"),
    }
    match Process::open_qemu(pid, uuid.trim()) {
        Err(ProcessError::NotTheDomain { .. }) => {}
        other => bail!("another process is taken for the domain's: {other:?}"),
    }
    match session.memslots() {
        Err(SamplerError::VmGone) => {}
        other => bail!("a session goes on without its VM: {other:?}"),
    }
    // libvirt kills whatever has the number, and holds the domain's lock until it is gone.
    let forgotten = || {
        impostor.reap()?;
        Ok(daemon::domain(guest.name)?.is_none())
    };
    host::wait_until("the domain is forgotten", TIMEOUT, forgotten)
        .with_context(|| format!("libvirt: {:?}; the daemon: {}", virsh(&["list"]), daemon::log_tail()))?;
    drop(impostor);
    Ok(format!("process number {pid} was used again"))
}

/// Sets the balloon, and waits until it has the size.
fn set_memory(guest: &Domain, kib: u64) -> Result<()> {
    virsh(&["setmem", guest.name, &kib.to_string(), "--live"])?;
    let mut now = 0;
    host::wait_until("the balloon has its size", TIMEOUT, || {
        now = memory_kib(guest)?;
        Ok(now == kib)
    })
    .with_context(|| format!("{now} KiB, {kib} were asked for"))
}

/// The guest's memory without the balloon.
fn memory_kib(guest: &Domain) -> Result<u64> {
    let stats = virsh(&["dommemstat", guest.name])?;
    let actual = stats.lines().find_map(|line| line.strip_prefix("actual "));
    actual.context("no balloon")?.trim().parse().with_context(|| stats.clone())
}

fn resident_kib(pid: i32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    line.trim().trim_end_matches(" kB").parse().with_context(|| line.to_owned())
}

/// Has QEMU's own monitor obey a command.
fn monitor(guest: &Domain, command: &str, arguments: Value) -> Result<()> {
    let request = json!({"execute": command, "arguments": arguments}).to_string();
    let answer = virsh(&["qemu-monitor-command", guest.name, &request])?;
    ensure!(!answer.contains("\"error\""), "QEMU refuses {command}: {answer}");
    Ok(())
}

fn drain(mut stream: impl Read) {
    let mut buffer = vec![0; 1 << 16];
    while stream.read(&mut buffer).is_ok_and(|length| length > 0) {}
}

fn wait_placing(guest: &Domain) -> Result<DomainStatus> {
    let pid = guest.pid()?;
    daemon::wait_for(guest.name, "the daemon places", TIMEOUT, |d| {
        d.state == DomainState::Placing && d.pid == Some(pid) && rounds(d) >= 2
    })
}

fn rounds(domain: &DomainStatus) -> u64 {
    domain.round.as_ref().map_or(0, |round| round.number)
}

fn moved(domain: &DomainStatus) -> (u64, u64) {
    (domain.moves.demote_tried_bytes, domain.moves.promote_tried_bytes)
}
