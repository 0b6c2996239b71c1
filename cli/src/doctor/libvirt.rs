// SPDX-License-Identifier: MIT OR Apache-2.0
//! libvirt, and which nodes its running domains may use.

use ept_virt_core::domain::{Libvirt, RunningDomain, Versions, versions};
use ept_virt_core::topology::NodeSet;

use super::report::Check;
use super::root::Root;

/// The oldest libvirt that the project was tried with.
const OLDEST_TRIED: (u32, u32) = (9, 0);

/// A running domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guest {
    /// Its name.
    pub name: String,
    /// The nodes that its QEMU may use; none when that is not known.
    pub allowed: Option<NodeSet>,
}

/// What libvirt says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LibvirtSays {
    /// The connection URI.
    pub uri: String,
    /// Its versions, or why it can not be asked.
    pub versions: Result<Versions, String>,
    /// What runs; none when that is not known.
    pub guests: Option<Vec<Guest>>,
}

impl LibvirtSays {
    /// Asks it. That can take long: libvirt may hang.
    pub fn ask(uri: &str, root: &Root) -> Self {
        let versions = versions(uri).map_err(|error| error.to_string());
        let running = versions.as_ref().ok().and_then(|_| Libvirt::new(uri).running().ok());
        let guests = running.map(|running| running.iter().map(|domain| guest(root, domain)).collect());
        Self { uri: uri.to_owned(), versions, guests }
    }

    /// What stands for a libvirt that gave no answer in time.
    pub fn silent(uri: &str, seconds: u64) -> Self {
        let problem = format!("libvirt at {uri} does not answer within {seconds} s");
        Self { uri: uri.to_owned(), versions: Err(problem), guests: None }
    }

    /// Whether it answers, and is of a version that was tried.
    pub fn judge(&self) -> Check {
        const NAME: &str = "libvirt";
        let versions = match &self.versions {
            Ok(versions) => versions,
            Err(problem) => {
                return Check::fail(
                    NAME,
                    problem.clone(),
                    "systemctl start libvirtd (or virtqemud); or name another one with -c URI",
                );
            }
        };
        let text = format!("{} at {}", versions, self.uri);
        match versions.daemon.is_none_or(|daemon| (daemon.major, daemon.minor) >= OLDEST_TRIED) {
            true => Check::ok(NAME, text),
            false => Check::warn(
                NAME,
                format!("{text}; nothing older than {}.{} was tried", OLDEST_TRIED.0, OLDEST_TRIED.1),
                "upgrade libvirt, or try ept-virt on a guest that does not matter first",
            ),
        }
    }

    /// Whether guests may use the nodes that they would be moved to: what their
    /// cpuset forbids, move_pages refuses.
    pub fn judge_cpusets(&self, nodes: &NodeSet) -> Check {
        const NAME: &str = "cpusets";
        let Some(guests) = &self.guests else {
            return Check::warn(NAME, "not known without libvirt", "see libvirt above");
        };
        let forbidden = |guest: &Guest| {
            let missing = nodes.difference(guest.allowed.as_ref()?);
            (!missing.is_empty()).then(|| format!("{:?} (node {missing})", guest.name))
        };
        let kept: Vec<String> = guests.iter().filter_map(forbidden).collect();
        match (kept.as_slice(), guests.len()) {
            ([], 0) => Check::ok(NAME, "no domain runs"),
            ([], _) => Check::ok(NAME, "no running domain is kept from a node, as far as is known"),
            (kept, _) => Check::warn(
                NAME,
                format!("domains that may not use a node, and so not be moved there: {}", kept.join(", ")),
                "add the node to the nodeset of <numatune>, or take mode='strict' out of it, for the next start",
            ),
        }
    }
}

fn guest(root: &Root, domain: &RunningDomain) -> Guest {
    let allowed = || {
        let pid = domain.read_pid().ok()?;
        let status = root.text(format!("/proc/{pid}/status"))?;
        let list = status.lines().find_map(|line| line.strip_prefix("Mems_allowed_list:"))?;
        list.trim().parse().ok()
    };
    Guest { name: domain.name.clone(), allowed: allowed() }
}

#[cfg(test)]
mod tests {
    use ept_virt_core::domain::Version;

    use super::*;
    use crate::doctor::report::Verdict::{Fail, Ok as Good, Warn};

    fn says(daemon: Option<u32>, guests: &[(&str, Option<&str>)]) -> LibvirtSays {
        let guest = |(name, allowed): &(&str, Option<&str>)| Guest {
            name: (*name).to_owned(),
            allowed: allowed.map(|list| list.parse().unwrap()),
        };
        let versions = Versions {
            library: Version::from_number(11_003_000),
            daemon: daemon.map(Version::from_number),
            hypervisor: None,
        };
        LibvirtSays {
            uri: "qemu:///system".into(),
            versions: Ok(versions),
            guests: Some(guests.iter().map(guest).collect()),
        }
    }

    #[test]
    fn an_old_libvirt_is_told() {
        for (daemon, verdict) in
            [(Some(11_003_000), Good), (Some(9_000_000), Good), (Some(8_010_000), Warn), (None, Good)]
        {
            assert_eq!(says(daemon, &[]).judge().verdict, verdict);
        }
        let check = LibvirtSays::silent("qemu:///system", 5).judge();
        assert_eq!(check.verdict, Fail);
        assert!(check.text.contains("within 5 s"));
    }

    #[test]
    fn what_runs_is_not_known_without_libvirt() {
        let check = LibvirtSays::silent("qemu:///system", 5).judge_cpusets(&NodeSet::from_iter([0]));
        assert_eq!((check.verdict, check.text.as_str()), (Warn, "not known without libvirt"));
    }

    #[test]
    fn names_guests_and_the_nodes_they_may_not_use() {
        let nodes = NodeSet::from_iter([0, 1]);
        let judge = |guests: &[(&str, Option<&str>)]| says(None, guests).judge_cpusets(&nodes);
        assert_eq!(judge(&[]).verdict, Good);
        assert_eq!(judge(&[("a", Some("0-1")), ("b", None)]).verdict, Good);
        let check = judge(&[("a", Some("0-1")), ("web", Some("0")), ("db", Some("1"))]);
        assert_eq!(check.verdict, Warn);
        assert!(check.text.ends_with(": \"web\" (node 1), \"db\" (node 0)"), "{}", check.text);
    }
}
