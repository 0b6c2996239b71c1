// SPDX-License-Identifier: MIT OR Apache-2.0
//! What wakes the main thread. However much is posted, there is one of each kind
//! at most: a look that is asked for a thousand times is one look.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Instant;

use super::state::lock;

/// What wakes the main thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Something may have changed.
    Look,
    /// Read the configuration again.
    Reload,
    /// End.
    Stop,
}

/// What was posted since the mailbox was emptied last.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mail {
    /// [`Event::Look`].
    pub look: bool,
    /// [`Event::Reload`].
    pub reload: bool,
    /// [`Event::Stop`].
    pub stop: bool,
}

/// Where all threads post, and the main thread waits.
#[derive(Clone, Default)]
pub struct Mailbox(Arc<Inner>);

#[derive(Default)]
struct Inner {
    mail: Mutex<Mail>,
    posted: Condvar,
}

impl Mailbox {
    /// Never waits, and loses nothing.
    pub fn post(&self, event: Event) {
        let mut mail = lock(&self.0.mail);
        match event {
            Event::Look => mail.look = true,
            Event::Reload => mail.reload = true,
            Event::Stop => mail.stop = true,
        }
        self.0.posted.notify_all();
    }

    /// Empties the mailbox: as soon as there is something, but not before
    /// `earliest`, or at `latest`. A stop waits for nothing.
    pub fn wait(&self, earliest: Instant, latest: Instant) -> Mail {
        let mut mail = lock(&self.0.mail);
        loop {
            let due = if *mail == Mail::default() { latest } else { earliest };
            let left = due.saturating_duration_since(Instant::now());
            if mail.stop || left.is_zero() {
                return std::mem::take(&mut mail);
            }
            let waited = self.0.posted.wait_timeout(mail, left);
            mail = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn nothing_is_lost_and_nothing_grows() {
        let mailbox = Mailbox::default();
        let now = Instant::now();
        for _ in 0..1000 {
            mailbox.post(Event::Look);
        }
        assert_eq!(mailbox.wait(now, now + HOUR), Mail { look: true, ..Mail::default() });
        assert_eq!(mailbox.wait(now, now), Mail::default());
        for event in [Event::Look, Event::Reload, Event::Stop, Event::Look] {
            mailbox.post(event);
        }
        assert_eq!(mailbox.wait(now, now), Mail { look: true, reload: true, stop: true });
    }

    #[test]
    fn looks_keep_their_distance_and_a_stop_does_not() {
        let mailbox = Mailbox::default();
        let earliest = Instant::now() + Duration::from_millis(30);
        mailbox.post(Event::Look);
        assert!(mailbox.wait(earliest, earliest + HOUR).look);
        assert!(Instant::now() >= earliest);
        let later = Instant::now() + HOUR;
        mailbox.post(Event::Look);
        mailbox.post(Event::Stop);
        assert!(mailbox.wait(later, later).stop);
    }

    #[test]
    fn who_posts_wakes_who_waits() {
        let mailbox = Mailbox::default();
        let now = Instant::now();
        let waiting = thread::spawn({
            let mailbox = mailbox.clone();
            move || mailbox.wait(now, now + HOUR)
        });
        mailbox.post(Event::Reload);
        assert!(waiting.join().unwrap().reload);
    }
}
