// SPDX-License-Identifier: MIT OR Apache-2.0
//! Versions of libvirt, and the names of its domains.

use std::fmt;

use virt::connect::Connect;
use virt::sys;

use super::{LibvirtError, call_error, open, silence};

/// A version, as libvirt numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number.
    pub release: u32,
}

impl Version {
    /// Takes libvirt's number apart: a million times the first, a thousand times
    /// the second, and the third (virConnectGetLibVersion).
    pub fn from_number(number: u32) -> Self {
        Self { major: number / 1_000_000, minor: number / 1000 % 1000, release: number % 1000 }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.release)
    }
}

/// Versions on both sides of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Versions {
    /// The library in this process.
    pub library: Version,
    /// The daemon, where it tells.
    pub daemon: Option<Version>,
    /// What it drives, as "QEMU", where it tells.
    pub hypervisor: Option<(String, Version)>,
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "libvirt {}", self.daemon.unwrap_or(self.library))?;
        if self.daemon.is_some_and(|daemon| daemon != self.library) {
            write!(f, " (library {})", self.library)?;
        }
        match &self.hypervisor {
            Some((kind, version)) => write!(f, " with {kind} {version}"),
            None => Ok(()),
        }
    }
}

/// Asks the libvirt at `uri` for versions.
pub fn versions(uri: &str) -> Result<Versions, LibvirtError> {
    silence();
    let connection = open(uri, true)?;
    let library = Connect::version().map_err(|error| call_error(uri, "tell its version", &error))?;
    let hypervisor = connection.driver_type().ok().zip(connection.hyp_version().ok());
    Ok(Versions {
        library: Version::from_number(library),
        daemon: connection.lib_version().ok().map(Version::from_number),
        hypervisor: hypervisor.map(|(kind, number)| (kind, Version::from_number(number))),
    })
}

/// The names of all domains that libvirt at `uri` has, running or defined, sorted.
pub fn names(uri: &str) -> Result<Vec<String>, LibvirtError> {
    silence();
    let connection = open(uri, true)?;
    let all = sys::VIR_CONNECT_LIST_DOMAINS_ACTIVE | sys::VIR_CONNECT_LIST_DOMAINS_INACTIVE;
    let domains = connection.list_all_domains(all);
    let domains = domains.map_err(|error| call_error(uri, "list the domains", &error))?;
    // One that has just gone has no name any more.
    let mut names: Vec<String> = domains.iter().filter_map(|domain| domain.name().ok()).collect();
    names.sort();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_numbers_taken_apart() {
        for (number, text) in [(11_003_000, "11.3.0"), (9_000_012, "9.0.12"), (2, "0.0.2")] {
            assert_eq!(Version::from_number(number).to_string(), text);
        }
    }

    #[test]
    fn tells_versions_and_names() {
        let found = versions("test:///default").unwrap();
        assert!(found.library.major >= 7, "{found}");
        assert_eq!(found.hypervisor.unwrap().0, "TEST");
        assert_eq!(names("test:///default").unwrap(), ["test"]);
        assert!(matches!(versions("nonsense:///"), Err(LibvirtError::Connect { .. })));
    }
}
