// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pages by temperature: finds thresholds without sorting.

/// Temperatures differ in their upper 14 bits.
const SHIFT: u32 = 2;
const BINS: usize = 1 << (16 - SHIFT);

/// Number of pages at each temperature.
#[derive(Clone, Debug)]
pub struct Histogram {
    pages: Box<[u64]>,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram { pages: vec![0; BINS].into() }
    }
}

impl Histogram {
    /// Counts `pages` pages of `temperature`.
    pub fn add(&mut self, temperature: u16, pages: u64) {
        self.pages[usize::from(temperature >> SHIFT)] += pages;
    }

    /// The lowest temperature such that `wanted` pages are as cold or colder,
    /// with the number of pages that are strictly colder; the highest
    /// temperature there is when there are fewer.
    pub fn coldest(&self, wanted: u64) -> (u16, u64) {
        Self::threshold(self.pages.iter().enumerate(), wanted)
    }

    /// The highest temperature such that `wanted` pages are as hot or hotter,
    /// with the number of pages that are strictly hotter; the lowest temperature
    /// there is when there are fewer.
    pub fn hottest(&self, wanted: u64) -> (u16, u64) {
        Self::threshold(self.pages.iter().enumerate().rev(), wanted)
    }

    fn threshold<'a>(bins: impl Iterator<Item = (usize, &'a u64)>, wanted: u64) -> (u16, u64) {
        let (mut last, mut before) = (0, 0);
        let mut seen = 0;
        for (bin, pages) in bins.filter(|(_, pages)| **pages > 0) {
            (last, before) = (bin, seen);
            seen += pages;
            if seen >= wanted {
                break;
            }
        }
        // A bin is less than 2^14.
        ((last << SHIFT) as u16, before)
    }
}
