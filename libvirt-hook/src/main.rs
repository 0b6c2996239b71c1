// SPDX-License-Identifier: MIT OR Apache-2.0
//! libvirt's hook for QEMU domains, `/etc/libvirt/hooks/qemu.d/ept-virt`: tells
//! the daemon that something happened, and no more. The daemon then asks libvirt
//! itself, so a lost nudge costs seconds, never correctness.
//!
//! libvirt waits for its hooks and obeys them: a failing `started` kills the
//! guest, and what `migrate` or `restore` print replaces the domain's XML. So
//! this program prints nothing on stdout, never calls libvirt, and ends within
//! [`TIME_LIMIT`]. It exits with 0 whatever happens, but for one veto: before a
//! start, when the domain's policy says `required` and is invalid or can not be
//! served. A doubt is no veto.

mod nudge;
mod veto;

use std::env;
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use ept_virt_core::wire;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::read;

/// Names the daemon's socket in place of [`wire::DEFAULT_SOCKET`].
const SOCKET_VARIABLE: &str = "EPT_VIRT_SOCKET";

/// More XML than this is not a domain's.
const LONGEST_XML: usize = 16 << 20;

/// All that this program may take.
const TIME_LIMIT: Duration = Duration::from_millis(200);

fn main() -> ExitCode {
    let deadline = Instant::now() + TIME_LIMIT;
    // libvirt calls: NAME OPERATION SUB-OPERATION EXTRA
    let mut arguments = env::args_os().skip(1);
    let (Some(domain), Some(operation)) = (arguments.next(), arguments.next()) else {
        complain("expected: DOMAIN OPERATION SUB-OPERATION EXTRA, as libvirt calls its hooks");
        return ExitCode::SUCCESS;
    };
    let socket = PathBuf::from(env::var_os(SOCKET_VARIABLE).unwrap_or(OsString::from(wire::DEFAULT_SOCKET)));
    if operation == "prepare" {
        return prepare(&socket, deadline);
    }
    if nudge::wanted(&operation)
        && let Err(error) = nudge::send(&socket, &domain, &operation, deadline)
    {
        complain(&format!("cannot nudge the ept-virt daemon at {}: {error}", socket.display()));
    }
    read_all(io::stdin().as_fd(), deadline, |_| {});
    ExitCode::SUCCESS
}

/// Before a domain starts.
fn prepare(socket: &Path, deadline: Instant) -> ExitCode {
    let mut xml = Vec::new();
    let whole = read_all(io::stdin().as_fd(), deadline, |part| {
        if xml.len() <= LONGEST_XML {
            xml.extend_from_slice(part);
        }
    });
    if !whole || xml.len() > LONGEST_XML {
        complain("the domain's XML could not be read in time; it starts, whatever its policy says");
        return ExitCode::SUCCESS;
    }
    match veto::reason(&String::from_utf8_lossy(&xml), socket, deadline) {
        None => ExitCode::SUCCESS,
        Some(reason) => {
            complain(&format!("the domain's placement policy is required, and can not be served: {reason}"));
            ExitCode::FAILURE
        }
    }
}

/// libvirt shows stderr only when a hook fails, which this one does not; it is
/// for those who try it by hand. That it can not be written changes nothing.
fn complain(message: &str) {
    let _ = writeln!(io::stderr(), "ept-virt-hook: {message}");
}

/// Reads the domain's XML to its end, so that who writes it meets a reader;
/// whether that came in time. libvirt gets by without a reader, but says so in
/// its log; others may not.
fn read_all(input: BorrowedFd<'_>, deadline: Instant, mut take: impl FnMut(&[u8])) -> bool {
    let mut buffer = [0; 64 << 10];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        let mut fds = [PollFd::new(input, PollFlags::POLLIN)];
        if left.is_zero() || !matches!(poll(&mut fds, timeout), Ok(ready) if ready > 0) {
            return false;
        }
        match read(input, &mut buffer) {
            Ok(0) => return true,
            Ok(length) => take(&buffer[..length]),
            // Nothing is left to read for us.
            Err(_) => return false,
        }
    }
}
