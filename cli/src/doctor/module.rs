// SPDX-License-Identifier: MIT OR Apache-2.0
//! Our kernel module: whether it is loaded, and of this version.

use std::process::Command;

use ept_virt_core::sampler::{KernelSampler, ModuleInfo, Sampler, SamplerError};

use super::report::Check;
use super::root::Root;

/// The module, as a try to open its file shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Module {
    /// It answers.
    Ready(ModuleInfo),
    /// It answers, and is not the one that `modprobe` finds.
    Replaced(ModuleInfo),
    /// It is loaded; more only root may see.
    NotForUs,
    /// It is not loaded; `modprobe` would find it.
    NotLoaded,
    /// It is not built for the running kernel.
    NotBuilt {
        /// As `uname -r` says it.
        release: String,
        /// What it is built with is there.
        has_headers: bool,
    },
    /// It is of another version, or broken; in plain words.
    Unusable(String),
}

impl Module {
    /// Asks it.
    pub fn ask(root: &Root, release: &str) -> Self {
        match KernelSampler::open().map(|sampler| sampler.info()) {
            Ok(info) if is_replaced(root, release) => Module::Replaced(info),
            Ok(info) => Module::Ready(info),
            Err(SamplerError::NotPermitted { .. }) => Module::NotForUs,
            Err(SamplerError::ModuleMissing) => {
                let known = root.text(format!("/lib/modules/{release}/modules.dep")).unwrap_or_default();
                match known.contains("kvm_ept_sample.ko") {
                    true => Module::NotLoaded,
                    false => Module::NotBuilt {
                        has_headers: root.exists(format!("/lib/modules/{release}/build/include")),
                        release: release.to_owned(),
                    },
                }
            }
            Err(error) => Module::Unusable(error.to_string()),
        }
    }

    /// Whether it is in the kernel.
    pub fn is_loaded(&self) -> bool {
        !matches!(self, Module::NotLoaded | Module::NotBuilt { .. })
    }

    /// Whether it can be used.
    pub fn judge(&self) -> Check {
        const NAME: &str = "module";
        // The daemon keeps the module in use. Guests notice nothing of this.
        const RELOAD: &str = "`systemctl stop ept-virt; rmmod kvm_ept_sample; modprobe kvm_ept_sample; systemctl start ept-virt`";
        match self {
            Module::Ready(info) => Check::ok(NAME, loaded(info)),
            Module::Replaced(info) => Check::warn(
                NAME,
                format!(
                    "{}; another is installed, as an upgrade leaves the one that is in use",
                    loaded(info)
                ),
                RELOAD,
            ),
            Module::NotForUs => Check::warn(
                NAME,
                "kvm_ept_sample is loaded; its version only root may ask",
                "run this as root",
            ),
            Module::NotLoaded => Check::fail(
                NAME,
                "kvm_ept_sample is installed, and not loaded",
                "modprobe kvm_ept_sample; when that fails, `dmesg` says why",
            ),
            Module::NotBuilt { release, has_headers: false } => Check::fail(
                NAME,
                format!("kvm_ept_sample is not built for Linux {release}, whose headers are not installed"),
                format!(
                    "install the headers, on Debian `apt install linux-headers-{release}`: DKMS builds it then; \
                     `modprobe kvm_ept_sample`"
                ),
            ),
            Module::NotBuilt { release, has_headers: true } => Check::fail(
                NAME,
                format!("kvm_ept_sample is not built for Linux {release}"),
                format!(
                    "`dkms install kvm-ept-sample/{}`, or in the sources `make -C kmod && make -C kmod \
                     modules_install && depmod`; then `modprobe kvm_ept_sample`",
                    env!("CARGO_PKG_VERSION")
                ),
            ),
            Module::Unusable(problem) => Check::fail(
                NAME,
                problem.clone(),
                format!("install module and ept-virt of one version, then {RELOAD}"),
            ),
        }
    }
}

/// What a module that answers is.
fn loaded(info: &ModuleInfo) -> String {
    let (ModuleInfo { format, .. }, (major, minor)) = (info, info.abi);
    let kvm = if info.patched_kvm { "; KVM is patched for samples" } else { "" };
    format!("kvm_ept_sample is loaded, ABI {major}.{minor}, for {format}{kvm}")
}

/// Whether the loaded module and the installed one were built of different sources, by
/// the hash of them that the kernel's build puts into each.
fn is_replaced(root: &Root, release: &str) -> bool {
    let mut modinfo = Command::new("modinfo");
    let installed = modinfo.args(["-k", release, "-F", "srcversion", "kvm_ept_sample"]).output();
    let installed = installed.ok().filter(|output| output.status.success());
    let installed = installed.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
    root.text("/sys/module/kvm_ept_sample/srcversion")
        .zip(installed)
        .is_some_and(|(loaded, installed)| loaded != installed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::report::Verdict::{Fail, Ok, Warn};
    use crate::doctor::tests::LOADED;

    #[test]
    fn says_how_to_get_the_module() {
        let not_built = |has_headers| Module::NotBuilt { release: "6.12.1".into(), has_headers };
        for (module, verdict, words) in [
            (Module::Ready(LOADED), Ok, "ABI 1.2, for NPT"),
            (
                Module::Ready(ModuleInfo { patched_kvm: true, ..LOADED }),
                Ok,
                "NPT; KVM is patched for samples",
            ),
            (Module::Replaced(LOADED), Warn, "for NPT; another is installed"),
            (Module::NotForUs, Warn, "only root"),
            (Module::NotLoaded, Fail, "not loaded"),
            (not_built(true), Fail, "not built for Linux 6.12.1"),
            (not_built(false), Fail, "headers are not installed"),
            (Module::Unusable("ABI 9".into()), Fail, "ABI 9"),
        ] {
            let check = module.judge();
            assert_eq!(check.verdict, verdict, "{check:?}");
            assert!(check.text.contains(words), "{check:?}");
            assert_eq!(check.mend.is_none(), verdict == Ok);
            // A module in use can not be removed.
            let mend = check.mend.unwrap_or_default();
            let stop = mend.find("systemctl stop ept-virt");
            assert!(mend.find("rmmod").is_none_or(|at| stop.is_some_and(|stop| stop < at)), "{mend}");
        }
    }
}
