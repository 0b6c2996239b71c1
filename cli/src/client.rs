// SPDX-License-Identifier: MIT OR Apache-2.0
//! Asks the daemon. Every wait is bounded: a daemon that hangs must not hang
//! its clients.

use std::io::{self, ErrorKind as Io, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use ept_virt_core::wire::{
    Command, ErrorKind, MAX_LINE_BYTES, MemoryMap, PROTOCOL_VERSION, Reply, Request, Response, Status,
    WireError,
};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};

use crate::failure::Failure;

/// Longest wait for a whole answer. A round holds a domain for less than this.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);

/// Pause before a busy socket is tried again.
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// The state of the daemon and of `domain`, or of all domains.
pub fn status(path: &Path, domain: Option<&str>) -> Result<Status, Failure> {
    match ask(path, Command::Status { domain: domain.map(Into::into) })? {
        Reply::Status(status) => Ok(*status),
        other => Err(misfit(&other)),
    }
}

/// The class and place of every page of `domain`.
pub fn map(path: &Path, domain: &str) -> Result<MemoryMap, Failure> {
    match ask(path, Command::Map { domain: domain.into() })? {
        Reply::Map(map) => Ok(map),
        other => Err(misfit(&other)),
    }
}

/// Sends one request and reads its answer; an error in it is a [`Failure`].
fn ask(path: &Path, command: Command) -> Result<Reply, Failure> {
    let line = exchange(path, &command).map_err(|error| explain(path, &error))?;
    let response: Response = serde_json::from_slice(&line).map_err(|error| {
        Failure::refused(format!(
            "the answer of the daemon at {} is not understood ({error})",
            path.display()
        ))
        .hint("make sure that ept-virt and the daemon are of the same version")
    })?;
    match response {
        Response { v, .. } if v != PROTOCOL_VERSION => Err(Failure::refused(format!(
            "the daemon speaks version {v} of the protocol, this program version {PROTOCOL_VERSION}"
        ))
        .hint("restart the daemon after an upgrade: systemctl restart ept-virt")),
        Response { reply: Reply::Error(error), .. } => Err(answered(error)),
        Response { reply, .. } => Ok(reply),
    }
}

fn exchange(path: &Path, command: &Command) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + ANSWER_TIMEOUT;
    let mut stream = open(path, deadline)?;
    let mut line = serde_json::to_vec(&Request { v: PROTOCOL_VERSION, command: command.clone() })?;
    line.push(b'\n');
    stream.set_write_timeout(Some(left(deadline)?))?;
    stream.write_all(&line)?;
    read_line(&mut stream, deadline)
}

/// Connects without ever blocking: a full queue of a hanging daemon would block
/// an ordinary connect for good.
fn open(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let address = UnixAddr::new(path)?;
    loop {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let descriptor = socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
        match connect(descriptor.as_raw_fd(), &address) {
            Ok(()) => {
                let stream = UnixStream::from(descriptor);
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            Err(Errno::EAGAIN) => thread::sleep(BUSY_PAUSE.min(left(deadline)?)),
            Err(error) => return Err(error.into()),
        }
    }
}

fn read_line(stream: &mut UnixStream, deadline: Instant) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    let mut chunk = [0; 64 << 10];
    loop {
        stream.set_read_timeout(Some(left(deadline)?))?;
        let read = match stream.read(&mut chunk) {
            Err(error) if error.kind() == Io::Interrupted => continue,
            other => other?,
        };
        if read == 0 {
            return Err(Io::UnexpectedEof.into());
        }
        line.extend_from_slice(&chunk[..read]);
        if line.last() == Some(&b'\n') {
            return Ok(line);
        }
        if line.len() > MAX_LINE_BYTES {
            return Err(Io::InvalidData.into());
        }
    }
}

fn left(deadline: Instant) -> io::Result<Duration> {
    match deadline.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err(Io::TimedOut.into()),
        left => Ok(left),
    }
}

fn explain(path: &Path, error: &io::Error) -> Failure {
    let at = path.display();
    match error.kind() {
        Io::NotFound | Io::ConnectionRefused => Failure::unreachable(format!("no daemon listens at {at}"))
            .hint("start it with `systemctl start ept-virt`, or `ept-virt daemon`, or give its --socket"),
        Io::PermissionDenied => Failure::unreachable(format!("not permitted to ask the daemon at {at}"))
            .hint("run this command as root"),
        Io::TimedOut | Io::WouldBlock => {
            let seconds = ANSWER_TIMEOUT.as_secs();
            Failure::unreachable(format!("the daemon at {at} did not answer within {seconds} s"))
                .hint("look at `systemctl status ept-virt` and `journalctl -u ept-virt`")
        }
        Io::UnexpectedEof | Io::ConnectionReset | Io::BrokenPipe => {
            Failure::unreachable(format!("the daemon at {at} closed the connection before it answered"))
                .hint("look at `journalctl -u ept-virt`")
        }
        Io::InvalidData => Failure::refused(format!(
            "the answer of the daemon at {at} is longer than {MAX_LINE_BYTES} bytes"
        )),
        _ => Failure::unreachable(format!("cannot ask the daemon at {at}: {error}")),
    }
}

fn answered(error: WireError) -> Failure {
    let failure = Failure::refused(error.message);
    match (error.hint, error.kind) {
        (Some(hint), _) => failure.hint(hint),
        (None, ErrorKind::NoDomain) => failure.hint("`ept-virt list` shows the running domains"),
        (None, _) => failure,
    }
}

fn misfit(reply: &Reply) -> Failure {
    let kind = match reply {
        Reply::Status(_) => "status",
        Reply::Map(_) => "map",
        Reply::Done => "done",
        Reply::Error(_) => "error",
    };
    Failure::refused(format!("the daemon gave an answer of another kind ({kind})"))
}
