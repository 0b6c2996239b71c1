// SPDX-License-Identifier: MIT OR Apache-2.0
//! What `cargo xtask demo` shows: one guest under a policy, from `virsh start`
//! to its idle memory lying on the slow node.

use std::collections::BTreeSet;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use ept_virt_core::wire::MemoryMap;

use super::daemon::{self, Daemon};
use super::domain::{Domain, DomainSpec, policy};
use super::host::{self, PAYLOAD};
use super::truth::{self, Truth};

/// The delay is longer than the workload, emulated twice over, takes to write its
/// hot block for the first time: a block that is half written is idle.
const POLICY: &str = "<ev:sampling><ev:interval unit='ms'>500</ev:interval></ev:sampling>\
    <ev:temperature><ev:half-life unit='s'>3</ev:half-life></ev:temperature>\
    <ev:dram><ev:max unit='MiB'>37</ev:max></ev:dram>\
    <ev:migration tolerance='20%'><ev:delay unit='s'>6</ev:delay>\
    <ev:bandwidth unit='MiB/s'>8</ev:bandwidth></ev:migration>";

/// Long enough for the idle block at the policy's bandwidth.
const SHOW_TIME: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_secs(2);

/// Runs the demo; everything goes to standard output, then `EPT-DONE`.
pub fn run() -> Result<()> {
    let outcome = show();
    if let Err(error) = &outcome {
        println!("The demo failed: {error:#}");
    }
    println!("EPT-DONE");
    outcome
}

/// Prints the XML of the demo's domain.
pub fn example() -> Result<()> {
    print!("{}", placed().xml());
    Ok(())
}

fn placed() -> DomainSpec {
    DomainSpec { policy: policy("place", POLICY), ..DomainSpec::default() }
}

fn show() -> Result<()> {
    host::reset()?;
    let _daemon = Daemon::start()?;
    say("the daemon runs; no guest yet");
    status(None)?;
    let spec = placed();
    say(&format!("its policy, in the <metadata> of the domain's XML: {POLICY}"));
    say("$ virsh define guest.xml && virsh start guest");
    let mut guest = spec.start()?;
    let nudge = daemon::status()?.daemon.last_nudge.unwrap_or("nothing yet".into());
    say(&format!("the hook fired; the daemon heard: {nudge}"));
    say("the guest boots: 32 MiB will be rewritten all the time, 64 MiB written once");
    let truth = guest.wait_ready()?;
    watch(&guest, &truth)?;
    compare(&mut guest, &truth)
}

/// Shows the domain until its idle block has left DRAM.
fn watch(guest: &Domain, truth: &Truth) -> Result<()> {
    let end = Instant::now() + SHOW_TIME;
    loop {
        if !plain() {
            // Each picture takes the place of the one before.
            print!("\x1b[H\x1b[2J");
        }
        status(Some(guest.name))?;
        let map = daemon::map(guest.name).unwrap_or_else(|_| MemoryMap {
            name: guest.name.into(),
            round: 0,
            runs: Vec::new(),
        });
        let idle = on_node(1, guest, &map, &truth.idle)?;
        if idle * 100 >= truth.idle.len() as u64 * 95 || Instant::now() > end {
            return Ok(());
        }
        thread::sleep(PAUSE);
    }
}

/// What ept-virt says against what the guest and the host's kernel know.
fn compare(guest: &mut Domain, truth: &Truth) -> Result<()> {
    let map = daemon::map(guest.name)?;
    let score = truth::score_hot(truth, &map, 1);
    say("what ept-virt says, against the guest's own truth");
    println!("  hot block found   recall {:.3}  precision {:.3}", score.recall, score.precision);
    say("where each MiB lies, by the kernel's own account (move_pages, numa_maps)");
    println!("  {:<12} {:>10} {:>14}", "", "DRAM node 0", "slow node 1");
    for (name, frames) in [("hot block", &truth.hot), ("idle block", &truth.idle)] {
        let mib = |node| Ok::<u64, anyhow::Error>(on_node(node, guest, &map, frames)? >> 8);
        println!("  {name:<12} {:>7} MiB {:>10} MiB", mib(0)?, mib(1)?);
    }
    let all = truth::numa_maps(guest.pid()?, &map)?;
    let mib = |node| all.get(&node).copied().unwrap_or(0) >> 20;
    println!("  {:<12} {:>7} MiB {:>10} MiB", "whole guest", mib(0), mib(1));
    guest.check_data()?;
    say("the guest verified both blocks: every byte is what it wrote");
    Ok(())
}

fn on_node(node: i32, guest: &Domain, map: &MemoryMap, frames: &BTreeSet<u64>) -> Result<u64> {
    let nodes = truth::pages_by_node(guest.pid()?, map, frames)?;
    Ok(nodes.get(&node).copied().unwrap_or(0))
}

/// Prints `ept-virt status`, as a person would see it.
fn status(name: Option<&str>) -> Result<()> {
    let mut command = Command::new(format!("{PAYLOAD}/ept-virt"));
    let colour = if plain() { "never" } else { "always" };
    command.args(["--color", colour, "status"]).args(name);
    println!("{}", host::succeed(&mut command)?);
    Ok(())
}

/// Whether the reader is no terminal: the lab says so.
fn plain() -> bool {
    std::env::var_os("NO_COLOR").is_some()
}

fn say(text: &str) {
    println!("\n— {text}");
}
