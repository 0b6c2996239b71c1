// SPDX-License-Identifier: MIT OR Apache-2.0
//! Policies on a real libvirt: changed while the guest runs, and one that must
//! not start.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use ept_virt_core::wire::DomainState;

use super::daemon::{self, Daemon};
use super::domain::{DomainSpec, policy};
use super::host::{self, virsh};
use crate::report::Outcome;

const TIMEOUT: Duration = Duration::from_secs(60);

/// Far above the times of this test: only libvirt's events tell of changes.
const NEVER_S: &str = "3600";

/// `ept-virt policy`, `pause` and the like take effect on a running guest, by
/// libvirt's events alone; `samples` and `memslots` show it. With all of the product in
/// its place, `doctor` and `hook status` find it there.
pub fn live() -> Result<Outcome> {
    let _daemon = Daemon::start_looking_every(NEVER_S)?;
    let mut guest = DomainSpec::default().start()?;
    guest.wait_ready()?;
    wait(DomainState::Observing)?;
    let warned = daemon::doctor(TIMEOUT)?;
    let hook = daemon::cli_text(&["hook", "status"])?;
    ensure!(hook.contains("qemu.d/ept-virt: installed"), "{hook}");
    let begun = Instant::now();
    daemon::cli_text(&["policy", "set", "guest", "--mode", "place", "--dram", "50%"])?;
    let effect = wait(DomainState::Placing).map(|()| begun.elapsed())?;
    let shown = daemon::cli_text(&["policy", "show", "guest"])?;
    ensure!(
        shown.lines().any(|line| line.starts_with("dram.share") && line.contains("domain XML")),
        "{shown}"
    );
    let both = [virsh(&["dumpxml", "guest"])?, virsh(&["dumpxml", "guest", "--inactive"])?];
    ensure!(both.iter().all(|xml| xml.contains("share=\"50%\"")), "not in both descriptions: {both:?}");
    for (verb, state) in [
        ("pause", DomainState::Observing),
        ("resume", DomainState::Placing),
        ("stop", DomainState::Off),
        ("start", DomainState::Placing),
    ] {
        daemon::cli_text(&[verb, "guest"])?;
        wait(state).with_context(|| format!("after {verb}"))?;
    }
    let samples = daemon::cli_text(&["samples", "guest", "--rate", "200", "--count", "50", "--json"])?;
    let complete = |line: &&str| line.contains("\"gpa\":") && line.contains("\"hva\":1");
    ensure!(samples.lines().count() == 50, "{} samples, not 50", samples.lines().count());
    let memslots = daemon::cli_text(&["memslots", "guest", "--json"])?;
    ensure!(memslots.contains("\"hva\":"), "{memslots}");
    let (code, message) = daemon::cli_failure(&["policy", "set", "guest", "mode=plase"])?;
    ensure!(code == Some(1) && message.contains("did you mean \"place\"?"), "{code:?} {message}");
    daemon::cli_text(&["policy", "clear", "guest"])?;
    wait(DomainState::Observing)?;
    guest.check_data()?;
    Ok(Outcome::Pass(format!(
        "in effect {} ms after it was asked for; {} of 50 samples with their address in QEMU; doctor warns of {}",
        effect.as_millis(),
        samples.lines().filter(complete).count(),
        if warned.is_empty() { "nothing".to_owned() } else { warned.join(", ") }
    )))
}

/// libvirt refuses the start of a domain whose required policy is wrong or can
/// not be served, shows why, and starts it when that is mended.
pub fn required() -> Result<Outcome> {
    let start = |policy: &Option<String>| -> Result<String> {
        let spec = DomainSpec { policy: policy.clone(), ..DomainSpec::default() };
        let said = spec.start().map_or_else(|error| format!("{error:#}"), |_| String::new());
        // Defined it is also when it did not start.
        if virsh(&["list", "--all", "--name"])?.contains("guest") {
            virsh(&["undefine", "guest"])?;
        }
        Ok(said)
    };
    let require = |mode: &str| policy(mode, "").map(|text| text.replacen("mode=", "required='yes' mode=", 1));
    let wrong = start(&require("plase"))?;
    ensure!(
        wrong.contains("is required") && wrong.contains("did you mean \"place\"?"),
        "virsh said: {wrong:?}"
    );
    let unserved = start(&require("place"))?;
    ensure!(unserved.contains("daemon does not answer"), "virsh said: {unserved:?}");
    ensure!(start(&policy("plase", ""))?.is_empty(), "a domain that requires nothing did not start");
    let _daemon = Daemon::start()?;
    let spec = DomainSpec { policy: require("place"), ..DomainSpec::default() };
    let _guest = spec.start().context("with the daemon there")?;
    wait(DomainState::Placing)?;
    host::wait_until("the hook's word", TIMEOUT, || Ok(daemon::status()?.daemon.nudges > 0))?;
    Ok(Outcome::Pass(wrong.lines().last().unwrap_or_default().to_owned()))
}

fn wait(state: DomainState) -> Result<()> {
    daemon::wait_for("guest", &format!("the guest is {state:?}"), TIMEOUT, |d| d.state == state).map(drop)
}
