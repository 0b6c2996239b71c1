// SPDX-License-Identifier: MIT OR Apache-2.0
//! The one case in which a domain must not start: its policy says `required`,
//! and is invalid or can not be served here.

use std::env;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use ept_virt_core::policy::{Config, DEFAULT_CONFIG, Host, refusal};
use ept_virt_core::topology::Tiers;

use crate::nudge;

/// Stands before the paths of the host's files, for tests.
const ROOT_VARIABLE: &str = "EPT_VIRT_ROOT";

/// The file that the kernel module makes.
const MODULE_FILE: &str = "/proc/kvm_ept_sample";

/// Why the domain with this XML must not start.
pub fn reason(xml: &str, socket: &Path, deadline: Instant) -> Option<String> {
    let root = PathBuf::from(env::var_os(ROOT_VARIABLE).unwrap_or_default());
    refusal(xml, &ThisHost { root, socket, deadline })
}

struct ThisHost<'a> {
    root: PathBuf,
    socket: &'a Path,
    deadline: Instant,
}

impl ThisHost<'_> {
    fn path(&self, path: &str) -> PathBuf {
        match self.root.as_os_str().is_empty() {
            true => path.into(),
            false => self.root.join(path.trim_start_matches('/')),
        }
    }
}

impl Host for ThisHost<'_> {
    fn config(&self) -> Result<Config, String> {
        Config::read(&self.path(DEFAULT_CONFIG)).map_err(|error| error.to_string())
    }

    fn tiers(&self) -> Result<Tiers, String> {
        Tiers::detect(&self.path("/sys")).map_err(|error| format!("the host's memory is not known: {error}"))
    }

    fn ready(&self) -> Result<(), String> {
        if !self.path(MODULE_FILE).exists() {
            return Err("the kernel module is not loaded: modprobe kvm_ept_sample".into());
        }
        match nudge::connect_until(self.socket, self.deadline) {
            Ok(_) => Ok(()),
            // There was no time left to ask, which is nobody's fault but this program's.
            Err(error) if error.kind() == io::ErrorKind::TimedOut => Ok(()),
            Err(error) => {
                let socket = self.socket.display();
                Err(format!(
                    "the ept-virt daemon does not answer at {socket} ({error}): systemctl start ept-virt"
                ))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use super::*;

    #[test]
    fn who_comes_too_late_to_ask_refuses_nothing() {
        let root = env::temp_dir().join(format!("ept-virt-veto-{}", std::process::id()));
        fs::create_dir_all(root.join("proc")).unwrap();
        fs::write(root.join("proc/kvm_ept_sample"), "").unwrap();
        let socket = root.join("no-such-socket");
        let ready = |deadline| ThisHost { root: root.clone(), socket: &socket, deadline }.ready();
        let now = Instant::now();
        assert_eq!(ready(now), Ok(()));
        let refused = ready(now + Duration::from_secs(60)).unwrap_err();
        assert!(refused.contains("does not answer"), "{refused}");
        fs::remove_dir_all(&root).unwrap();
    }
}
