// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest under libvirt, and a line to the workload in it.

use std::fs;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::host::{self, PAYLOAD, virsh};
use super::truth::Truth;

/// From `virsh start` to the workload running.
const READY_TIMEOUT: Duration = Duration::from_secs(120);

/// For a command that the workload obeys. It verifies its blocks at a few
/// hundred MiB a second, emulated twice over.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(90);

const POLICY_NAMESPACE: &str = "https://ept-virt.org/xmlns/placement/1.0";

/// What backs the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Memory {
    /// Shared memory: 4 KiB pages on the host.
    Memfd,
    /// Anonymous memory: huge pages on the host where it has them.
    Anonymous,
}

/// What a domain is made of.
#[derive(Clone, Debug)]
pub struct DomainSpec {
    /// Its name.
    pub name: &'static str,
    /// With KVM, or emulated.
    pub kvm: bool,
    /// What backs its memory.
    pub memory: Memory,
    /// The policy element, or none.
    pub policy: Option<String>,
    /// `<numatune mode='strict'>` on this node.
    pub strict_node: Option<u32>,
    /// Memory that the workload rewrites all the time.
    pub hot_mib: u32,
    /// Memory that the workload wrote once.
    pub idle_mib: u32,
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
        }
    }
}

/// A policy element with this mode and these children, whose prefix is `ev`.
pub fn policy(mode: &str, children: &str) -> Option<String> {
    Some(format!("<ev:placement xmlns:ev='{POLICY_NAMESPACE}' mode='{mode}'>{children}</ev:placement>"))
}

/// A started domain; destroyed when dropped.
pub struct Domain {
    /// Its name.
    pub name: &'static str,
    log: PathBuf,
    console: UnixStream,
    /// Bytes of the log that were consumed.
    seen: usize,
}

impl DomainSpec {
    /// Defines and starts the domain, and returns at once.
    pub fn start(&self) -> Result<Domain> {
        let path = format!("/run/{}.xml", self.name);
        fs::write(&path, self.xml()).with_context(|| format!("writing {path}"))?;
        let log = PathBuf::from(format!("/run/{}.log", self.name));
        if log.exists() {
            fs::remove_file(&log).context("removing an old console log")?;
        }
        virsh(&["define", &path])?;
        virsh(&["start", self.name])?;
        let console = UnixStream::connect(format!("/run/{}.sock", self.name))
            .with_context(|| format!("connecting to the console of {}", self.name))?;
        // What the guest says is read from the log, which has it from the start.
        // But a connection that nobody reads fills up, and then the guest waits.
        let mut unread = console.try_clone().context("duplicating the connection")?;
        thread::spawn(move || io::copy(&mut unread, &mut io::sink()));
        Ok(Domain { name: self.name, log, console, seen: 0 })
    }

    /// Its definition for libvirt.
    pub fn xml(&self) -> String {
        let kind = if self.kvm { "kvm" } else { "qemu" };
        let cpu = if self.kvm {
            "<cpu mode='host-passthrough'><feature policy='disable' name='svm'/></cpu>"
        } else {
            ""
        };
        let backing = match self.memory {
            Memory::Memfd => "<memoryBacking><source type='memfd'/></memoryBacking>",
            Memory::Anonymous => "",
        };
        let numatune = self.strict_node.map_or(String::new(), |node| {
            format!("<numatune><memory mode='strict' nodeset='{node}'/></numatune>")
        });
        let metadata =
            self.policy.as_ref().map_or(String::new(), |policy| format!("<metadata>{policy}</metadata>"));
        let Self { name, hot_mib, idle_mib, .. } = self;
        let memory_mib = hot_mib + idle_mib + 96;
        // Words after "--" reach the guest's first program.
        format!(
            "<domain type='{kind}'>
  <name>{name}</name>
  {metadata}
  <memory unit='MiB'>{memory_mib}</memory>
  {backing}
  <vcpu>1</vcpu>
  {numatune}
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{PAYLOAD}/vmlinuz</kernel>
    <initrd>{PAYLOAD}/guest.cpio</initrd>
    <cmdline>console=ttyS0 loglevel=1 nokaslr mitigations=off tsc=reliable no_timer_check \
acpi=off panic=-1 HOT_MIB={hot_mib} IDLE_MIB={idle_mib} -- guest</cmdline>
  </os>
  {cpu}
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>destroy</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <serial type='unix'>
      <source mode='bind' path='/run/{name}.sock'/>
      <log file='/run/{name}.log' append='off'/>
      <target port='0'/>
    </serial>
  </devices>
</domain>
"
        )
    }
}

impl Domain {
    /// Waits until the workload runs; where its blocks lie.
    pub fn wait_ready(&mut self) -> Result<Truth> {
        let lines = self.read_until("ready", READY_TIMEOUT)?;
        Truth::parse(&lines)
    }

    /// Has the workload obey a command; its answer up to the line `last`.
    pub fn ask(&mut self, command: &str, last: &str) -> Result<Vec<String>> {
        writeln!(self.console, "{command}")
            .with_context(|| format!("writing to the console of {}", self.name))?;
        self.read_until(last, ANSWER_TIMEOUT)
    }

    /// Fails unless both blocks hold what the workload wrote.
    pub fn check_data(&mut self) -> Result<()> {
        let answer = self.ask("check", "check end")?;
        for block in ["hot", "idle"] {
            if !answer.contains(&format!("check {block} ok")) {
                bail!("the guest's data is damaged: {}", answer.join("; "));
            }
        }
        Ok(())
    }

    /// The process id of its QEMU.
    pub fn pid(&self) -> Result<i32> {
        let path = format!("/run/libvirt/qemu/{}.pid", self.name);
        let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        text.trim().parse().with_context(|| format!("{path}: {text}"))
    }

    /// What libvirt says of it: "running", "shut off"...
    pub fn state(&self) -> Result<String> {
        Ok(virsh(&["domstate", self.name])?.trim().to_owned())
    }

    fn read_until(&mut self, last: &str, timeout: Duration) -> Result<Vec<String>> {
        let mut lines = Vec::new();
        let what = format!("{} says {last:?}", self.name);
        let outcome = host::wait_until(&what, timeout, || {
            lines.extend(self.new_lines()?);
            Ok(lines.iter().any(|line| line == last))
        });
        outcome.with_context(|| format!("so far: {}; its console: {}", lines.join("; "), self.log_tail()))?;
        Ok(lines)
    }

    /// The last lines of its console, the kernel's among them.
    fn log_tail(&self) -> String {
        let bytes = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(8)..].join(" | ")
    }

    /// What the workload said since the last call, without its mark; complete
    /// lines only.
    fn new_lines(&mut self) -> Result<Vec<String>> {
        let Ok(bytes) = fs::read(&self.log) else {
            return Ok(Vec::new());
        };
        let fresh = bytes.get(self.seen..).unwrap_or_default();
        let end = fresh.iter().rposition(|b| *b == b'\n').map_or(0, |at| at + 1);
        self.seen += end;
        let text = String::from_utf8_lossy(&fresh[..end]).into_owned();
        let lines: Vec<String> = text
            .lines()
            .filter_map(|line| line.split_once("EPT-GUEST "))
            .map(|(_, said)| said.trim_end().to_owned())
            .collect();
        if let Some(failure) = lines.iter().find(|line| line.starts_with("failed")) {
            bail!("the workload of {} {failure}", self.name);
        }
        Ok(lines)
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
