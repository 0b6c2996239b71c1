// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the service manager is told: that the daemon is ready, reloads, stops,
//! and is alive. Without systemd nobody is told anything.
//!
//! # The watchdog
//!
//! A daemon that hangs is killed and started again, which costs its guests
//! nothing and the heat nothing either. So the pings come from a thread that looks
//! at the main thread, and takes the locks of what all domains share and of each
//! domain's status: where they hang, it hangs, as every answer to a client would. It
//! does not take those of a guest's memory, which one domain's worker holds.
//!
//! Two hangs are none of ours and are excused, since a new daemon would hang there
//! as well. A call of libvirt: meanwhile the workers go on, status tells that
//! libvirt does not answer, and to be killed would cost what they know. And a
//! single domain's worker, as in a QEMU that the kernel does not let go of: the
//! other domains must not pay for it.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use log::{debug, error};
use sd_notify::NotifyState;

use super::state::{Phase, Shared};

/// Pings in the time that the service manager waits for one.
const PINGS: u32 = 3;

/// Tells the service manager.
pub fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        debug!("the service manager can not be told: {error}");
    }
}

/// Starts the thread that pings, if the service manager waits for it.
pub fn watch(shared: Arc<Shared>) -> io::Result<()> {
    let Some(limit) = sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero()) else { return Ok(()) };
    thread::Builder::new().name("watchdog".into()).spawn(move || {
        loop {
            thread::sleep(limit / PINGS);
            let line = shared.summary();
            match shared.phase() {
                phase if is_well(phase, Instant::now(), limit) => {
                    tell(&[NotifyState::Watchdog, NotifyState::Status(&line)]);
                }
                _ => error!("the main thread does not get on; the service manager will end the daemon"),
            }
        }
    })?;
    Ok(())
}

/// Whether the main thread gets on, as far as that is in its hands.
fn is_well(phase: Phase, now: Instant, limit: Duration) -> bool {
    match phase {
        Phase::Waits | Phase::Asks(_) => true,
        Phase::Works(since) => now.saturating_duration_since(since) < limit,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_work_of_our_own_may_not_take_long() {
        let limit = Duration::from_secs(60);
        let since = Instant::now();
        let after = |seconds| since + Duration::from_secs(seconds);
        assert!(is_well(Phase::Works(since), after(59), limit));
        assert!(!is_well(Phase::Works(since), after(60), limit));
        assert!(is_well(Phase::Asks(since), after(3600), limit));
        assert!(is_well(Phase::Waits, after(3600), limit));
        let from_the_start = Shared::new("test:///default").phase();
        assert!(matches!(from_the_start, Phase::Works(_)), "{from_the_start:?}");
    }
}
