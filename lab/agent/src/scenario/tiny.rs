// SPDX-License-Identifier: MIT OR Apache-2.0
//! Guests that cost next to nothing: under libvirt and KVM as any other, with
//! 8 MiB and no kernel. They run as soon as QEMU does, and eight of them leave the
//! emulated host most of its processor.

mod firmware;

use std::fs;

use anyhow::{Context, Result};

use super::console::Console;
use super::domain;
use super::host::virsh;

pub use firmware::HOT_PAGES;

const ROM: &str = "/run/tiny-guest.rom";

/// All of its memory.
pub const MEMORY_MIB: u32 = 8;

/// Defines a domain for each name, with a policy element or without.
pub fn define(names: &[String], policy: Option<&str>) -> Result<()> {
    let mut commands = Vec::new();
    for name in names {
        commands.push(format!("define {}", write(name, policy)?));
    }
    // One virsh for all: each takes half a second to begin with.
    virsh(&[&commands.join("; ")]).map(drop)
}

/// Writes what a domain is made of; the path of its definition.
pub fn write(name: &str, policy: Option<&str>) -> Result<String> {
    fs::write(ROM, firmware::rom()).with_context(|| format!("writing {ROM}"))?;
    let path = format!("/run/{name}.xml");
    fs::write(&path, xml(name, policy)).with_context(|| format!("writing {path}"))?;
    Ok(path)
}

/// Starts a defined domain, and waits until it is up.
pub fn start(name: &str) -> Result<Console> {
    Console::clear(name)?;
    virsh(&["start", name])?;
    let mut console = Console::connect(name)?;
    console.wait_ready()?;
    Ok(console)
}

/// Kills a domain's QEMU.
pub fn kill_qemu(name: &str) -> Result<()> {
    domain::signal_qemu(name, nix::sys::signal::Signal::SIGKILL)
}

/// Its definition. Ticks that were missed are not made up for, nor does the next one
/// wait until they are.
fn xml(name: &str, policy: Option<&str>) -> String {
    let metadata = policy.map_or(String::new(), |policy| format!("<metadata>{policy}</metadata>"));
    format!(
        "<domain type='kvm'>
  <name>{name}</name>
  {metadata}
  <memory unit='MiB'>{MEMORY_MIB}</memory>
  <memoryBacking><source type='memfd'/></memoryBacking>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <loader readonly='yes' type='rom'>{ROM}</loader>
  </os>
  <features><acpi/></features>
  <clock offset='utc'><timer name='pit' tickpolicy='discard'/></clock>
  <cpu mode='host-passthrough'><feature policy='disable' name='svm'/></cpu>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    {serial}
  </devices>
</domain>
",
        serial = domain::serial_xml(name)
    )
}
