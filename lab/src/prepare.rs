// SPDX-License-Identifier: MIT OR Apache-2.0
//! All that stands before the first use of an emulated host. What takes minutes
//! and needs nothing but the network is done in the background, so that later
//! steps find it in the cache, or wait for it there.

use std::thread::{self, Scope};

use anyhow::Result;

use crate::Lab;
use crate::amd::{self, AmdHost};
use crate::apt::{self, Need};
use crate::boots::{Boot, Host};
use crate::flavour::{Flavour, Init};
use crate::kernel::Line;
use crate::micro::Target;
use crate::product::{self, Installation};
use crate::{deb, debian, intel_bochs, kvm_patch, micro_amd, micro_intel, rpm, virtqemud};

/// What will run.
#[derive(Default)]
pub struct Plan<'a> {
    /// AMD hosts with libvirt.
    pub flavours: Vec<Flavour>,
    /// Micro hosts.
    pub boots: Vec<&'a Boot>,
}

impl Plan<'_> {
    fn intel(&self) -> bool {
        self.boots.iter().any(|boot| boot.host != Host::Amd)
    }

    /// Whether there are hosts that packages are installed on.
    fn systemd(&self) -> bool {
        self.flavours.iter().any(|flavour| flavour.init != Init::Script)
    }

    /// The kernels that it needs: what takes longest to run after first.
    pub fn lines(&self) -> Vec<Line> {
        let wanted = |line| {
            // Hosts with systemd have a kernel of their own.
            let script = self.flavours.iter().any(|flavour| flavour.init == Init::Script);
            let main = script && line == Line::MAIN;
            main || self.boots.iter().any(|boot| boot.kernel == line)
        };
        let (mut first, rest): (Vec<Line>, Vec<Line>) =
            Line::ALL.into_iter().filter(|line| wanted(*line)).partition(|line| *line == Line::MAIN);
        first.extend(rest);
        first
    }
}

/// Installs all packages at once: apt serves one caller at a time.
pub fn packages(lab: &Lab, plan: &Plan) -> Result<()> {
    let mut needs: Vec<Need> = [product::NEEDS, debian::NEEDS, micro_amd::NEEDS].concat();
    if !plan.flavours.is_empty() {
        needs.extend(amd::NEEDS);
    }
    if plan.systemd() {
        needs.extend([deb::NEEDS, rpm::NEEDS].concat());
    }
    if plan.boots.iter().any(|boot| boot.patched) {
        needs.extend(kvm_patch::NEEDS);
    }
    if plan.intel() {
        needs.extend([micro_intel::NEEDS, intel_bochs::NEEDS].concat());
    }
    apt::ensure(lab, &needs)
}

/// Starts building what the hosts are made of. An error is left to the step that
/// asks for the thing again, and can tell what it is for.
pub fn in_background<'scope>(scope: &'scope Scope<'scope, '_>, lab: &'scope Lab, plan: &'scope Plan) {
    // A thread of their own: children end with the thread that started them.
    scope.spawn(move || {
        let (main, others): (Vec<Flavour>, Vec<Flavour>) =
            plan.flavours.iter().partition(|flavour| flavour.suite == Flavour::MAIN.suite);
        let hosts = |flavours: &[Flavour]| {
            flavours.iter().try_for_each(|flavour| {
                AmdHost::prepare(lab, &debian::host_kernel(lab, *flavour)?, *flavour).map(drop)
            })
        };
        for line in plan.lines() {
            let kernel = line.get(lab);
            if line == Line::MAIN {
                kernel?;
                hosts(&main)?;
            }
        }
        hosts(&main)?;
        // Last, as their jobs come last.
        hosts(&others)
    });
    if plan.intel() {
        scope.spawn(move || intel_bochs::obtain(lab));
    }
}

/// The main AMD host with libvirt and the product for it, all made that was missing.
pub fn amd(lab: &Lab) -> Result<(AmdHost, Installation)> {
    let plan = Plan { flavours: vec![Flavour::MAIN], boots: Vec::new() };
    packages(lab, &plan)?;
    thread::scope(|scope| {
        in_background(scope, lab, &plan);
        let agent = product::build_agent(lab)?;
        let product = product::build(lab)?;
        let Target { kernel, module, .. } = Target::get(lab, Line::MAIN)?;
        let module = Some(module);
        let host = AmdHost::prepare(lab, &kernel, Flavour::MAIN)?;
        let (kernel, modules) = (kernel.image, kernel.modules);
        let virtqemud = virtqemud::built(lab, Flavour::MAIN)?;
        Ok((host, Installation { product, module, agent, kernel, modules, virtqemud, packages: None }))
    })
}
