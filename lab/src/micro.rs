// SPDX-License-Identifier: MIT OR Apache-2.0
//! Micro hosts: kernels booted on emulated processors for the tests of the
//! module, which run there against virtual machines of their own.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::Lab;
use crate::boots::{Boot, Host};
use crate::intel_bochs::{self, Bochs};
use crate::kernel::{Kernel, Line};
use crate::verdict::{self, Tally, Verdict};
use crate::{apt, kmod, micro_amd, micro_image, micro_intel, proc};

/// Boot and tests take 10 to 150 s.
const TIMEOUT: Duration = Duration::from_secs(400);

/// A kernel and our module for it.
pub struct Target {
    /// The kernel.
    pub kernel: Kernel,
    /// kvm_ept_sample.ko.
    pub module: PathBuf,
}

impl Target {
    /// Fetches the kernel and builds the module, unless that was done before.
    pub fn get(lab: &Lab, line: Line) -> Result<Self> {
        let kernel = line.get(lab)?;
        let module = kmod::build(lab, &kernel)?;
        Ok(Self { kernel, module })
    }
}

/// What boots are made of.
pub struct MicroHosts<'a> {
    lab: &'a Lab,
    targets: &'a BTreeMap<Line, Target>,
    /// The static program that is PID 1.
    agent: &'a Path,
    /// The emulator of Intel hosts, from when it is first needed.
    bochs: Option<Bochs>,
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
    /// Hosts for boots of the kernels in `targets`.
    pub fn new(lab: &'a Lab, targets: &'a BTreeMap<Line, Target>, agent: &'a Path) -> Self {
        Self { lab, targets, agent, bochs: None }
    }

    /// Boots once and adds the verdicts of its tests, or of those in `only`, to
    /// `tally`. A host that does not get to its end is a failure there, not an
    /// error here.
    pub fn run(&mut self, boot: &Boot, only: &[String], tally: &mut Tally) -> Result<()> {
        let lab = self.lab;
        let failed_before = tally.count(Verdict::Fail);
        let target = self.targets.get(&boot.kernel).context("its kernel was not prepared")?;
        if let Host::Intel(_) = boot.host
            && self.bochs.is_none()
        {
            apt::ensure(lab, micro_intel::NEEDS)?;
            self.bochs = Some(intel_bochs::obtain(lab)?);
        }
        let step = lab.progress.step(boot.to_string());
        let work = lab.run_folder(boot.name)?;
        let machine = Machine {
            kernel: micro_image::kernel(lab, &target.kernel, boot.flavour)?,
            initramfs: micro_image::initramfs(lab, boot, target, self.agent, &work)?,
            work: work.clone(),
            command_line: boot.command_line(only),
            console: lab.log(&format!("{}-console", boot.name)),
            wire: lab.log(boot.name),
            log: lab.log(&format!("{}-emulator", boot.name)),
        };
        machine.start_logs()?;
        let (mut command, output, slowness) = match (boot.host, &self.bochs) {
            (Host::Intel(cpu), Some(bochs)) => {
                (micro_intel::command(lab, bochs, boot, cpu, &machine)?, &machine.wire, bochs.slowness())
            }
            _ => (micro_amd::command(boot, &machine), &machine.log, 1),
        };
        let mut child = proc::spawn(&mut command, output)?;
        let timeout = TIMEOUT * slowness;
        verdict::collect(boot.name, &machine.wire, &machine.console, &mut child, timeout, tally, &step)?;
        drop(child);
        if tally.count(Verdict::Fail) == failed_before {
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
