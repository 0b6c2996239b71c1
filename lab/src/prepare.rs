// SPDX-License-Identifier: MIT OR Apache-2.0
//! All that stands before the first use of an emulated host. What takes minutes
//! and needs nothing but the network is done in the background, so that later
//! steps find it in the cache, or wait for it there.

use std::thread::{self, Scope};

use anyhow::Result;

use crate::Lab;
use crate::amd::{self, AmdHost};
use crate::apt::{self, Need};
use crate::debian::{self, BuildTree};
use crate::product::{self, Installation};
use crate::{intel, intel_bochs, kmod};

/// Which hosts will be needed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Hosts {
    /// The AMD host alone.
    Amd,
    /// Both.
    All,
}

/// Installs all packages at once: apt serves one caller at a time.
pub fn packages(lab: &Lab, hosts: Hosts) -> Result<()> {
    let mut needs: Vec<Need> = [product::NEEDS, debian::NEEDS, amd::NEEDS].concat();
    if hosts == Hosts::All {
        needs.extend([intel::NEEDS, intel_bochs::NEEDS].concat());
    }
    apt::ensure(lab, &needs)
}

/// Starts building what the hosts are made of. An error is left to the step that
/// asks for the thing again, and can tell what it is for.
pub fn in_background<'scope>(scope: &'scope Scope<'scope, '_>, lab: &'scope Lab, hosts: Hosts) {
    // A thread of their own: children end with the thread that started them.
    scope.spawn(move || {
        let tree = BuildTree::get(lab)?;
        AmdHost::prepare(lab, &tree)?;
        if hosts == Hosts::All {
            intel_bochs::obtain(lab)?;
        }
        anyhow::Ok(())
    });
}

/// The AMD host and the product for it, all made that was missing.
pub fn amd(lab: &Lab) -> Result<(AmdHost, Installation)> {
    packages(lab, Hosts::Amd)?;
    thread::scope(|scope| {
        in_background(scope, lab, Hosts::Amd);
        let agent = product::build_agent(lab)?;
        let product = product::build(lab)?;
        let tree = BuildTree::get(lab)?;
        let module = kmod::build(lab, &tree)?;
        let files = Installation { product, module, agent, kernel: tree.kernel() };
        Ok((AmdHost::prepare(lab, &tree)?, files))
    })
}
