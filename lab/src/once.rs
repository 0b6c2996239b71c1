// SPDX-License-Identifier: MIT OR Apache-2.0
//! What several threads want and one of them makes.

use std::sync::OnceLock;

use anyhow::{Result, anyhow};

/// A thing that is made when it is first asked for, once for all threads.
pub struct Once<T>(OnceLock<Result<T>>);

impl<T> Once<T> {
    /// Not made yet.
    pub fn new() -> Self {
        Self(OnceLock::new())
    }

    /// The thing, or why it could not be made.
    pub fn get(&self, make: impl FnOnce() -> Result<T>) -> Result<&T> {
        self.0.get_or_init(make).as_ref().map_err(|error| anyhow!("{error:#}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_told_to_all_and_not_tried_again() {
        let once: Once<u32> = Once::new();
        assert_eq!(once.get(|| Err(anyhow!("the reason"))).unwrap_err().to_string(), "the reason");
        assert_eq!(once.get(|| panic!("tried again")).unwrap_err().to_string(), "the reason");
    }
}
