// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask fresh`: commands of README's first screen, on a Debian machine that has
//! Rust and nothing else.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::Lab;
use crate::debian::{self, Bind, Recipe, Suite};
use crate::{apt, proc};

/// All that the machine has beside a minimal Debian: its own Rust.
const PACKAGES: &[&str] = &["cargo", "ca-certificates"];

/// Runs the commands that it is given one after the other, and writes a line for each:
/// its name, its exit status, and how many seconds it took.
const SCRIPT: &str = r#"
cd /srv/ept-virt
for command; do
    began=$(date +%s)
    cargo xtask $command
    echo "$command $? $(($(date +%s) - began))" >>/srv/times
done
"#;

/// Everything twice over, on a slow machine.
const TIMEOUT: Duration = Duration::from_secs(3 * 3600);
const CLONE_TIMEOUT: Duration = Duration::from_secs(300);

/// What to run there.
#[derive(Args)]
pub struct Options {
    /// Commands of `cargo xtask`, one after the other; each may have options, in one word
    /// with it: "test --dependencies".
    #[arg(default_values = ["demo", "test"])]
    commands: Vec<String>,
}

/// Runs the commands on the last commit; whether all ended well.
pub fn run(lab: &Lab, options: &Options) -> Result<bool> {
    apt::ensure(lab, debian::NEEDS)?;
    let recipe = Recipe { suites: &[Suite::MAIN.name()], packages: PACKAGES, ..Recipe::default() };
    let tree = debian::tree(lab, "fresh-tree", &recipe)?;
    let work = lab.run_folder("fresh")?;
    let checkout = work.join("ept-virt");
    let mut clone = Command::new("git");
    clone.args(["clone", "--quiet", "--no-hardlinks"]).args([&lab.root, &checkout]);
    proc::run(&mut clone, &lab.log("fresh-clone"), CLONE_TIMEOUT).context("copying the last commit")?;
    let log = lab.log("fresh");
    let step =
        lab.progress.step(format!("a fresh machine: {}, to {}", options.commands.join(", "), log.display()));
    let quoted = options.commands.iter().map(|command| format!("'{}'", command.replace('\'', "'\\''")));
    let script = format!("set -- {}\n{SCRIPT}", quoted.collect::<Vec<_>>().join(" "));
    // Tests ask the kernel for its NUMA nodes.
    let binds = [Bind::write(&work, "/srv"), Bind::read(Path::new("/sys"), "/sys")];
    let mut command = debian::enter(&tree, &binds, &script);
    proc::run(&mut command, &log, TIMEOUT)?;
    step.done("");
    let times = work.join("times");
    let ended = fs::read_to_string(&times).with_context(|| format!("reading {}", times.display()))?;
    let mut good = ended.lines().count() == options.commands.len();
    for line in ended.lines() {
        let mut words = line.rsplitn(3, ' ');
        let (Some(seconds), Some(status), Some(name)) = (words.next(), words.next(), words.next()) else {
            bail!("{} has the line {line:?}", times.display());
        };
        let minutes = seconds.parse::<f64>().context("a time in seconds")? / 60.0;
        println!("cargo xtask {name}: exit status {status} after {minutes:.1} minutes");
        good &= status == "0";
    }
    fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))?;
    Ok(good)
}
