// SPDX-License-Identifier: MIT OR Apache-2.0
//! A set of pages that takes little memory where it is uniform.

use std::ops::Range;

use super::{WORD_BITS, masks, words_for};

/// Words in a chunk: 4096 pages, 16 MiB of guest memory.
const CHUNK_WORDS: usize = 64;

type Words = [u64; CHUNK_WORDS];

/// A bitmap in chunks, of which those that are all zeros or all ones take 16 bytes, and
/// others 512 more. Of most guests, most memory is all there, and in one place.
///
/// Bits past the last page are as they were set: callers mask what they write.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    chunks: Vec<Chunk>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Chunk {
    #[default]
    None,
    All,
    /// The words, and the number of ones among them, so that nobody has to look for it.
    Some(Box<Words>, u32),
}

impl Chunk {
    fn word(&self, index: usize) -> u64 {
        match self {
            Chunk::None => 0,
            Chunk::All => !0,
            Chunk::Some(words, _) => words[index],
        }
    }

    fn to_words(&self) -> Words {
        match self {
            Chunk::None => [0; CHUNK_WORDS],
            Chunk::All => [!0; CHUNK_WORDS],
            Chunk::Some(words, _) => **words,
        }
    }

    /// Takes other words, in the memory that it has, if it has any.
    fn set(&mut self, words: &Words) {
        if words.iter().all(|word| *word == 0) {
            *self = Chunk::None;
        } else if words.iter().all(|word| *word == !0) {
            *self = Chunk::All;
        } else if let Chunk::Some(own, ones) = self {
            // Mostly nothing has changed, and comparing costs less than counting.
            if **own != *words {
                (**own, *ones) = (*words, count_ones(words));
            }
        } else {
            *self = Chunk::Some(Box::new(*words), count_ones(words));
        }
    }
}

fn count_ones(words: &Words) -> u32 {
    words.iter().map(|word| word.count_ones()).sum()
}

impl PageSet {
    /// An empty set of some of `pages` pages.
    pub fn new(pages: usize) -> Self {
        PageSet { chunks: vec![Chunk::None; words_for(pages).div_ceil(CHUNK_WORDS)] }
    }

    /// The word that holds bits `64 * index..`; words past the end are zero.
    pub fn word(&self, index: usize) -> u64 {
        self.chunks.get(index / CHUNK_WORDS).map_or(0, |chunk| chunk.word(index % CHUNK_WORDS))
    }

    /// Whether `page` is in the set.
    pub fn contains(&self, page: usize) -> bool {
        self.word(page / WORD_BITS) >> (page % WORD_BITS) & 1 == 1
    }

    /// Number of pages.
    pub fn count(&self) -> u64 {
        let count = |chunk: &Chunk| match chunk {
            Chunk::None => 0,
            Chunk::All => (CHUNK_WORDS * WORD_BITS) as u64,
            Chunk::Some(_, ones) => u64::from(*ones),
        };
        self.chunks.iter().map(count).sum()
    }

    /// Puts the words of a range through `change`, which gets the index of each and what
    /// it is. What the range has past the end is left out.
    pub fn update(&mut self, words: Range<usize>, mut change: impl FnMut(usize, u64) -> u64) {
        let last = words.end.div_ceil(CHUNK_WORDS).min(self.chunks.len());
        for number in words.start / CHUNK_WORDS..last {
            let base = number * CHUNK_WORDS;
            let mut changed = self.chunks[number].to_words();
            for index in words.start.max(base)..words.end.min(base + CHUNK_WORDS) {
                changed[index - base] = change(index, changed[index - base]);
            }
            self.chunks[number].set(&changed);
        }
    }

    /// Puts `pages` in, or takes them out; the part past the end is left out.
    pub fn fill(&mut self, pages: Range<usize>, value: bool) {
        const PAGES: usize = CHUNK_WORDS * WORD_BITS;
        let last = pages.end.div_ceil(PAGES).min(self.chunks.len());
        for number in pages.start / PAGES..last {
            let start = pages.start.saturating_sub(number * PAGES);
            let end = (pages.end - number * PAGES).min(PAGES);
            let chunk = &mut self.chunks[number];
            if (start, end) == (0, PAGES) {
                *chunk = if value { Chunk::All } else { Chunk::None };
            } else if start < end {
                let mut words = chunk.to_words();
                super::fill(&mut words, start..end, value);
                chunk.set(&words);
            }
        }
    }

    /// Whether any of `pages` is in the set.
    pub fn any(&self, pages: Range<usize>) -> bool {
        masks(pages).any(|(index, mask)| self.word(index) & mask != 0)
    }

    /// Whether all of `pages` are in the set.
    pub fn all(&self, pages: Range<usize>) -> bool {
        masks(pages).all(|(index, mask)| self.word(index) & mask == mask)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Three chunks, the last one of them in part.
    const PAGES: usize = 2 * 4096 + 1000;

    proptest! {
        #[test]
        fn it_is_as_a_plain_bitmap_is(
            fills in proptest::collection::vec((0..PAGES + 5000, 0..PAGES, any::<bool>()), 0..12),
            flip in any::<u64>(), asked in (0..PAGES, 0..PAGES),
        ) {
            let mut set = PageSet::new(PAGES);
            // A set has whole chunks.
            let mut plain = vec![0; 3 * CHUNK_WORDS];
            for (start, length, value) in fills {
                set.fill(start..start + length, value);
                super::super::fill(&mut plain, start..start + length, value);
            }
            if flip % 3 == 0 {
                set.update(7..words_for(PAGES), |index, word| word ^ flip.rotate_left(index as u32));
                for (index, word) in plain.iter_mut().enumerate().take(words_for(PAGES)).skip(7) {
                    *word ^= flip.rotate_left(index as u32);
                }
            }
            prop_assert_eq!(set.count(), super::super::count(&plain));
            prop_assert_eq!(set.count() == 0, plain.iter().all(|word| *word == 0));
            for (index, word) in plain.iter().enumerate() {
                prop_assert_eq!(set.word(index), *word);
            }
            let range = asked.0.min(asked.1)..asked.0.max(asked.1);
            prop_assert_eq!(set.any(range.clone()), super::super::any(&plain, range.clone()));
            prop_assert_eq!(set.all(range.clone()), super::super::all(&plain, range.clone()));
            prop_assert_eq!(set.contains(asked.0), super::super::get(&plain, asked.0));
            set.fill(0..3 * 4096, false);
            prop_assert!(set.count() == 0 && set.word(0) == 0);
        }
    }

    #[test]
    fn a_uniform_set_takes_no_memory() {
        let mut set = PageSet::new(PAGES);
        set.fill(0..3 * 4096, true);
        assert!(set.chunks.iter().all(|chunk| *chunk == Chunk::All));
        set.fill(5000..5001, false);
        assert!(matches!(set.chunks[1], Chunk::Some(..)));
        set.update(64..words_for(PAGES), |_, _| !0);
        assert_eq!(set.chunks[1], Chunk::All);
    }
}
