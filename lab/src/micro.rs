// SPDX-License-Identifier: MIT OR Apache-2.0
//! Micro hosts: kernels booted on emulated processors for the tests of the
//! module, which run there against virtual machines of their own.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::Lab;
use crate::boots::{self, Boot, Host, Wishes};
use crate::intel_bochs::{self, Bochs};
use crate::kernel::{Kernel, Line};
use crate::once::Once;
use crate::verdict::{self, Tally};
use crate::{kmod, micro_amd, micro_image, micro_intel, proc};

/// Boot and tests take 10 to 150 s, on a loaded machine several times that.
const TIMEOUT: Duration = Duration::from_secs(600);
/// Measurements on hosts with faster CPUs or more of them.
const LONG_TIMEOUT: Duration = Duration::from_secs(3600);

/// A kernel and our module for it.
pub struct Target {
    /// The kernel.
    pub kernel: Kernel,
    /// kvm_ept_sample.ko.
    pub module: PathBuf,
    /// The same, built for a kernel that the module does not know.
    pub unknown: PathBuf,
}

impl Target {
    /// Fetches the kernel and builds the module, unless that was done before.
    pub fn get(lab: &Lab, line: Line) -> Result<Self> {
        let kernel = line.get(lab)?;
        let module = kmod::build(lab, &kernel)?;
        let unknown = kmod::build_unknown(lab, &kernel)?;
        Ok(Self { kernel, module, unknown })
    }
}

/// What boots are made of.
pub struct MicroHosts<'a> {
    lab: &'a Lab,
    /// The static program that is PID 1.
    agent: &'a Path,
    targets: BTreeMap<Line, Once<Target>>,
    /// The emulator of Intel hosts.
    bochs: Once<Bochs>,
}

/// The files of one emulated machine.
pub struct Machine {
    /// A folder for what is made for this boot alone.
    pub work: PathBuf,
    /// The boot image.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// The kernel command line.
    pub command_line: String,
    /// Where the serial console goes.
    pub console: PathBuf,
    /// Where what is written to port 0xE9 goes.
    pub wire: PathBuf,
    /// Where the emulator's own messages go.
    pub log: PathBuf,
}

impl<'a> MicroHosts<'a> {
    /// Nothing is made before it is needed.
    pub fn new(lab: &'a Lab, agent: &'a Path) -> Self {
        let targets = Line::ALL.into_iter().map(|line| (line, Once::new())).collect();
        Self { lab, agent, targets, bochs: Once::new() }
    }

    /// A kernel and our module for it.
    pub fn target(&self, line: Line) -> Result<&Target> {
        let target = self.targets.get(&line).context("a kernel line that is not in the list of all")?;
        target.get(|| Target::get(self.lab, line))
    }

    /// Boots once and adds the verdicts of its tests to `tally`. A host that does
    /// not get to its end is a failure there, not an error here.
    pub fn run(&self, boot: &Boot, wishes: &Wishes, tally: &Tally) -> Result<()> {
        let lab = self.lab;
        let target = self.target(boot.kernel)?;
        let bochs = match boot.host {
            Host::Amd => None,
            Host::Intel(cpu) => Some((self.bochs.get(|| intel_bochs::obtain(lab))?, cpu)),
        };
        let step = lab.progress.step(boot.to_string());
        let work = lab.run_folder(boot.name)?;
        let machine = Machine {
            kernel: micro_image::kernel(lab, &target.kernel, boot.flavour)?,
            initramfs: micro_image::initramfs(lab, boot, target, self.agent, &work)?,
            work: work.clone(),
            command_line: boot.command_line(wishes),
            console: lab.log(&format!("{}-console", boot.name)),
            wire: lab.log(boot.name),
            log: lab.log(&format!("{}-emulator", boot.name)),
        };
        machine.start_logs()?;
        let (mut command, output, timeout) = match bochs {
            None => (micro_amd::command(boot, &machine), &machine.log, TIMEOUT),
            // Bochs writes the wire to its standard output.
            Some((bochs, cpu)) => {
                let command = micro_intel::command(lab, bochs, boot, cpu, &machine)?;
                let long = boot.mips > boots::MIPS || boot.cpus > 2;
                let timeout = if long { LONG_TIMEOUT } else { TIMEOUT };
                (command, &machine.wire, timeout * bochs.slowness())
            }
        };
        let mut child = proc::spawn(&mut command, output)?;
        let timeout = wishes.timeout.unwrap_or(timeout);
        let well = verdict::collect(boot.name, &machine.wire, &machine.console, &mut child, timeout, tally)?;
        drop(child);
        if well {
            step.done("");
        }
        fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))
    }
}

impl Machine {
    /// Empties the logs of an earlier machine, which would be taken for ours if
    /// this one ended before it wrote any.
    fn start_logs(&self) -> Result<()> {
        for log in [&self.console, &self.wire, &self.log] {
            let folder = log.parent().context("a log without a folder")?;
            fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
            fs::write(log, "").with_context(|| format!("emptying {}", log.display()))?;
        }
        Ok(())
    }
}
