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

use std::env;
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use ept_virt_core::policy::LONGEST_XML;
use ept_virt_core::wire;
use ept_virt_hook::{Action, TIME_LIMIT, TIME_TO_EXIT, TIME_TO_TELL, nudge, veto};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::read;

/// Names the daemon's socket in place of [`wire::DEFAULT_SOCKET`].
const SOCKET_VARIABLE: &str = "EPT_VIRT_SOCKET";

fn main() -> ExitCode {
    let deadline = Instant::now() + TIME_LIMIT - TIME_TO_EXIT;
    // libvirt calls: NAME OPERATION SUB-OPERATION EXTRA
    let mut arguments = env::args_os().skip(1);
    let (Some(domain), Some(operation)) = (arguments.next(), arguments.next()) else {
        complain("expected: DOMAIN OPERATION SUB-OPERATION EXTRA, as libvirt calls its hooks");
        return ExitCode::SUCCESS;
    };
    let socket = PathBuf::from(env::var_os(SOCKET_VARIABLE).unwrap_or(OsString::from(wire::DEFAULT_SOCKET)));
    match Action::of(&domain, &operation) {
        Action::Judge => return judge(&socket, deadline),
        Action::Nudge(line) => {
            if let Err(error) = nudge::send(&socket, &line, deadline) {
                complain(&format!("cannot nudge the ept-virt daemon at {}: {error}", socket.display()));
            }
        }
        Action::Nothing => {}
    }
    read_all(io::stdin().as_fd(), deadline, |_| {});
    ExitCode::SUCCESS
}

/// Before a domain starts.
fn judge(socket: &Path, deadline: Instant) -> ExitCode {
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
    match reason_until(xml, socket, deadline) {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(reason)) => {
            complain(&format!("the domain's placement policy is required, and can not be served: {reason}"));
            ExitCode::FAILURE
        }
        Err(doubt) => {
            complain(&format!("{doubt}; the domain starts, whatever its policy says"));
            ExitCode::SUCCESS
        }
    }
}

/// Why the domain must not start, or why that could not be told. In a thread, so
/// that neither an XML that is slow to read nor a mistake of ours, which would
/// end this program with an error, keeps a domain from starting.
fn reason_until(xml: Vec<u8>, socket: &Path, deadline: Instant) -> Result<Option<String>, String> {
    let (sender, receiver) = mpsc::channel();
    let socket = socket.to_owned();
    let judging = thread::Builder::new().name("judge".into()).spawn(move || {
        // Nobody listens any more when it comes too late.
        let _ = sender.send(veto::reason(&String::from_utf8_lossy(&xml), &socket, deadline - TIME_TO_TELL));
    });
    judging.map_err(|error| format!("cannot start a thread: {error}"))?;
    let left = deadline.saturating_duration_since(Instant::now());
    receiver.recv_timeout(left).map_err(|error| match error {
        mpsc::RecvTimeoutError::Timeout => "the domain's policy could not be judged in time".into(),
        mpsc::RecvTimeoutError::Disconnected => "judging the domain's policy failed".into(),
    })
}

/// libvirt shows stderr only when a hook fails, which this one does not but for
/// its veto; the rest is for those who try it by hand. That it can not be
/// written changes nothing.
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
