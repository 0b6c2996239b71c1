// SPDX-License-Identifier: MIT OR Apache-2.0
//! The boots of micro hosts: which kernel, on which processor, for which tests.
//! A micro host has no disk and no user space but the lab's agent as PID 1.

use std::fmt;
use std::time::Duration;

use crate::kernel::Line;
use crate::{micro_amd, micro_intel};

/// One boot of a host and the tests to run in it.
pub struct Boot {
    /// Stands before the names of the tests, and in the names of the logs.
    pub name: &'static str,
    /// What boots.
    pub kernel: Line,
    /// What it boots on.
    pub host: Host,
    /// How many CPUs. On Intel those after the first are kept free of the
    /// kernel's own work and timer ticks, so that a guest can spin there
    /// without any VM exit.
    pub cpus: u32,
    /// Millions of instructions in an emulated second, for fast boots on Intel.
    pub mips: u32,
    /// Kernel, modules and command line as Debian has them, or what boots fast.
    pub flavour: Flavour,
    /// The host's memory; on Intel 3 GiB take 4 s longer to boot than 512 MiB.
    pub memory_mib: u32,
    /// More words for the kernel command line: parameters of KVM's modules, and
    /// what the agent's tests are to know.
    pub kvm: &'static str,
    /// Whether the module is there that the benches compare with.
    pub bench_module: bool,
    /// Whether KVM's modules are those with the patch of kernel_patch.
    pub patched: bool,
    /// What to run.
    pub tests: Tests,
}

/// What a run asks of its boots beside what they are.
#[derive(Default)]
pub struct Wishes {
    /// Tests to run in place of the boot's own.
    pub only: Vec<String>,
    /// Words for the kernel command line.
    pub words: Vec<String>,
    /// When to give up, if not as usual.
    pub timeout: Option<Duration>,
}

/// A processor with an emulator of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// SVM with nested paging, emulated by QEMU. Two NUMA nodes.
    Amd,
    /// VT-x with EPT, emulated by Bochs. Two NUMA nodes if it has two CPUs.
    Intel(Cpu),
}

/// Intel processors that differ in what their EPT can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cpu {
    /// EPT without accessed and dirty bits.
    IvyBridge,
    /// EPT with accessed and dirty bits.
    Haswell,
    /// EPT with accessed and dirty bits and page modification logging (PML).
    SkylakeX,
}

/// Whether kernel and modules are as Debian ships them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// Byte for byte, with a command line that leaves out nothing.
    Stock,
    /// Kernel uncompressed, KVM's modules without their list of ftrace call
    /// sites, which alone takes longer to process than all the rest of a boot,
    /// and a command line that leaves out what takes an emulator long.
    Fast,
}

/// Names of tests, as the agent knows them.
pub enum Tests {
    /// All that the agent knows, except these.
    AllBut(&'static [&'static str]),
    /// These.
    Only(&'static [&'static str]),
}

/// The emulators do about as many, so that emulated seconds are about as long
/// as real ones.
pub const MIPS: u32 = 50;

/// What counts samples in time, which only a host that counts instructions tells
/// apart from a slow machine.
const SAMPLING: Tests = Tests::Only(&[
    "sample-chosen",
    "sample-huge",
    "sample-fair",
    "sample-harvest",
    "sample-read",
    "sample-overflow",
    "sample-churn",
]);

/// The same without what the controller alone decides, whatever the kernel.
const SAMPLING_ON_EACH_LINE: Tests = Tests::Only(&[
    "sample-chosen",
    "sample-huge",
    "sample-harvest",
    "sample-read",
    "sample-overflow",
    "sample-churn",
]);

/// Wrong arguments are refused before anything depends on the processor: AMD hosts try
/// them on each line.
const NOT_ON_EACH_LINE: &[&str] = &["levels-1g", "arguments"];

/// What takes longer than a test, or the module away from under others.
const FIRE_AND_FUZZ: &[&str] = &[
    "fire-small",
    "fire-huge",
    "fire-hugetlb",
    "fire-killed",
    "fire-closed",
    "fire-unloaded",
    "leaks",
    "fuzz",
];

/// Those of these that depend on the kernel, or on who made the processor. What the
/// module leaks, and how it takes wrong calls, does not.
const FIRE: &[&str] = FIRE_AND_FUZZ.split_at(FIRE_AND_FUZZ.len() - 2).0;

/// What depends on who arms entries and restores them, where KVM is patched.
const PATCHED: Tests = Tests::Only(&[
    "back-end",
    "sample-in-place",
    "harvest-exact",
    "levels-2m",
    "nested-exact",
    "nested-direct",
    "sample-types",
    "sample-dirty-log",
    "sample-end",
    "sample-nx",
    "sample-refusals",
    "sample-vm-exit",
    "abi-2019-types",
    "fire-unloaded",
]);

/// The same where samples can be counted in time.
const PATCHED_SAMPLING: Tests = Tests::Only(&[
    "back-end",
    "sample-in-place",
    "harvest-exact",
    "nested-direct",
    "sample-types",
    "sample-dirty-log",
    "sample-nx",
    "sample-vm-exit",
    "sample-chosen",
    "sample-huge",
    "sample-harvest",
    "sample-churn",
]);

/// All tests, on a kernel line and AMD.
const fn amd(name: &'static str, kernel: Line) -> Boot {
    Boot {
        name,
        kernel,
        host: Host::Amd,
        // With two emulated in parallel, QEMU 7.2 now and then runs code that
        // the other one has patched, and the kernel dies of an int3.
        cpus: 1,
        mips: MIPS,
        flavour: Flavour::Stock,
        // Three whole GiB above the fourth, of which a kernel at a random
        // address leaves one free for a page of that size.
        memory_mib: 6144,
        kvm: "",
        bench_module: false,
        patched: false,
        tests: Tests::AllBut(&[]),
    }
}

/// A fast boot of an Intel host with two CPUs.
const fn intel(name: &'static str, kernel: Line, tests: Tests) -> Boot {
    Boot {
        name,
        kernel,
        host: Host::Intel(Cpu::SkylakeX),
        cpus: 2,
        mips: MIPS,
        flavour: Flavour::Fast,
        // Enough for the kernel to use transparent huge pages.
        memory_mib: 1024,
        kvm: "",
        bench_module: false,
        patched: false,
        tests,
    }
}

/// A fast boot of a small Intel host with one CPU.
const fn small(name: &'static str, cpu: Cpu, tests: Tests) -> Boot {
    Boot { host: Host::Intel(cpu), cpus: 1, memory_mib: 512, ..intel(name, Line::V6_12, tests) }
}

/// A boot without any trick. It takes 40 to 100 s before the tests begin.
const fn stock(name: &'static str, kernel: Line) -> Boot {
    let tests = Tests::Only(&["harvest-exact", "dirty-exact"]);
    Boot { kernel, flavour: Flavour::Stock, ..small(name, Cpu::SkylakeX, tests) }
}

/// What a harvest costs. Alone, as then a tick is one instruction of one CPU, and
/// with several NUMA nodes to tell apart; 512 MiB of the memory are the guest's.
const COST: Boot = Boot {
    cpus: 1,
    memory_mib: 1536,
    kvm: "numa=fake=4",
    bench_module: true,
    ..intel("intel-cost", Line::V6_12, Tests::Only(&["on-nodes", "harvest-cost", "harvest-cost-2m", "holds"]))
};

/// What a sample costs where KVM is patched.
const PATCHED_COST: Boot = Boot {
    cpus: 1,
    patched: true,
    ..intel("intel-patched-cost", Line::V6_12, Tests::Only(&["sample-cost"]))
};

/// What samples, harvests and KVM's own faults cost, to compare KVM with the patch
/// and without. Without page modification logging, with which no write faults.
const fn cost_beside(name: &'static str, kernel: Line, patched: bool) -> Boot {
    let tests = Tests::Only(&["sample-cost", "sample-in-place", "harvest-cost", "fault-cost"]);
    Boot {
        cpus: 1,
        memory_mib: 1536,
        kvm: "kvm_intel.pml=0",
        bench_module: true,
        patched,
        ..intel(name, kernel, tests)
    }
}

/// The boots that the tests need.
pub const TESTS: &[Boot] = &[
    amd("amd-6.1", Line::V6_1),
    amd("amd-6.12", Line::V6_12),
    amd("amd-7.3", Line::V7_3),
    Boot { tests: Tests::Only(FIRE_AND_FUZZ), ..amd("amd-fire", Line::V6_12) },
    Boot { tests: Tests::Only(FIRE), ..amd("amd-fire-6.1", Line::V6_1) },
    Boot { tests: Tests::Only(FIRE), ..amd("amd-fire-7.3", Line::V7_3) },
    intel("intel-fire", Line::V6_12, Tests::Only(FIRE)),
    // The page of 1 GiB needs the memory of intel-haswell.
    intel("intel", Line::V6_12, Tests::AllBut(&["levels-1g"])),
    intel("intel-6.1", Line::V6_1, Tests::AllBut(NOT_ON_EACH_LINE)),
    intel("intel-7.3", Line::V7_3, Tests::AllBut(NOT_ON_EACH_LINE)),
    intel("intel-sampling", Line::V6_12, SAMPLING),
    COST,
    intel("intel-sampling-6.1", Line::V6_1, SAMPLING_ON_EACH_LINE),
    intel("intel-sampling-7.3", Line::V7_3, SAMPLING_ON_EACH_LINE),
    Boot { patched: true, tests: PATCHED, ..amd("amd-patched", Line::V6_12) },
    Boot { patched: true, tests: PATCHED, ..amd("amd-patched-7.3", Line::V7_3) },
    Boot { patched: true, ..intel("intel-patched", Line::V6_12, PATCHED_SAMPLING) },
    Boot { patched: true, ..intel("intel-patched-7.3", Line::V7_3, PATCHED_SAMPLING) },
    PATCHED_COST,
    stock("intel-stock", Line::V6_12),
    Boot {
        // With the second GiB free as a whole.
        memory_mib: 2304,
        ..small("intel-haswell", Cpu::Haswell, Tests::Only(&["harvest-exact", "dirty-exact", "levels-1g"]))
    },
    Boot {
        host: Host::Intel(Cpu::IvyBridge),
        ..intel(
            "intel-ivybridge",
            Line::V6_12,
            Tests::Only(&[
                "harvest-exact",
                "harvest-peek",
                "harvest-unaligned",
                "levels-2m",
                "flush-proof",
                "churn-accessed",
                "no-ad-bits",
            ]),
        )
    },
    Boot {
        kvm: "kvm.tdp_mmu=0",
        ..intel(
            "intel-shadow",
            Line::V6_12,
            Tests::Only(&["shadow-exact", "shadow-huge", "vm-exit", "module-in-use", "churn-accessed"]),
        )
    },
];

/// Boots by name only, `cargo xtask test --boot`: those of the debug kernel, and what
/// takes longer than it tells beside [`TESTS`].
pub const BY_NAME: &[Boot] = &[
    stock("intel-stock-6.1", Line::V6_1),
    stock("intel-stock-7.3", Line::V7_3),
    // Each GiB costs KASAN an eighth of it.
    Boot { memory_mib: 4096, ..amd("amd-debug", Line::V6_12Debug) },
    Boot {
        memory_mib: 4096,
        kvm: "ept.slow=5",
        tests: Tests::Only(FIRE_AND_FUZZ),
        ..amd("amd-debug-fire", Line::V6_12Debug)
    },
    Boot { flavour: Flavour::Stock, ..intel("intel-debug", Line::V6_12Debug, Tests::AllBut(&["levels-1g"])) },
];

/// The boots that the benches need.
pub const BENCHES: &[Boot] = &[
    COST,
    intel("intel-bench-sampling", Line::V6_12, Tests::Only(&["sample-rate", "sample-cold", "holds"])),
    Boot { cpus: 1, ..intel("intel-bench-sample", Line::V6_12, Tests::Only(&["sample-cost"])) },
    // The same on stock KVM and on patched KVM.
    cost_beside("intel-bench-stock", Line::V6_12, false),
    cost_beside("intel-bench-patched", Line::V6_12, true),
    cost_beside("intel-bench-stock-7.3", Line::V7_3, false),
    cost_beside("intel-bench-patched-7.3", Line::V7_3, true),
    // A CPU for each vCPU, and one for the host.
    intel("intel-bench-flush", Line::V6_12, Tests::Only(&["flush-cost"])),
    Boot { cpus: 5, ..intel("intel-bench-flush-4", Line::V6_12, Tests::Only(&["flush-cost"])) },
    Boot { cpus: 3, ..intel("intel-bench-slow", Line::V6_12, Tests::Only(&["sample-settle-slow"])) },
    // What is to be sampled 50000 times in a second takes a faster CPU.
    Boot {
        cpus: 2,
        mips: FAST_MIPS,
        ..intel("intel-bench-fast", Line::V6_12, Tests::Only(&["sample-settle-fast"]))
    },
    Boot {
        cpus: 2,
        mips: FAST_MIPS,
        ..intel("intel-bench-whole", Line::V6_12, Tests::Only(&["guest-slowdown"]))
    },
];

/// One instruction in a nanosecond.
const FAST_MIPS: u32 = 1000;

/// Those of [`TESTS`] and [`BY_NAME`] with these names.
pub fn named(names: &[String]) -> Vec<&'static Boot> {
    all().filter(|boot| names.iter().any(|name| name == boot.name)).collect()
}

/// The names of [`TESTS`] and [`BY_NAME`].
pub fn names() -> Vec<&'static str> {
    all().map(|boot| boot.name).collect()
}

fn all() -> impl Iterator<Item = &'static Boot> {
    TESTS.iter().chain(BY_NAME)
}

impl Boot {
    /// The kernel command line.
    pub fn command_line(&self, wishes: &Wishes) -> String {
        let mut words = vec![
            "console=ttyS0".to_owned(),
            // A bug ends the emulator at once.
            "oops=panic panic=-1".to_owned(),
            // Which would unmap pages of guests now and then, to see who uses them.
            "numa_balancing=disable".to_owned(),
            // Which would clear accessed bits of guests now and then (DAMON_STAT, on by
            // default since it came, after 6.12).
            "damon_stat.enabled=N".to_owned(),
            format!("ept.host={}", self.name),
        ];
        words.push(match &self.tests {
            _ if !wishes.only.is_empty() => format!("ept.tests={}", wishes.only.join(",")),
            Tests::AllBut(names) => format!("ept.without={}", names.join(",")),
            Tests::Only(names) => format!("ept.tests={}", names.join(",")),
        });
        words.push(self.kvm.to_owned());
        if self.patched {
            words.push("ept.patched=1".to_owned());
        }
        words.extend(wishes.words.iter().cloned());
        words.push(match self.host {
            Host::Amd => micro_amd::WORDS.to_owned(),
            Host::Intel(_) => micro_intel::words(self),
        });
        // What follows goes to PID 1.
        words.push("-- init-micro".to_owned());
        words.join(" ")
    }
}

impl fmt::Display for Boot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: Linux {} on {} x {}", self.name, self.kernel, self.cpus, self.host)
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Amd => "AMD EPYC",
            Self::Intel(Cpu::IvyBridge) => "Intel Ivy Bridge",
            Self::Intel(Cpu::Haswell) => "Intel Haswell",
            Self::Intel(Cpu::SkylakeX) => "Intel Skylake X",
        })
    }
}

#[cfg(test)]
mod tests;
