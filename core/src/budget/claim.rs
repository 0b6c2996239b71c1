// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a domain claims, by its policy and by what is known of its memory.

use crate::memory::GuestMemory;
use crate::policy::Policy;
use crate::units::Bytes;

use super::Claim;

impl Claim {
    /// What a guest claims that uses so much, as far as that is known, and may have
    /// `ceiling` in DRAM, or all of its memory.
    pub fn of(
        policy: &Policy,
        memory: &GuestMemory,
        used: Option<Bytes>,
        ceiling: Option<Bytes>,
        movable: bool,
    ) -> Self {
        let held = Bytes::of_pages(memory.places().fast);
        Self {
            weight: policy.dram.weight,
            floor: policy.dram.min,
            ceiling: ceiling.unwrap_or(memory.bytes()),
            // Of whom too little is known yet, nothing is taken unless others are in need.
            demand: used.unwrap_or(held),
            held,
            movable,
        }
    }
}
