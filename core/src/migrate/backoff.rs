// SPDX-License-Identifier: MIT OR Apache-2.0
//! Waiting longer each time that something fails.

use std::time::Duration;

/// When to try again. Pure: the caller says what time it is, on any clock that does
/// not go back.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    shortest: Duration,
    longest: Duration,
    /// The last wait; none after a success.
    wait: Duration,
    until: Duration,
}

impl Backoff {
    /// Waits for `shortest` after the first failure, and for twice as long after each
    /// that follows, up to `longest`.
    pub fn new(shortest: Duration, longest: Duration) -> Self {
        Self { shortest, longest, wait: Duration::ZERO, until: Duration::ZERO }
    }

    /// It failed. What fails while one waits already is the same failure.
    pub fn fail(&mut self, now: Duration) {
        if self.left(now).is_none() {
            self.wait = (self.wait * 2).clamp(self.shortest, self.longest);
            self.until = now + self.wait;
        }
    }

    /// It succeeded: the next failure is a first one.
    pub fn succeed(&mut self) {
        self.wait = Duration::ZERO;
    }

    /// How long to wait; `None` when it may be tried.
    pub fn left(&self, now: Duration) -> Option<Duration> {
        self.until.checked_sub(now).filter(|left| !left.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_a_bound_and_end_with_a_success() {
        let second = Duration::from_secs(1);
        let mut backoff = Backoff::new(second, second * 10);
        let mut now = second * 100;
        assert_eq!(backoff.left(now), None);
        for expected in [1, 2, 4, 8, 10, 10] {
            backoff.fail(now);
            backoff.fail(now);
            assert_eq!(backoff.left(now), Some(second * expected));
            now += second * expected;
            assert_eq!(backoff.left(now), None);
        }
        backoff.succeed();
        backoff.fail(now);
        assert_eq!(backoff.left(now), Some(second));
    }
}
