// SPDX-License-Identifier: MIT OR Apache-2.0
//! The host's configuration: a daemon does not start with one that it can not read.

use ept_virt_core::policy::{Config, ConfigError, DEFAULT_CONFIG};

use super::report::Check;
use super::root::Root;

/// The file, as a try to read it shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Configuration {
    /// It is valid.
    Valid,
    /// There is none.
    Missing,
    /// It can not be read.
    Unreadable(String),
    /// It says something wrong.
    Wrong(String),
}

impl Configuration {
    /// Reads it.
    pub fn read(root: &Root) -> Self {
        match Config::read(&root.join(DEFAULT_CONFIG)) {
            Ok(_) if root.exists(DEFAULT_CONFIG) => Configuration::Valid,
            Ok(_) => Configuration::Missing,
            Err(ConfigError::Read { cause, .. }) => Configuration::Unreadable(cause.to_string()),
            Err(ConfigError::Bad { problem, .. }) => Configuration::Wrong(problem),
        }
    }

    /// Whether the daemon will start with it.
    pub fn judge(&self) -> Check {
        const NAME: &str = "configuration";
        match self {
            Configuration::Valid => Check::ok(NAME, format!("{DEFAULT_CONFIG} is valid")),
            Configuration::Missing => Check::ok(NAME, format!("there is no {DEFAULT_CONFIG}, nor need be")),
            Configuration::Unreadable(cause) => {
                Check::warn(NAME, format!("{DEFAULT_CONFIG} can not be read: {cause}"), "run this as root")
            }
            Configuration::Wrong(problem) => Check::fail(
                NAME,
                format!(
                    "{DEFAULT_CONFIG}: {problem}; the daemon goes on with what it read before, and none starts with this"
                ),
                format!(
                    "mend it until `ept-virt policy validate {DEFAULT_CONFIG}` accepts it; `systemctl reload ept-virt`"
                ),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::doctor::report::Verdict::{Fail, Ok, Warn};
    use crate::scratch::Scratch;

    #[test]
    fn says_whether_a_daemon_would_start() {
        let dir = Scratch::new();
        let root = Root::new(&*dir);
        let path = root.join(DEFAULT_CONFIG);
        let judge = || Configuration::read(&root).judge();
        assert_eq!(judge().verdict, Ok);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        for (text, verdict, words) in [
            ("[host]\ncpu = \"1%\"\n", Ok, "is valid"),
            ("[hots]\n", Fail, "\"hots\""),
            ("group = ", Fail, "line 1"),
        ] {
            fs::write(&path, text).unwrap();
            let check = judge();
            assert_eq!(check.verdict, verdict, "{check:?}");
            assert!(check.text.contains(words), "{check:?}");
        }
        fs::remove_file(&path).unwrap();
        // A folder is there, and not to be read as a file, for root as well.
        fs::create_dir(&path).unwrap();
        assert_eq!(judge().verdict, Warn);
    }
}
