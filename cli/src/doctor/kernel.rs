// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel: whether the module knows it, what it loads, whom it lets trace.

use super::report::Check;
use super::root::Root;

/// The kernels that the module knows: `KES_KERNELS` of `kmod/compat.h`.
const KNOWN: [(u32, u32); 3] = [(6, 1), (6, 12), (7, 3)];

/// [`KNOWN`], in words.
const KNOWN_WORDS: &str = "Linux 6.1, 6.12 and 7.3";

/// UEFI's variable: four bytes of attributes, then 1 when Secure Boot is on.
const SECURE_BOOT: &str = "/sys/firmware/efi/efivars/SecureBoot-8be4df61-93ca-11d2-aa0d-00e098032b8c";

/// Yama's setting under which nobody traces anybody.
const NO_TRACING: u64 = 3;

/// What is asked of the kernel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kernel {
    /// As `uname -r` says.
    pub release: String,
    /// Lockdown: none, integrity or confidentiality; none of these without it.
    pub lockdown: Option<String>,
    /// Secure Boot; none without UEFI.
    pub secure_boot: Option<bool>,
    /// Modules need a signature (`module.sig_enforce`).
    pub signatures: bool,
    /// `kernel.yama.ptrace_scope`; none without Yama.
    pub ptrace_scope: Option<u64>,
}

impl Kernel {
    /// Reads it.
    pub fn read(root: &Root) -> Self {
        Self {
            release: root.text("/proc/sys/kernel/osrelease").unwrap_or_default(),
            lockdown: root.choice("/sys/kernel/security/lockdown"),
            secure_boot: root.bytes(SECURE_BOOT).and_then(|bytes| Some(*bytes.get(4)? == 1)),
            signatures: root.switch("/sys/module/module/parameters/sig_enforce") == Some(true),
            ptrace_scope: root.number("/proc/sys/kernel/yama/ptrace_scope"),
        }
    }

    /// Whether the module knows it; one that is loaded does.
    pub fn judge_version(&self, module_is_loaded: bool) -> Check {
        let release = if self.release.is_empty() { "of an unknown release" } else { &self.release };
        match module_is_loaded || version(release).is_some_and(|version| KNOWN.contains(&version)) {
            true => Check::ok("kernel", format!("Linux {release}, which the module knows")),
            false => Check::fail(
                "kernel",
                format!("Linux {release}: the module knows {KNOWN_WORDS}, and refuses all others"),
                "boot one of these kernels; docs/KERNELS.md says where each was tried",
            ),
        }
    }

    /// Whether it would load the module.
    pub fn judge_signing(&self, module_is_loaded: bool) -> Check {
        let mut reasons = Vec::new();
        if self.secure_boot == Some(true) {
            reasons.push("Secure Boot is on".to_owned());
        }
        if let Some(lockdown) = self.lockdown.as_ref().filter(|lockdown| *lockdown != "none") {
            reasons.push(format!("the kernel is locked down ({lockdown})"));
        }
        if self.signatures {
            reasons.push("module.sig_enforce is set".into());
        }
        // Secure Boot alone does not keep modules out: lockdown or the switch does.
        let enforced = self.signatures || self.lockdown.as_ref().is_some_and(|lockdown| lockdown != "none");
        match (enforced, module_is_loaded) {
            (false, _) if reasons.is_empty() => Check::ok("signing", "modules need no signature"),
            (false, _) => {
                Check::ok("signing", format!("{}, and modules need no signature", reasons.join(", ")))
            }
            (true, true) => {
                Check::ok("signing", format!("{}; the module is signed, and loaded", reasons.join(", ")))
            }
            (true, false) => Check::warn(
                "signing",
                format!("{}: only modules signed by an enrolled key are loaded", reasons.join(", ")),
                "DKMS has signed it with a key of its own (`modinfo -F signer kvm_ept_sample`): enroll that by \
                 `mokutil --import /var/lib/dkms/mok.pub`, which asks for a password, boot, and choose Enroll MOK. \
                 Without DKMS sign kvm_ept_sample.ko with `/lib/modules/$(uname -r)/build/scripts/sign-file sha256 \
                 KEY CERT FILE`, and enroll CERT",
            ),
        }
    }

    /// Whether a VM's descriptor can be taken from its QEMU.
    pub fn judge_tracing(&self) -> Check {
        match self.ptrace_scope {
            Some(NO_TRACING) => Check::fail(
                "tracing",
                "kernel.yama.ptrace_scope is 3: nobody, not even root, gets a VM from its QEMU",
                "set it to 2 or less in /etc/sysctl.d, and boot again: a running kernel does not take 3 back",
            ),
            _ => Check::ok("tracing", "root may trace QEMU, and so get its VM"),
        }
    }
}

/// Major and minor number of a release, as `6.12.95+deb13-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|letter: char| !letter.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::report::Verdict::{Fail, Ok, Warn};

    #[test]
    fn knows_the_kernels_that_the_module_knows() {
        let compat = include_str!("../../../kmod/compat.h");
        assert!(compat.contains(&format!("#define KES_KERNELS \"{KNOWN_WORDS}\"")));
        for (release, verdict) in [
            ("6.1.0-38-amd64", Ok),
            ("6.12.95+deb13-amd64", Ok),
            ("7.3.4-rt1", Ok),
            ("7.3-rc1", Ok),
            ("6.18.44", Fail),
            ("6.10.1", Fail),
            ("7", Fail),
            ("", Fail),
        ] {
            let kernel = Kernel { release: release.into(), ..Kernel::default() };
            assert_eq!(kernel.judge_version(false).verdict, verdict, "{release}");
            assert_eq!(kernel.judge_version(true).verdict, Ok);
        }
    }

    #[test]
    fn an_unsigned_module_is_kept_out_by_lockdown_not_by_secure_boot() {
        let kernel = |secure_boot, lockdown: Option<&str>, signatures| Kernel {
            secure_boot,
            lockdown: lockdown.map(Into::into),
            signatures,
            ..Kernel::default()
        };
        for (kernel, loaded, verdict) in [
            (kernel(None, None, false), false, Ok),
            (kernel(Some(true), Some("none"), false), false, Ok),
            (kernel(Some(true), Some("integrity"), false), false, Warn),
            (kernel(Some(true), Some("integrity"), false), true, Ok),
            (kernel(Some(false), Some("confidentiality"), false), false, Warn),
            (kernel(None, None, true), false, Warn),
        ] {
            assert_eq!(kernel.judge_signing(loaded).verdict, verdict, "{kernel:?} {loaded}");
        }
    }

    #[test]
    fn yama_may_forbid_all_tracing() {
        for (scope, verdict) in [(None, Ok), (Some(0), Ok), (Some(2), Ok), (Some(3), Fail)] {
            let kernel = Kernel { ptrace_scope: scope, ..Kernel::default() };
            assert_eq!(kernel.judge_tracing().verdict, verdict);
        }
    }
}
