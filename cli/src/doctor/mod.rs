// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ept-virt doctor`: what is wrong with a host, and what mends it.
//!
//! Three steps, apart from each other. [`Facts::gather`] reads files through
//! [`Root`] and asks module, libvirt and daemon; each kind of fact has a file here.
//! [`judge`] turns facts into [`Check`]s and does nothing else, so tests give it
//! whatever host they like. [`report`] prints.

mod configuration;
mod daemon;
mod hook;
mod kernel;
pub mod kvm;
mod libvirt;
mod module;
mod pages;
mod processes;
pub mod report;
mod rights;
mod rivals;
pub mod root;
#[cfg(test)]
mod tests;
mod tiers;
#[cfg(test)]
mod warnings_tests;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use crate::bounded;
use crate::failure::Failure;
use crate::hook::{HOOKS_DIR, Hooks};
use crate::output::{Output, print};
use crate::style::Style;

use configuration::Configuration;
use daemon::Daemon;
use hook::Seen;
use kernel::Kernel;
use kvm::Kvm;
use libvirt::LibvirtSays;
use module::Module;
use pages::Pages;
use processes::Processes;
use report::{Check, Report, Verdict};
use rivals::Rivals;
use root::Root;
use tiers::Memory;

/// How long libvirt may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// All that is judged.
#[derive(Clone, Debug)]
struct Facts {
    kernel: Kernel,
    kvm: Kvm,
    module: Module,
    memory: Memory,
    pages: Pages,
    rivals: Rivals,
    processes: Processes,
    hooks: Hooks,
    libvirt: LibvirtSays,
    configuration: Configuration,
    daemon: Daemon,
    is_root: bool,
}

impl Facts {
    /// Of the host whose files are at `root`, with what was asked of the others.
    fn read(root: &Root, module: impl FnOnce(&str) -> Module, libvirt: LibvirtSays, daemon: Daemon) -> Self {
        let kernel = Kernel::read(root);
        let memory = Memory::read(root);
        let processes = Processes::read(root);
        Self {
            module: module(&kernel.release),
            kvm: Kvm::read(root),
            pages: Pages::read(root, &memory.all_nodes()),
            rivals: Rivals::read(root, &processes),
            hooks: Hooks::look(&root.join(HOOKS_DIR)),
            configuration: Configuration::read(root),
            is_root: nix::unistd::geteuid().is_root(),
            kernel,
            memory,
            processes,
            libvirt,
            daemon,
        }
    }

    /// Of this host.
    fn gather(uri: &str, socket: &Path) -> Self {
        let root = Root::new("/");
        let (asked, at) = (uri.to_owned(), root.clone());
        let libvirt = bounded::within(PATIENCE, move || LibvirtSays::ask(&asked, &at))
            .unwrap_or_else(|| LibvirtSays::silent(uri, PATIENCE.as_secs()));
        let mut facts =
            Self::read(&root, |release| Module::ask(&root, release), libvirt, Daemon::ask(socket));
        if let Some(libvirt) = facts.processes.libvirt.clone() {
            let asked = libvirt.clone();
            let known = bounded::within(PATIENCE, move || asked.after_reload());
            facts.processes.libvirt = Some(known.unwrap_or(libvirt));
        }
        facts
    }
}

/// What the facts mean. What others build on comes first.
fn judge(facts: &Facts) -> Vec<Check> {
    let seen = Seen {
        libvirt: facts.processes.libvirt.as_ref(),
        nudges: facts.daemon.status().map(|status| status.daemon.nudges),
    };
    vec![
        facts.kernel.judge_version(facts.module.is_loaded()),
        facts.kvm.judge(),
        facts.kvm.judge_back_end(),
        facts.module.judge(),
        facts.kernel.judge_signing(facts.module.is_loaded()),
        facts.kernel.judge_tracing(),
        facts.memory.judge_tiers(),
        facts.memory.judge_balancing(),
        facts.rivals.judge(),
        facts.pages.judge_transparent(),
        facts.pages.judge_pools(),
        facts.pages.judge_merged(),
        facts.libvirt.judge(),
        facts.libvirt.judge_cpusets(&facts.memory.all_nodes()),
        hook::judge(&facts.hooks, seen),
        facts.configuration.judge(),
        facts.daemon.judge(env!("CARGO_PKG_VERSION")),
        facts.daemon.judge_domains(),
        rights::judge(facts.is_root),
    ]
}

/// Prints the report; the exit code is 1 when something fails.
pub fn run(uri: &str, socket: &Path, output: Output, style: &Style) -> Result<ExitCode, Failure> {
    let report = Report::new(judge(&Facts::gather(uri, socket)));
    print(output, &report, || report::render(&report, style))?;
    Ok(ExitCode::from(u8::from(report.verdict == Verdict::Fail)))
}
