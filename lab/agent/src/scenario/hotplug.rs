// SPDX-License-Identifier: MIT OR Apache-2.0
//! Memory that a running domain gets is observed as the rest is, left alone where the
//! policy excludes it by its alias, and what it gives back is no longer observed.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ept_virt_core::wire::DomainStatus;

use super::console::Console;
use super::daemon::{self, Daemon};
use super::domain::{DomainSpec, policy};
use super::host::{self, virsh};
use super::tiny;
use crate::report::Outcome;

const NAME: &str = "guest";
const ADDED_MIB: u64 = 64;
const DIMM: &str = "/run/dimm.xml";
const TIMEOUT: Duration = Duration::from_secs(60);

/// Linux adds and removes memory in blocks of this size (x86, below 64 GiB).
const BLOCK_MIB: u64 = 128;

/// Of a block of virtio memory, what the guest gets.
const PART_MIB: u64 = 64;

/// What the guest may keep of virtio memory that it is asked to give back: it gives
/// none of 2 MiB in which its kernel has something that does not move.
const KEPT_MIB: u64 = 4;

/// Memory is added to a running guest.
pub fn added() -> Result<Outcome> {
    let place = policy("place", "<ev:exclude><ev:memory alias='dimm0'/></ev:exclude>");
    let path = tiny::write(NAME, place.as_deref())?;
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

    ensure!(before.policy_warnings.iter().any(|w| w.contains("\"dimm0\"")), "{:?}", before.policy_warnings);
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
    let excluded = daemon::wait_for(NAME, "what was added is excluded", TIMEOUT, |d| {
        d.excluded_bytes == ADDED_MIB << 20
    })?;
    ensure!(excluded.policy_warnings.is_empty(), "{:?}", excluded.policy_warnings);
    console.check_data()?;
    daemon.stop()?;
    Ok(Outcome::Pass(format!(
        "{} MiB in {} slots, then {} in {}, of it {ADDED_MIB} excluded",
        before.memory_bytes >> 20,
        before.slots,
        later.memory_bytes >> 20,
        later.slots
    )))
}

/// Memory is added and taken away again: a DIMM, which goes with its slot, and virtio
/// memory, whose slot stays while the pages in it go.
pub fn removed() -> Result<Outcome> {
    let times = "<ev:sampling><ev:interval unit='ms'>500</ev:interval></ev:sampling>";
    let spec = DomainSpec {
        room_mib: u32::try_from(2 * BLOCK_MIB)?,
        // Linux keeps 64 MiB for bounce buffers where memory above 4 GiB may be added.
        rest_mib: 192,
        policy: policy("observe", times),
        ..DomainSpec::default()
    };
    let daemon = Daemon::start()?;
    let mut guest = spec.start()?;
    guest.wait_ready()?;
    let before = next_round(guest.name, None, "rounds", |_| true)?;

    let dimm = format!(
        "<memory model='dimm'><target><size unit='MiB'>{BLOCK_MIB}</size><node>0</node></target></memory>"
    );
    let with_block = before.memory_bytes + (BLOCK_MIB << 20);
    device("attach-device", guest.name, &dimm)?;
    let more = next_round(guest.name, None, "a DIMM that was added", |d| d.memory_bytes == with_block)?;
    ensure!(more.slots == before.slots + 1, "{more:?}, before {before:?}");
    // All of it is used once, so that there is something to take away.
    guest.tell("scratch free")?;
    device("detach-device", guest.name, &dimm)?;
    let as_before = |d: &DomainStatus| d.memory_bytes == before.memory_bytes && d.slots == before.slots;
    let less = next_round(guest.name, Some(&more), "the DIMM's end", as_before)?;
    ensure!(less.pid == before.pid, "the guest is another: {less:?}, before {before:?}");
    guest.check_data()?;

    guest.tell("insmod virtio_mem")?;
    device("attach-device", guest.name, &virtio(PART_MIB))?;
    wait_current(guest.name, |mib| mib == PART_MIB)?;
    guest.tell("scratch free")?;
    let full = next_round(guest.name, Some(&less), "virtio memory in use", |d| {
        d.memory_bytes == with_block && mapped(d) > mapped(&less) + (PART_MIB << 20) / 2
    })?;
    virsh(&["update-memory-device", guest.name, "--requested-size", "0"])?;
    wait_current(guest.name, |mib| mib <= KEPT_MIB)?;
    let given = mapped(&full) - (PART_MIB - KEPT_MIB) * (1 << 20);
    let empty =
        next_round(guest.name, Some(&full), "virtio memory that was given back", |d| mapped(d) <= given)?;
    ensure!(empty.memory_bytes == with_block, "{empty:?}, before {full:?}");
    guest.check_data()?;
    guest.console.wait_passes()?;
    daemon.stop()?;
    Ok(Outcome::Pass(format!(
        "{BLOCK_MIB} MiB came and went with their slot; mapped with {PART_MIB} MiB of virtio memory {} MiB, \
         without {} MiB",
        mapped(&full) >> 20,
        mapped(&empty) >> 20
    )))
}

/// Attaches or detaches a device of a running domain.
fn device(verb: &str, name: &str, xml: &str) -> Result<()> {
    fs::write(DIMM, xml).with_context(|| format!("writing {DIMM}"))?;
    virsh(&[verb, name, DIMM, "--live"]).map(drop)
}

fn virtio(requested_mib: u64) -> String {
    format!(
        "<memory model='virtio-mem'><target><size unit='MiB'>{BLOCK_MIB}</size><node>0</node>\
         <block unit='MiB'>2</block><requested unit='MiB'>{requested_mib}</requested></target></memory>"
    )
}

/// Waits until the guest has so much of its virtio memory.
fn wait_current(name: &str, good: impl Fn(u64) -> bool) -> Result<()> {
    let mut seen = String::new();
    host::wait_until("the guest takes or gives virtio memory", TIMEOUT, || {
        let xml = virsh(&["dumpxml", name])?;
        let current = xml.split_once("<current unit='KiB'>").and_then(|(_, rest)| rest.split_once('<'));
        let kib: u64 = current
            .with_context(|| format!("no current size of virtio memory in {xml}"))?
            .0
            .parse()
            .context("the current size of virtio memory")?;
        seen = format!("{kib} KiB");
        Ok(good(kib >> 10))
    })
    .with_context(|| format!("it has {seen}"))
}

/// The status of a domain two rounds after `earlier`, when it is `good`.
fn next_round(
    name: &str,
    earlier: Option<&DomainStatus>,
    what: &str,
    good: impl Fn(&DomainStatus) -> bool,
) -> Result<DomainStatus> {
    let number = |d: &DomainStatus| d.round.as_ref().map_or(0, |round| round.number);
    let after = earlier.map_or(0, number) + 1;
    daemon::wait_for(name, what, TIMEOUT, |d| number(d) > after && good(d))
}

fn mapped(domain: &DomainStatus) -> u64 {
    domain.round.as_ref().map_or(0, |round| round.mapped_bytes)
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
