// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask bench`: each way of doing a thing beside its alternatives, in
//! the same run. What emulated hosts show are ratios, and counts of
//! instructions; only the first two tables are in time of a real machine.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::builder::PossibleValuesParser;
use clap::{Args, Subcommand};
use serde::Deserialize;

use crate::Lab;
use crate::boots::{self, Boot, Wishes};
use crate::micro::MicroHosts;
use crate::prepare::{self, Plan};
use crate::verdict::{Tally, Verdict};
use crate::{bench_hook, bench_placement, demo, native, proc, product};

/// 512 MiB of entries: the tables of 256 GiB of guest memory.
const ENTRIES_MIB: &str = "512";
const GATHER_TIMEOUT: Duration = Duration::from_secs(300);

/// Programs of the AMD host: what they show, and how long they may take.
const AMD_BENCHES: [(&str, &str, Duration); 2] = [
    ("bench", "Ways to learn about a QEMU guest", Duration::from_secs(300)),
    ("bench-libvirt", "Hook and daemon beside libvirt", Duration::from_secs(900)),
];

/// What to run: without any option all benches but placement's, which takes most of
/// an hour.
#[derive(Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Options {
    #[command(subcommand)]
    whole: Option<Whole>,
    /// Only these boots of the Intel host.
    #[arg(long, value_name = "NAME", num_args = 1.., value_parser = PossibleValuesParser::new(boots::BENCHES.iter().map(|boot| boot.name)))]
    boot: Vec<String>,
    /// Only what is measured on this machine.
    #[arg(long, conflicts_with_all = ["boot", "amd"])]
    here: bool,
    /// Only these benches of the AMD host with libvirt.
    #[arg(long, value_name = "NAME", num_args = 1.., conflicts_with = "boot", value_parser = PossibleValuesParser::new(AMD_BENCHES.map(|bench| bench.0)))]
    amd: Vec<String>,
}

/// Benches with options of their own.
#[derive(Subcommand)]
enum Whole {
    /// ept-virt, DAMON, NUMA balancing and first touch place the memory of the same
    /// guests with the same DRAM, on the emulated AMD host.
    Placement(bench_placement::Options),
}

/// Runs all benches; whether they came to their ends.
pub fn run(lab: &Lab, options: &Options) -> Result<bool> {
    if let Some(Whole::Placement(options)) = &options.whole {
        return bench_placement::run(lab, options);
    }
    if !options.boot.is_empty() {
        return intel(lab, |boot| options.boot.iter().any(|name| name == boot.name));
    }
    if !options.amd.is_empty() {
        return amd(lab, |name| options.amd.iter().any(|chosen| chosen == name));
    }
    gather(lab)?;
    bench_hook::run(lab)?;
    if options.here {
        return Ok(true);
    }
    let well = amd(lab, |_| true)?;
    println!("\nInstructions of the module, on the emulated Intel host:\n");
    Ok(intel(lab, |_| true)? && well)
}

/// Programs of the AMD host; whether all came to their ends.
fn amd(lab: &Lab, chosen: impl Fn(&str) -> bool) -> Result<bool> {
    let mut well = true;
    for (name, title, timeout) in AMD_BENCHES.into_iter().filter(|bench| chosen(bench.0)) {
        println!("\n{title}, on the emulated AMD host:\n");
        well &= demo::run(lab, name, timeout)?;
    }
    Ok(well)
}

/// Measurements that count instructions.
fn intel(lab: &Lab, chosen: impl Fn(&Boot) -> bool) -> Result<bool> {
    let chosen: Vec<&Boot> = boots::BENCHES.iter().filter(|boot| chosen(boot)).collect();
    prepare::packages(lab, &Plan { flavours: Vec::new(), boots: chosen.clone() })?;
    let agent = product::build_agent(lab)?;
    let hosts = MicroHosts::new(lab, &agent);
    let tally = Tally::new(&lab.progress);
    chosen.into_iter().try_for_each(|boot| hosts.run(boot, &Wishes::default(), &tally))?;
    Ok(tally.count(Verdict::Fail) == 0)
}

/// A line of what `kmod/bench/gather.c` prints.
#[derive(Deserialize)]
struct Gather {
    young_percent: u32,
    read_ns: f64,
    gather_ns: f64,
    dirty_ns: f64,
    nodes_ns: f64,
    one_by_one_ns: f64,
}

/// The module's inner loop, built for this machine.
fn gather(lab: &Lab) -> Result<()> {
    let program = native::build(lab, "gather", &["gather.c"])?;
    let log = lab.log("gather");
    proc::run(Command::new(program).arg(ENTRIES_MIB), &log, GATHER_TIMEOUT)?;
    println!("The harvest's inner loop over {ENTRIES_MIB} MiB of entries, on this machine, ns per entry:\n");
    println!(
        "{:>7} {:>10} {:>18} {:>18} {:>18} {:>18}",
        "young", "plain read", "gathered by 64", "and dirty", "and on which node", "one by one"
    );
    let text = std::fs::read_to_string(&log).with_context(|| format!("reading {}", log.display()))?;
    for line in text.lines() {
        let row: Gather = serde_json::from_str(line).with_context(|| format!("reading {line:?}"))?;
        let beside = |ns: f64| format!("{ns:.2} ({:.2} x)", ns / row.read_ns);
        println!(
            "{:>5} % {:>10.2} {:>18} {:>18} {:>18} {:>18}",
            row.young_percent,
            row.read_ns,
            beside(row.gather_ns),
            beside(row.dirty_ns),
            beside(row.nodes_ns),
            beside(row.one_by_one_ns)
        );
    }
    Ok(())
}
