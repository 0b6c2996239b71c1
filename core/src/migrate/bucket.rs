// SPDX-License-Identifier: MIT OR Apache-2.0
//! A cap on bytes per second.

use std::time::Duration;

const NANOS_PER_SECOND: u128 = 1_000_000_000;

/// What may be saved up while nothing moves, as a part of one second's bytes.
/// It is also by how much any one second can exceed the cap.
const BURST_DIVISOR: u64 = 20;

/// A token bucket. Pure: the caller says what time it is, on any clock that
/// does not go back.
///
/// In any one second at most 105 % of the rate is granted, or one request more
/// than the rate when single requests are larger than 5 % of it.
#[derive(Clone, Debug)]
pub struct TokenBucket {
    bytes_per_second: u64,
    /// Tokens in byte-nanoseconds per second, so that nothing is ever rounded.
    /// Below zero after a request that was larger than the bucket, and after a charge.
    tokens: i128,
    updated: Duration,
}

impl TokenBucket {
    /// A full bucket at time `now`. A rate of zero grants nothing, ever.
    pub fn new(bytes_per_second: u64, now: Duration) -> Self {
        let mut bucket = Self { bytes_per_second, tokens: 0, updated: now };
        bucket.tokens = bucket.capacity();
        bucket
    }

    /// Changes the rate from `now` on. What was saved up above the new burst is lost.
    pub fn set_rate(&mut self, bytes_per_second: u64, now: Duration) {
        self.refill(now);
        self.bytes_per_second = bytes_per_second;
        self.tokens = self.tokens.min(self.capacity());
    }

    /// Grants `bytes`, or says how long to wait before asking again. `None`:
    /// waiting does not help, the rate is zero.
    pub fn take(&mut self, bytes: u64, now: Duration) -> Result<(), Option<Duration>> {
        match self.wait_for(bytes, now) {
            Some(Duration::ZERO) => {
                self.tokens -= i128::from(bytes) * NANOS_PER_SECOND as i128;
                Ok(())
            }
            wait => Err(wait),
        }
    }

    /// Takes `bytes` that have moved without being granted: they are a debt, and over time
    /// the rate holds.
    pub fn charge(&mut self, bytes: u64, now: Duration) {
        self.refill(now);
        self.tokens = self.tokens.saturating_sub(i128::from(bytes) * NANOS_PER_SECOND as i128);
    }

    /// How long until `bytes` would be granted: zero when at once, `None` when
    /// never. Takes nothing.
    pub fn wait_for(&mut self, bytes: u64, now: Duration) -> Option<Duration> {
        self.refill(now);
        if self.bytes_per_second == 0 {
            return None;
        }
        // A request larger than the bucket is granted when the bucket is full,
        // and leaves a debt: over time the rate holds.
        let needed = (i128::from(bytes) * NANOS_PER_SECOND as i128).min(self.capacity());
        if self.tokens >= needed {
            return Some(Duration::ZERO);
        }
        let missing = needed.abs_diff(self.tokens);
        let nanos = missing.div_ceil(u128::from(self.bytes_per_second));
        Some(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
    }

    /// Bytes granted in a second.
    pub fn bytes_per_second(&self) -> u64 {
        self.bytes_per_second
    }

    /// Largest request in bytes that is granted without a debt.
    pub fn burst_bytes(&self) -> u64 {
        self.bytes_per_second / BURST_DIVISOR
    }

    fn capacity(&self) -> i128 {
        i128::from(self.burst_bytes()) * NANOS_PER_SECOND as i128
    }

    fn refill(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.updated);
        self.updated = self.updated.max(now);
        // At most 2^64 * 2^94: Duration's nanoseconds fill less than 94 bits.
        let gained = elapsed.as_nanos().saturating_mul(u128::from(self.bytes_per_second));
        let gained = i128::try_from(gained).unwrap_or(i128::MAX);
        self.tokens = self.tokens.saturating_add(gained).min(self.capacity());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Asks as often as the bucket lets it, and sometimes idles; returns when
    /// how much was granted.
    fn run(rate: u64, requests: &[(u64, u64)]) -> Vec<(Duration, u64)> {
        let mut now = Duration::from_secs(7);
        let mut bucket = TokenBucket::new(rate, now);
        let mut granted = Vec::new();
        for &(bytes, idle_us) in requests {
            now += Duration::from_micros(idle_us);
            if let Err(wait) = bucket.take(bytes, now) {
                now += wait.unwrap();
                bucket.take(bytes, now).unwrap();
            }
            granted.push((now, bytes));
        }
        granted
    }

    fn most_in_one_second(granted: &[(Duration, u64)]) -> u64 {
        (0..granted.len())
            .map(|first| {
                let start = granted[first].0;
                granted[first..]
                    .iter()
                    .take_while(|(at, _)| *at < start + SECOND)
                    .map(|(_, bytes)| bytes)
                    .sum()
            })
            .max()
            .unwrap_or(0)
    }

    #[test]
    fn what_moved_unasked_is_paid_for_before_more_is_granted() {
        let mut bucket = TokenBucket::new(1000, SECOND);
        bucket.charge(2050, SECOND);
        assert_eq!(bucket.take(10, SECOND), Err(Some(Duration::from_millis(2010))));
        assert_eq!(bucket.take(10, SECOND + Duration::from_millis(2010)), Ok(()));
    }

    proptest! {
        #[test]
        fn no_second_exceeds_the_cap_by_more_than_a_twentieth(
            rate in 1_000u64..1_000_000_000_000,
            shares in proptest::collection::vec((0u64..=1000, 0u64..300_000), 1..300),
        ) {
            let burst = rate / BURST_DIVISOR;
            let requests: Vec<_> = shares
                .iter()
                .map(|&(share, idle)| (burst * share / 1000, idle))
                .collect();
            let most = most_in_one_second(&run(rate, &requests));
            prop_assert!(most <= rate + burst, "{most} of {rate}");
        }

        #[test]
        fn large_requests_exceed_the_cap_by_at_most_one_of_them(
            rate in 1_000u64..1_000_000_000,
            bytes in 1u64..100_000_000,
            idles in proptest::collection::vec(0u64..300_000, 1..100),
        ) {
            let requests: Vec<_> = idles.iter().map(|&idle| (bytes, idle)).collect();
            let most = most_in_one_second(&run(rate, &requests));
            prop_assert!(most <= rate + bytes.max(rate / BURST_DIVISOR));
        }

        #[test]
        fn a_steady_caller_gets_the_whole_rate(
            rate in 10_000u64..1_000_000_000_000,
            divisor in 20u64..200,
        ) {
            let bytes = rate / divisor;
            let granted = run(rate, &vec![(bytes, 0); divisor as usize * 10]);
            let took = granted.last().unwrap().0 - granted[0].0;
            // Ten seconds' worth, less what rounding the request down left out.
            prop_assert!(took <= SECOND * 10, "{took:?}");
            prop_assert!(took >= SECOND * 9, "{took:?}");
        }
    }

    #[test]
    fn a_rate_of_zero_grants_nothing() {
        let mut bucket = TokenBucket::new(0, Duration::ZERO);
        assert_eq!(bucket.take(1, SECOND * 1000), Err(None));
    }

    #[test]
    fn a_clock_that_stands_or_goes_back_grants_nothing_extra() {
        let mut bucket = TokenBucket::new(2000, SECOND);
        assert_eq!(bucket.take(100, SECOND), Ok(()));
        assert!(bucket.take(100, SECOND).is_err());
        assert!(bucket.take(100, Duration::ZERO).is_err());
        assert_eq!(bucket.take(100, SECOND + SECOND / 20), Ok(()));
    }

    #[test]
    fn a_new_rate_holds_at_once() {
        let mut bucket = TokenBucket::new(1 << 30, Duration::ZERO);
        bucket.set_rate(2000, Duration::ZERO);
        assert_eq!(bucket.take(100, Duration::ZERO), Ok(()));
        assert_eq!(bucket.take(100, Duration::ZERO), Err(Some(Duration::from_millis(50))));
    }
}
