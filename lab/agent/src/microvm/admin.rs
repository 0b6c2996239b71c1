// SPDX-License-Identifier: MIT OR Apache-2.0
//! What an administrator sees of the module: statistics, the kernel's log, the
//! check of the kernel, and a kernel that is not known.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ept_virt_core::samples::{AccessSet, Sampling};
use ept_virt_core::uapi;
use nix::errno::Errno;
use nix::kmod::{DeleteModuleFlags, ModuleInitFlags, delete_module, finit_module};
use nix::mount::{MsFlags, mount};

use super::Outcome;
use super::machine::{ALL, ALL_CLEAR, Machine, PAGES, SPREAD, Touch, harvest, round_program};
use super::sampling::{OFTEN_HZ, while_running};
use crate::kernel_log::KernelLog;

const STATS: &str = "/proc/kvm_ept_sample_stats";
const MODULE: &str = "kvm_ept_sample";
/// The same module, built for a kernel that it does not know.
const MODULE_OF_UNKNOWN_KERNEL: &str = "/modules/unknown-kernel/kvm_ept_sample.ko";

/// The statistics of the whole host, by name, and the lines of the sessions.
pub struct Stats {
    text: String,
    values: BTreeMap<String, String>,
    sessions: Vec<String>,
}

impl Stats {
    pub fn read() -> Result<Stats> {
        let text = fs::read_to_string(STATS).with_context(|| format!("cannot read {STATS}"))?;
        let (mut values, mut sessions) = (BTreeMap::new(), Vec::new());
        for line in text.lines() {
            let (name, value) = line.split_once(' ').with_context(|| format!("no value: {line:?}"))?;
            if name == "session" {
                sessions.push(value.to_owned());
            } else {
                let double = values.insert(name.to_owned(), value.to_owned());
                ensure!(double.is_none(), "{name} stands there twice");
            }
        }
        Ok(Stats { text, values, sessions })
    }

    pub fn word(&self, name: &str) -> Result<&str> {
        self.values.get(name).map(String::as_str).with_context(|| format!("no {name} in {}", self.text))
    }

    fn number(&self, name: &str) -> Result<u64> {
        self.word(name)?.parse().with_context(|| format!("{name} is not a number"))
    }

    /// Fails unless these numbers grew by so much since `before`.
    fn expect_grown(&self, before: &Stats, by: &[(&str, u64)]) -> Result<()> {
        for (name, by) in by {
            let (from, to) = (before.number(name)?, self.number(name)?);
            ensure!(to.wrapping_sub(from) == *by, "{name} went from {from} to {to}, expected {by} more");
        }
        Ok(())
    }
}

/// The statistics count what was done, while sessions are open and afterwards.
pub fn statistics() -> Result<Outcome> {
    const HARVESTS: u64 = 5;
    let mode = fs::metadata(STATS)?.permissions().mode() & 0o777;
    ensure!(mode == 0o400, "{STATS} has mode {mode:o}");
    let before = Stats::read()?;
    let abi = format!("{}.{}", uapi::ABI_VERSION >> 16, uapi::ABI_VERSION & 0xffff);
    ensure!(before.word("abi")? == abi, "ABI {}, expected {abi}", before.word("abi")?);
    ensure!(before.word("version")? == env!("CARGO_PKG_VERSION"), "version {}", before.word("version")?);
    ensure!(["ept", "npt"].contains(&before.word("format")?), "format {}", before.word("format")?);

    let mut machine = Machine::standard()?;
    machine.load(&round_program(SPREAD, Touch::Write))?;
    machine.run_round()?;
    let (mut session, sampled) = (machine.observe()?, machine.observe()?);
    let attached = [("sessions_open", 2), ("sessions_attached", 2), ("vms_attached", 1)];
    Stats::read()?.expect_grown(&before, &attached)?;
    let (mut cleared, mut read) = (0, 0);
    for _ in 0..HARVESTS {
        let stats = harvest(&mut session, ALL_CLEAR)?.stats;
        cleared += stats.entries_cleared;
        read += stats.entries_read;
        machine.run_round()?;
    }
    let counted = [
        ("harvests", HARVESTS),
        ("harvest_pages", HARVESTS * PAGES),
        ("harvest_entries_cleared", cleared),
        ("harvest_entries_read", read),
        ("harvest_flushes", HARVESTS),
        ("harvests_partial", 0),
        ("harvest_errors_other", 0),
    ];
    let now = Stats::read()?;
    now.expect_grown(&before, &counted)?;
    ensure!(now.word("self_check")? == "passed", "the self-check {}", now.word("self_check")?);
    let line = format!("pid={} harvests={HARVESTS} sample_hz=0", std::process::id());
    ensure!(now.sessions.contains(&line), "no {line:?} in {:?}", now.sessions);

    let mut sampling = Sampling::start(sampled, AccessSet::ALL, OFTEN_HZ, 0)?;
    let (_, ()) = while_running(&mut machine, || {
        sampling.read(&mut Vec::new(), Duration::from_secs(10))?;
        Ok(())
    })?;
    let now = Stats::read()?;
    now.expect_grown(&before, &[("samplers", 1)])?;
    let line = format!("pid={} harvests=0 sample_hz={OFTEN_HZ}", std::process::id());
    ensure!(now.sessions.contains(&line), "no {line:?} in {:?}", now.sessions);
    // The guest rests: what it paid does not change any more.
    let stats = sampling.stats()?;
    ensure!(stats.samples > 0, "nothing was sampled");
    drop((session, sampling));
    let after = Stats::read()?;
    after.expect_grown(&before, &counted)?;
    after.expect_grown(&before, &attached.map(|(name, _)| (name, 0)))?;
    let faults = stats.samples + stats.dropped + stats.unwanted;
    after.expect_grown(
        &before,
        &[("samples", stats.samples), ("sample_faults", faults), ("samplers", 0), ("sample_armed_now", 0)],
    )?;
    let lost = after.number("sample_armed")? - before.number("sample_armed")?;
    after.expect_grown(&before, &[("sample_released", lost - faults)])?;
    // A kernel address has 16 digits, and begins with these.
    ensure!(!after.text.contains("ffff"), "an address? {}", after.text);
    Ok(Outcome::Pass(format!(
        "{HARVESTS} harvests, {cleared} entries cleared and {faults} faults by sampling, still counted after detach"
    )))
}

/// Of the kernel's new lines those that name the module.
fn lines_of_module(log: &mut KernelLog) -> Result<Vec<String>> {
    Ok(log.lines()?.into_iter().filter(|line| line.contains(MODULE)).collect())
}

/// In good weather the module writes nothing into the kernel's log.
pub fn quiet() -> Result<Outcome> {
    let mut log = KernelLog::from_now()?;
    let mut machine = Machine::standard()?;
    machine.load(&round_program(SPREAD, Touch::Write))?;
    machine.run_round()?;
    let mut session = machine.observe()?;
    harvest(&mut session, ALL_CLEAR)?;
    let mut sampling = Sampling::start(machine.observe()?, AccessSet::ALL, OFTEN_HZ, 0)?;
    while_running(&mut machine, || {
        for _ in 0..20 {
            harvest(&mut session, ALL_CLEAR)?;
            sampling.read(&mut Vec::new(), Duration::from_millis(10))?;
        }
        Ok(())
    })?;
    let samples = sampling.stats()?.samples;
    ensure!(samples > 0, "nothing was sampled");
    sampling.detach()?;
    drop(session);
    let lines = lines_of_module(&mut log)?;
    ensure!(lines.is_empty(), "the module said: {lines:?}");
    // What is refused is said, so the log is read where lines would come.
    let second = Sampling::start(machine.observe()?, AccessSet::ALL, OFTEN_HZ, 0)?;
    ensure!(Sampling::start(machine.observe()?, AccessSet::ALL, OFTEN_HZ, 0).is_err(), "two samplers");
    drop(second);
    let lines = lines_of_module(&mut log)?;
    ensure!(lines.len() == 1, "one line about the second sampler expected: {lines:?}");
    Ok(Outcome::Pass(format!("no line beside 21 harvests and {samples} samples; one for what was refused")))
}

const TRACING: &str = "/sys/kernel/tracing";

/// The module's own events, on from now until this is dropped.
struct Tracing;

impl Tracing {
    fn start() -> Result<Tracing> {
        let tracing = Path::new(TRACING);
        if !tracing.join("trace").exists() {
            mount(Some("tracefs"), tracing, Some("tracefs"), MsFlags::empty(), None::<&str>)
                .context("cannot mount tracefs")?;
        }
        fs::write(tracing.join("trace"), "").context("cannot empty the trace")?;
        fs::write(tracing.join(EVENTS), "1").context("cannot turn the module's events on")?;
        Ok(Tracing)
    }

    /// The lines of one event.
    fn lines(&self, event: &str) -> Result<Vec<String>> {
        let trace = fs::read_to_string(Path::new(TRACING).join("trace"))?;
        let mark = format!(" {event}: ");
        Ok(trace.lines().filter_map(|line| Some(line.split_once(&mark)?.1.to_owned())).collect())
    }

    /// Fails unless an event's lines all have this, and there is one at least.
    fn expect(&self, event: &str, words: &str) -> Result<usize> {
        let lines = self.lines(event)?;
        ensure!(!lines.is_empty(), "no {event} in the trace");
        let other =
            lines.iter().find(|line| !words.split(' ').all(|word| line.split(' ').any(|is| is == word)));
        ensure!(other.is_none(), "{event} without {words}: {other:?}");
        Ok(lines.len())
    }
}

impl Drop for Tracing {
    fn drop(&mut self) {
        // The next test says it if this did not work.
        let _ = fs::write(Path::new(TRACING).join(EVENTS), "0");
    }
}

const EVENTS: &str = "events/kvm_ept_sample/enable";

/// Each tracepoint tells what happened.
pub fn tracepoints() -> Result<Outcome> {
    let tracing = Tracing::start()?;
    let mut machine = Machine::standard()?;
    machine.load(&round_program(SPREAD, Touch::Write))?;
    machine.run_round()?;
    let mut session = machine.observe()?;
    let cleared = harvest(&mut session, ALL_CLEAR)?.stats.entries_cleared;
    let pid = format!("pid={}", std::process::id());
    tracing.expect("kes_attach", &format!("{pid} result=0"))?;
    let sections = tracing.expect("kes_chunk", &pid)?;
    let words =
        format!("{pid} pages={PAGES} accessed=201 mapped=201 cleared={cleared} chunks={sections} result=0");
    tracing.expect("kes_harvest", &words)?;
    tracing.expect("kes_flush", &pid)?;
    let mut sampling = Sampling::start(machine.observe()?, AccessSet::WRITE, OFTEN_HZ, 0)?;
    tracing.expect("kes_sample_set", &format!("{pid} access=0x2 hz={OFTEN_HZ} result=0"))?;
    while_running(&mut machine, || Ok(sampling.read(&mut Vec::new(), Duration::from_secs(10))?))?;
    let samples = sampling.stats()?.samples;
    let traced = tracing.expect("kes_sample", &format!("{pid} vcpu=0 access=write level=1"))?;
    ensure!(samples > 0 && traced as u64 == samples, "{traced} samples traced of {samples}");
    tracing.expect("kes_arm_round", &pid)?;
    drop((session, sampling));
    let detached = tracing.expect("kes_detach", &pid)?;
    ensure!(detached == 2, "{detached} sessions detached");
    Ok(Outcome::Pass(format!("8 events, {traced} samples among them, and nothing of them amiss")))
}

/// Where PID 1 of the host found the module.
fn module_file() -> Result<File> {
    let path = Path::new("/modules").join(MODULE).with_extension("ko");
    File::open(&path).with_context(|| format!("cannot open {}", path.display()))
}

fn unload() -> Result<()> {
    let name = c"kvm_ept_sample";
    delete_module(name, DeleteModuleFlags::O_NONBLOCK).context("cannot remove the module")
}

fn load() -> Result<()> {
    finit_module(module_file()?, c"", ModuleInitFlags::empty()).context("cannot load the module")
}

/// The kernel is checked on the first VM that has pages mapped, once for each load.
pub fn self_check() -> Result<Outcome> {
    unload()?;
    load()?;
    let state = || Stats::read()?.word("self_check").map(str::to_owned);
    ensure!(state()? == "pending", "after loading: {}", state()?);
    let mut machine = Machine::standard()?;
    let mut session = machine.observe()?;
    harvest(&mut session, ALL)?;
    ensure!(state()? == "pending", "on a VM that has nothing mapped: {}", state()?);
    machine.load(&round_program(SPREAD, Touch::Write))?;
    machine.run_round()?;
    ensure!(harvest(&mut session, ALL_CLEAR)?.stats.accessed == 201, "the check changed accessed bits");
    ensure!(state()? == "passed", "on a VM that has pages mapped: {}", state()?);
    Ok(Outcome::Pass("pending until pages were mapped, then passed; 201 pages accessed as ever".into()))
}

/// On a kernel that it does not know the module says so in one line, and is not
/// loaded.
pub fn unknown_kernel() -> Result<Outcome> {
    let path = Path::new(MODULE_OF_UNKNOWN_KERNEL);
    let module = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    unload()?;
    let mut log = KernelLog::from_now()?;
    let result = finit_module(module, c"", ModuleInitFlags::empty());
    let lines = lines_of_module(&mut log);
    load()?;
    ensure!(result == Err(Errno::EOPNOTSUPP), "loading it: {result:?}");
    let lines: Vec<String> = lines?.into_iter().filter(|line| line.contains("refused:")).collect();
    ensure!(lines.len() == 1, "one line expected: {lines:?}");
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    for word in ["8.0", release.trim(), "6.1, 6.12 and 7.3", "docs/KERNELS.md"] {
        ensure!(lines[0].contains(word), "the line does not name {word}: {}", lines[0]);
    }
    Ok(Outcome::Pass("EOPNOTSUPP and one line that names both kernels and those that are known".into()))
}
