// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest in a process of its own, which does to it what it is told, and may be
//! killed at any time.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use ept_virt_core::process::{Process, find_vm_fd};

use super::disturb::{Disturbance, Disturbed};
use super::machine::{Memory, PAGES};
use super::pattern::Guest;

/// Between its vCPUs' rounds: several such processes share a CPU with their tests.
const REST: Duration = Duration::from_millis(5);

/// The process. Killed and reaped on drop.
pub struct GuestProcess {
    process: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl GuestProcess {
    /// Starts it; its guest runs when this returns.
    pub fn start() -> Result<GuestProcess> {
        let mut process = Command::new("/proc/self/exe")
            .arg("microvm-child")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start a guest's process")?;
        let to = process.stdin.take().context("no pipe")?;
        let from = BufReader::new(process.stdout.take().context("no pipe")?);
        let mut guest = GuestProcess { process, to, from };
        guest.answer().context("a guest's process did not start")?;
        Ok(guest)
    }

    pub fn vm(&self) -> Result<OwnedFd> {
        Ok(find_vm_fd(&Process::open(self.process.id() as i32)?)?)
    }

    /// Disturbs the guest; comes back when that is done.
    pub fn disturb(&mut self, how: Disturbance) -> Result<()> {
        self.tell(how.name())
    }

    /// Compares all of the guest's memory with what must stand there.
    pub fn check(&mut self) -> Result<()> {
        self.tell("check")
    }

    fn tell(&mut self, words: &str) -> Result<()> {
        writeln!(self.to, "{words}").with_context(|| format!("cannot tell a guest to {words}"))?;
        self.answer().with_context(|| format!("a guest that was told to {words}"))
    }

    fn answer(&mut self) -> Result<()> {
        let mut line = String::new();
        self.from.read_line(&mut line).context("cannot read from a guest's process")?;
        match line.trim_end() {
            "done" => Ok(()),
            "" => bail!("its process ended by itself"),
            said => bail!("{said}"),
        }
    }

    /// Kills it, and waits for its end.
    pub fn kill(&mut self) -> Result<()> {
        self.process.kill().context("cannot kill a guest's process")?;
        self.process.wait().context("cannot wait for a guest's process")?;
        Ok(())
    }
}

impl Drop for GuestProcess {
    fn drop(&mut self) {
        // It may have ended already; then there is nothing left to do.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The process itself: does what its input says, line by line.
pub fn run() -> Result<()> {
    let mut guest = Disturbed::new(Guest::start_resting(Memory::small_pages(PAGES)?, REST)?)?;
    guest.guest.wait_rounds(1)?;
    println!("done");
    for line in std::io::stdin().lines() {
        let line = line?;
        let result = match line.as_str() {
            "check" => guest.guest.is_alive().and_then(|()| guest.guest.check()),
            name => Disturbance::named(name).and_then(|how| guest.apply(how)),
        };
        match result {
            Ok(()) => println!("done"),
            // What a vCPU saw comes before what was seen of it.
            Err(error) => {
                println!("{error:#}; the guest ended with {:?}", guest.stop());
                bail!("{error:#}");
            }
        }
        std::io::stdout().flush()?;
    }
    ensure!(guest.stop()? > 0, "the guest did nothing");
    Ok(())
}
