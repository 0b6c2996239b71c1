// SPDX-License-Identifier: MIT OR Apache-2.0
//! The control socket: JSON lines, a thread for each client. No client can make
//! the daemon fail, wait, or use memory without bound.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, ErrorKind as Io, Read, Write};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use ept_virt_core::text::shown;
use ept_virt_core::wire::{Command, ErrorKind, MAX_REQUEST_BYTES, Reply, Request, Response, WireError};
use log::{debug, info, warn};
use nix::fcntl::Flock;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::sys::stat::{Mode, umask};

use super::files;
use super::mailbox::{Event, Mailbox};
use super::state::{Cell, Hold, Shared};
use super::tap::Rounds;
use crate::failure::Failure;

/// Clients served at once; one more is turned away.
const MAX_CLIENTS: usize = 64;

/// Of these, places that only those get who may change something: who may only
/// ask can not lock root out.
const KEPT_FOR_ROOT: usize = 8;

/// How long a client may be silent, or not read its answer.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest part of a nudge that is kept, in letters.
const LONGEST_NUDGE: usize = 300;

/// The socket of the only daemon that uses it.
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
    /// Held as long as the daemon lives, also by a daemon that is killed.
    _lock: Flock<File>,
}

impl Server {
    /// Binds the socket, for root alone. The lock beside it tells a running daemon from
    /// a socket that a killed one has left.
    pub fn bind(path: &Path) -> Result<Self, Failure> {
        let cannot = |what: &str, error: io::Error| {
            let hint = match error.kind() {
                Io::PermissionDenied => "run the daemon as root, or name another place with --socket",
                _ => "name another place with --socket",
            };
            Failure::unreachable(format!("cannot {what} {}: {error}", path.display())).hint(hint)
        };
        if let Some(dir) = path.parent().filter(|dir| !dir.as_os_str().is_empty()) {
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o755)
                .create(dir)
                .map_err(|error| cannot("create the directory of", error))?;
        }
        let mut lock_path = path.as_os_str().to_owned();
        lock_path.push(".lock");
        let lock = files::lock_alone(Path::new(&lock_path)).map_err(|error| match error.kind() {
            Io::WouldBlock => {
                Failure::refused(format!("another ept-virt daemon serves {} already", path.display()))
            }
            _ => cannot("lock", error),
        })?;
        files::remove_socket(path).map_err(|error| cannot("replace", error))?;
        // The mode has to be right from the first moment on.
        let before = umask(Mode::from_bits_truncate(0o177));
        let bound = UnixListener::bind(path);
        umask(before);
        let listener = bound.map_err(|error| cannot("listen on", error))?;
        info!("listening on {}", path.display());
        Ok(Self { listener, path: path.to_owned(), _lock: lock })
    }

    /// Lets the members of `group` ask, or root alone. Clients that are connected
    /// stay so.
    pub fn open_to(&self, group: Option<&str>) -> Result<(), Failure> {
        let path = &self.path;
        open_to(path, group).map_err(|error| {
            let group = group.unwrap_or("root");
            let problem = format!("cannot open {} to group \"{group}\": {error}", path.display());
            Failure::unreachable(problem).hint("name another group in the configuration, or none")
        })
    }

    /// Starts the thread that serves clients.
    pub fn start(&self, shared: Arc<Shared>, mailbox: Mailbox) -> io::Result<()> {
        let listener = self.listener.try_clone()?;
        let clients = Arc::new(());
        thread::Builder::new().name("socket".into()).spawn(move || {
            loop {
                match listener.accept() {
                    Ok((stream, _)) => admit(stream, &clients, &shared, &mailbox),
                    Err(error) => {
                        warn!("cannot accept a client: {error}");
                        // As when there are no descriptors left: they may come back.
                        thread::sleep(Duration::from_millis(100));
                    }
                }
            }
        })?;
        Ok(())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // The lock file stays: removing it would let two daemons lock two files.
        if let Err(error) = fs::remove_file(&self.path) {
            debug!("cannot remove {}: {error}", self.path.display());
        }
    }
}

fn open_to(path: &Path, group: Option<&str>) -> io::Result<()> {
    let Some(name) = group else {
        // The mode first: the group is nobody's concern then.
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
        return std::os::unix::fs::chown(path, None, Some(nix::unistd::getegid().as_raw()));
    };
    let found = nix::unistd::Group::from_name(name)?;
    let group = found.ok_or_else(|| io::Error::new(Io::NotFound, "there is no such group"))?;
    std::os::unix::fs::chown(path, None, Some(group.gid.as_raw()))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o660))
}

/// Serves the client in a thread of its own, if there are not too many.
fn admit(mut stream: UnixStream, clients: &Arc<()>, shared: &Arc<Shared>, mailbox: &Mailbox) {
    let timeouts =
        stream.set_read_timeout(Some(CLIENT_TIMEOUT)).and(stream.set_write_timeout(Some(CLIENT_TIMEOUT)));
    if let Err(error) = timeouts {
        warn!("a client is turned away: {error}");
        return;
    }
    let may_change = match getsockopt(&stream, PeerCredentials) {
        Ok(peer) => {
            debug!("client: pid {}, uid {}", peer.pid(), peer.uid());
            peer.uid() == 0 || peer.uid() == nix::unistd::geteuid().as_raw()
        }
        Err(error) => {
            debug!("client: credentials unknown: {error}");
            false
        }
    };
    let most = if may_change { MAX_CLIENTS } else { MAX_CLIENTS - KEPT_FOR_ROOT };
    // Each client's thread holds a reference; one is ours.
    if Arc::strong_count(clients) > most {
        let refusal = error(ErrorKind::Internal, format!("more than {most} clients are connected"));
        let _ = stream.write_all(&Response::line(refusal));
        return;
    }
    let (place, shared, mailbox) = (Arc::clone(clients), Arc::clone(shared), mailbox.clone());
    let spawned = thread::Builder::new().name("client".into()).spawn(move || {
        match serve(&stream, may_change, &shared, &mailbox) {
            // The hook does not wait for its answer.
            Err(error) if error.kind() != Io::BrokenPipe => debug!("a client was dropped: {error}"),
            _ => {}
        }
        drop(place);
    });
    if let Err(error) = spawned {
        warn!("cannot start a thread for a client: {error}");
    }
}

/// Answers line after line until the client ends or breaks the rules.
fn serve(stream: &UnixStream, may_change: bool, shared: &Shared, mailbox: &Mailbox) -> io::Result<()> {
    let mut reader = BufReader::new(stream);
    loop {
        let mut line = Vec::new();
        reader.by_ref().take(MAX_REQUEST_BYTES as u64 + 1).read_until(b'\n', &mut line)?;
        let too_long = line.len() > MAX_REQUEST_BYTES;
        if line.is_empty() {
            return Ok(());
        }
        let mut writer = stream;
        if let Some(wanted) = recording(&line, may_change) {
            match record(shared, &wanted) {
                Ok((cell, rounds)) => {
                    writer.write_all(&Response::line(Reply::Done))?;
                    let (name, uuid) = cell.names();
                    info!("domain {name:?} is recorded");
                    return rounds.stream(stream, &name, &uuid);
                }
                Err(reply) => writer.write_all(&Response::line(reply))?,
            }
            continue;
        }
        let reply = answer(&line, may_change, shared, mailbox);
        writer.write_all(&Response::line(reply))?;
        if too_long {
            // Where the next line begins can not be told.
            return Ok(());
        }
    }
}

/// The domain that a client who may do so wants to record.
fn recording(line: &[u8], may_change: bool) -> Option<String> {
    match Request::read(line) {
        Ok(Command::Record { domain }) if may_change => Some(domain),
        _ => None,
    }
}

/// The domain's rounds, or why they can not be had.
fn record(shared: &Shared, wanted: &str) -> Result<(Arc<Cell>, Rounds), Reply> {
    let cell = find(shared, wanted)?;
    match cell.record() {
        Ok(rounds) => Ok((cell, rounds)),
        Err(reason) => Err(error(
            ErrorKind::NotObserved,
            format!("there are no rounds of domain {wanted:?} to record: {reason}"),
        )),
    }
}

/// The answer to one line.
fn answer(line: &[u8], may_change: bool, shared: &Shared, mailbox: &Mailbox) -> Reply {
    let command = match Request::read(line) {
        Ok(command) => command,
        Err(error) => return Reply::Error(error),
    };
    match command {
        Command::Status { domain: None } => Reply::Status(Box::new(shared.status(None))),
        Command::Status { domain: Some(name) } => match find(shared, &name) {
            Ok(cell) => Reply::Status(Box::new(shared.status(Some(cell)))),
            Err(reply) => reply,
        },
        Command::Map { domain } => match find(shared, &domain).map(|cell| cell.map()) {
            Ok(Ok(map)) => Reply::Map(map),
            Ok(Err((kind, reason))) => error(kind, format!("there is no map of domain {domain:?}: {reason}")),
            Err(reply) => reply,
        },
        command if !may_change && changes(&command) => {
            error(ErrorKind::NotPermitted, "only root may change what the daemon does".into())
        }
        // The one verb whose answer is no line; see `serve`.
        Command::Record { .. } => error(ErrorKind::Internal, "the recording can not begin".into()),
        Command::Start { domain } => hold(shared, mailbox, &domain, &[Hold::Stopped], Hold::None),
        Command::Stop { domain } => {
            hold(shared, mailbox, &domain, &[Hold::None, Hold::Paused], Hold::Stopped)
        }
        Command::Pause { domain } => hold(shared, mailbox, &domain, &[Hold::None], Hold::Paused),
        Command::Resume { domain } => hold(shared, mailbox, &domain, &[Hold::Paused], Hold::None),
        Command::Nudge { op, domain } => {
            debug!("nudge: {op:?} {domain:?}");
            let mut facts = shared.facts();
            facts.nudges += 1;
            facts.last_nudge = Some(shown(&format!("{op} {domain}"), LONGEST_NUDGE));
            drop(facts);
            mailbox.post(Event::Look);
            Reply::Done
        }
    }
}

fn changes(command: &Command) -> bool {
    use Command::{Pause, Record, Resume, Start, Stop};
    matches!(command, Start { .. } | Stop { .. } | Pause { .. } | Resume { .. } | Record { .. })
}

/// Takes note of what a person asked for, and makes the daemon look.
fn hold(shared: &Shared, mailbox: &Mailbox, domain: &str, expected: &[Hold], wanted: Hold) -> Reply {
    let cell = match find(shared, domain) {
        Ok(cell) => cell,
        Err(reply) => return reply,
    };
    match cell.set_hold(expected, wanted) {
        Ok(()) => {
            mailbox.post(Event::Look);
            Reply::Done
        }
        Err(held) => {
            let held = match held {
                Hold::None => "neither stopped nor paused",
                Hold::Paused => "paused",
                Hold::Stopped => "stopped",
            };
            error(ErrorKind::BadRequest, format!("domain {domain:?} is {held}"))
        }
    }
}

fn find(shared: &Shared, name: &str) -> Result<Arc<Cell>, Reply> {
    shared.find(name).ok_or_else(|| {
        let wire = WireError {
            kind: ErrorKind::NoDomain,
            message: format!("no running domain is called {name:?}"),
            hint: Some("`virsh list` shows what runs".into()),
        };
        Reply::Error(wire)
    })
}

fn error(kind: ErrorKind, message: String) -> Reply {
    Reply::Error(WireError { kind, message, hint: None })
}

#[cfg(test)]
#[path = "server_tests.rs"]
mod tests;
