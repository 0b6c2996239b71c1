// SPDX-License-Identifier: MIT OR Apache-2.0
//! Micro hosts with VT-x and EPT, emulated by Bochs, which boots from a CD.
//!
//! One instruction is one tick of the emulated clock: times taken in the host
//! count instructions, not what real hardware takes. All translations are
//! flushed at each VM entry and exit, so a stale one shows only on a guest that
//! spins without exits on another CPU.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::Lab;
use crate::apt::{Need, need};
use crate::boots::{Boot, Cpu, Flavour};
use crate::intel_bochs::Bochs;
use crate::micro::Machine;
use crate::proc;

/// From syslinux-common and isolinux.
const BOOT_LOADER: [&str; 2] =
    ["/usr/lib/ISOLINUX/isolinux.bin", "/usr/lib/syslinux/modules/bios/ldlinux.c32"];
const TOOL_TIMEOUT: Duration = Duration::from_secs(120);

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

/// How much of the emulated memory Bochs keeps in real memory; the rest goes to
/// a file once it is touched.
const RESIDENT_MIB: u32 = 2048;

/// The kernel's words for this host.
pub fn words(boot: &Boot) -> String {
    // Bochs stops at a triple fault. Posted interrupts and the virtual APIC of
    // Bochs do not suit QEMU's guests.
    let mut words = vec!["reboot=triple kvm_intel.enable_apicv=0".to_owned()];
    if boot.flavour == Flavour::Fast {
        words.push(fast_boot(boot.mips));
    }
    if boot.cpus > 1 {
        // Bochs loses wake-ups from MWAIT: MONITOR invalidates the other
        // CPUs' translations of the page by its physical address in place
        // of the linear one, so a store of theirs can go by unseen. HLT
        // waits for an interrupt instead.
        words.push(format!("numa=fake=2 nohz_full=1-{} idle=halt", boot.cpus - 1));
    }
    words.join(" ")
}

/// Kernel parameters that leave out what takes an emulated processor long. How
/// fast it is the kernel would otherwise measure for a second.
fn fast_boot(mips: u32) -> String {
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
    let (khz, loops) = (mips * 1000, mips * 20_000);
    format!(
        "loglevel=5 mitigations=off random.trust_cpu=1 cryptomgr.notests \
         tsc=reliable tsc_early_khz={khz} lpj={loops} no_timer_check initcall_blacklist={}",
        SKIPPED_INITCALLS.join(",")
    )
}

/// Makes the CD and returns the emulator, ready to start. The wire is its
/// standard output.
pub fn command(lab: &Lab, bochs: &Bochs, boot: &Boot, cpu: Cpu, machine: &Machine) -> Result<Command> {
    let cd = burn(lab, boot, machine)?;
    let config = machine.work.join("bochsrc");
    fs::write(&config, describe(bochs, boot, cpu, machine, &cd))
        .with_context(|| format!("writing {}", config.display()))?;
    Ok(bochs.command(&config))
}

/// Burns a CD that boots the machine's kernel.
fn burn(lab: &Lab, boot: &Boot, machine: &Machine) -> Result<PathBuf> {
    let (root, cd) = (machine.work.join("cd"), machine.work.join("cd.iso"));
    fs::create_dir_all(&root).with_context(|| format!("creating {}", root.display()))?;
    for file in BOOT_LOADER.map(Path::new) {
        let name = file.file_name().context("a file of the boot loader has no name")?;
        fs::copy(file, root.join(name)).with_context(|| format!("copying {}", file.display()))?;
    }
    // A cache may hold links to another's images; on the CD they would lead nowhere.
    let kernel = fs::canonicalize(&machine.kernel)
        .with_context(|| format!("finding the kernel {}", machine.kernel.display()))?;
    let config = format!(
        "DEFAULT host\nLABEL host\n KERNEL /vmlinuz\n INITRD /initrd\n APPEND {}\n",
        machine.command_line
    );
    fs::write(root.join("isolinux.cfg"), config)?;
    let mut command = Command::new("xorriso");
    command
        .args(["-as", "mkisofs", "-quiet", "-graft-points"])
        .args(["-b", "isolinux.bin", "-c", "boot.cat"])
        .args(["-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"])
        .arg("-o")
        .arg(&cd)
        .arg(&root)
        .arg(format!("/vmlinuz={}", kernel.display()))
        .arg(format!("/initrd={}", machine.initramfs.display()));
    proc::run(&mut command, &lab.log(&format!("{}-cd", boot.name)), TOOL_TIMEOUT)?;
    Ok(cd)
}

/// The emulator's configuration (bochsrc).
fn describe(bochs: &Bochs, boot: &Boot, cpu: Cpu, machine: &Machine, cd: &Path) -> String {
    format!(
        "display_library: {display}\n\
             romimage: file=/usr/share/bochs/BIOS-bochs-latest\n\
             vgaromimage: file=/usr/share/vgabios/vgabios.bin\n\
             memory: guest={memory}, host={resident}\n\
             cpu: model={model}, count={cpus}, ips={ips}, reset_on_triple_fault=0, \
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
        memory = boot.memory_mib,
        resident = boot.memory_mib.min(RESIDENT_MIB),
        model = model(cpu),
        cpus = boot.cpus,
        ips = boot.mips * 1_000_000,
        cd = cd.display(),
        console = machine.console.display(),
        log = machine.log.display(),
    )
}

/// Bochs' name of the processor.
fn model(cpu: Cpu) -> &'static str {
    match cpu {
        Cpu::IvyBridge => "corei7_ivy_bridge_3770k",
        Cpu::Haswell => "corei7_haswell_4770",
        Cpu::SkylakeX => "corei7_skylake_x",
    }
}
