// SPDX-License-Identifier: MIT OR Apache-2.0
//! What strangers wrote, in messages: it neither drives a terminal nor fills a
//! log.

/// `text` with `instead` in the place of each control character.
pub fn printable(text: &str, instead: char) -> String {
    text.chars().map(|char| if char.is_control() { instead } else { char }).collect()
}

/// `text` without control characters, cut after `most` letters.
pub fn shown(text: &str, most: usize) -> String {
    let end = text.char_indices().nth(most).map_or(text.len(), |(index, _)| index);
    let mut shown = printable(&text[..end], char::REPLACEMENT_CHARACTER);
    if end < text.len() {
        shown += "...";
    }
    shown
}

/// A word or a value as it stands in a message, in quotes or not.
pub(crate) fn word(text: &str) -> String {
    shown(text, 80)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_short_and_printable() {
        assert_eq!(shown("dram", 4), "dram");
        assert_eq!(shown("drams", 4), "dram...");
        assert_eq!(shown("a\n\u{1b}[31m\u{9b}é", 20), "a\u{fffd}\u{fffd}[31m\u{fffd}é");
        assert_eq!(shown("", 0), "");
    }
}
