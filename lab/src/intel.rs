// SPDX-License-Identifier: MIT OR Apache-2.0
//! The Intel host: VT-x with EPT, emulated by Bochs, on which tests of the
//! module run against small virtual machines of their own.
//!
//! One instruction is one tick of the emulated clock: times taken in the host
//! count instructions, not what real hardware takes. All translations are
//! flushed at each VM entry and exit, so a stale one shows only on a guest that
//! spins without exits on another CPU.

use std::fmt;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::Lab;
use crate::apt::{self, Need, need};
use crate::intel_bochs::{self, Bochs};
use crate::intel_image::{self, Flavour, Ingredients};
use crate::proc;
use crate::verdict::{self, Tally, Verdict};

/// What booting the Intel host takes.
pub const NEEDS: &[Need] = &[
    need("binutils", "puts the uncompressed kernel of the Intel host together"),
    need("bochsbios", "firmware of the Intel host"),
    need("isolinux", "boot loader of the Intel host"),
    need("syslinux-common", "boot loader of the Intel host"),
    need("vgabios", "firmware of the Intel host"),
    need("xorriso", "makes the CD that the Intel host boots from"),
    need("zstd", "unpacks the kernel of the Intel host"),
];

/// Instructions per emulated second. The fast boot tells the kernel, which
/// would otherwise measure for a second.
const INSTRUCTIONS_PER_SECOND: u32 = 50_000_000;
/// How much of the emulated memory Bochs keeps in real memory; the rest goes to
/// a file once it is touched.
const RESIDENT_MIB: u32 = 2048;
/// Boot and tests take 10 to 150 s with our own build of Bochs.
const FAST_TIMEOUT: Duration = Duration::from_secs(400);
/// Without the tricks a boot alone takes 40 s.
const STOCK_TIMEOUT: Duration = Duration::from_secs(400);

/// The boots that the tests need.
const RUNS: [Run; 6] = [
    Run {
        name: "intel",
        cpu: Cpu::SkylakeX,
        cpus: 2,
        flavour: Flavour::Fast,
        // Enough for the kernel to use transparent huge pages.
        memory_mib: 1024,
        kvm: "",
        // The next host has the memory for a page of 1 GiB.
        tests: Tests::AllBut(&["levels-1g"]),
    },
    Run {
        name: "intel-sampling",
        cpu: Cpu::SkylakeX,
        cpus: 2,
        flavour: Flavour::Fast,
        memory_mib: 1024,
        kvm: "",
        tests: Tests::Only(&[
            "sample-chosen",
            "sample-huge",
            "sample-harvest",
            "sample-read",
            "sample-overflow",
            "sample-churn",
        ]),
    },
    Run {
        name: "intel-haswell",
        cpu: Cpu::Haswell,
        cpus: 1,
        flavour: Flavour::Fast,
        // With the second GiB free as a whole.
        memory_mib: 2304,
        kvm: "",
        tests: Tests::Only(&["harvest-exact", "dirty-exact", "levels-1g"]),
    },
    Run {
        name: "intel-stock",
        cpu: Cpu::SkylakeX,
        cpus: 1,
        flavour: Flavour::Stock,
        memory_mib: 512,
        kvm: "",
        tests: Tests::Only(&["harvest-exact", "dirty-exact"]),
    },
    Run {
        name: "intel-ivybridge",
        cpu: Cpu::IvyBridge,
        cpus: 1,
        flavour: Flavour::Fast,
        memory_mib: 512,
        kvm: "",
        tests: Tests::Only(&["refuses-no-ad-bits"]),
    },
    Run {
        name: "intel-shadow",
        cpu: Cpu::SkylakeX,
        cpus: 1,
        flavour: Flavour::Fast,
        memory_mib: 512,
        kvm: "kvm.tdp_mmu=0",
        tests: Tests::Only(&["refuses-shadow-mmu"]),
    },
];

/// The boots that the benches need.
const BENCHES: [Run; 2] = [
    Run {
        name: "intel-bench",
        cpu: Cpu::SkylakeX,
        // Alone: a tick is one instruction, of one CPU.
        cpus: 1,
        flavour: Flavour::Fast,
        // 256 MiB are the guest's.
        memory_mib: 1024,
        kvm: "",
        tests: Tests::Only(&["harvest-cost"]),
    },
    Run {
        name: "intel-bench-sampling",
        cpu: Cpu::SkylakeX,
        cpus: 2,
        flavour: Flavour::Fast,
        memory_mib: 1024,
        kvm: "",
        tests: Tests::Only(&["sample-rate", "sample-cold"]),
    },
];

/// Counts instructions; whether all came to an end.
pub fn bench(lab: &Lab, ingredients: Ingredients) -> Result<bool> {
    let mut tally = Tally::default();
    let host = IntelHost::prepare(lab, ingredients)?;
    BENCHES.iter().try_for_each(|run| host.run(lab, run, &mut tally))?;
    Ok(tally.count(Verdict::Fail) == 0)
}

/// Runs the tests of the module on all Intel hosts; their verdicts go to `tally`.
pub fn test(lab: &Lab, ingredients: Ingredients, tally: &mut Tally) -> Result<()> {
    let host = IntelHost::prepare(lab, ingredients)?;
    RUNS.iter().try_for_each(|run| host.run(lab, run, tally))
}

/// Processors that differ in what their EPT can do.
#[derive(Clone, Copy)]
pub enum Cpu {
    /// EPT without accessed and dirty bits.
    IvyBridge,
    /// EPT with accessed and dirty bits.
    Haswell,
    /// EPT with accessed and dirty bits and page modification logging (PML).
    SkylakeX,
}

/// One boot of the host and the tests to run in it.
pub struct Run<'a> {
    /// Stands before the names of the tests, and in the names of the logs.
    pub name: &'a str,
    /// The processor.
    pub cpu: Cpu,
    /// How many: 1, or 2 with a NUMA node each. The second is kept free of the
    /// kernel's own work and timer ticks, so that a guest can spin there
    /// without any VM exit.
    pub cpus: u32,
    /// Kernel, modules and command line as Debian has them, or what boots fast.
    pub flavour: Flavour,
    /// The host's memory; 3 GiB take 4 s longer to boot than 512 MiB.
    pub memory_mib: u32,
    /// Parameters of KVM's modules, on the kernel command line.
    pub kvm: &'a str,
    /// What to run.
    pub tests: Tests<'a>,
}

/// Names of tests, as the agent knows them.
pub enum Tests<'a> {
    /// All that the agent knows, except these.
    AllBut(&'a [&'a str]),
    /// These.
    Only(&'a [&'a str]),
}

/// The emulator and all that the host is made of, ready to boot.
pub struct IntelHost<'a> {
    bochs: Bochs,
    ingredients: Ingredients<'a>,
}

impl<'a> IntelHost<'a> {
    /// Installs what is needed and builds the emulator, unless that was done before.
    pub fn prepare(lab: &Lab, ingredients: Ingredients<'a>) -> Result<Self> {
        apt::ensure(lab, NEEDS)?;
        let bochs = intel_bochs::obtain(lab)?;
        Ok(Self { bochs, ingredients })
    }

    /// Boots the host once and adds the verdicts of its tests to `tally`. A
    /// host that does not get to its end is a failure there, not an error here.
    pub fn run(&self, lab: &Lab, run: &Run, tally: &mut Tally) -> Result<()> {
        let failed_before = tally.count(Verdict::Fail);
        let step = lab.progress.step(format!("Intel host {}: {} x {}", run.name, run.cpus, run.cpu));
        let work = lab.run_folder(run.name)?;
        let image = intel_image::build(lab, &self.ingredients, run.flavour, &work)?;
        let machine = Machine {
            cd: work.join("cd.iso"),
            console: lab.log(&format!("{}-console", run.name)),
            log: lab.log(&format!("{}-bochs", run.name)),
        };
        intel_image::burn(lab, &image, &run.kernel_command_line(), &work, &machine.cd)?;
        let config = work.join("bochsrc");
        fs::write(&config, machine.describe(run, &self.bochs))
            .with_context(|| format!("writing {}", config.display()))?;

        let wire = lab.log(run.name);
        machine.forget_last_run()?;
        let mut child = proc::spawn(&mut self.bochs.command(&config), &wire)?;
        let timeout = run.timeout() * self.bochs.slowness();
        verdict::collect(run.name, &wire, &machine.console, &mut child, timeout, tally, &step)?;
        drop(child);
        if tally.count(Verdict::Fail) == failed_before {
            step.done("");
        }
        fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))
    }
}

impl Run<'_> {
    fn kernel_command_line(&self) -> String {
        let mut words = vec![
            "console=ttyS0".to_owned(),
            // A bug ends the emulator at once: Bochs stops at a triple fault.
            "oops=panic panic=-1 reboot=triple".to_owned(),
            format!("ept.host={}", self.name),
            // Posted interrupts and the virtual APIC of Bochs do not suit QEMU's guests.
            format!("kvm_intel.enable_apicv=0 {}", self.kvm),
            match self.tests {
                Tests::AllBut(names) => format!("ept.without={}", names.join(",")),
                Tests::Only(names) => format!("ept.tests={}", names.join(",")),
            },
        ];
        if self.flavour == Flavour::Fast {
            words.push(fast_boot());
        }
        if self.cpus > 1 {
            // Bochs loses wake-ups from MWAIT: MONITOR invalidates the other
            // CPUs' translations of the page by its physical address in place
            // of the linear one, so a store of theirs can go by unseen. HLT
            // waits for an interrupt instead.
            words.push("numa=fake=2 nohz_full=1 idle=halt".to_owned());
        }
        // What follows goes to PID 1.
        words.push("-- init-intel".to_owned());
        words.join(" ")
    }

    fn timeout(&self) -> Duration {
        match self.flavour {
            Flavour::Fast => FAST_TIMEOUT,
            Flavour::Stock => STOCK_TIMEOUT,
        }
    }
}

/// Kernel parameters that leave out what takes an emulated processor long.
fn fast_boot() -> String {
    /// Boot-time work that these tests do without.
    const SKIPPED_INITCALLS: [&str; 8] = [
        "jent_mod_init",
        "bpf_tcp_ca_kfunc_init",
        "load_system_certificate_list",
        "trace_eval_init",
        "bpf_dummy_struct_ops_init",
        "init_kprobe_trace",
        "ftrace_check_for_weak_functions",
        "ftrace_check_sync",
    ];
    let khz = INSTRUCTIONS_PER_SECOND / 1000;
    format!(
        "loglevel=5 mitigations=off random.trust_cpu=1 cryptomgr.notests \
         tsc=reliable tsc_early_khz={khz} lpj=1000000 no_timer_check initcall_blacklist={}",
        SKIPPED_INITCALLS.join(",")
    )
}

/// The files of one emulated machine.
struct Machine {
    cd: PathBuf,
    console: PathBuf,
    log: PathBuf,
}

impl Machine {
    /// Removes the logs of an earlier machine, which would be taken for ours
    /// if this one ended before it wrote any.
    fn forget_last_run(&self) -> Result<()> {
        for log in [&self.console, &self.log] {
            match fs::remove_file(log) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("removing {}", log.display()));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The emulator's configuration (bochsrc).
    fn describe(&self, run: &Run, bochs: &Bochs) -> String {
        format!(
            "display_library: {display}\n\
             romimage: file=/usr/share/bochs/BIOS-bochs-latest\n\
             vgaromimage: file=/usr/share/vgabios/vgabios.bin\n\
             memory: guest={memory}, host={resident}\n\
             cpu: model={model}, count={cpus}, ips={INSTRUCTIONS_PER_SECOND}, reset_on_triple_fault=0, \
             ignore_bad_msrs=1\n\
             clock: sync=none, time0=local\n\
             ata0-master: type=cdrom, path={cd}, status=inserted\n\
             boot: cdrom\n\
             com1: enabled=1, mode=file, dev={console}\n\
             port_e9_hack: enabled=1\n\
             log: {log}\n\
             panic: action=fatal\n\
             error: action=report\n\
             info: action=ignore\n\
             debug: action=ignore\n",
            display = bochs.display(),
            memory = run.memory_mib,
            resident = run.memory_mib.min(RESIDENT_MIB),
            model = run.cpu.bochs_model(),
            cpus = run.cpus,
            cd = self.cd.display(),
            console = self.console.display(),
            log = self.log.display(),
        )
    }
}

impl Cpu {
    fn bochs_model(self) -> &'static str {
        match self {
            Self::IvyBridge => "corei7_ivy_bridge_3770k",
            Self::Haswell => "corei7_haswell_4770",
            Self::SkylakeX => "corei7_skylake_x",
        }
    }
}

impl fmt::Display for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::IvyBridge => "Ivy Bridge",
            Self::Haswell => "Haswell",
            Self::SkylakeX => "Skylake X",
        })
    }
}
