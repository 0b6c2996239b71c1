// SPDX-License-Identifier: MIT OR Apache-2.0
//! How much memory a guest uses, for those who share DRAM among guests.

use std::time::Duration;

use crate::units::Bytes;

/// Half-lives of temperature in which a surplus of the estimate falls to a part
/// of 1/e or a little more. Temperature itself forgets in some half-lives; this
/// is for guests whose work comes back.
const FALL_HALF_LIVES: u32 = 2;

/// An estimate of a guest's working set. It rises at once and falls slowly: too
/// little DRAM costs the guest time, too much costs others what they can get back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    bytes: u64,
    observed: Duration,
}

impl WorkingSet {
    /// Takes in what looks used after a round that took `elapsed`: the pages that
    /// are not cold, of a heat map with this half-life.
    pub fn observe(&mut self, used: Bytes, elapsed: Duration, half_life: Duration) {
        self.observed = self.observed.saturating_add(elapsed);
        let surplus = u128::from(self.bytes.saturating_sub(used.0));
        let (fall, elapsed) = (half_life.saturating_mul(FALL_HALF_LIVES).as_nanos(), elapsed.as_nanos());
        // In many short rounds this falls as in few long ones, but for the part
        // that the exponential is steeper.
        let kept = surplus.checked_mul(fall).map_or(surplus, |product| product / (fall + elapsed).max(1));
        // At most the surplus, so it fits again.
        self.bytes = used.0.saturating_add(kept as u64);
    }

    /// Goes on with heat from before: it tells as much as if it had been
    /// observed here.
    pub fn recall(&mut self, half_life: Duration) {
        self.observed = self.observed.max(half_life);
    }

    /// The estimate; `None` until the guest was observed for a half-life.
    pub fn bytes(&self, half_life: Duration) -> Option<Bytes> {
        (self.observed >= half_life).then_some(Bytes(self.bytes))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const HALF_LIFE: Duration = Duration::from_secs(30);
    const ROUND: Duration = Duration::from_secs(1);

    fn after(used: &[u64], round: Duration) -> u64 {
        let mut set = WorkingSet::default();
        used.iter().for_each(|used| set.observe(Bytes(*used), round, HALF_LIFE));
        set.bytes
    }

    #[test]
    fn it_is_not_known_before_a_half_life_has_passed() {
        let mut set = WorkingSet::default();
        set.observe(Bytes(5), HALF_LIFE - ROUND, HALF_LIFE);
        assert_eq!(set.bytes(HALF_LIFE), None);
        set.observe(Bytes(5), ROUND, HALF_LIFE);
        assert_eq!(set.bytes(HALF_LIFE), Some(Bytes(5)));
        let mut recalled = WorkingSet::default();
        recalled.recall(HALF_LIFE);
        assert!(recalled.bytes(HALF_LIFE).is_some());
    }

    #[test]
    fn it_rises_at_once_and_falls_slowly() {
        assert_eq!(after(&[100, 900], ROUND), 900);
        let falling = after(&[vec![1_000_000], vec![0; 60]].concat(), ROUND);
        assert!((367_879..=372_000).contains(&falling), "{falling} after two half-lives, 1/e is 367879");
        assert_eq!(after(&[vec![1_000_000], vec![0; 2000]].concat(), ROUND), 0);
        // Two long rounds for sixty short ones.
        let coarse = after(&[1_000_000, 0, 0], HALF_LIFE);
        assert!((falling..=450_000).contains(&coarse), "{coarse}");
    }

    proptest! {
        #[test]
        fn it_lies_between_what_is_used_now_and_what_was_used_at_most(
            used in proptest::collection::vec(any::<u64>(), 1..50),
            round_ms in 0u64..100_000_000,
        ) {
            let found = after(&used, Duration::from_millis(round_ms));
            prop_assert!(found >= *used.last().unwrap() && found <= *used.iter().max().unwrap());
        }

        #[test]
        fn constant_use_is_a_constant_estimate(used in any::<u64>(), rounds in 1usize..50) {
            prop_assert_eq!(after(&vec![used; rounds], ROUND), used);
        }
    }
}
