// SPDX-License-Identifier: MIT OR Apache-2.0
//! Waiting for what may never answer, as a libvirt that hangs.

use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use log::warn;

/// What `ask` returns, if it does so in time. Otherwise its thread is left to
/// itself; it ends with the process at the latest.
pub fn within<T: Send + 'static>(limit: Duration, ask: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    aside(ask).recv_timeout(limit).ok()
}

/// What `ask` will return, by a thread of its own. Disconnected: the thread could not be
/// started, or failed.
pub fn aside<T: Send + 'static>(ask: impl FnOnce() -> T + Send + 'static) -> Receiver<T> {
    let (sender, receiver) = mpsc::sync_channel(1);
    let asked = thread::Builder::new().name("asking".into()).spawn(move || {
        // Nobody may be waiting any more.
        let _ = sender.send(ask());
    });
    if let Err(error) = asked {
        warn!("cannot start a thread for what may not answer: {error}");
    }
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_never_answers_is_not_waited_for() {
        let (silence, never) = mpsc::channel::<()>();
        assert_eq!(within(Duration::from_millis(10), move || never.recv().is_ok()), None);
        drop(silence);
        assert_eq!(within(Duration::from_secs(60), || 7), Some(7));
    }
}
