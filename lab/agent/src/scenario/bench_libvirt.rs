// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the product costs beside libvirt: a call of the hook, a daemon that has
//! little to do, and how soon it does what it is told. All in the time of an
//! emulated host, which is many times slower than a real one.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ept_virt_core::wire::{DomainState, DomainStatus};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

use super::daemon::{self, Daemon};
use super::domain::{POLICY_NAMESPACE, policy};
use super::footprint::Footprint;
use super::host::{self, PAYLOAD, virsh};
use super::tiny;

/// Calls of the hook of one kind.
const CALLS: u32 = 30;

/// Starts, and changes of a policy.
const STARTS: usize = 5;
const CHANGES: usize = 6;

/// How often the daemon looks at libvirt when nobody tells it to; its default.
const LOOKS_S: &str = "5";

/// The daemon is watched for so long, after it has had time to come to rest.
const WATCHED: Duration = Duration::from_secs(30);
const SETTLE: Duration = Duration::from_secs(8);

/// Between two looks at the daemon's status.
const LOOK: Duration = Duration::from_millis(10);

const DEFINED: usize = 50;
/// Not all: with 49 running, the one emulated processor does not start another
/// within a minute.
const SOME: usize = 8;

const TIMEOUT: Duration = Duration::from_secs(120);

/// Measures and prints tables, then `EPT-DONE`.
pub fn run() -> Result<()> {
    let outcome = host::reset().and_then(|()| measure());
    if let Err(error) = &outcome {
        println!("The bench-libvirt failed: {error:#}");
    }
    println!("EPT-DONE");
    outcome
}

fn measure() -> Result<()> {
    let names: Vec<String> = (0..DEFINED).map(|number| format!("idle-{number:02}")).collect();
    tiny::define(&names, policy("observe", "").as_deref())?;
    println!(
        "libvirt {}; all times are those of an emulated host: compare, do not quote\n",
        host::libvirt_major()?
    );
    println!("{:<52} {:>9} {:>9} {:>9}", "a call of the hook (emulated)", "wall", "longest", "CPU");
    let xml = "/run/bench.xml";
    fs::write(xml, virsh(&["dumpxml", &names[0]])?).with_context(|| format!("writing {xml}"))?;
    calls("for comparison: busybox true", Path::new(xml), || {
        let mut command = Command::new("busybox");
        command.arg("true");
        command
    })?;
    hook_calls("no daemon", Path::new(xml))?;
    let daemon = Daemon::start_looking_every(LOOKS_S)?;
    hook_calls("with a daemon", Path::new(xml))?;
    println!("\n{:<52} {:>9} {:>9}", "how soon (emulated)", "median", "longest");
    starts(&names[0])?;
    changes(&names[0])?;
    virsh(&["destroy", &names[0]])?;
    println!(
        "\n{:<30} {:>9} {:>9} {:>9} {:>9}",
        "the daemon at rest (emulated)", "of a CPU", "threads", "RSS", "private"
    );
    let mut running = 0;
    for count in [0, SOME] {
        for name in &names[running..count] {
            virsh(&["start", name]).with_context(|| format!("with {running} domains running"))?;
            running += 1;
        }
        rest(&daemon, count)?;
    }
    daemon.stop()
}

fn hook_calls(with: &str, xml: &Path) -> Result<()> {
    for operation in ["prepare", "start", "started", "stopped"] {
        calls(&format!("{operation}, {with}"), xml, || {
            let mut command = Command::new(format!("{PAYLOAD}/ept-virt-hook"));
            command.args(["idle-00", operation, "begin", "-"]);
            command
        })?;
    }
    Ok(())
}

/// Prints what a command costs, from before it is started to its end.
fn calls(what: &str, input: &Path, make: impl Fn() -> Command) -> Result<()> {
    let cpu = || -> Result<i64> {
        let usage = getrusage(UsageWho::RUSAGE_CHILDREN).context("asking for the time of children")?;
        Ok((usage.user_time() + usage.system_time()).num_microseconds())
    };
    let (mut wall, mut longest, before) = (Duration::ZERO, Duration::ZERO, cpu()?);
    for _ in 0..CALLS {
        let input = File::open(input).with_context(|| format!("opening {}", input.display()))?;
        let begun = Instant::now();
        let output = make().stdin(input).stderr(Stdio::null()).stdout(Stdio::null()).status();
        let status = output.with_context(|| format!("running {what}"))?;
        let took = begun.elapsed();
        ensure!(status.success(), "{what}: {status}");
        wall += took;
        longest = longest.max(took);
    }
    let cpu_ms = (cpu()? - before) as f64 / f64::from(CALLS) / 1e3;
    println!("{what:<52} {:>6.1} ms {:>6.1} ms {cpu_ms:>6.1} ms", ms(wall / CALLS), ms(longest));
    Ok(())
}

/// A start, and the first round in the daemon's status: which is often there before
/// virsh returns.
fn starts(name: &str) -> Result<()> {
    let (mut returns, mut rounds) = (Vec::new(), Vec::new());
    for number in 0..STARTS {
        if number > 0 {
            virsh(&["destroy", name])?;
            host::wait_until("the domain is forgotten", TIMEOUT, || Ok(status_of(name)?.is_none()))?;
        }
        let (returned, shown) = race(&["start", name], name, |d| d.round.is_some())?;
        returns.push(returned);
        rounds.push(shown);
    }
    row("virsh start called to returned", &mut returns);
    row("virsh start called to first round shown", &mut rounds);
    Ok(())
}

/// A change of the policy, and its effect.
fn changes(name: &str) -> Result<()> {
    let (mut returns, mut effects) = (Vec::new(), Vec::new());
    for number in 0..CHANGES {
        let (mode, state) = match number % 2 {
            0 => ("place", DomainState::Placing),
            _ => ("observe", DomainState::Observing),
        };
        let element = format!("<placement mode='{mode}'/>");
        let words = ["metadata", name, "--live", "--uri", POLICY_NAMESPACE, "--key", "ev", "--set", &element];
        let (returned, shown) = race(&words, name, |d| d.state == state)?;
        returns.push(returned);
        effects.push(shown);
    }
    row("virsh metadata called to returned", &mut returns);
    row("virsh metadata called to effect", &mut effects);
    Ok(())
}

/// Runs virsh while it looks at the daemon: after which time virsh returned, and
/// after which the domain was seen to be as it should.
fn race(virsh: &[&str], name: &str, good: impl Fn(&DomainStatus) -> bool) -> Result<(Duration, Duration)> {
    let called = Instant::now();
    let mut child = Command::new("virsh")
        .arg("--quiet")
        .args(virsh)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()
        .with_context(|| format!("starting virsh {virsh:?}"))?;
    let (mut returned, mut shown) = (None, None);
    while returned.is_none() || shown.is_none() {
        if let (None, Some(status)) = (returned, child.try_wait()?) {
            returned = Some(called.elapsed());
            ensure!(status.success(), "virsh {virsh:?}: {status}");
        }
        if shown.is_none() && status_of(name)?.is_some_and(|d| good(&d)) {
            shown = Some(called.elapsed());
        }
        if called.elapsed() > TIMEOUT {
            let _ = child.kill();
            let _ = child.wait();
            bail!("virsh {virsh:?} has no effect within {} s", TIMEOUT.as_secs());
        }
        thread::sleep(LOOK);
    }
    Ok((returned.context("virsh did not return")?, shown.context("no effect")?))
}

fn status_of(name: &str) -> Result<Option<DomainStatus>> {
    Ok(daemon::status_on(Path::new("/"))?.domains.into_iter().find(|d| d.name == name))
}

/// Prints what a daemon takes that has so many domains to observe.
fn rest(daemon: &Daemon, count: usize) -> Result<()> {
    host::wait_until("all domains are observed", TIMEOUT, || {
        let domains = daemon::status_on(Path::new("/"))?.domains;
        Ok(domains.len() == count && domains.iter().all(|d| d.round.is_some()))
    })?;
    thread::sleep(SETTLE);
    let (before, begun) = (Footprint::of(daemon.pid())?, Instant::now());
    thread::sleep(WATCHED);
    let (after, took) = (Footprint::of(daemon.pid())?, begun.elapsed());
    let share = 100.0 * (after.cpu - before.cpu).as_secs_f64() / took.as_secs_f64();
    println!(
        "{:<30} {share:>7.1} % {:>9} {:>5.1} MiB {:>5.1} MiB",
        format!("{count} domains run, {DEFINED} defined"),
        after.threads,
        after.resident_kib as f64 / 1024.0,
        after.anonymous_kib as f64 / 1024.0
    );
    Ok(())
}

fn row(what: &str, times: &mut [Duration]) {
    times.sort();
    let (median, longest) = (times[times.len() / 2], times[times.len() - 1]);
    println!(
        "{:<52} {:>6.0} ms {:>6.0} ms",
        format!("{what}, {} times", times.len()),
        ms(median),
        ms(longest)
    );
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
