// SPDX-License-Identifier: MIT OR Apache-2.0
//! The host's DRAM, shared as the daemon does it, and never more than there is.

use crate::budget::{Claim, settle};
use crate::units::Bytes;

/// What a guest may have until the next round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Allowance {
    /// What it is granted.
    pub(super) granted: Bytes,
    /// What it can have, as there is no more room: what others give back is room for
    /// it only when they have.
    pub(super) reachable: Bytes,
}

/// What guests begin with that want so much, when all touch their memory at one pace:
/// the kernel knows no weights.
pub(super) fn begin(total: Bytes, wants: impl Iterator<Item = Bytes>) -> Vec<Bytes> {
    let claim = |want| Claim {
        weight: 1,
        floor: Bytes(0),
        ceiling: want,
        demand: want,
        held: Bytes(0),
        movable: true,
    };
    settle(total, &wants.map(claim).collect::<Vec<_>>()).grants.iter().map(|grant| grant.bytes).collect()
}

/// Shares `total`. As long as what is held fits, so does what is reachable.
pub(super) fn share(total: Bytes, claims: &[Claim]) -> Vec<Allowance> {
    let grants = settle(total, claims).grants;
    let more = |index: usize| grants[index].bytes.0.saturating_sub(claims[index].held.0);
    let held = claims.iter().fold(0u64, |sum, claim| sum.saturating_add(claim.held.0));
    let free = total.0.saturating_sub(held);
    // All grants together are no more than `total`.
    let asked: u64 = (0..claims.len()).map(more).sum();
    // For pages that come up.
    let rest = free.saturating_sub(asked) / (claims.len() as u64).max(1);
    let allowance = |(index, claim): (usize, &Claim)| {
        let room = match asked > free {
            // Each gets the same part of what it lacks; less than that, so it fits again.
            true => (u128::from(more(index)) * u128::from(free) / u128::from(asked)) as u64,
            false => more(index),
        };
        Allowance {
            granted: grants[index].bytes,
            reachable: Bytes(claim.held.0.saturating_add(room).saturating_add(rest)),
        }
    };
    claims.iter().enumerate().map(allowance).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn guests_begin_alike_whatever_their_weights() {
        let wants = [2, 30, 30].map(|mib| Bytes(mib * MIB));
        assert_eq!(begin(Bytes(22 * MIB), wants.into_iter()), [2, 10, 10].map(|mib| Bytes(mib * MIB)));
        assert_eq!(begin(Bytes(100 * MIB), wants.into_iter()), wants);
    }

    proptest! {
        #[test]
        fn no_more_is_reachable_than_there_is(
            guests in proptest::collection::vec((1u32..9, 0u64..99, 0u64..99, 0u64..99), 1..9), spare in 0u64..99,
        ) {
            let claim = |(weight, ceiling, demand, held): (u32, u64, u64, u64)| Claim {
                weight,
                floor: Bytes(0),
                ceiling: Bytes(ceiling * MIB),
                demand: Bytes(demand * MIB),
                held: Bytes(held * MIB),
                movable: true,
            };
            let claims: Vec<Claim> = guests.into_iter().map(claim).collect();
            let total = spare * MIB + claims.iter().map(|claim| claim.held.0).sum::<u64>();
            let shared = share(Bytes(total), &claims);
            let reachable: u64 = shared.iter().map(|allowance| allowance.reachable.0).sum();
            prop_assert!(reachable <= total, "{shared:?} of {total}");
            prop_assert!(shared.iter().zip(&claims).all(|(allowance, claim)| allowance.reachable >= claim.held));
        }
    }
}
