// SPDX-License-Identifier: MIT OR Apache-2.0
//! QEMU processes: held by pidfd, never by a bare pid.
//!
//! `/proc/PID` and a few system calls still take a number. The rule here: open
//! the pidfd first, use the number, then ask the pidfd whether the process is
//! still there. If it is, the number meant this process all the time.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// What `/proc/PID/fd/N` of a KVM virtual machine points to.
const VM_LINK: &str = "anon_inode:kvm-vm";

/// Changes with every boot of the host.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The kernel's name for this boot of the host.
pub fn boot_id() -> io::Result<String> {
    fs::read_to_string(BOOT_ID).map(|text| text.trim().to_owned())
}

/// What tells a process from all others, past ones included: to be written down,
/// where a pidfd can not be kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// See [`boot_id`].
    pub boot_id: String,
    /// The process id, which may have had other owners in this boot.
    pub pid: i32,
    /// When it was started, in clock ticks since the boot.
    pub started_ticks: u64,
}

/// Why a process can not be used.
#[derive(Debug, Error)]
pub enum ProcessError {
    /// It has exited.
    #[error("process {pid} has exited")]
    Gone {
        /// Its pid.
        pid: i32,
    },
    /// The pid belongs to something that is not this domain's QEMU.
    #[error("process {pid} is not the QEMU of domain {uuid}")]
    NotTheDomain {
        /// The pid that was given.
        pid: i32,
        /// The domain that was expected.
        uuid: String,
    },
    /// The process runs no KVM virtual machine.
    #[error("process {pid} uses no KVM virtual machine")]
    NoKvm {
        /// Its pid.
        pid: i32,
    },
    /// Which virtual machine is meant can not be told.
    #[error("process {pid} holds {count} KVM virtual machines, one was expected")]
    SeveralVms {
        /// Its pid.
        pid: i32,
        /// How many descriptors were found.
        count: usize,
    },
    /// The kernel refuses access to the process.
    #[error("cannot {operation} of process {pid}: not permitted")]
    NotPermitted {
        /// Its pid.
        pid: i32,
        /// What was tried.
        operation: &'static str,
    },
    /// Anything else.
    #[error("cannot {operation} of process {pid}: {source}")]
    Io {
        /// Its pid.
        pid: i32,
        /// What was tried.
        operation: &'static str,
        /// The cause.
        source: io::Error,
    },
}

impl ProcessError {
    /// What a person can do about it.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::NoKvm { .. } => {
                Some("use <domain type='kvm'>: without KVM there are no second-level page tables to read")
            }
            Self::NotPermitted { .. } => {
                Some("run the daemon as root, or with CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH")
            }
            Self::Gone { .. } | Self::NotTheDomain { .. } | Self::SeveralVms { .. } | Self::Io { .. } => None,
        }
    }

    fn from_io(pid: i32, operation: &'static str, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::ESRCH) => Self::Gone { pid },
            Some(libc::EPERM | libc::EACCES) => Self::NotPermitted { pid, operation },
            _ => Self::Io { pid, operation, source },
        }
    }
}

/// A process that can not be mistaken for a later one of the same pid.
#[derive(Debug)]
pub struct Process {
    pid: i32,
    pidfd: OwnedFd,
}

impl Process {
    /// Opens whatever process has this pid now.
    pub fn open(pid: i32) -> Result<Self, ProcessError> {
        // SAFETY: pidfd_open takes two integers and touches no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        let pidfd = owned_fd(fd).map_err(|source| ProcessError::from_io(pid, "open a descriptor", source))?;
        Ok(Self { pid, pidfd })
    }

    /// Opens the QEMU process of the domain `uuid`. libvirt starts QEMU with
    /// `-uuid`, and no process of another domain has it, so a pid file that has
    /// gone stale is noticed.
    pub fn open_qemu(pid: i32, uuid: &str) -> Result<Self, ProcessError> {
        let process = Self::open(pid)?;
        let arguments = process.read("cmdline", "read the arguments")?;
        if !is_qemu_of(&arguments, uuid) {
            return Err(ProcessError::NotTheDomain { pid, uuid: uuid.to_owned() });
        }
        Ok(process)
    }

    /// The process id, which means this process while [`Process::is_alive`].
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether the process has not exited yet.
    pub fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(self.pidfd.as_fd(), PollFlags::POLLIN)];
        // A pidfd becomes readable when its process exits. An interrupted poll
        // says nothing about the process: the next look will.
        !matches!(poll(&mut fds, PollTimeout::ZERO), Ok(n) if n > 0)
    }

    /// What tells it from all other processes.
    pub fn identity(&self) -> Result<ProcessIdentity, ProcessError> {
        let (pid, operation) = (self.pid, "read the start time");
        let boot_id =
            boot_id().map_err(|source| ProcessError::Io { pid, operation: "tell the boot", source })?;
        let stat = self.read("stat", operation)?;
        let started_ticks = start_time(&stat).ok_or_else(|| {
            let source = io::Error::new(io::ErrorKind::InvalidData, "its stat file has another form");
            ProcessError::Io { pid, operation, source }
        })?;
        Ok(ProcessIdentity { boot_id, pid, started_ticks })
    }

    /// CPU time that its vCPUs have had, all together, since it was started.
    pub fn guest_time(&self) -> Result<Duration, ProcessError> {
        let operation = "tell the CPU time of the vCPUs";
        let ticks = guest_ticks(&self.read("stat", operation)?).ok_or_else(|| {
            let source = io::Error::new(io::ErrorKind::InvalidData, "its stat file has another form");
            ProcessError::Io { pid: self.pid, operation, source }
        })?;
        Ok(Duration::from_millis(ticks.saturating_mul(1000 / TICKS_PER_SECOND)))
    }

    /// Reads `/proc/PID/NAME`, which is this process's for certain when it
    /// returns with success.
    fn read(&self, name: &str, operation: &'static str) -> Result<Vec<u8>, ProcessError> {
        let read = fs::read(format!("/proc/{}/{name}", self.pid));
        if !self.is_alive() {
            return Err(ProcessError::Gone { pid: self.pid });
        }
        read.map_err(|source| ProcessError::from_io(self.pid, operation, source))
    }

    /// Numbers of the descriptors that point to `link`.
    fn descriptors(&self, link: &str) -> Result<Vec<RawFd>, ProcessError> {
        let operation = "list the descriptors";
        let found = || -> io::Result<Vec<RawFd>> {
            let mut found = Vec::new();
            for entry in fs::read_dir(format!("/proc/{}/fd", self.pid))? {
                let entry = entry?;
                // A descriptor that was closed since is none of ours.
                let target = fs::read_link(entry.path()).unwrap_or_default();
                let number = entry.file_name().to_str().and_then(|n| n.parse::<RawFd>().ok());
                if target.as_os_str() == link {
                    found.extend(number);
                }
            }
            Ok(found)
        }();
        if !self.is_alive() {
            return Err(ProcessError::Gone { pid: self.pid });
        }
        found.map_err(|source| ProcessError::from_io(self.pid, operation, source))
    }

    /// Duplicates the process's descriptor into ours. The kernel asks for
    /// ptrace rights over the process.
    fn take_descriptor(&self, number: RawFd) -> io::Result<OwnedFd> {
        let pidfd = self.pidfd.as_raw_fd();
        // SAFETY: pidfd_getfd takes three integers and touches no memory of
        // ours; the pidfd is open as long as `self` lives.
        owned_fd(unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd, number, 0) })
    }

    /// The one descriptor that points to `link`; [`ProcessError::NoKvm`] or
    /// [`ProcessError::SeveralVms`] when there is not exactly one.
    fn take_only(&self, link: &str) -> Result<OwnedFd, ProcessError> {
        let pid = self.pid;
        let number = match self.descriptors(link)?.as_slice() {
            [] => return Err(ProcessError::NoKvm { pid }),
            [only] => *only,
            several => {
                return Err(ProcessError::SeveralVms { pid, count: several.len() });
            }
        };
        let operation = "take the VM descriptor";
        let taken =
            self.take_descriptor(number).map_err(|source| ProcessError::from_io(pid, operation, source))?;
        // The process may have reused the number between the look and the take.
        let ours = PathBuf::from(format!("/proc/self/fd/{}", taken.as_raw_fd()));
        match fs::read_link(ours) {
            Ok(target) if target.as_os_str() == link => Ok(taken),
            Ok(_) => Err(ProcessError::NoKvm { pid }),
            Err(source) => Err(ProcessError::from_io(pid, operation, source)),
        }
    }
}

impl AsFd for Process {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// Takes the descriptor of the process's KVM virtual machine.
///
/// The link's name is only how it is found; the kernel module checks what it
/// really is.
pub fn find_vm_fd(process: &Process) -> Result<OwnedFd, ProcessError> {
    process.take_only(VM_LINK)
}

/// Makes the result of a system call that opens a descriptor into one.
fn owned_fd(result: libc::c_long) -> io::Result<OwnedFd> {
    match RawFd::try_from(result) {
        // SAFETY: the kernel has just opened this descriptor for us, so it is
        // open and has no other owner.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Clock ticks of procfs in a second: USER_HZ, on all architectures that run KVM guests.
const TICKS_PER_SECOND: u64 = 100;

/// The start time, field 22 of `/proc/PID/stat` (proc_pid_stat(5)), in clock ticks
/// since the boot. The name, field 2, may
/// hold whatever its owner likes; what follows its last bracket holds none.
pub fn start_time(stat: &[u8]) -> Option<u64> {
    field_after_name(stat, 19)
}

/// Time that all threads have spent running guests, field 43, in clock ticks.
fn guest_ticks(stat: &[u8]) -> Option<u64> {
    field_after_name(stat, 40)
}

fn field_after_name(stat: &[u8], index: usize) -> Option<u64> {
    let after_name = stat.iter().rposition(|byte| *byte == b')')? + 1;
    let fields = std::str::from_utf8(stat.get(after_name..)?).ok()?;
    fields.split_ascii_whitespace().nth(index)?.parse().ok()
}

/// Whether a NUL-separated command line says `-uuid UUID`.
fn is_qemu_of(command_line: &[u8], uuid: &str) -> bool {
    let mut arguments = command_line.split(|&byte| byte == 0);
    while let Some(argument) = arguments.next() {
        if argument == b"-uuid" {
            return arguments.next().is_some_and(|value| value.eq_ignore_ascii_case(uuid.as_bytes()));
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::sys::stat::fstat;
    use nix::unistd::dup;

    use super::*;

    const UUID: &str = "0b0e4a38-2b3c-4f6e-9d5e-6f0f6c1a2b3c";

    fn own_pid() -> i32 {
        std::process::id() as i32
    }

    /// Starts a child and waits for the new program: just after its start a
    /// process still has its parent's files and no arguments.
    fn spawn_ready(command: &mut Command) -> Child {
        let child = command.spawn().unwrap();
        let arguments = format!("/proc/{}/cmdline", child.id());
        let program = command.get_program().as_encoded_bytes();
        while !fs::read(&arguments).unwrap().starts_with(program) {
            std::thread::yield_now();
        }
        child
    }

    #[test]
    fn notices_the_exit_of_a_child() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::open(child.id() as i32).unwrap();
        assert!(process.is_alive());
        child.kill().unwrap();
        // A zombie is no longer alive, though its pid is still taken.
        while process.is_alive() {
            std::thread::yield_now();
        }
        child.wait().unwrap();
        assert!(!process.is_alive());
        assert!(matches!(process.read("cmdline", "read"), Err(ProcessError::Gone { .. })));
        assert!(matches!(find_vm_fd(&process), Err(ProcessError::Gone { .. })));
    }

    #[test]
    fn the_time_of_vcpus_is_field_43() {
        let fields: Vec<String> = (3..=52).map(|field| field.to_string()).collect();
        let stat = format!("1 (a) 43 (x)) {}", fields.join(" "));
        assert_eq!(guest_ticks(stat.as_bytes()), Some(43));
        assert_eq!(guest_ticks(b"1 (a) S 1"), None);
        // We run no guest.
        assert_eq!(Process::open(own_pid()).unwrap().guest_time().unwrap(), Duration::ZERO);
    }

    #[test]
    fn an_identity_is_one_process_s() {
        let own = Process::open(own_pid()).unwrap();
        let identity = own.identity().unwrap();
        assert_eq!(identity.pid, own_pid());
        assert_eq!(identity.boot_id.len(), 36);
        assert_eq!(own.identity().unwrap(), identity);
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let other = Process::open(child.id() as i32).unwrap();
        let theirs = other.identity().unwrap();
        assert!(theirs.started_ticks >= identity.started_ticks && theirs != identity);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(matches!(other.identity(), Err(ProcessError::Gone { .. })));
    }

    #[test]
    fn a_name_can_not_forge_a_start_time() {
        let rest = "S 1 1 1 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4711 1 1";
        for name in ["qemu", "a) S 1 2 3 (b", "", ") 1 ("] {
            assert_eq!(start_time(format!("7 ({name}) {rest}\n").as_bytes()), Some(4711), "{name}");
        }
        for broken in ["", "7 (qemu", "7 (qemu) S 1 1", "7 (qemu) \u{fffd}"] {
            assert_eq!(start_time(broken.as_bytes()), None, "{broken}");
        }
    }

    #[test]
    fn refuses_a_pid_of_no_process() {
        // The largest pid that Linux allows is 4194304.
        assert!(matches!(Process::open(4_194_305), Err(ProcessError::Gone { .. })));
        assert!(Process::open(-1).is_err());
    }

    #[test]
    fn knows_the_qemu_of_a_domain_by_its_uuid() {
        let mut child = spawn_ready(
            Command::new("sh").args(["-c", "read line", "qemu", "-uuid", UUID]).stdin(Stdio::piped()),
        );
        let pid = child.id() as i32;
        assert!(Process::open_qemu(pid, UUID).is_ok());
        let other = UUID.replace('0', "1");
        assert!(matches!(Process::open_qemu(pid, &other), Err(ProcessError::NotTheDomain { .. })));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn uuid_must_follow_its_option() {
        let line = |text: &str| text.replace(' ', "\0").into_bytes();
        assert!(is_qemu_of(&line(&format!("qemu -uuid {UUID} -S")), UUID));
        assert!(is_qemu_of(&line(&format!("qemu -uuid {}", UUID.to_uppercase())), UUID));
        assert!(!is_qemu_of(&line(&format!("qemu {UUID}")), UUID));
        assert!(!is_qemu_of(&line("qemu -uuid"), UUID));
        assert!(!is_qemu_of(b"", UUID));
    }

    #[test]
    fn a_process_without_kvm_is_told_apart() {
        let process = Process::open(own_pid()).unwrap();
        let error = find_vm_fd(&process).unwrap_err();
        assert!(matches!(error, ProcessError::NoKvm { .. }), "{error}");
        assert!(error.hint().unwrap().contains("type='kvm'"));
    }

    #[test]
    fn takes_the_only_descriptor_of_a_kind() {
        // Memory files stand in for VMs. A child has them alone, so tests that
        // run beside this one do not disturb it.
        let file = memfd_create("ept-virt-test", MFdFlags::MFD_CLOEXEC).unwrap();
        let link = "/memfd:ept-virt-test (deleted)";
        let hold = |count: usize| {
            let copies: Vec<OwnedFd> = (0..count).map(|_| dup(&file).unwrap()).collect();
            let mut child = spawn_ready(Command::new("sleep").arg("60"));
            drop(copies);
            let taken = Process::open(child.id() as i32).unwrap().take_only(link);
            child.kill().unwrap();
            child.wait().unwrap();
            taken
        };
        let taken = hold(1).unwrap();
        assert_eq!(fstat(&taken).unwrap().st_ino, fstat(&file).unwrap().st_ino);
        assert!(matches!(hold(2), Err(ProcessError::SeveralVms { count: 2, .. })));
        assert!(matches!(hold(0), Err(ProcessError::NoKvm { .. })));
    }
}
