// SPDX-License-Identifier: MIT OR Apache-2.0
//! From a domain that runs to a session of the kernel module on its VM.

use std::io;
use std::os::fd::AsFd;

use ept_virt_core::domain::{DefinedDomain, RunningDomain};
use ept_virt_core::process::{Process, ProcessError, find_vm_fd};
use ept_virt_core::sampler::{KernelSampler, SamplerError};

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
    /// What is in the way.
    pub obstacle: Obstacle,
}

/// What is in the way of a session.
#[derive(Debug)]
pub struct Obstacle {
    /// In plain words.
    pub reason: String,
    /// It is a right or the module that is missing, whatever the domain.
    is_ours: bool,
}

impl Obstacle {
    /// One that lies with the domain.
    pub fn of_domain(reason: String) -> Self {
        Self { reason, is_ours: false }
    }
}

impl From<ProcessError> for Obstacle {
    fn from(error: ProcessError) -> Self {
        let is_ours = matches!(error, ProcessError::NotPermitted { .. });
        let reason = match error.hint() {
            Some(hint) => format!("{error}: {hint}"),
            None => error.to_string(),
        };
        Self { reason, is_ours }
    }
}

impl From<SamplerError> for Obstacle {
    fn from(error: SamplerError) -> Self {
        use SamplerError::{ModuleMissing, NotPermitted, WrongVersion};
        let is_ours = matches!(error, ModuleMissing | NotPermitted { .. } | WrongVersion { .. });
        Self { reason: error.to_string(), is_ours }
    }
}

/// Finds the domain's process and VM, and binds the kernel module to it; or says
/// why it can not be observed.
pub fn attach(domain: &RunningDomain) -> Result<Attached, Unattached> {
    let process = open_qemu(domain);
    let pid = process.as_ref().ok().map(Process::pid);
    let attached = match domain.kind().filter(|kind| kind != "kvm") {
        Some(kind) => Err(Obstacle::of_domain(format!(
            "the domain runs without KVM (type='{kind}'): there are no second-level page tables to read. Use <domain type='kvm'>"
        ))),
        None => process.and_then(attach_to),
    };
    attached.map_err(|obstacle| Unattached { pid, obstacle })
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
    let attached = attach(&running).map_err(|Unattached { obstacle, .. }| {
        let problem = format!("domain \"{}\" can not be observed: {}", domain.name, obstacle.reason);
        if obstacle.is_ours { Failure::unreachable(problem) } else { Failure::refused(problem) }
    })?;
    Ok((running, attached))
}

fn open_qemu(domain: &RunningDomain) -> Result<Process, Obstacle> {
    let file = domain.pid_file();
    let pid = domain.read_pid().map_err(|error| {
        Obstacle::of_domain(match error.kind() {
            io::ErrorKind::NotFound => {
                format!("the pid of its QEMU is not known: {} is missing", file.display())
            }
            _ => format!("the pid of its QEMU is not known: {}: {error}", file.display()),
        })
    })?;
    Ok(Process::open_qemu(pid, &domain.uuid)?)
}

fn attach_to(process: Process) -> Result<Attached, Obstacle> {
    let sampler = attach_session(&process)?;
    Ok(Attached { process, sampler })
}

/// Binds one more session to the VM of a process.
pub fn attach_session(process: &Process) -> Result<KernelSampler, Obstacle> {
    let vm = find_vm_fd(process)?;
    let mut sampler = KernelSampler::open()?;
    sampler.attach(vm.as_fd())?;
    Ok(sampler)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_what_is_missing_here_from_what_the_domain_is() {
        let (pid, operation) = (7, "list the files");
        let missing = [
            Obstacle::from(ProcessError::NotPermitted { pid, operation }),
            Obstacle::from(SamplerError::NotPermitted { operation }),
            Obstacle::from(SamplerError::ModuleMissing),
            Obstacle::from(SamplerError::WrongVersion { module_major: 9, module_minor: 0 }),
        ];
        assert!(missing.iter().all(|obstacle| obstacle.is_ours), "{missing:?}");
        assert!(missing[0].reason.contains("as root"), "{missing:?}");
        let of_domain = [Obstacle::from(ProcessError::NoKvm { pid }), Obstacle::from(SamplerError::VmGone)];
        assert!(of_domain.iter().all(|obstacle| !obstacle.is_ours), "{of_domain:?}");
    }
}
