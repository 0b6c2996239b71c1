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

/// Where the unit's daemon tells what happened to it.
const LOG: &str = "look at what it logged: `journalctl -u ept-virt`, or its standard error";

/// Pause before a busy socket is tried again.
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// The state of the daemon and of `domains`, each once and in this order; of all
/// when none is named.
pub fn status(path: &Path, domains: &[String]) -> Result<Status, Failure> {
    let mut named = domains.iter().cloned();
    let mut status = status_within(path, named.next(), ANSWER_TIMEOUT)?;
    for domain in named {
        for found in status_within(path, Some(domain), ANSWER_TIMEOUT)?.domains {
            if status.domains.iter().all(|known| known.uuid != found.uuid) {
                status.domains.push(found);
            }
        }
    }
    Ok(status)
}

/// The state of the daemon and of `domain`, or of all domains, if it comes in time.
pub fn status_within(path: &Path, domain: Option<String>, timeout: Duration) -> Result<Status, Failure> {
    match ask_within(path, Command::Status { domain }, timeout)? {
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

/// Tells the daemon to change what it does with a domain.
pub fn change(path: &Path, command: Command) -> Result<(), Failure> {
    match ask(path, command)? {
        Reply::Done => Ok(()),
        other => Err(misfit(&other)),
    }
}

/// How a domain can be recorded.
pub enum Recorded {
    /// The daemon observes it: a recording of its rounds.
    Rounds(Patient),
    /// There is no daemon, or it leaves the domain alone.
    NotObserved,
}

/// Asks the daemon for its rounds of `domain`.
pub fn record(path: &Path, domain: &str) -> Result<Recorded, Failure> {
    let at = |error: io::Error| explain(path, ANSWER_TIMEOUT, &error);
    let deadline = Instant::now() + ANSWER_TIMEOUT;
    let mut stream = match open(path, deadline) {
        Ok(stream) => stream,
        Err(error) if matches!(error.kind(), Io::NotFound | Io::ConnectionRefused) => {
            return Ok(Recorded::NotObserved);
        }
        Err(error) => return Err(at(error)),
    };
    let command = Command::Record { domain: domain.into() };
    stream.set_write_timeout(Some(ANSWER_TIMEOUT)).map_err(at)?;
    stream.write_all(&Request::line(command)).map_err(at)?;
    // Byte by byte: what comes after the line is no line.
    let mut line = Vec::new();
    while line.last() != Some(&b'\n') && line.len() < MAX_LINE_BYTES {
        stream.set_read_timeout(Some(left(deadline).map_err(at)?)).map_err(at)?;
        let mut byte = [0];
        stream.read_exact(&mut byte).map_err(at)?;
        line.push(byte[0]);
    }
    match understand(path, &line) {
        Ok(Reply::Done) => Ok(Recorded::Rounds(Patient { stream, until: None })),
        Ok(Reply::Error(error)) if error.kind == ErrorKind::NotObserved => Ok(Recorded::NotObserved),
        Ok(Reply::Error(error)) => Err(answered(error)),
        Ok(other) => Err(misfit(&other)),
        Err(failure) => Err(failure),
    }
}

/// A connection on which much may come, at no certain time.
pub struct Patient {
    stream: UnixStream,
    until: Option<Instant>,
}

impl Patient {
    /// How long reading waits from now on; for good without a time.
    pub fn wait_until(&mut self, until: Option<Instant>) {
        self.until = until;
    }
}

impl Read for Patient {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(self.until.map(left).transpose()?)?;
        self.stream.read(bytes)
    }
}

fn ask(path: &Path, command: Command) -> Result<Reply, Failure> {
    ask_within(path, command, ANSWER_TIMEOUT)
}

/// Sends one request and reads its answer; an error in it is a [`Failure`].
fn ask_within(path: &Path, command: Command, timeout: Duration) -> Result<Reply, Failure> {
    let line = exchange(path, command, timeout).map_err(|error| explain(path, timeout, &error))?;
    match understand(path, &line)? {
        Reply::Error(error) => Err(answered(error)),
        reply => Ok(reply),
    }
}

/// Reads an answer.
fn understand(path: &Path, line: &[u8]) -> Result<Reply, Failure> {
    let response: Response = serde_json::from_slice(line).map_err(|error| {
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
        .hint("restart the daemon after an upgrade: `systemctl restart ept-virt`")),
        Response { reply, .. } => Ok(reply),
    }
}

fn exchange(path: &Path, command: Command, timeout: Duration) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + timeout;
    let mut stream = open(path, deadline)?;
    stream.set_write_timeout(Some(left(deadline)?))?;
    stream.write_all(&Request::line(command))?;
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

fn explain(path: &Path, timeout: Duration, error: &io::Error) -> Failure {
    let at = path.display();
    match error.kind() {
        Io::NotFound | Io::ConnectionRefused => Failure::unreachable(format!("no daemon listens at {at}"))
            .hint("start it, as root, with `systemctl start ept-virt` (or `ept-virt daemon`), or give its --socket"),
        Io::PermissionDenied => Failure::unreachable(format!("not permitted to ask the daemon at {at}"))
            .hint("run this command as root"),
        Io::TimedOut | Io::WouldBlock => {
            Failure::unreachable(format!("the daemon at {at} did not answer within {timeout:?}"))
                .hint(LOG)
        }
        Io::UnexpectedEof | Io::ConnectionReset | Io::BrokenPipe => {
            Failure::unreachable(format!("the daemon at {at} closed the connection before it answered"))
                .hint(LOG)
        }
        Io::InvalidData => Failure::refused(format!(
            "the answer of the daemon at {at} is longer than {MAX_LINE_BYTES} bytes"
        )),
        _ => Failure::unreachable(format!("cannot ask the daemon at {at}: {error}")),
    }
}

fn answered(error: WireError) -> Failure {
    let failure = match error.kind {
        ErrorKind::NotPermitted => Failure::unreachable(error.message),
        _ => Failure::refused(error.message),
    };
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

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::socket::{Backlog, listen};
    use std::os::unix::net::UnixListener;
    use std::path::PathBuf;
    use std::process;

    const SHORT: Duration = Duration::from_millis(300);

    /// A socket of its own for each test; removed with the value.
    struct Fake(PathBuf);

    impl Drop for Fake {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    impl Fake {
        fn path(name: &str) -> Self {
            Fake(std::env::temp_dir().join(format!("ept-virt-client-{}-{name}.sock", process::id())))
        }

        /// Answers one request with `answer` as it stands.
        fn answering(name: &str, answer: impl Into<Vec<u8>>) -> Self {
            let fake = Fake::path(name);
            let listener = UnixListener::bind(&fake.0).unwrap();
            let answer = answer.into();
            thread::spawn(move || {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 4096];
                let _ = stream.read(&mut request).unwrap();
                let _ = stream.write_all(&answer);
            });
            fake
        }

        fn failure(&self) -> String {
            let command = Command::Status { domain: None };
            let message = ask_within(&self.0, command, SHORT).unwrap_err().to_string();
            message.replace(self.0.to_str().unwrap(), "SOCKET")
        }
    }

    #[test]
    fn an_answer_of_many_reads_arrives_whole() {
        let name = "x".repeat(300_000);
        let answer = format!("{{\"v\":1,\"reply\":\"map\",\"name\":\"{name}\",\"round\":7,\"runs\":[]}}\n");
        let fake = Fake::answering("whole", answer);
        assert_eq!(map(&fake.0, "x").unwrap().name.len(), name.len());
    }

    #[test]
    fn without_a_daemon_it_says_how_to_start_one() {
        let expected = "no daemon listens at SOCKET: start it, as root, with `systemctl start ept-virt` \
                        (or `ept-virt daemon`), or give its --socket";
        let fake = Fake::path("nobody");
        assert_eq!(fake.failure(), expected);
        // A socket that a killed daemon left behind.
        drop(UnixListener::bind(&fake.0).unwrap());
        assert_eq!(fake.failure(), expected);
    }

    #[test]
    fn a_daemon_that_hangs_does_not_hang_its_client() {
        let fake = Fake::path("hangs");
        let listener = UnixListener::bind(&fake.0).unwrap();
        let started = Instant::now();
        let message = "the daemon at SOCKET did not answer within 300ms: \
                       look at what it logged: `journalctl -u ept-virt`, or its standard error";
        assert_eq!(fake.failure(), message);
        // Its queue full, even a connect would block.
        listen(&listener, Backlog::new(0).unwrap()).unwrap();
        let _waiting: Vec<_> =
            (0..4).map(|_| open(&fake.0, Instant::now() + Duration::from_millis(20))).collect();
        assert_eq!(fake.failure(), message);
        assert!(started.elapsed() < SHORT * 10);
    }

    #[test]
    fn broken_answers_are_told_apart() {
        for (name, answer, message) in [
            (
                "closes",
                "",
                "the daemon at SOCKET closed the connection before it answered: \
                 look at what it logged: `journalctl -u ept-virt`, or its standard error",
            ),
            (
                "other-version",
                "{\"v\":9,\"reply\":\"done\"}\n",
                "the daemon speaks version 9 of the protocol, this program version 1: \
                 restart the daemon after an upgrade: `systemctl restart ept-virt`",
            ),
            (
                "error",
                "{\"v\":1,\"reply\":\"error\",\"kind\":\"no-domain\",\"message\":\"no\",\"hint\":\"look\"}\n",
                "no: look",
            ),
        ] {
            assert_eq!(Fake::answering(name, answer).failure(), message);
        }
        assert!(Fake::answering("garbage", "}\n").failure().contains("is not understood"));
        let long = vec![b'x'; MAX_LINE_BYTES + 100_000];
        assert!(Fake::answering("long", long).failure().contains("is longer than"));
        let fake = Fake::answering("misfit", "{\"v\":1,\"reply\":\"done\"}\n");
        let message = status(&fake.0, &[]).unwrap_err().to_string();
        assert_eq!(message, "the daemon gave an answer of another kind (done)");
    }
}
