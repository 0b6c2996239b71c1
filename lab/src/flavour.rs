// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which kinds of AMD hosts with libvirt there are.

use std::fmt;

use crate::debian::Suite;

/// A kind of host: what it is unpacked from, and what its process 1 is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flavour {
    /// The Debian that it runs.
    pub suite: Suite,
    /// What brings it up.
    pub init: Init,
}

/// Process 1 of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Init {
    /// `amd/host-init`, which starts libvirt and nothing else: up in half the time.
    Script,
    /// systemd, with the units that Debian's packages bring.
    Systemd,
    /// The same in the tree of a host where our packages were installed, and then a
    /// second kernel, which boots: [`crate::package_life`].
    Upgraded,
}

impl Flavour {
    /// That of whoever does not ask for another.
    pub const MAIN: Self = Self::script(Suite::MAIN);

    /// A host of this suite that is up soon.
    pub const fn script(suite: Suite) -> Self {
        Self { suite, init: Init::Script }
    }

    /// A host of this suite as people have it.
    pub const fn systemd(suite: Suite) -> Self {
        Self { suite, init: Init::Systemd }
    }

    /// The name in the cache, or of a log, of something that each flavour has one of.
    pub fn item(self, what: &str) -> String {
        let name = self.suite.item(what);
        match self.init {
            Init::Script => name,
            Init::Systemd => format!("{name}-systemd"),
            Init::Upgraded => format!("{name}-upgraded"),
        }
    }
}

impl fmt::Display for Flavour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.init {
            Init::Script => self.suite.fmt(f),
            Init::Systemd => write!(f, "{}-systemd", self.suite),
            Init::Upgraded => write!(f, "{}-upgraded", self.suite),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_a_name_of_its_own() {
        let [trixie, bookworm] = [Suite::Trixie, Suite::Bookworm];
        let flavours = [
            (Flavour::MAIN, "x", "trixie"),
            (Flavour::systemd(trixie), "x-systemd", "trixie-systemd"),
            (Flavour::script(bookworm), "x-bookworm", "bookworm"),
            (Flavour::systemd(bookworm), "x-bookworm-systemd", "bookworm-systemd"),
            (Flavour { suite: bookworm, init: Init::Upgraded }, "x-bookworm-upgraded", "bookworm-upgraded"),
        ];
        for (flavour, item, shown) in flavours {
            assert_eq!((flavour.item("x").as_str(), flavour.to_string().as_str()), (item, shown));
        }
    }
}
