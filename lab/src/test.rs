// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask test`: everything that must hold.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;

use crate::Lab;
use crate::amd::{AmdHost, Wire};
use crate::debian::BuildTree;
use crate::intel_image::Ingredients;
use crate::prepare::Hosts;
use crate::product::{self, Installation};
use crate::verdict::{self, Tally, Verdict};
use crate::{intel, kmod, prepare, proc};

const CARGO_TIMEOUT: Duration = Duration::from_secs(20 * 60);

/// The module's tests against micro VMs, on the AMD host.
const AMD_MICROVM: &str = "insmod kvm_ept_sample.ko && ./lab-agent microvm amd && echo EPT-DONE";
const MICROVM_TIMEOUT: Duration = Duration::from_secs(300);

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

/// What to run.
#[derive(Args)]
pub struct Options {
    /// Only these scenarios of the AMD host, none of the rest.
    #[arg(long, value_name = "NAME", num_args = 1.., conflicts_with = "intel")]
    amd: Vec<String>,
    /// Only the Intel host.
    #[arg(long)]
    intel: bool,
}

/// Runs the tests; whether none failed.
pub fn run(lab: &Lab, options: &Options) -> Result<bool> {
    let mut tally = Tally::default();
    let only_some = options.intel || !options.amd.is_empty();
    prepare::packages(lab, Hosts::All)?;
    thread::scope(|scope| {
        prepare::in_background(scope, lab, Hosts::All);
        if !only_some {
            sources(lab, &mut tally);
        }
        if let Err(error) = hosts(lab, options, &mut tally) {
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
fn hosts(lab: &Lab, options: &Options, tally: &mut Tally) -> Result<()> {
    let tree = BuildTree::get(lab)?;
    let mut module = None;
    tally.check("kmod-build", || {
        module = Some(kmod::build(lab, &tree)?);
        Ok(format!("W=1, {}", tree.release))
    });
    let module = module.context("without the module nothing else can be tested")?;
    let agent = product::build_agent(lab)?;
    if !options.intel {
        let product = product::build(lab)?;
        let files =
            Installation { product, module: module.clone(), agent: agent.clone(), kernel: tree.kernel() };
        let host = AmdHost::prepare(lab, &tree)?;
        let amd = Amd { lab, host, files };
        if options.amd.is_empty() {
            amd.run("amd-microvm", AMD_MICROVM, MICROVM_TIMEOUT, tally)?;
            for (name, scenarios) in AMD_RUNS {
                amd.scenarios(name, scenarios, tally)?;
            }
        } else {
            let names: Vec<&str> = options.amd.iter().map(String::as_str).collect();
            amd.scenarios("amd-some", &names, tally)?;
        }
    }
    if options.amd.is_empty() {
        let ingredients = Ingredients { tree: &tree, sampler: &module, agent: &agent };
        intel::test(lab, ingredients, tally)?;
    }
    Ok(())
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
