// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest under libvirt.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::console::Console;
use super::host::{self, PAYLOAD, virsh};
use super::truth::Truth;

/// The namespace of policies.
pub const POLICY_NAMESPACE: &str = "https://ept-virt.org/xmlns/placement/1.0";

/// What backs the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// Shared memory: 4 KiB pages on the host.
    Memfd,
    /// Anonymous memory: huge pages on the host where it has them.
    Anonymous,
    /// Pages of 2 MiB that the host set apart.
    Hugetlbfs,
}

/// Devices that fit the room of a domain that can get memory.
const ROOM_SLOTS: u32 = 2;

/// What a domain is made of.
#[derive(Clone, Debug)]
pub struct DomainSpec {
    /// Its name.
    pub name: &'static str,
    /// With KVM, or emulated.
    pub kvm: bool,
    /// What backs its memory.
    pub memory: Memory,
    /// What stands in its metadata: the policy element, what others write, or nothing.
    pub policy: Option<String>,
    /// `<numatune mode='strict'>` on this node.
    pub strict_node: Option<u32>,
    /// Memory that the workload rewrites all the time.
    pub hot_mib: u32,
    /// Memory that the workload wrote once.
    pub idle_mib: u32,
    /// Memory besides, for the guest's kernel and what commands ask for.
    pub rest_mib: u32,
    /// Processors that can be added while it runs. With more than none the guest
    /// has ACPI, by which it hears of them.
    pub spare_cpus: u32,
    /// A virtio balloon.
    pub balloon: bool,
    /// Memory that can be added and taken away again while it runs, for which it has
    /// ACPI as well.
    pub room_mib: u32,
    /// More words for the guest's kernel command line.
    pub words: String,
}

impl Default for DomainSpec {
    fn default() -> Self {
        Self {
            name: "guest",
            kvm: true,
            memory: Memory::Memfd,
            policy: None,
            strict_node: None,
            hot_mib: 32,
            idle_mib: 64,
            rest_mib: 96,
            spare_cpus: 0,
            balloon: false,
            room_mib: 0,
            words: String::new(),
        }
    }
}

/// The serial port that [`Console`] connects to.
pub fn serial_xml(name: &str) -> String {
    format!(
        "<serial type='unix'>
      <source mode='bind' path='/run/{name}.sock'/>
      <log file='/run/{name}.log' append='off'/>
      <target port='0'/>
    </serial>"
    )
}

/// The process id of a running domain's QEMU.
pub fn pid(name: &str) -> Result<i32> {
    host::read_pid(Path::new(&format!("/run/libvirt/qemu/{name}.pid"))).map(Pid::as_raw)
}

/// Sends a signal to a running domain's QEMU.
pub fn signal_qemu(name: &str, signal: Signal) -> Result<()> {
    kill(Pid::from_raw(pid(name)?), signal).with_context(|| format!("sending {signal} to the QEMU of {name}"))
}

/// A policy element with this mode and these children, whose prefix is `ev`.
pub fn policy(mode: &str, children: &str) -> Option<String> {
    Some(format!("<ev:placement xmlns:ev='{POLICY_NAMESPACE}' mode='{mode}'>{children}</ev:placement>"))
}

/// A started domain; destroyed when dropped.
pub struct Domain {
    /// Its name.
    pub name: &'static str,
    /// The line to its workload.
    pub console: Console,
}

impl DomainSpec {
    /// Defines and starts the domain, and returns at once.
    pub fn start(&self) -> Result<Domain> {
        self.start_with(&[])
    }

    /// As [`DomainSpec::start`], with its processors halted: [`Domain::resume`]. It
    /// has touched none of its memory.
    pub fn start_paused(&self) -> Result<Domain> {
        self.start_with(&["--paused"])
    }

    /// Defines the domain.
    pub fn define(&self) -> Result<()> {
        let path = format!("/run/{}.xml", self.name);
        fs::write(&path, self.xml()).with_context(|| format!("writing {path}"))?;
        Console::clear(self.name)?;
        virsh(&["define", &path]).map(drop)
    }

    fn start_with(&self, options: &[&str]) -> Result<Domain> {
        self.define()?;
        virsh(&[&["start", self.name], options].concat())?;
        Domain::started(self.name)
    }

    /// All of its memory.
    pub fn memory_mib(&self) -> u32 {
        self.hot_mib + self.idle_mib + self.rest_mib
    }

    /// The command line of its kernel.
    pub fn command_line(&self) -> String {
        let Self { hot_mib, idle_mib, words, .. } = self;
        let acpi = if self.has_acpi() { "" } else { "acpi=off" };
        // What the guest's kernel puts elsewhere can be taken away from it.
        let online = if self.room_mib > 0 { "memhp_default_state=online_movable" } else { "" };
        // Words after "--" reach the guest's first program.
        format!(
            "console=ttyS0 loglevel=1 nokaslr mitigations=off tsc=reliable no_timer_check {acpi} {online} \
panic=-1 HOT_MIB={hot_mib} IDLE_MIB={idle_mib} {words} -- guest"
        )
    }

    /// Whether the guest hears of what is added to it.
    fn has_acpi(&self) -> bool {
        self.spare_cpus + self.room_mib > 0
    }

    /// Its definition for libvirt.
    pub fn xml(&self) -> String {
        let kind = if self.kvm { "kvm" } else { "qemu" };
        let memory_mib = self.memory_mib();
        let cpus = 1 + self.spare_cpus;
        let (room, numa) = match self.room_mib {
            0 => (String::new(), String::new()),
            more => (
                format!("<maxMemory slots='{ROOM_SLOTS}' unit='MiB'>{}</maxMemory>", memory_mib + more),
                format!(
                    "<numa><cell id='0' cpus='0-{}' memory='{memory_mib}' unit='MiB' memAccess='shared'/></numa>",
                    cpus - 1
                ),
            ),
        };
        let cpu = match self.kvm {
            true => {
                format!("<cpu mode='host-passthrough'><feature policy='disable' name='svm'/>{numa}</cpu>")
            }
            false => String::new(),
        };
        let backing = match self.memory {
            Memory::Memfd => "<memoryBacking><source type='memfd'/></memoryBacking>",
            Memory::Anonymous => "",
            Memory::Hugetlbfs => "<memoryBacking><hugepages/></memoryBacking>",
        };
        let numatune = self.strict_node.map_or(String::new(), |node| {
            format!("<numatune><memory mode='strict' nodeset='{node}'/></numatune>")
        });
        let metadata =
            self.policy.as_ref().map_or(String::new(), |policy| format!("<metadata>{policy}</metadata>"));
        let Self { name, .. } = self;
        let features = if self.has_acpi() { "<features><acpi/></features>" } else { "" };
        let balloon = if self.balloon { "virtio" } else { "none" };
        format!(
            "<domain type='{kind}'>
  <name>{name}</name>
  {metadata}
  {room}
  <memory unit='MiB'>{memory_mib}</memory>
  {backing}
  <vcpu current='1'>{cpus}</vcpu>
  {numatune}
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{PAYLOAD}/vmlinuz</kernel>
    <initrd>{PAYLOAD}/guest.cpio</initrd>
    <cmdline>{command_line}</cmdline>
  </os>
  {features}
  {cpu}
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>destroy</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='{balloon}'/>
    {serial}
  </devices>
</domain>
",
            command_line = self.command_line(),
            serial = serial_xml(name)
        )
    }
}

impl Domain {
    /// A domain that others defined and started, with the serial port of [`serial_xml`].
    pub fn started(name: &'static str) -> Result<Self> {
        Ok(Self { name, console: Console::connect(name)? })
    }

    /// See [`Console::wait_ready`].
    pub fn wait_ready(&mut self) -> Result<Truth> {
        self.console.wait_ready()
    }

    /// See [`Console::tell`].
    pub fn tell(&mut self, command: &str) -> Result<()> {
        self.console.tell(command)
    }

    /// See [`Console::check_data`].
    pub fn check_data(&mut self) -> Result<()> {
        self.console.check_data()
    }

    /// Lets its processors run.
    pub fn resume(&self) -> Result<()> {
        virsh(&["resume", self.name]).map(drop)
    }

    /// The process id of its QEMU.
    pub fn pid(&self) -> Result<i32> {
        pid(self.name)
    }

    /// What libvirt says of it: "running", "shut off"...
    pub fn state(&self) -> Result<String> {
        Ok(virsh(&["domstate", self.name])?.trim().to_owned())
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // It may have ended already; the next scenario starts from a clean host
        // or says what is left.
        let _ = virsh(&["destroy", self.name]);
        let _ = virsh(&["undefine", self.name]);
    }
}
