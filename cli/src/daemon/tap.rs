// SPDX-License-Identifier: MIT OR Apache-2.0
//! A domain's rounds on their way to someone who records them.
//!
//! The daemon's harvests clear the accessed bits, and so would a recorder's own: each
//! would miss what the other saw first. So who records a domain that the daemon
//! observes gets the daemon's rounds. He gets them by a thread of his own, and a round
//! never waits for him: one that he has no time for goes into the next.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ept_virt_core::record::{Frame, FrameSlot, Header, Writer};
use ept_virt_core::sampler::{Harvest, MemSlot};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::state::lock;

/// Between two looks whether the client is still there.
const LOOK: Duration = Duration::from_secs(1);

/// Where a domain's cell keeps a tap until its worker takes it.
#[derive(Default)]
pub struct Socket {
    waiting: Mutex<Option<Tap>>,
    /// Lives as long as somebody records.
    recorder: Mutex<Weak<()>>,
}

/// The worker's end.
pub struct Tap {
    sender: SyncSender<Frame>,
    /// Of a round that was not taken yet.
    kept: Option<Frame>,
    /// The guest's time, which stands still while it is suspended.
    time: Duration,
    frame: Frame,
}

/// The recorder's end.
pub struct Rounds {
    receiver: Receiver<Frame>,
    _recorder: Arc<()>,
}

impl Socket {
    /// Asks the worker for its rounds; `None` when another one gets them.
    pub fn plug(&self) -> Option<Rounds> {
        let mut recorder = lock(&self.recorder);
        if recorder.strong_count() > 0 {
            return None;
        }
        let token = Arc::new(());
        *recorder = Arc::downgrade(&token);
        let (sender, receiver) = mpsc::sync_channel(1);
        let tap = Tap { sender, kept: None, time: Duration::ZERO, frame: Frame::default() };
        *lock(&self.waiting) = Some(tap);
        Some(Rounds { receiver, _recorder: token })
    }

    /// The tap that waits for the worker.
    pub fn take(&self) -> Option<Tap> {
        lock(&self.waiting).take()
    }
}

impl Tap {
    /// Takes a copy of what was harvested of a slot, or of its next pages.
    pub fn add(&mut self, slot: &MemSlot, harvest: &Harvest) {
        match self.frame.slots.last_mut().filter(|last| last.gfn_start == slot.gfn_start) {
            Some(last) => last.extend(harvest),
            None => {
                let mut first = FrameSlot::new(slot);
                first.extend(harvest);
                self.frame.slots.push(first);
            }
        }
    }

    /// Ends a round, which took `elapsed` of the guest's time; whether somebody still
    /// listens.
    pub fn end(&mut self, elapsed: Option<Duration>) -> bool {
        self.time += elapsed.unwrap_or_default();
        let mut frame = std::mem::take(&mut self.frame);
        frame.time = self.time;
        if let Some(kept) = self.kept.take() {
            frame.absorb(&kept);
        }
        match self.sender.try_send(frame) {
            Ok(()) => true,
            Err(TrySendError::Full(frame)) => {
                self.kept = Some(frame);
                true
            }
            Err(TrySendError::Disconnected(_)) => false,
        }
    }
}

impl Rounds {
    /// The next round, when it comes.
    #[cfg(test)]
    pub fn next_round(&self) -> Option<Frame> {
        self.receiver.recv().ok()
    }

    /// Writes a recording to the client, until one of both ends.
    pub fn stream(self, stream: &UnixStream, domain: &str, uuid: &str) -> io::Result<()> {
        let mut writer = Writer::new(io::BufWriter::new(stream), &header(domain, uuid))?;
        loop {
            match self.receiver.recv_timeout(LOOK) {
                Ok(frame) => {
                    writer.append(frame)?;
                }
                Err(RecvTimeoutError::Disconnected) => return writer.into_inner().flush(),
                Err(RecvTimeoutError::Timeout) => {}
            }
            // Rounds may come too fast for there to be a pause.
            if has_gone(stream) {
                return Ok(());
            }
        }
    }
}

/// What a recording that begins now says of itself.
pub fn header(domain: &str, uuid: &str) -> Header {
    Header {
        domain: domain.into(),
        uuid: uuid.into(),
        began: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        program: format!("ept-virt {}", env!("CARGO_PKG_VERSION")),
    }
}

/// Whether the other side has closed, whatever it sent before. One that only says no more
/// still listens.
fn has_gone(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream.as_fd(), PollFlags::empty())];
    match poll(&mut fds, PollTimeout::ZERO) {
        // POLLHUP and POLLERR are told unasked (poll(2)).
        Ok(_) => fds[0].any().unwrap_or(true),
        Err(error) => error != Errno::EINTR,
    }
}

#[cfg(test)]
#[path = "tap_tests.rs"]
mod tests;
