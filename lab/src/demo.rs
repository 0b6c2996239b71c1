// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask demo`, and the AMD host's parts of `cargo xtask bench`: programs
//! on that host whose output is for people.

use std::io::{self, IsTerminal};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::Lab;
use crate::amd::{AmdHost, Payload, Wire};
use crate::verdict::Follower;
use crate::{prepare, proc};

/// Runs the agent's program `name` ("demo", "bench"...) on the host and shows
/// what it prints; whether it came to its end in time.
pub fn run(lab: &Lab, name: &str, timeout: Duration) -> Result<bool> {
    let (host, files) = prepare::amd(lab)?;
    let colour = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let environment = if colour { "" } else { "NO_COLOR=1 " };
    let payload = files.payload(&format!("{environment}exec ./lab-agent {name}"))?;
    let mut failed = false;
    follow(lab, &host, name, payload, timeout, |line| {
        failed |= line.starts_with(&format!("The {name} failed"));
        println!("{line}");
        Ok(())
    })?;
    Ok(!failed)
}

/// Starts the host with `payload` and hands over each line that comes from there
/// until `EPT-DONE`. `name` stands in the names of the logs.
pub fn follow(
    lab: &Lab,
    host: &AmdHost,
    name: &str,
    payload: Payload,
    timeout: Duration,
    mut each: impl FnMut(&str) -> Result<()>,
) -> Result<()> {
    let wire = lab.log(&format!("{name}-wire"));
    let mut machine = host.start(lab, name, payload, &Wire::File(wire.clone()))?;
    lab.progress.line("an emulated AMD host with 2 GiB of DRAM and 1 GiB of slower memory");
    let deadline = Instant::now() + timeout;
    let mut follower = Follower::new(&wire);
    loop {
        let ended = machine.qemu.try_wait()?;
        for line in follower.lines()? {
            if line == "EPT-DONE" {
                return Ok(());
            }
            each(&line)?;
        }
        if let Some(status) = ended {
            bail!("the emulator {}\n{}", proc::describe(status), proc::log_tail(&machine.console));
        }
        if Instant::now() > deadline {
            bail!("the {name} took more than {} s\n{}", timeout.as_secs(), proc::log_tail(&machine.console));
        }
        thread::sleep(Duration::from_millis(50));
    }
}
