// SPDX-License-Identifier: MIT OR Apache-2.0
//! Micro hosts with SVM and nested paging, emulated by QEMU without any help of
//! the machine's own processor (TCG).

use std::path::Path;
use std::process::Command;

use crate::apt::{Need, need};
use crate::boots::Boot;
use crate::micro::Machine;

/// What booting the host takes.
pub const NEEDS: &[Need] =
    &[need("qemu-system-x86", "emulates AMD hosts"), need("xz-utils", "unpacks kernel modules")];

/// What the slower node has, without any CPU: enough for a test to place pages there.
const FAR_NODE_MIB: u32 = 512;

/// The machine, but for its memory and files. The agent reports through port
/// 0xE9 and ends the machine through port 0x8900, as on Intel hosts.
const MACHINE: &[&str] = &[
    "-nodefaults",
    "-no-user-config",
    "-no-reboot",
    "-display",
    "none",
    "-machine",
    "q35",
    "-accel",
    "tcg,thread=single,tb-size=256",
    "-cpu",
    "EPYC,+svm,+npt",
    "-device",
    "isa-debugcon,iobase=0xe9,chardev=wire",
    "-device",
    "isa-debug-exit,iobase=0x8900,iosize=1",
];

/// The kernel's words for this host. What protects it from its guests takes TCG
/// long; a page of 1 GiB is sure to be found only before there is anything else.
pub const WORDS: &str = "quiet mitigations=off hugepagesz=1G hugepages=0:1";

/// The emulator, ready to start.
pub fn command(boot: &Boot, machine: &Machine) -> Command {
    let near_mib = boot.memory_mib.saturating_sub(FAR_NODE_MIB);
    let mut command = Command::new("qemu-system-x86_64");
    command
        .current_dir(&machine.work)
        .args(MACHINE)
        .arg("-smp")
        .arg(boot.cpus.to_string())
        .arg("-m")
        .arg(format!("{}M", boot.memory_mib))
        .args(["-object", &format!("memory-backend-ram,id=near,size={near_mib}M")])
        .args(["-object", &format!("memory-backend-ram,id=far,size={FAR_NODE_MIB}M")])
        .args(["-numa", &format!("node,nodeid=0,memdev=near,cpus=0-{}", boot.cpus - 1)])
        .args(["-numa", "node,nodeid=1,memdev=far"])
        .arg("-chardev")
        .arg(format!("file,id=wire,path={}", quoted(&machine.wire)))
        .arg("-serial")
        .arg(format!("file:{}", machine.console.display()))
        .arg("-kernel")
        .arg(&machine.kernel)
        .arg("-initrd")
        .arg(&machine.initramfs)
        .arg("-append")
        .arg(&machine.command_line);
    command
}

/// A comma in QEMU's options is written twice.
fn quoted(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}
