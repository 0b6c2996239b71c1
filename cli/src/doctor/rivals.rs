// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who else clears the accessed bits that we read: what they clear, we miss.

use super::processes::Processes;
use super::report::Check;
use super::root::Root;

/// Parts of the kernel's DAMON that run by a switch of their own.
const DAMON_MODULES: [&str; 3] = ["damon_stat", "damon_reclaim", "damon_lru_sort"];

/// What is known of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rivals {
    /// Those of [`DAMON_MODULES`] that are on.
    pub damon_modules: Vec<&'static str>,
    /// DAMON's threads, of these or of a tool such as damo.
    pub damon_threads: usize,
}

impl Rivals {
    /// Looks for them.
    pub fn read(root: &Root, processes: &Processes) -> Self {
        let is_on =
            |module: &&str| root.switch(format!("/sys/module/{module}/parameters/enabled")) == Some(true);
        Self {
            damon_modules: DAMON_MODULES.into_iter().filter(is_on).collect(),
            damon_threads: processes.damon_threads,
        }
    }

    /// Whether accesses are lost to somebody.
    pub fn judge(&self) -> Check {
        const NAME: &str = "DAMON";
        const LOST: &str = "it clears accessed bits of guests, so that some accesses are not seen";
        match (self.damon_modules.as_slice(), self.damon_threads) {
            ([], 0) => Check::ok(NAME, "does not run"),
            ([], threads) => Check::warn(
                NAME,
                format!("{threads} of its threads run, started by a tool: {LOST}"),
                "end the tool, as by `damo stop`; or `echo off > /sys/kernel/mm/damon/admin/kdamonds/0/state`",
            ),
            (modules, _) => {
                let mends = modules
                    .iter()
                    .map(|module| format!("`echo N > /sys/module/{module}/parameters/enabled`"));
                Check::warn(
                    NAME,
                    format!("{} is on: {LOST}", modules.join(" and ")),
                    format!(
                        "{}; for good with {}.enabled=N on the kernel's command line",
                        mends.collect::<Vec<_>>().join(", "),
                        modules.join(".enabled=N ")
                    ),
                )
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::report::Verdict::{Ok, Warn};

    #[test]
    fn names_who_clears_accessed_bits() {
        let rivals = |modules: &[&'static str], damon_threads| Rivals {
            damon_modules: modules.to_vec(),
            damon_threads,
        };
        for (rivals, verdict, mend) in [
            (rivals(&[], 0), Ok, ""),
            (rivals(&["damon_stat"], 1), Warn, "echo N > /sys/module/damon_stat/parameters/enabled"),
            (
                rivals(&["damon_stat", "damon_reclaim"], 2),
                Warn,
                "damon_stat.enabled=N damon_reclaim.enabled=N",
            ),
            (rivals(&[], 2), Warn, "damo stop"),
        ] {
            let check = rivals.judge();
            assert_eq!(check.verdict, verdict);
            assert!(check.mend.unwrap_or_default().contains(mend));
        }
    }
}
