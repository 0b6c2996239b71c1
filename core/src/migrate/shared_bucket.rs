// SPDX-License-Identifier: MIT OR Apache-2.0
//! One cap on bytes per second for many domains.

use std::collections::BTreeMap;
use std::time::Duration;

use super::TokenBucket;

/// Who does not come back this long after it was told to is passed over: a plan
/// that has become void must not keep the others from moving.
const PATIENCE: Duration = Duration::from_millis(20);

/// A [`TokenBucket`] for all domains, from which each that asks gets the same
/// number of bytes, however many it asks for at a time. Pure: the caller says
/// what time it is.
///
/// This is start-time fair queueing (Goyal, Vin, Cheng, SIGCOMM 1996): a request
/// is tagged with the bytes that its domain was granted before, no less than the
/// tag that was served last, and the smallest tag goes first.
#[derive(Clone, Debug)]
pub struct SharedBucket {
    bucket: TokenBucket,
    /// The tag that was served last.
    served: u64,
    /// Tags of the next requests of those that were served.
    next: BTreeMap<u64, u64>,
    waiting: BTreeMap<u64, Waiter>,
}

/// A request that was not granted yet.
#[derive(Clone, Copy, Debug)]
struct Waiter {
    tag: u64,
    bytes: u64,
    /// When it was told to ask again.
    due: Duration,
}

impl SharedBucket {
    /// A full bucket at time `now`. A rate of zero grants nothing, ever.
    pub fn new(bytes_per_second: u64, now: Duration) -> Self {
        let bucket = TokenBucket::new(bytes_per_second, now);
        Self { bucket, served: 0, next: BTreeMap::new(), waiting: BTreeMap::new() }
    }

    /// Changes the rate from `now` on.
    pub fn set_rate(&mut self, bytes_per_second: u64, now: Duration) {
        self.bucket.set_rate(bytes_per_second, now);
    }

    /// Bytes granted in a second.
    pub fn bytes_per_second(&self) -> u64 {
        self.bucket.bytes_per_second()
    }

    /// Largest request in bytes that keeps the cap to 5 % in any second; see
    /// [`TokenBucket`].
    pub fn burst_bytes(&self) -> u64 {
        self.bucket.burst_bytes()
    }

    /// Grants `bytes` to the domain `id`, or says how long it should wait before
    /// it asks again, with `None` when that does not help.
    pub fn take(&mut self, id: u64, bytes: u64, now: Duration) -> Result<(), Option<Duration>> {
        let tag = self.next.get(&id).map_or(self.served, |next| self.served.max(*next));
        let tag = self.waiting.get(&id).map_or(tag, |waiter| waiter.tag.max(self.served));
        let before = |(other, waiter): &(&u64, &Waiter)| {
            **other != id && (waiter.tag, **other) < (tag, id) && now <= waiter.due + PATIENCE
        };
        let ahead = self.waiting.iter().filter(before).fold(0u64, |sum, (_, w)| sum.saturating_add(w.bytes));
        let granted = match ahead {
            0 => self.bucket.take(bytes, now),
            _ => Err(self.bucket.wait_for(bytes, now)),
        };
        match granted {
            Ok(()) => self.serve(id, tag, bytes),
            Err(None) => return Err(None),
            Err(Some(wait)) => {
                let wait = wait + self.time_of(ahead);
                self.waiting.insert(id, Waiter { tag, bytes, due: now + wait });
                return Err(Some(wait));
            }
        }
        Ok(())
    }

    /// Takes `bytes` that the domain `id` has moved without being granted them, as
    /// [`TokenBucket::charge`]; they count as granted to it.
    pub fn charge(&mut self, id: u64, bytes: u64, now: Duration) {
        self.bucket.charge(bytes, now);
        let next = self.next.entry(id).or_insert(self.served);
        *next = (*next).max(self.served).saturating_add(bytes);
    }

    /// Forgets the domain `id`.
    pub fn leave(&mut self, id: u64) {
        self.waiting.remove(&id);
        self.next.remove(&id);
    }

    fn serve(&mut self, id: u64, tag: u64, bytes: u64) {
        self.waiting.remove(&id);
        self.served = tag;
        self.next.insert(id, tag.saturating_add(bytes));
        // The others begin where this one is anyway.
        self.next.retain(|_, next| *next > tag);
    }

    /// How long granting `bytes` takes.
    fn time_of(&self, bytes: u64) -> Duration {
        let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second().max(1));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);
    const BEGIN: Duration = Duration::from_secs(7);

    /// A domain that asks for as many bytes at a time, and comes back late.
    #[derive(Clone, Copy, Debug)]
    struct Domain {
        bytes: u64,
        late_us: u64,
        /// It has something to move in this part of the time, in seconds.
        active: (u64, u64),
    }

    /// All that was granted: when, to whom, how much.
    fn run(bucket: &mut SharedBucket, domains: &[Domain], end: Duration) -> Vec<(Duration, usize, u64)> {
        let mut asks: Vec<Duration> = domains.iter().map(|d| BEGIN + SECOND * d.active.0 as u32).collect();
        let mut granted = Vec::new();
        while let Some((index, now)) = asks.iter().copied().enumerate().min_by_key(|(_, at)| *at) {
            let domain = domains[index];
            if now >= BEGIN + end {
                return granted;
            }
            let late = Duration::from_micros(domain.late_us);
            asks[index] = now + late + Duration::from_micros(1);
            match bucket.take(index as u64, domain.bytes, now) {
                Ok(()) => granted.push((now, index, domain.bytes)),
                Err(wait) => asks[index] = now + wait.unwrap() + late,
            }
            if asks[index] >= BEGIN + SECOND * domain.active.1 as u32 {
                // It goes without a word, as a void plan does.
                asks[index] = BEGIN + end;
            }
        }
        granted
    }

    fn most_in_one_second(granted: &[(Duration, usize, u64)]) -> u64 {
        let sum_from = |first: usize| {
            let within = granted[first..].iter().take_while(|(at, ..)| *at < granted[first].0 + SECOND);
            within.map(|(.., bytes)| bytes).sum()
        };
        (0..granted.len()).map(sum_from).max().unwrap_or(0)
    }

    fn domains(burst: u64) -> impl Strategy<Value = Vec<Domain>> {
        let one =
            (burst / 10..=burst, 0u64..2000, 0u64..2, 1u64..4).prop_map(|(bytes, late_us, from, time)| {
                Domain { bytes: bytes.max(1), late_us, active: (from, from + time) }
            });
        proptest::collection::vec(one, 1..8)
    }

    #[test]
    fn who_moved_more_than_it_was_granted_comes_later() {
        let mut bucket = SharedBucket::new(1000, BEGIN);
        assert_eq!(bucket.take(1, 10, BEGIN), Ok(()));
        bucket.charge(1, 1040, BEGIN);
        assert_eq!(bucket.take(1, 10, BEGIN), Err(Some(Duration::from_millis(1010))));
        assert!(bucket.take(2, 10, BEGIN).is_err(), "the host's cap holds for all");
        let later = BEGIN + Duration::from_millis(1010);
        assert!(bucket.take(1, 10, later).is_err(), "the other has moved less");
        assert_eq!(bucket.take(2, 10, later), Ok(()));
    }

    proptest! {
        #[test]
        fn no_second_exceeds_the_cap_by_more_than_a_twentieth(
            (rate, domains) in (10_000u64..1 << 40).prop_flat_map(|r| (Just(r), domains(r / 20))),
        ) {
            let granted = run(&mut SharedBucket::new(rate, BEGIN), &domains, SECOND * 4);
            let most = most_in_one_second(&granted);
            prop_assert!(most <= rate + rate / 20, "{most} of {rate}");
        }

        /// Those that want all the time get the same, but for what one asks for
        /// at once, and nothing is left lying.
        #[test]
        fn it_is_shared_alike_and_used_up(
            (rate, domains) in (10_000u64..1 << 40).prop_flat_map(|r| (Just(r), domains(r / 20))),
        ) {
            // Who comes much later than its requests take can not use its part.
            let busy = |d: &Domain| Domain { late_us: d.late_us / 10, active: (0, 9), ..*d };
            let busy: Vec<Domain> = domains.iter().map(busy).collect();
            let granted = run(&mut SharedBucket::new(rate, BEGIN), &busy, SECOND * 4);
            let got = |domain: usize| -> u64 {
                granted.iter().filter(|(_, index, _)| *index == domain).map(|(.., bytes)| bytes).sum()
            };
            let all: Vec<u64> = (0..busy.len()).map(got).collect();
            let largest = busy.iter().map(|domain| domain.bytes).max().unwrap();
            let (least, most) = (all.iter().min().unwrap(), all.iter().max().unwrap());
            // While one is on its way, another can be served twice.
            prop_assert!(most - least <= 2 * largest + most / 20, "{all:?} by at most {largest}");
            let sum: u64 = all.iter().sum();
            prop_assert!(sum >= rate * 4 / 10 * 9, "{sum} of {}", rate * 4);
        }
    }

    #[test]
    fn who_does_not_come_back_is_passed_over() {
        let mut bucket = SharedBucket::new(20_000, BEGIN);
        assert_eq!(bucket.take(1, 1000, BEGIN), Ok(()));
        let wait = bucket.take(2, 1000, BEGIN).unwrap_err().unwrap();
        assert_eq!(wait, Duration::from_millis(50));
        assert_eq!(bucket.take(1, 1000, BEGIN), Err(Some(wait * 2)));
        // The second one has still its turn.
        assert!(bucket.take(1, 1000, BEGIN + wait).is_err());
        let late = BEGIN + wait + PATIENCE + Duration::from_millis(1);
        assert_eq!(bucket.clone().take(1, 1000, late), Ok(()));
        bucket.leave(2);
        assert_eq!(bucket.take(1, 1000, BEGIN + wait), Ok(()));
    }

    #[test]
    fn a_rate_of_zero_grants_nothing() {
        assert_eq!(SharedBucket::new(0, BEGIN).take(1, 1, BEGIN + SECOND), Err(None));
    }
}
