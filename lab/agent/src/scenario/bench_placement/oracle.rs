// SPDX-License-Identifier: MIT OR Apache-2.0
//! What could be had: the best pages to keep in DRAM, by the guest's own counts.
//! Pure.

use std::cmp::Reverse;
use std::collections::BTreeMap;

/// Which pages of the block are placed together.
pub struct Units {
    /// The unit of each page of the block.
    of_page: Vec<u32>,
    count: usize,
}

impl Units {
    /// From the block's guest frames and the pages of a unit.
    pub fn new(frames: &[u64], unit_pages: u64) -> Self {
        let mut numbers = BTreeMap::new();
        let of_page = frames
            .iter()
            .map(|gfn| {
                let next = numbers.len() as u32;
                *numbers.entry(gfn / unit_pages).or_insert(next)
            })
            .collect();
        Self { of_page, count: numbers.len() }
    }

    /// The best `room` units by these counts of pages: whether each unit is one.
    pub fn best(&self, counts: &[u32], room: usize) -> Vec<bool> {
        let mut sums = vec![0_u64; self.count];
        for (unit, count) in self.of_page.iter().zip(counts) {
            sums[*unit as usize] += u64::from(*count);
        }
        let mut order: Vec<u32> = (0..self.count as u32).collect();
        let room = room.min(self.count);
        if room > 0 && room < self.count {
            // Which of equal ones is the same in each period.
            order.select_nth_unstable_by_key(room - 1, |unit| (Reverse(sums[*unit as usize]), *unit));
        }
        let mut best = vec![false; self.count];
        order.iter().take(room).for_each(|unit| best[*unit as usize] = true);
        best
    }

    /// Accesses, of these counts, to the units of a set.
    pub fn served(&self, counts: &[u32], set: &[bool]) -> f64 {
        let inside = self.of_page.iter().zip(counts).filter(|(unit, _)| set[**unit as usize]);
        inside.map(|(_, count)| f64::from(*count)).sum()
    }

    /// Units of `to` that are not of `from`.
    pub fn entered(from: &[bool], to: &[bool]) -> u64 {
        from.iter().zip(to).filter(|(from, to)| **to && !**from).count() as u64
    }

    /// Units whose pages lie for the most part where `there` says.
    pub fn mostly(&self, there: &[bool]) -> Vec<bool> {
        let mut balance = vec![0_i64; self.count];
        for (unit, there) in self.of_page.iter().zip(there) {
            balance[*unit as usize] += if *there { 1 } else { -1 };
        }
        balance.into_iter().map(|balance| balance > 0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_pages_are_those_with_most_accesses() {
        let units = Units::new(&[10, 11, 12, 13], 1);
        assert_eq!(units.best(&[5, 9, 0, 7], 2), [false, true, false, true]);
        assert_eq!(units.best(&[5, 5, 5, 5], 2), [true, true, false, false]);
        assert_eq!(units.best(&[5, 9, 0, 7], 0), [false; 4]);
        assert_eq!(units.best(&[5, 9, 0, 7], 9), [true; 4]);
        assert_eq!(units.served(&[5, 9, 0, 7], &[false, true, false, true]), 16.0);
    }

    #[test]
    fn pages_of_a_huge_page_are_one() {
        // Two pages of one unit, and three of another that is not beside it.
        let units = Units::new(&[512, 513, 2048, 2049, 2050], 512);
        assert_eq!(units.best(&[4, 4, 3, 3, 3], 1), [false, true]);
        assert_eq!(units.served(&[4, 4, 3, 3, 3], &[false, true]), 9.0);
        assert_eq!(units.mostly(&[true, false, true, true, false]), [false, true]);
    }

    #[test]
    fn what_enters_is_counted_once() {
        assert_eq!(Units::entered(&[true, false, false], &[false, true, true]), 2);
    }
}
