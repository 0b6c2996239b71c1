// SPDX-License-Identifier: MIT OR Apache-2.0
//! Bitmaps of pages as the kernel module writes them: bit `i % 64` of word
//! `i / 64` stands for page `i`. Bits past the last page are zero.

mod page_set;

use std::ops::Range;

pub use page_set::PageSet;

/// Pages that one word stands for.
pub const WORD_BITS: usize = 64;

/// Words that hold `bits` bits.
pub const fn words_for(bits: usize) -> usize {
    bits.div_ceil(WORD_BITS)
}

/// Whether bit `index` is set; bits past the end are not.
pub fn get(words: &[u64], index: usize) -> bool {
    words.get(index / WORD_BITS).is_some_and(|word| word >> (index % WORD_BITS) & 1 == 1)
}

/// The word that holds bits `64 * index..`; words past the end are zero.
pub fn word(words: &[u64], index: usize) -> u64 {
    words.get(index).copied().unwrap_or(0)
}

/// Number of set bits.
pub fn count(words: &[u64]) -> u64 {
    words.iter().map(|word| u64::from(word.count_ones())).sum()
}

/// Sets or clears all bits of `range`; the part past the end is left out.
pub fn fill(words: &mut [u64], range: Range<usize>, value: bool) {
    for (index, mask) in masks(range) {
        let Some(word) = words.get_mut(index) else { return };
        *word = if value { *word | mask } else { *word & !mask };
    }
}

/// Whether any bit of `range` is set.
pub fn any(words: &[u64], range: Range<usize>) -> bool {
    masks(range).any(|(index, mask)| word(words, index) & mask != 0)
}

/// Whether all bits of `range` are set.
pub fn all(words: &[u64], range: Range<usize>) -> bool {
    masks(range).all(|(index, mask)| word(words, index) & mask == mask)
}

/// The set bits of one word, lowest first.
pub fn ones(mut word: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        if word == 0 {
            return None;
        }
        let bit = word.trailing_zeros() as usize;
        word &= word - 1;
        Some(bit)
    })
}

/// The bits of the last word of a bitmap of `bits` bits that stand for something.
pub fn tail_mask(bits: usize) -> u64 {
    match bits % WORD_BITS {
        0 => !0,
        rest => (1 << rest) - 1,
    }
}

/// The words that `range` touches, each with the mask of its bits in `range`.
pub fn masks(range: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
    let Range { start, end } = range;
    (start / WORD_BITS..words_for(end)).map(move |index| {
        let base = index * WORD_BITS;
        let low = start.saturating_sub(base);
        let high = (end - base).min(WORD_BITS);
        let mask = if low >= high { 0 } else { !0 << low & !0 >> (WORD_BITS - high) };
        (index, mask)
    })
}

#[cfg(test)]
mod tests {
    use super::{WORD_BITS, all, count, fill, get, ones};
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn range_operations_agree_with_single_bits(
            before in proptest::collection::vec(any::<u64>(), 0..5),
            start in 0usize..330, length in 0usize..330, value: bool,
        ) {
            let range = start..start + length;
            let bits = before.len() * WORD_BITS;
            let mut after = before.clone();
            fill(&mut after, range.clone(), value);
            for bit in 0..bits {
                let expected = if range.contains(&bit) { value } else { get(&before, bit) };
                prop_assert_eq!(get(&after, bit), expected);
            }
            prop_assert_eq!(super::any(&before, range.clone()), range.clone().any(|bit| get(&before, bit)));
            prop_assert_eq!(all(&before, range.clone()), range.clone().all(|bit| get(&before, bit)));
        }

        #[test]
        fn ones_are_the_set_bits(word: u64) {
            let expected: Vec<usize> = (0..64).filter(|bit| get(&[word], *bit)).collect();
            prop_assert_eq!(count(&[word]) as usize, expected.len());
            prop_assert_eq!(ones(word).collect::<Vec<_>>(), expected);
        }
    }
}
