// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sets of NUMA nodes.

use std::fmt;
use std::str::FromStr;

/// Nodes that a set can hold, from 0 on (MAX_NUMNODES of x86-64 distribution kernels).
pub const MAX_NODES: u32 = 1024;

const WORDS: usize = MAX_NODES as usize / 64;

/// A set of NUMA nodes, written as the kernel and libvirt do: `0,2-3`.
#[derive(Clone, Default, PartialEq, Eq, Hash)]
pub struct NodeSet {
    words: [u64; WORDS],
}

/// Why a set of nodes could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("\"{text}\" is not a list of NUMA nodes from 0 to {last}, as 0,2-3", last = MAX_NODES - 1)]
pub struct NodeSetError {
    text: String,
}

impl NodeSet {
    /// The set as a bitmap of [`MAX_NODES`] bits: bit `n % 64` of word `n / 64`
    /// stands for node `n`.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Whether `node` is in the set.
    pub fn contains(&self, node: u32) -> bool {
        crate::bitmap::get(&self.words, node as usize)
    }

    /// Whether the set has no node.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Number of nodes.
    pub fn len(&self) -> usize {
        crate::bitmap::count(&self.words) as usize
    }

    /// The nodes, lowest first.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        (0..MAX_NODES).filter(|node| self.contains(*node))
    }

    /// The nodes of either set.
    pub fn union(&self, other: &NodeSet) -> NodeSet {
        self.zip(other, |a, b| a | b)
    }

    /// The nodes of both sets.
    pub fn intersection(&self, other: &NodeSet) -> NodeSet {
        self.zip(other, |a, b| a & b)
    }

    /// The nodes of this set that are not in `other`.
    pub fn difference(&self, other: &NodeSet) -> NodeSet {
        self.zip(other, |a, b| a & !b)
    }

    fn zip(&self, other: &NodeSet, join: impl Fn(u64, u64) -> u64) -> NodeSet {
        NodeSet { words: std::array::from_fn(|index| join(self.words[index], other.words[index])) }
    }
}

/// Nodes from [`MAX_NODES`] on are left out: the kernel has none.
impl FromIterator<u32> for NodeSet {
    fn from_iter<I: IntoIterator<Item = u32>>(nodes: I) -> Self {
        let mut set = NodeSet::default();
        for node in nodes {
            let node = node as usize;
            crate::bitmap::fill(&mut set.words, node..node + 1, true);
        }
        set
    }
}

impl FromStr for NodeSet {
    type Err = NodeSetError;

    /// An empty text is the empty set, as in sysfs.
    fn from_str(text: &str) -> Result<Self, NodeSetError> {
        let bad = || NodeSetError { text: crate::text::word(text) };
        let number = |text: &str| {
            let node: u32 = crate::units::digits(text.trim()).ok_or_else(bad)?;
            if node < MAX_NODES { Ok(node) } else { Err(bad()) }
        };
        let mut set = NodeSet::default();
        if text.trim().is_empty() {
            return Ok(set);
        }
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last) = (number(first)?, number(last)?);
            if first > last {
                return Err(bad());
            }
            crate::bitmap::fill(&mut set.words, first as usize..last as usize + 1, true);
        }
        Ok(set)
    }
}

impl fmt::Display for NodeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = String::new();
        let mut nodes = self.iter().peekable();
        while let Some(first) = nodes.next() {
            let mut last = first;
            while nodes.next_if(|next| *next == last + 1).is_some() {
                last += 1;
            }
            let comma = if text.is_empty() { "" } else { "," };
            text += &match last - first {
                0 => format!("{comma}{first}"),
                _ => format!("{comma}{first}-{last}"),
            };
        }
        f.pad(&text)
    }
}

impl fmt::Debug for NodeSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeSet({self})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_what_the_kernel_writes() {
        for (text, nodes) in
            [("", vec![]), ("0", vec![0]), ("0,2-4\n", vec![0, 2, 3, 4]), ("1023", vec![1023])]
        {
            let set: NodeSet = text.parse().unwrap();
            assert_eq!(set.iter().collect::<Vec<_>>(), nodes);
            assert_eq!(set.to_string(), text.trim());
        }
    }

    #[test]
    fn refuses_what_is_no_set() {
        for text in ["a", "-1", "0,", "3-1", "1024", "0-", "0--2", "0;1", "+1"] {
            assert!(text.parse::<NodeSet>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn text_and_set_are_the_same_thing(nodes in proptest::collection::btree_set(0..MAX_NODES, 0..40)) {
            let set = NodeSet::from_iter(nodes.iter().copied());
            prop_assert_eq!(set.len(), nodes.len());
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), nodes.into_iter().collect::<Vec<_>>());
            prop_assert_eq!(set.to_string().parse::<NodeSet>().unwrap(), set);
        }
    }
}
