// SPDX-License-Identifier: MIT OR Apache-2.0
//! From a domain that runs to a session of the kernel module on its VM.

use std::io;
use std::os::fd::AsFd;

use ept_virt_core::domain::{DefinedDomain, RunningDomain};
use ept_virt_core::process::{Process, ProcessError, find_vm_fd};
use ept_virt_core::sampler::KernelSampler;

use crate::failure::Failure;

/// A session that is bound to a domain's VM.
pub struct Attached {
    /// Its QEMU.
    pub process: Process,
    /// The session.
    pub sampler: KernelSampler,
}

/// Why a domain can not be observed.
pub struct Unattached {
    /// Its process, if that much is known.
    pub pid: Option<i32>,
    /// In plain words.
    pub reason: String,
}

/// Finds the domain's process and VM, and binds the kernel module to it; or says
/// why it can not be observed.
pub fn attach(domain: &RunningDomain) -> Result<Attached, Unattached> {
    let process = open_qemu(domain);
    let pid = process.as_ref().ok().map(Process::pid);
    let attached = match domain.kind().filter(|kind| kind != "kvm") {
        Some(kind) => Err(format!(
            "the domain runs without KVM (type='{kind}'): there are no second-level page tables to read. Use <domain type='kvm'>"
        )),
        None => process.and_then(attach_to),
    };
    attached.map_err(|reason| Unattached { pid, reason })
}

/// For a command that works on the module itself: takes root, no daemon.
pub fn attach_named(uri: &str, wanted: &str) -> Result<Attached, Failure> {
    attach_running(uri, wanted).map(|(_, attached)| attached)
}

/// The same, with the domain.
pub fn attach_running(uri: &str, wanted: &str) -> Result<(RunningDomain, Attached), Failure> {
    let domain = DefinedDomain::find(uri, wanted, true)?;
    let running = domain.running()?;
    let running = running.ok_or_else(|| {
        Failure::refused(format!("domain \"{}\" does not run", domain.name)).hint("`virsh start` starts it")
    })?;
    let attached = attach(&running).map_err(|unattached| {
        Failure::refused(format!("domain \"{}\" can not be observed: {}", domain.name, unattached.reason))
    })?;
    Ok((running, attached))
}

fn open_qemu(domain: &RunningDomain) -> Result<Process, String> {
    let file = domain.pid_file();
    let pid = domain.read_pid().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => format!("the pid of its QEMU is not known: {} is missing", file.display()),
        _ => format!("the pid of its QEMU is not known: {}: {error}", file.display()),
    })?;
    Process::open_qemu(pid, &domain.uuid).map_err(|error| explain(&error))
}

fn attach_to(process: Process) -> Result<Attached, String> {
    let sampler = attach_session(&process)?;
    Ok(Attached { process, sampler })
}

/// Binds one more session to the VM of a process.
pub fn attach_session(process: &Process) -> Result<KernelSampler, String> {
    let vm = find_vm_fd(process).map_err(|error| explain(&error))?;
    let mut sampler = KernelSampler::open().map_err(|error| error.to_string())?;
    sampler.attach(vm.as_fd()).map_err(|error| error.to_string())?;
    Ok(sampler)
}

fn explain(error: &ProcessError) -> String {
    match error.hint() {
        Some(hint) => format!("{error}: {hint}"),
        None => error.to_string(),
    }
}
