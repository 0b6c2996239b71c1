// SPDX-License-Identifier: MIT OR Apache-2.0
//! The coldest and the hottest of each 64 pages, many at a time: what lets a search
//! pass over most of a guest.

use crate::bitmap::WORD_BITS;

use super::{HeatMap, IDLE_COUNT, MAX_TEMPERATURE};

/// Blocks that are summarized at once.
const BLOCKS: usize = 64;

/// Of some neighbouring blocks of 64 pages, one for each word of a bitmap.
#[derive(Clone, Debug)]
pub(crate) struct Summaries {
    /// Number of the first block; none were summarized yet.
    first: Option<usize>,
    /// Lowest cell, its idle bits uppermost.
    lowest: [u16; BLOCKS],
    highest: [u16; BLOCKS],
}

impl Summaries {
    pub(crate) fn new() -> Self {
        Summaries { first: None, lowest: [0; BLOCKS], highest: [0; BLOCKS] }
    }

    /// The lowest temperature of the idle ones among the 64 pages of word `index` of a
    /// bitmap, those past the last page included. All calls are for the same map.
    pub(crate) fn coldest_idle(&mut self, heat: &HeatMap, index: usize) -> Option<u16> {
        self.load(heat, index);
        let temperature = self.lowest[index % BLOCKS].rotate_left(2);
        (temperature & IDLE_COUNT == 0).then_some(temperature)
    }

    /// The highest temperature among the 64 pages of word `index` of a bitmap.
    pub(crate) fn hottest(&mut self, heat: &HeatMap, index: usize) -> u16 {
        self.load(heat, index);
        self.highest[index % BLOCKS] & MAX_TEMPERATURE
    }

    fn load(&mut self, heat: &HeatMap, index: usize) {
        let first = index / BLOCKS * BLOCKS;
        if self.first == Some(first) {
            return;
        }
        self.first = Some(first);
        let cells = heat.cells.get(first * WORD_BITS..).unwrap_or_default();
        self.fill(&cells[..cells.len().min(BLOCKS * WORD_BITS)], MAX_TEMPERATURE | heat.idle_bits());
    }

    fn fill(&mut self, cells: &[u16], judged: u16) {
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has what the function is built for.
            return unsafe { self.fill_avx2(cells, judged) };
        }
        self.fill_all(cells, judged);
    }

    /// # Safety
    ///
    /// The processor must have AVX2.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    unsafe fn fill_avx2(&mut self, cells: &[u16], judged: u16) {
        self.fill_all(cells, judged);
    }

    #[inline(always)]
    fn fill_all(&mut self, cells: &[u16], judged: u16) {
        let blocks = cells.chunks_exact(WORD_BITS);
        for (block, (lowest, highest)) in blocks.zip(self.lowest.iter_mut().zip(&mut self.highest)) {
            // The count becomes the highest bits, so one minimum tells both.
            *lowest = block.iter().fold(u16::MAX, |low, cell| low.min((cell & judged).rotate_right(2)));
            *highest = block.iter().fold(0, |high, cell| high.max(*cell));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::heat::HeatParams;

    proptest! {
        #[test]
        fn blocks_are_as_their_pages(
            cells in proptest::collection::vec(any::<u16>(), 1..70 * WORD_BITS),
            delay_s in 0_u64..2, blocks in proptest::collection::vec(0_usize..70, 1..9),
        ) {
            let params = HeatParams { half_life: Duration::from_secs(9), delay: Duration::from_secs(delay_s) };
            let heat = HeatMap::from_cells(cells.len() / WORD_BITS * WORD_BITS, params, cells);
            let mut summaries = Summaries::new();
            for block in blocks {
                let pages = (block * WORD_BITS..(block + 1) * WORD_BITS).filter(|page| *page < heat.pages());
                let hottest = pages.clone().map(|page| heat.temperature(page)).max();
                let idle = pages.filter(|page| heat.is_idle(*page)).map(|page| heat.temperature(page));
                if let Some(hottest) = hottest {
                    prop_assert_eq!(summaries.hottest(&heat, block), hottest);
                    prop_assert_eq!(summaries.coldest_idle(&heat, block), idle.min());
                }
            }
        }
    }
}
