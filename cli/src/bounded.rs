// SPDX-License-Identifier: MIT OR Apache-2.0
//! Waiting for what may never answer, as a libvirt that hangs.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

/// What `ask` returns, if it does so in time. Otherwise its thread is left to
/// itself; it ends with the process at the latest.
pub fn within<T: Send + 'static>(limit: Duration, ask: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (sender, receiver) = mpsc::sync_channel(1);
    let asked = thread::Builder::new().name("asking".into()).spawn(move || {
        // Nobody waits any more when the time is over.
        let _ = sender.send(ask());
    });
    asked.ok()?;
    receiver.recv_timeout(limit).ok()
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
