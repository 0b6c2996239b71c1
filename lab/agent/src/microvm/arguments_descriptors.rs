// SPDX-License-Identifier: MIT OR Apache-2.0
//! Attaching to what is no VM, to none of the caller's, or to none that lives.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, ensure};
use ept_virt_core::uapi::{KesAttach, number};
use libc::{EBADF, ENODEV, EPERM, ESRCH};
use nix::sys::epoll::{Epoll, EpollCreateFlags};
use nix::sys::eventfd::EventFd;

use super::arguments::{ATTACH, Bench, DETACH, State};
use super::lifecycle::Victim;

/// A system call that makes a descriptor.
fn descriptor(what: &str, result: libc::c_long) -> Result<OwnedFd> {
    ensure!(result >= 0, "{what}: {}", std::io::Error::last_os_error());
    // SAFETY: the kernel has just given it to us.
    Ok(unsafe { OwnedFd::from_raw_fd(result as RawFd) })
}

/// Files that are no VM; some are called as one.
fn impostors(bench: &Bench) -> Result<Vec<(&'static str, OwnedFd)>> {
    let folder = std::env::temp_dir();
    fs::create_dir_all(&folder)?;
    let path = folder.join("kvm-vm");
    let named = File::create(&path).with_context(|| format!("cannot create {}", path.display()))?;
    fs::remove_file(&path)?;
    fs::create_dir(&path).with_context(|| format!("cannot create {}", path.display()))?;
    let directory = File::open(&path)?;
    fs::remove_dir(&path)?;
    let name = CString::new(path.to_str().context("the folder's name is no text")?)?;
    // SAFETY: makes a pipe with a name; the kernel only reads the name.
    let made = unsafe { libc::mkfifo(name.as_ptr(), 0o600) };
    ensure!(made == 0, "mkfifo: {}", std::io::Error::last_os_error());
    let fifo = fs::OpenOptions::new().read(true).write(true).open(&path)?;
    fs::remove_file(&path)?;
    // SAFETY: the kernel only reads the name.
    let memfd = unsafe { libc::syscall(libc::SYS_memfd_create, c"kvm-vm".as_ptr(), 0) };
    // SAFETY: takes a number and flags.
    let pidfd = unsafe { libc::syscall(libc::SYS_pidfd_open, std::process::id(), 0) };
    // SAFETY: as above.
    let timer = unsafe { libc::syscall(libc::SYS_timerfd_create, libc::CLOCK_MONOTONIC, 0) };
    // SAFETY: as above.
    let inotify = unsafe { libc::syscall(libc::SYS_inotify_init1, 0) };
    let (reader, _writer) = nix::unistd::pipe()?;
    let (socket, _peer) = UnixStream::pair()?;
    Ok(vec![
        ("a file named kvm-vm", named.into()),
        ("a folder named kvm-vm", directory.into()),
        ("a fifo named kvm-vm", fifo.into()),
        ("a memfd named kvm-vm", descriptor("memfd_create", memfd)?),
        ("a pidfd", descriptor("pidfd_open", pidfd)?),
        ("a timerfd", descriptor("timerfd_create", timer)?),
        ("an inotify", descriptor("inotify_init1", inotify)?),
        ("a pipe", reader),
        ("a socket", socket.into()),
        ("an eventfd", EventFd::new()?.into()),
        ("an epoll", Epoll::new(EpollCreateFlags::empty())?.0),
        ("/dev/kvm", File::open("/dev/kvm")?.into()),
        ("/dev/null", File::open("/dev/null")?.into()),
        ("/proc/self/mem", File::open("/proc/self/mem")?.into()),
        ("a vCPU", duplicate(bench.machine.vcpu.as_raw_fd())?),
        ("the session itself", duplicate(bench.fresh.as_raw_fd())?),
        ("another session", duplicate(bench.attached.as_raw_fd())?),
    ])
}

fn duplicate(fd: RawFd) -> Result<OwnedFd> {
    // SAFETY: copies a descriptor of ours.
    descriptor("dup", unsafe { libc::dup(fd) }.into())
}

pub fn all(bench: &mut Bench) -> Result<()> {
    for (what, fd) in impostors(bench)? {
        attach(bench, what, fd.as_raw_fd(), ENODEV)?;
    }
    // A descriptor that names a file without opening it is none.
    let path_only = File::options().read(true).custom_flags(libc::O_PATH).open("/dev/kvm")?;
    attach(bench, "a path", path_only.as_raw_fd(), EBADF)?;
    let closed = {
        let file = duplicate(bench.machine.vm_fd().as_raw_fd())?;
        file.as_raw_fd()
    };
    for fd in [closed, -1, -100 /* AT_FDCWD */, RawFd::MIN, RawFd::MAX, 1 << 20] {
        attach(bench, &format!("descriptor {fd}"), fd, EBADF)?;
    }
    // A number means a VM in the process that has it open, and nothing here.
    let victim = Victim::start()?;
    let theirs = victim.vm_number()?;
    // SAFETY: asks about a descriptor that need not be open.
    ensure!(unsafe { libc::fcntl(theirs, libc::F_GETFD) } < 0, "descriptor {theirs} is open here too");
    attach(bench, "a descriptor of another process", theirs, EBADF)?;
    drop(victim);
    let dead = bench.dead_vm.as_raw_fd();
    attach(bench, "a VM whose process has exited", dead, ESRCH)?;
    without_rights(bench)
}

fn attach(bench: &mut Bench, what: &str, vm_fd: RawFd, want: i32) -> Result<()> {
    let request = KesAttach { vm_fd, ..Default::default() };
    bench.expect_of(&format!("ATTACH to {what}"), State::Fresh, ATTACH.number, &request, want)
}

/// A thread without CAP_SYS_ADMIN gets nowhere with a session that it was given.
fn without_rights(bench: &mut Bench) -> Result<()> {
    let request = KesAttach { vm_fd: bench.machine.vm_fd().as_raw_fd(), ..Default::default() };
    let fresh = &bench.fresh;
    let got = super::rights::as_nobody(|| super::abi::errno(fresh, number::ATTACH, &mut { request }))?;
    ensure!(got == EPERM, "ATTACH without CAP_SYS_ADMIN: errno {got}, expected {EPERM}");
    bench.expect("DETACH", State::Fresh, DETACH.number, 0, libc::ENOTCONN)
}
