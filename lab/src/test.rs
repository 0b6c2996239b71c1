// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask test`: everything that must hold.

use std::collections::BTreeMap;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use clap::builder::PossibleValuesParser;

use crate::Lab;
use crate::amd::{AmdHost, Wire};
use crate::boots::{self, Boot, Host};
use crate::kernel::Line;
use crate::micro::{MicroHosts, Target};
use crate::prepare::{self, Plan};
use crate::proc;
use crate::product::{self, Installation};
use crate::verdict::{self, Tally, Verdict};

const CARGO_TIMEOUT: Duration = Duration::from_secs(20 * 60);

/// Scenarios that share one start of the AMD host. Those that must not see each
/// other's traces stand apart.
const AMD_RUNS: &[(&str, &[&str])] = &[
    ("amd-place", &["boot", "e2e-memfd", "e2e-thp"]),
    (
        "amd-bad",
        &[
            "bad-no-module",
            "bad-no-daemon",
            "bad-tcg-guest",
            "bad-policy",
            "bad-numatune",
            "bad-daemon-killed",
            "bad-libvirtd-restarted",
            "bad-module-removed",
            "bad-guest-dies",
        ],
    ),
];
const SCENARIO_TIMEOUT: Duration = Duration::from_secs(150);

/// What to run: without any option all tests.
#[derive(Args)]
pub struct Options {
    /// Only these scenarios of the AMD host with libvirt, none of the rest.
    #[arg(long, value_name = "SCENARIO", num_args = 1.., conflicts_with_all = ["intel", "boot"])]
    amd: Vec<String>,
    /// Only the boots of micro hosts whose names begin with intel.
    #[arg(long, conflicts_with = "boot")]
    intel: bool,
    /// Only these boots of micro hosts.
    #[arg(long, value_name = "NAME", num_args = 1.., value_parser = PossibleValuesParser::new(boots::names()))]
    boot: Vec<String>,
    /// In these boots only these tests, which may be any that the agent knows
    /// (lab/agent/src/microvm.rs).
    #[arg(long, value_name = "TEST", num_args = 1.., requires = "boot")]
    only: Vec<String>,
}

impl Options {
    fn all(&self) -> bool {
        !self.intel && self.amd.is_empty() && self.boot.is_empty()
    }

    fn plan(&self) -> Plan<'static> {
        let boots = match self {
            _ if self.all() => boots::TESTS.iter().collect(),
            _ if self.intel => boots::TESTS.iter().filter(|boot| boot.host != Host::Amd).collect(),
            _ => boots::named(&self.boot),
        };
        Plan { libvirt: self.all() || !self.amd.is_empty(), boots }
    }
}

/// Runs the tests; whether none failed.
pub fn run(lab: &Lab, options: &Options) -> Result<bool> {
    let mut tally = Tally::default();
    let plan = options.plan();
    prepare::packages(lab, &plan)?;
    thread::scope(|scope| {
        prepare::in_background(scope, lab, &plan);
        if options.all() {
            sources(lab, &mut tally);
        }
        if let Err(error) = hosts(lab, options, &plan, &mut tally) {
            tally.check("emulated hosts", || Err(error));
        }
    });
    let minutes = lab.progress.elapsed().as_secs_f64() / 60.0;
    eprintln!("after {minutes:.1} minutes, logs in {}", lab.cache.dir().join("logs").display());
    println!("{}", tally.closing());
    Ok(tally.count(Verdict::Fail) == 0)
}

/// What needs no emulated host.
fn sources(lab: &Lab, tally: &mut Tally) {
    let checks: [(&str, &[&str]); 3] = [
        ("fmt", &["fmt", "--all", "--check"]),
        ("clippy", &["clippy", "--workspace", "--all-targets", "--", "--deny=warnings"]),
        // The ABI header against its Rust mirror is one of these.
        ("unit-tests", &["test", "--workspace"]),
    ];
    for (name, args) in checks {
        tally.check(name, || {
            let log = lab.log(&format!("cargo-{name}"));
            proc::run(product::cargo(lab).args(args), &log, CARGO_TIMEOUT)?;
            Ok(String::new())
        });
    }
}

/// What runs on emulated hosts.
fn hosts(lab: &Lab, options: &Options, plan: &Plan, tally: &mut Tally) -> Result<()> {
    let agent = product::build_agent(lab)?;
    let mut targets = BTreeMap::new();
    for line in plan.lines() {
        tally.check(&format!("kmod-build-{line}"), || {
            let target = Target::get(lab, line)?;
            let detail = format!("W=1, {}", target.kernel.release);
            targets.insert(line, target);
            Ok(detail)
        });
        // Those of the line that is there; the next may still be unpacked.
        let of_line = |boot: &&&Boot| boot.kernel == line;
        if targets.contains_key(&line) {
            if plan.libvirt && line == Line::MAIN {
                libvirt(lab, options, &targets[&line], &agent, tally)?;
            }
            let mut hosts = MicroHosts::new(lab, &targets, &agent);
            plan.boots.iter().filter(of_line).try_for_each(|boot| hosts.run(boot, &options.only, tally))?;
        }
    }
    Ok(())
}

/// The scenarios, on the AMD host with libvirt.
fn libvirt(lab: &Lab, options: &Options, target: &Target, agent: &Path, tally: &mut Tally) -> Result<()> {
    let product = product::build(lab)?;
    let files = Installation {
        product,
        module: target.module.clone(),
        agent: agent.into(),
        kernel: target.kernel.image.clone(),
    };
    let amd = Amd { lab, host: AmdHost::prepare(lab, &target.kernel)?, files };
    if !options.amd.is_empty() {
        let names: Vec<&str> = options.amd.iter().map(String::as_str).collect();
        return amd.scenarios("amd-some", &names, tally);
    }
    AMD_RUNS.iter().try_for_each(|(name, scenarios)| amd.scenarios(name, scenarios, tally))
}

/// The AMD host with what is tested on it.
struct Amd<'a> {
    lab: &'a Lab,
    host: AmdHost,
    files: Installation,
}

impl Amd<'_> {
    fn scenarios(&self, name: &str, scenarios: &[&str], tally: &mut Tally) -> Result<()> {
        let script = format!("exec ./lab-agent scenario {}", scenarios.join(" "));
        let timeout = SCENARIO_TIMEOUT * u32::try_from(scenarios.len())?;
        self.run(name, &script, timeout, tally)
    }

    fn run(&self, name: &str, script: &str, timeout: Duration, tally: &mut Tally) -> Result<()> {
        let step = self.lab.progress.step(format!("AMD host: {name}"));
        let wire = self.lab.log(&format!("{name}-wire"));
        let payload = self.files.payload(script)?;
        let mut machine = self.host.start(self.lab, name, payload, &Wire::File(wire.clone()))?;
        let console = machine.console.clone();
        verdict::collect(name, &wire, &console, &mut machine.qemu, timeout, tally, &step)?;
        step.done("");
        Ok(())
    }
}
