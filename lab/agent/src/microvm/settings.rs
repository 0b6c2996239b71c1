// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the host's kernel command line asks of the tests: `ept.NAME=VALUE`.

use std::time::Duration;

use anyhow::{Context, Result};

/// The number that `ept.NAME=` says, or none when it is not there.
pub fn number(name: &str) -> Result<Option<u64>> {
    let line = std::fs::read_to_string("/proc/cmdline").context("cannot read /proc/cmdline")?;
    find(&line, name)
        .map(|text| text.parse().with_context(|| format!("ept.{name}={text} is not a number")))
        .transpose()
}

fn find<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    line.split_whitespace().find_map(|word| word.strip_prefix("ept.")?.strip_prefix(name)?.strip_prefix('='))
}

/// `time`, on a host that `ept.slow=N` calls N times slower than usual, such as
/// one whose kernel checks itself, N times as long.
pub fn patience(time: Duration) -> Duration {
    let factor = number("slow").ok().flatten().unwrap_or(1).clamp(1, 100);
    time * factor as u32
}

#[cfg(test)]
mod tests {
    use super::find;

    #[test]
    fn finds_whole_names_only() {
        let line = "quiet ept.fuzz_steps=7 ept.fuzz=8 ept.slow= xept.slow=3";
        assert_eq!(find(line, "fuzz"), Some("8"));
        assert_eq!(find(line, "fuzz_steps"), Some("7"));
        assert_eq!(find(line, "slow"), Some(""));
        assert_eq!(find(line, "fuz"), None);
    }
}
