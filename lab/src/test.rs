// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask test`: everything that must hold.

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use clap::builder::PossibleValuesParser;

use crate::Lab;
use crate::amd::{self, AmdHost, Wire};
use crate::boots::{self, Boot, Host, Wishes};
use crate::debian::Suite;
use crate::flavour::{Flavour, Init};
use crate::kernel::Line;
use crate::micro::MicroHosts;
use crate::once::Once;
use crate::prepare::{self, Plan};
use crate::product::{self, Installation};
use crate::verdict::{self, Tally, Verdict};
use crate::{deb, debian, dependencies, kernel_checks, kmod, native, package_life, proc, rpm, virtqemud};

/// What cargo says of a command that it does not have.
const NO_SUCH_COMMAND: &str = "error: no such command";

/// What apt says of packages that were made on a newer Debian.
const NEWER_LIBRARY: &str = "ept-virt : Depends: libc6 (>= ";

const CARGO_TIMEOUT: Duration = Duration::from_secs(20 * 60);

/// Scenarios that share one start of an AMD host, under a name for their logs.
#[derive(Clone)]
struct Run<'a> {
    name: &'a str,
    flavour: Flavour,
    scenarios: Vec<&'a str>,
}

const BOOKWORM: Flavour = Flavour::script(Suite::Bookworm);

/// All runs, those that take longest first. Scenarios that must not see each other's traces
/// stand apart. By name only, as the whole is to stay under forty minutes: `packages`,
/// `kernel-upgraded`, `memory-removed`, and on bookworm what its libvirt has no part in.
const AMD_RUNS: &[(&str, Flavour, &[&str])] = &[
    (
        "amd-place",
        Flavour::MAIN,
        &[
            "boot",
            "e2e-memfd",
            "e2e-thp",
            "e2e-split",
            "e2e-excluded",
            "e2e-sampled",
            "e2e-slowed",
            "shared-dram",
        ],
    ),
    (
        "amd-hook",
        Flavour::MAIN,
        &["hook-table", "two-libvirtd", "many-domains", "session", "memory-added", "virtqemud"],
    ),
    ("amd-libvirt-fire", Flavour::MAIN, &["fire-memory", "fire-life", "fire-migrate", "fire-hugetlbfs"]),
    (
        "amd-bad",
        Flavour::MAIN,
        &[
            "bad-no-module",
            "bad-no-daemon",
            "bad-tcg-guest",
            "bad-policy",
            "bad-numatune",
            "bad-daemon-killed",
            "bad-daemon-restarted",
            "bad-libvirtd-restarted",
            "bad-module-removed",
            "bad-guest-dies",
        ],
    ),
    ("amd-bookworm", BOOKWORM, &["hook-table", "policy-required"]),
    ("amd-policy", Flavour::MAIN, &["policy-live", "policy-required", "recording"]),
    ("amd-systemd", Flavour::systemd(Suite::Trixie), &["unit", "unit-restarts"]),
];
const SCENARIO_TIMEOUT: Duration = Duration::from_secs(240);

/// Four runs of apt and DKMS, which start hundreds of programs, besides.
const PACKAGES_TIMEOUT: Duration = Duration::from_secs(30 * 60);

/// Hosts that run at a time. Each has one CPU's worth of work, and 3 GiB at most.
const WORKERS: usize = 2;

/// What to run: without any option all tests.
#[derive(Args)]
pub struct Options {
    /// Only these scenarios of an AMD host with libvirt, none of the rest.
    #[arg(long, value_name = "SCENARIO", num_args = 1.., conflicts_with_all = ["intel", "boot"])]
    amd: Vec<String>,
    /// Run them on a host with this Debian's libvirt.
    #[arg(long, value_enum, default_value_t = Suite::MAIN, requires = "amd")]
    suite: Suite,
    /// Run them on a host whose process 1 is systemd, with Debian's units.
    #[arg(long, requires = "amd")]
    systemd: bool,
    /// Run them on a host where the packages were installed, then a second kernel, which
    /// it boots.
    #[arg(long, requires = "amd", conflicts_with = "systemd")]
    upgraded: bool,
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
    /// Words for their kernel command lines, as ept.fuzz_seed=7 or ept.slow=5.
    #[arg(long, value_name = "WORD", num_args = 1.., requires = "boot")]
    word: Vec<String>,
    /// Only what the project is built from: licences, sources, advisories, what is not
    /// used, and the oldest Rust.
    #[arg(long, conflicts_with_all = ["amd", "intel", "boot"])]
    dependencies: bool,
    /// Only the packages, in trees of both Debians, and the recipe for RPM.
    #[arg(long, conflicts_with_all = ["amd", "intel", "boot", "dependencies"])]
    packages: bool,
    /// Give each of these boots so many minutes.
    #[arg(long, requires = "boot")]
    minutes: Option<u64>,
}

impl Options {
    fn wishes(&self) -> Wishes {
        Wishes {
            only: self.only.clone(),
            words: self.word.clone(),
            timeout: self.minutes.map(|minutes| Duration::from_secs(60 * minutes)),
        }
    }

    fn all(&self) -> bool {
        !self.intel && self.amd.is_empty() && self.boot.is_empty()
    }

    fn plan(&self) -> Plan<'static> {
        if self.packages {
            return Plan { flavours: vec![Flavour::systemd(Suite::MAIN)], boots: Vec::new() };
        }
        let boots = match self {
            _ if self.all() => boots::TESTS.iter().collect(),
            _ if self.intel => boots::TESTS.iter().filter(|boot| boot.host != Host::Amd).collect(),
            _ => boots::named(&self.boot),
        };
        let mut flavours: Vec<Flavour> = self.runs().iter().map(|run| run.flavour).collect();
        flavours.sort_unstable();
        flavours.dedup();
        Plan { flavours, boots }
    }

    /// The flavour that was asked for.
    fn flavour(&self) -> Flavour {
        let init = match (self.systemd, self.upgraded) {
            (true, _) => Init::Systemd,
            (false, true) => Init::Upgraded,
            (false, false) => Init::Script,
        };
        Flavour { suite: self.suite, init }
    }

    /// What runs on hosts with libvirt.
    fn runs(&self) -> Vec<Run<'_>> {
        let run = |(name, flavour, scenarios): &(&'static str, Flavour, &'static [&'static str])| Run {
            name,
            flavour: *flavour,
            scenarios: scenarios.to_vec(),
        };
        let some: Vec<&str> = self.amd.iter().map(String::as_str).collect();
        match some.is_empty() {
            true if self.all() => AMD_RUNS.iter().map(run).collect(),
            true => Vec::new(),
            false => vec![Run { name: "amd-some", flavour: self.flavour(), scenarios: some }],
        }
    }
}

/// Runs the tests; whether none failed.
pub fn run(lab: &Lab, options: &Options) -> Result<bool> {
    let tally = Tally::new(&lab.progress);
    if options.dependencies {
        dependencies::check(lab, &tally);
        return Ok(close(&tally));
    }
    let plan = options.plan();
    prepare::packages(lab, &plan)?;
    if options.packages {
        let suites = [Suite::Trixie, Suite::Bookworm];
        packages(lab, &tally, &suites);
        for suite in suites {
            tally.try_check(&format!("packages-second-kernel-{suite}"), || {
                let lived = package_life::upgraded(lab, suite);
                judged(lived, "apt brought what DKMS builds with, and DKMS built for both kernels")
            });
        }
        return Ok(close(&tally));
    }
    thread::scope(|scope| {
        prepare::in_background(scope, lab, &plan);
        if options.all() {
            sources(lab, &tally);
        }
        if let Err(error) = hosts(lab, options, &plan, &tally) {
            tally.check("emulated hosts", || Err(error));
        }
    });
    let minutes = lab.progress.elapsed().as_secs_f64() / 60.0;
    if amd::wakes() > 0 {
        eprintln!("emulated hosts stood still and were woken {} times (lab/src/amd/waker.rs)", amd::wakes());
    }
    eprintln!("after {minutes:.1} minutes, logs in {}", lab.cache.dir().join("logs").display());
    Ok(close(&tally))
}

/// Prints the counts; whether none failed.
fn close(tally: &Tally) -> bool {
    println!("{}", tally.closing());
    tally.count(Verdict::Fail) == 0
}

/// What needs no emulated host.
fn sources(lab: &Lab, tally: &Tally) {
    let checks: [(&str, &[&str]); 3] = [
        ("fmt", &["fmt", "--all", "--check"]),
        ("clippy", &["clippy", "--workspace", "--all-targets", "--", "--deny=warnings"]),
        // The ABI header against its Rust mirror is one of these.
        ("unit-tests", &["test", "--workspace"]),
    ];
    for (name, args) in checks {
        tally.try_check(name, || {
            let log = lab.log(&format!("cargo-{name}"));
            // Debian's cargo comes without the first two.
            match proc::run(product::cargo(lab).args(args), &log, CARGO_TIMEOUT) {
                Err(error) if format!("{error:#}").contains(NO_SUCH_COMMAND) => {
                    Ok(Err(format!("cargo {} is not installed here", args[0])))
                }
                result => result.map(|()| Ok(String::new())),
            }
        });
    }
    tally.check("checkpatch", || kernel_checks::checkpatch(lab));
    tally.check("rate-controller", || {
        let log = lab.log("rate-controller");
        let program = native::build(lab, "rate-controller", &["rate.c", "../rate.c"])?;
        proc::run(&mut Command::new(program), &log, CARGO_TIMEOUT)?;
        let text = fs::read_to_string(&log).with_context(|| format!("reading {}", log.display()))?;
        Ok(text.trim().to_owned())
    });
}

/// What the packages are, and what becomes of a tree that they are installed in.
fn packages(lab: &Lab, tally: &Tally, suites: &[Suite]) {
    tally.check("packages", || {
        let packages = deb::tested(lab)?.first;
        let kib = |package: &Path| fs::metadata(package).map(|file| file.len() >> 10);
        let (program, dkms) = (kib(&packages.program)?, kib(&packages.dkms)?);
        Ok(format!("lintian accepts ept-virt, {program} KiB, and ept-virt-dkms, {dkms} KiB"))
    });
    for suite in suites {
        tally.try_check(&format!("packages-{suite}"), || {
            let lived = package_life::native(lab, *suite);
            judged(lived, "installed, built by DKMS, upgraded, removed, purged without a trace")
        });
    }
    tally.check("rpm-recipe", || rpm::judge(lab).map(|()| "rpmlint accepts it".to_owned()));
}

/// What became of packages in a tree; nothing, where that is of an older Debian than the
/// machine that made them.
fn judged<T>(lived: Result<T>, well: &str) -> Result<Result<String, String>> {
    match lived {
        Err(error) if format!("{error:#}").contains(NEWER_LIBRARY) => {
            Ok(Err("the packages are made for a newer C library than this Debian's".into()))
        }
        lived => lived.map(|_| Ok(well.to_owned())),
    }
}

/// Something to run that needs the machine for itself no more than others do.
enum Job<'a> {
    /// Checks on this machine, which print their own verdicts.
    Here(&'static str, fn(&Lab, &Tally)),
    /// Build the module for a kernel.
    Module(Line),
    /// Build KVM with the patch for a kernel, and check patch and module by sparse.
    Patch(Line),
    /// Scenarios of an AMD host with libvirt.
    Scenarios(Run<'a>),
    /// A boot of a micro host.
    Boot(&'a Boot),
}

impl Job<'_> {
    fn name(&self) -> String {
        match self {
            Self::Here(name, _) => (*name).to_owned(),
            Self::Module(line) => format!("kmod-build-{line}"),
            Self::Patch(line) => format!("kvm-patch-{line}"),
            Self::Scenarios(run) => run.name.to_owned(),
            Self::Boot(boot) => boot.name.to_owned(),
        }
    }
}

/// What runs on emulated hosts, each of which keeps one CPU busy.
fn hosts(lab: &Lab, options: &Options, plan: &Plan, tally: &Tally) -> Result<()> {
    let agent = product::build_agent(lab)?;
    let hosts = MicroHosts::new(lab, &agent);
    let libvirt: BTreeMap<Flavour, Once<Amd>> =
        plan.flavours.iter().map(|flavour| (*flavour, Once::new())).collect();
    let jobs = Mutex::new(jobs(options, plan));
    let work = |job: &Job| match job {
        Job::Here(_, check) => {
            check(lab, tally);
            Ok(())
        }
        Job::Module(line) => {
            tally.check(&job.name(), || Ok(format!("W=1, {}", hosts.target(*line)?.kernel.release)));
            Ok(())
        }
        Job::Patch(line) => {
            tally.check(&job.name(), || kernel_checks::patch(lab, &hosts.target(*line)?.kernel));
            Ok(())
        }
        Job::Boot(boot) => hosts.run(boot, &options.wishes(), tally),
        Job::Scenarios(run) => libvirt
            .get(&run.flavour)
            .context("a flavour that is not in the plan")?
            .get(|| Amd::prepare(lab, &agent, run.flavour))?
            .scenarios(run, tally),
    };
    thread::scope(|scope| {
        for _ in 0..WORKERS {
            scope.spawn(|| {
                while let Some(job) = jobs.lock().ok().and_then(|mut jobs| jobs.pop_front()) {
                    if let Err(error) = work(&job) {
                        tally.check(&job.name(), || Err(error));
                    }
                }
            });
        }
    });
    Ok(())
}

/// All jobs of a plan: modules before what needs them, kernels in the order in
/// which they are prepared, and what takes longest not last.
fn jobs<'a>(options: &'a Options, plan: &Plan<'a>) -> VecDeque<Job<'a>> {
    let mut scenarios: VecDeque<Job> = options.runs().into_iter().map(Job::Scenarios).collect();
    let mut jobs = VecDeque::new();
    for line in plan.lines() {
        jobs.push_back(Job::Module(line));
        if plan.boots.iter().any(|boot| boot.patched && boot.kernel == line) {
            jobs.push_back(Job::Patch(line));
        }
        // One at a time: the others find micro hosts to go on with.
        jobs.extend(scenarios.pop_front());
        jobs.extend(plan.boots.iter().filter(|boot| boot.kernel == line).map(|boot| Job::Boot(boot)));
    }
    if options.all() {
        jobs.push_back(Job::Here("packages", |lab, tally| packages(lab, tally, &[Suite::MAIN])));
        jobs.push_back(Job::Here("dependencies", dependencies::check));
    }
    jobs.extend(scenarios);
    jobs
}

/// An AMD host with what is tested on it.
struct Amd<'a> {
    lab: &'a Lab,
    host: AmdHost,
    files: Installation,
}

impl<'a> Amd<'a> {
    fn prepare(lab: &'a Lab, agent: &Path, flavour: Flavour) -> Result<Self> {
        let kernel = debian::host_kernel(lab, flavour)?;
        let packages = match flavour.init {
            Init::Script | Init::Upgraded => None,
            Init::Systemd => Some(package_life::native(lab, flavour.suite)?),
        };
        // Where the packages are installed already, theirs has to be there.
        let module = match flavour.init {
            Init::Script | Init::Systemd => Some(kmod::build(lab, &kernel)?),
            Init::Upgraded => None,
        };
        // Guests boot the host's own kernel, but not 7.3: as a guest without ACPI it panics.
        let guest = match flavour.init {
            Init::Script | Init::Systemd => kernel.clone(),
            Init::Upgraded => Line::MAIN.get(lab)?,
        };
        let files = Installation {
            product: product::build(lab)?,
            module,
            agent: agent.into(),
            kernel: guest.image,
            modules: guest.modules,
            virtqemud: virtqemud::built(lab, flavour)?,
            packages,
        };
        Ok(Self { lab, host: AmdHost::prepare(lab, &kernel, flavour)?, files })
    }

    fn scenarios(&self, run: &Run, tally: &Tally) -> Result<()> {
        // Verdicts of the main suite's hosts carry the scenarios' names alone.
        let program = match run.flavour.suite {
            Suite::MAIN => "scenario".to_owned(),
            other => format!("scenario-on {other}"),
        };
        let script = format!("exec ./lab-agent {program} {}", run.scenarios.join(" "));
        let timeout = run.scenarios.iter().map(|scenario| match *scenario {
            "packages" => PACKAGES_TIMEOUT,
            _ => SCENARIO_TIMEOUT,
        });
        self.run(run.name, &script, timeout.sum(), tally)
    }

    fn run(&self, name: &str, script: &str, timeout: Duration, tally: &Tally) -> Result<()> {
        let step = self.lab.progress.step(format!("AMD host: {name}"));
        let wire = self.lab.log(&format!("{name}-wire"));
        let payload = self.files.payload(script)?;
        let mut machine = self.host.start(self.lab, name, payload, &Wire::File(wire.clone()))?;
        let console = machine.console.clone();
        if verdict::collect(name, &wire, &console, &mut machine.qemu, timeout, tally)? {
            step.done("");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn names(line: &[&str]) -> Vec<String> {
        let options = Line::try_parse_from([&["test"], line].concat()).unwrap().options;
        jobs(&options, &options.plan()).iter().map(Job::name).collect()
    }

    #[test]
    fn a_boot_needs_its_kernel_alone() {
        assert_eq!(names(&["--boot", "amd-7.3"]), ["kmod-build-7.3", "amd-7.3"]);
        assert!(Line::try_parse_from(["test", "--boot", "no-such"]).is_err());
    }

    #[test]
    fn patched_kvm_is_built_before_what_boots_it() {
        let names = names(&["--boot", "amd-patched", "amd-6.12"]);
        assert_eq!(names, ["kmod-build-6.12", "kvm-patch-6.12", "amd-6.12", "amd-patched"]);
    }

    #[test]
    fn scenarios_need_no_micro_host() {
        assert_eq!(names(&["--amd", "boot"]), ["kmod-build-6.12", "amd-some"]);
    }

    #[test]
    fn a_flavour_is_chosen_for_scenarios_alone() {
        let flavours = |line: &[&str]| {
            Line::try_parse_from([&["test"], line].concat()).map(|line| line.options.plan().flavours)
        };
        assert_eq!(flavours(&["--amd", "boot"]).unwrap(), [Flavour::MAIN]);
        assert_eq!(flavours(&["--amd", "boot", "--suite", "bookworm"]).unwrap(), [BOOKWORM]);
        let systemd = flavours(&["--amd", "unit", "--systemd"]).unwrap();
        assert_eq!(systemd, [Flavour::systemd(Suite::Trixie)]);
        assert_eq!(flavours(&[]).unwrap(), [Flavour::MAIN, systemd[0], BOOKWORM]);
        assert!(flavours(&["--intel"]).unwrap().is_empty());
        assert!(flavours(&["--suite", "bookworm"]).is_err());
        assert!(flavours(&["--systemd"]).is_err());
    }

    #[test]
    fn without_options_everything_runs_after_its_module() {
        let all = names(&[]);
        for name in boots::TESTS.iter().map(|boot| boot.name).chain(AMD_RUNS.iter().map(|run| run.0)) {
            assert_eq!(all.iter().filter(|job| *job == name).count(), 1, "{name}");
        }
        let at = |name: &str| all.iter().position(|job| job == name).unwrap();
        assert!(at("kmod-build-6.1") < at("amd-6.1") && at("kmod-build-6.12") < at("amd-place"));
    }

    #[test]
    fn chosen_tests_want_chosen_boots() {
        assert!(Line::try_parse_from(["test", "--only", "churn"]).is_err());
        let builds = |job: &str| job.starts_with("kmod") || job.starts_with("kvm-patch");
        assert!(names(&["--intel"]).iter().all(|job| job.starts_with("intel") || builds(job)));
    }
}
