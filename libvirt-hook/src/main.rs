// SPDX-License-Identifier: MIT OR Apache-2.0
//! libvirt's hook for QEMU domains, `/etc/libvirt/hooks/qemu.d/ept-virt`: tells
//! the daemon that something happened, and no more. The daemon then asks libvirt
//! itself, so a lost nudge costs seconds, never correctness.
//!
//! libvirt waits for its hooks and obeys them: a failing `started` kills the
//! guest, and what `migrate` or `restore` print replaces the domain's XML. So
//! this program prints nothing on stdout, exits with 0 whatever happens, never
//! calls libvirt, and ends within [`TIME_LIMIT`].

mod nudge;

use std::env;
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use ept_virt_core::wire;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::read;

/// Names the daemon's socket in place of [`wire::DEFAULT_SOCKET`].
const SOCKET_VARIABLE: &str = "EPT_VIRT_SOCKET";

/// All that this program may take.
const TIME_LIMIT: Duration = Duration::from_millis(200);

fn main() {
    let deadline = Instant::now() + TIME_LIMIT;
    // libvirt calls: NAME OPERATION SUB-OPERATION EXTRA
    let mut arguments = env::args_os().skip(1);
    let (Some(domain), Some(operation)) = (arguments.next(), arguments.next()) else {
        complain("expected: DOMAIN OPERATION SUB-OPERATION EXTRA, as libvirt calls its hooks");
        return;
    };
    if nudge::wanted(&operation) {
        let socket = env::var_os(SOCKET_VARIABLE).unwrap_or(OsString::from(wire::DEFAULT_SOCKET));
        if let Err(error) = nudge::send(&PathBuf::from(&socket), &domain, &operation, deadline) {
            complain(&format!("cannot nudge the ept-virt daemon at {}: {error}", socket.display()));
        }
    }
    drain(io::stdin().as_fd(), deadline);
}

/// libvirt shows stderr only when a hook fails, which this one does not; it is
/// for those who try it by hand. That it can not be written changes nothing.
fn complain(message: &str) {
    let _ = writeln!(io::stderr(), "ept-virt-hook: {message}");
}

/// Reads and forgets the domain's XML, so that who writes it meets a reader.
/// libvirt gets by without, but says so in its log; others may not.
fn drain(input: BorrowedFd<'_>, deadline: Instant) {
    let mut buffer = [0; 64 << 10];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        let mut fds = [PollFd::new(input, PollFlags::POLLIN)];
        if left.is_zero() || !matches!(poll(&mut fds, timeout), Ok(ready) if ready > 0) {
            return;
        }
        // Zero: the end. An error: nothing is left to read for us.
        if !matches!(read(input, &mut buffer), Ok(length) if length > 0) {
            return;
        }
    }
}
