// SPDX-License-Identifier: MIT OR Apache-2.0
//! Pages by temperature: finds a threshold without sorting.

/// Temperatures differ in their upper 14 bits.
const SHIFT: u32 = 2;
const BINS: usize = 1 << (16 - SHIFT);

/// Number of pages at each temperature, or at each distance from the highest.
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
    /// Counts `pages` pages at `key`.
    pub fn add(&mut self, key: u16, pages: u64) {
        self.pages[usize::from(key >> SHIFT)] += pages;
    }

    /// Takes back an [`Histogram::add`].
    pub fn remove(&mut self, key: u16, pages: u64) {
        self.pages[usize::from(key >> SHIFT)] -= pages;
    }

    /// The lowest key such that `wanted` pages lie at it or below, with the
    /// number of pages below it; `None` when there are fewer pages.
    pub fn lowest(&self, wanted: u64) -> Option<(u16, u64)> {
        let mut below = 0;
        for (bin, pages) in self.pages.iter().enumerate() {
            if below + pages >= wanted {
                // A bin is less than 2^14.
                return Some(((bin << SHIFT) as u16, below));
            }
            below += pages;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_threshold_is_the_lowest_that_suffices() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.lowest(1), None);
        histogram.add(8, 10);
        histogram.add(400, 5);
        histogram.add(65532, 1);
        for (wanted, found) in [
            (1, Some((8, 0))),
            (10, Some((8, 0))),
            (11, Some((400, 10))),
            (16, Some((65532, 15))),
            (17, None),
        ] {
            assert_eq!(histogram.lowest(wanted), found, "{wanted}");
        }
        histogram.remove(8, 10);
        assert_eq!(histogram.lowest(1), Some((400, 0)));
    }
}
