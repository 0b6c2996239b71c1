// SPDX-License-Identifier: MIT OR Apache-2.0
//! What holds for every message that people see.

/// In letters.
const LONGEST: usize = 1000;

/// Checks that a message neither drives a terminal nor fills a log.
pub fn check(message: &str) {
    assert!(!message.is_empty());
    assert!(message.chars().count() <= LONGEST, "too long: {message:?}");
    assert!(!message.contains(char::is_control), "drives a terminal: {message:?}");
}
