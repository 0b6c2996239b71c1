// SPDX-License-Identifier: MIT OR Apache-2.0
//! Hosts that answer as they are told.

use ept_virt_core::policy::{Config, Host};
use ept_virt_core::topology::{NodeSet, Tiers};

/// A host.
pub struct Fake {
    config: Result<Config, String>,
    tiers: Result<Tiers, String>,
    ready: Result<(), String>,
}

impl Host for Fake {
    fn config(&self) -> Result<Config, String> {
        self.config.clone()
    }

    fn tiers(&self) -> Result<Tiers, String> {
        self.tiers.clone()
    }

    fn ready(&self) -> Result<(), String> {
        self.ready.clone()
    }
}

/// Two tiers, with daemon and module.
pub fn good() -> Fake {
    let set = |node| NodeSet::from_iter([node]);
    Fake {
        config: Ok(Config::default()),
        tiers: Ok(Tiers { fast: set(0), slow: set(1), from: "nodes without CPUs".into() }),
        ready: Ok(()),
    }
}

/// Nothing that can be served.
pub fn bare() -> Fake {
    Fake { tiers: Err("no memory".into()), ready: Err("no daemon".into()), ..good() }
}

/// Nothing, and its configuration is broken.
pub fn broken() -> Fake {
    Fake { config: Err("no configuration".into()), ..bare() }
}
