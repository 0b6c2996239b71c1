// SPDX-License-Identifier: MIT OR Apache-2.0
//! The one line that is sent.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use ept_virt_core::wire::{Command, PROTOCOL_VERSION, Request};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt};
use nix::sys::time::TimeVal;

/// Longest part of a name that is sent, in characters. It is for people to read;
/// the daemon asks libvirt which domains there are.
const LONGEST_NAME: usize = 255;

/// Whether the daemon wants to know of this operation: QEMU is there, is gone,
/// or libvirt found it again.
pub fn wanted(operation: &OsStr) -> bool {
    ["started", "stopped", "release", "reconnect"].iter().any(|name| operation == *name)
}

/// Sends the nudge, and does not wait for the answer.
pub fn send(socket: &Path, domain: &OsStr, operation: &OsStr, deadline: Instant) -> io::Result<()> {
    let mut stream = connect_until(socket, deadline)?;
    stream.set_write_timeout(Some(left_until(deadline)?))?;
    stream.write_all(&line(domain, operation))
}

/// The request, newline included.
fn line(domain: &OsStr, operation: &OsStr) -> Vec<u8> {
    let text = |text: &OsStr| text.to_string_lossy().chars().take(LONGEST_NAME).collect();
    let command = Command::Nudge { op: text(operation), domain: text(domain) };
    // These types have nothing that JSON can not hold, so there is no error to tell.
    let mut line = serde_json::to_vec(&Request { v: PROTOCOL_VERSION, command }).unwrap_or_default();
    line.push(b'\n');
    line
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
        let request: Request = serde_json::from_slice(line).unwrap();
        assert_eq!(request.v, PROTOCOL_VERSION);
        let Command::Nudge { op, domain } = request.command else { panic!("{request:?}") };
        (op, domain)
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
            ["prepare", "start", "started", "stopped", "release", "migrate", "restore", "reconnect", ""];
        let wanted: Vec<_> = all.into_iter().filter(|operation| wanted(OsStr::new(operation))).collect();
        assert_eq!(wanted, ["started", "stopped", "release", "reconnect"]);
    }

    #[test]
    fn a_deadline_that_has_passed_is_an_error() {
        let error = send(Path::new("/nonexistent"), OsStr::new("a"), OsStr::new("started"), Instant::now());
        assert_eq!(error.unwrap_err().kind(), io::ErrorKind::TimedOut);
    }
}
