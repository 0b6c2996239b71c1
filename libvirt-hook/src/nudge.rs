// SPDX-License-Identifier: MIT OR Apache-2.0
//! The one line that is sent.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use ept_virt_core::wire::{Command, Request};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt};
use nix::sys::time::TimeVal;

/// Longest part of a name that is sent, in characters. It is for people to read;
/// the daemon asks libvirt which domains there are.
const LONGEST_NAME: usize = 255;

/// Whether the daemon wants to know of this operation: QEMU is there, is gone,
/// or libvirt found it again. What only announces a QEMU (prepare, start, migrate,
/// restore) has nothing to look at yet. `attach` is in libvirt's manual; those of
/// today never call it.
pub fn wanted(operation: &OsStr) -> bool {
    ["started", "stopped", "release", "reconnect", "attach"].iter().any(|name| operation == *name)
}

/// Sends a nudge's line, and does not wait for the answer.
pub fn send(socket: &Path, line: &[u8], deadline: Instant) -> io::Result<()> {
    let mut stream = connect_until(socket, deadline)?;
    stream.set_write_timeout(Some(left_until(deadline)?))?;
    stream.write_all(line)
}

/// The request, newline included.
pub fn line(domain: &OsStr, operation: &OsStr) -> Vec<u8> {
    let text = |text: &OsStr| text.to_string_lossy().chars().take(LONGEST_NAME).collect();
    Request::line(Command::Nudge { op: text(operation), domain: text(domain) })
}

/// Connects, or fails at the deadline: a daemon that hangs has a full backlog,
/// and connecting would wait for it for ever.
pub fn connect_until(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let address = UnixAddr::new(path)?;
    let socket: OwnedFd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    // The send timeout of a UNIX socket bounds its connect too (socket(7)).
    let left = left_until(deadline)?;
    let timeout = TimeVal::new(left.as_secs() as i64, i64::from(left.subsec_micros()));
    setsockopt(&socket, sockopt::SendTimeout, &timeout)?;
    connect(socket.as_raw_fd(), &address)?;
    Ok(UnixStream::from(socket))
}

/// Never zero, which would mean "no limit" to the kernel.
fn left_until(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.as_micros() == 0 { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use ept_virt_core::wire::MAX_REQUEST_BYTES;

    use super::*;

    fn parse(line: &[u8]) -> (String, String) {
        assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
        assert!(line.len() <= MAX_REQUEST_BYTES);
        match Request::read(line) {
            Ok(Command::Nudge { op, domain }) => (op, domain),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn any_name_is_one_line_of_bounded_length() {
        let parsed = |name: &[u8]| parse(&line(OsStr::from_bytes(name), OsStr::new("started"))).1;
        assert_eq!(parsed(b"vm1"), "vm1");
        assert_eq!(parsed(b"a\nb\"}{\0"), "a\nb\"}{\0");
        assert_eq!(parsed(b"\xff\xfe"), "\u{fffd}\u{fffd}");
        assert_eq!(parsed(&vec![b'\x01'; 100_000]).len(), LONGEST_NAME);
    }

    #[test]
    fn nudges_when_a_process_comes_or_goes() {
        let all =
            "prepare start started stopped release migrate restore reconnect attach".split(' ').chain([""]);
        let wanted: Vec<_> = all.filter(|operation| wanted(OsStr::new(operation))).collect();
        assert_eq!(wanted, ["started", "stopped", "release", "reconnect", "attach"]);
    }

    #[test]
    fn a_deadline_that_has_passed_is_an_error() {
        let error = send(Path::new("/nonexistent"), b"{}\n", Instant::now());
        assert_eq!(error.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
