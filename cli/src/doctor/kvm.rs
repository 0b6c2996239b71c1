// SPDX-License-Identifier: MIT OR Apache-2.0
//! KVM, and who will tell what guests access. docs/KERNELS.md explains why.

use ept_virt_core::sampler::Sources;

use super::report::Check;
use super::root::Root;

/// Whose processor it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// VT-x, with EPT.
    Intel,
    /// SVM, with NPT.
    Amd,
}

impl Vendor {
    fn module(self) -> &'static str {
        match self {
            Vendor::Intel => "kvm_intel",
            Vendor::Amd => "kvm_amd",
        }
    }

    fn tables(self) -> &'static str {
        match self {
            Vendor::Intel => "EPT",
            Vendor::Amd => "NPT",
        }
    }
}

/// What is asked of KVM. Of its switches, none: this KVM does not tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kvm {
    /// What the processor has.
    pub cpu: Option<Vendor>,
    /// The processor marks accessed and dirty pages in EPT.
    pub cpu_marks: bool,
    /// Which of KVM's modules is loaded.
    pub loaded: Option<Vendor>,
    /// There is `/dev/kvm`.
    pub device: bool,
    /// Second-level tables: kvm_intel.ept or kvm_amd.npt.
    pub tables: Option<bool>,
    /// kvm_intel.eptad.
    pub marks: Option<bool>,
    /// kvm.tdp_mmu.
    pub tdp_mmu: Option<bool>,
}

impl Kvm {
    /// Reads it.
    pub fn read(root: &Root) -> Self {
        let cpuinfo = root.text("/proc/cpuinfo").unwrap_or_default();
        let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
        let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
        Self { cpu: first(has("vmx"), has("svm")), cpu_marks: has("ept_ad"), ..Self::loaded(root) }
    }

    /// Reads the modules and their switches alone: a few short files.
    pub fn loaded(root: &Root) -> Self {
        let loaded = first(root.exists("/sys/module/kvm_intel"), root.exists("/sys/module/kvm_amd"));
        Self {
            cpu: None,
            cpu_marks: false,
            loaded,
            device: root.exists("/dev/kvm"),
            tables: match loaded {
                Some(Vendor::Intel) => root.switch("/sys/module/kvm_intel/parameters/ept"),
                Some(Vendor::Amd) => root.switch("/sys/module/kvm_amd/parameters/npt"),
                None => None,
            },
            marks: root.switch("/sys/module/kvm_intel/parameters/eptad"),
            tdp_mmu: root.switch("/sys/module/kvm/parameters/tdp_mmu"),
        }
    }

    /// Who tells what guests access that run no guests themselves, as docs/KERNELS.md
    /// has it.
    pub fn sources(&self) -> Sources {
        let off = |switch| switch == Some(false);
        let tables = !off(self.tables) && !off(self.tdp_mmu);
        let marks = self.loaded != Some(Vendor::Intel) || !off(self.marks);
        Sources { tables, notifier: !tables || !marks }
    }

    /// Whether guests can run.
    pub fn judge(&self) -> Check {
        match (self.loaded, self.cpu) {
            (Some(vendor), _) if self.device => {
                Check::ok("KVM", format!("{} is loaded, and /dev/kvm is there", vendor.module()))
            }
            (Some(vendor), _) => Check::fail(
                "KVM",
                format!("{} is loaded, but there is no /dev/kvm", vendor.module()),
                "look for the reason in `dmesg | grep -i kvm`",
            ),
            (None, Some(vendor)) => {
                let module = vendor.module();
                Check::fail("KVM", format!("{module} is not loaded"), format!("modprobe {module}"))
            }
            (None, None) => Check::fail(
                "KVM",
                "the processor shows neither VT-x nor SVM, and neither kvm_intel nor kvm_amd is loaded",
                "switch virtualization on in the firmware; if this host is itself a guest, nested virtualization in its host",
            ),
        }
    }

    /// Who will tell what guests access: the tables, KVM's notifier, or both.
    pub fn judge_back_end(&self) -> Check {
        const NAME: &str = "back end";
        const LESS: &str = "there are no tables to walk: KVM's notifier tells accesses, page by page; \
                            neither dirty bits nor sampling";
        let Some(vendor) = self.loaded else {
            return Check::warn(NAME, "not known without KVM", "see KVM above");
        };
        let (module, tables) = (vendor.module(), vendor.tables());
        let reload = |what: &str| {
            format!(
                "with no guest running: `systemctl stop ept-virt; modprobe -r kvm_ept_sample {module} kvm`, then {what}, \
                 and `systemctl start ept-virt`; in /etc/modprobe.d for good"
            )
        };
        if self.tables == Some(false) {
            let switch = tables.to_lowercase();
            return Check::warn(
                NAME,
                format!("{module} was loaded with {switch}=0: {LESS}"),
                reload(&format!("`modprobe {module} {switch}=1`")),
            );
        }
        if self.tdp_mmu == Some(false) {
            return Check::warn(
                NAME,
                format!("kvm was loaded with tdp_mmu=N: {LESS}"),
                reload(&format!("`modprobe kvm tdp_mmu=Y`, `modprobe {module}`")),
            );
        }
        match (vendor, self.marks) {
            (Vendor::Intel, Some(false)) if self.cpu_marks => Check::warn(
                NAME,
                "kvm_intel was loaded with eptad=0: the guest pays a fault for each page that is seen; \
                 neither dirty bits nor sampling",
                reload("`modprobe kvm_intel eptad=1`"),
            ),
            (Vendor::Intel, Some(false)) => Check::warn(
                NAME,
                "the processor marks no accessed pages in EPT (those before Haswell do not): \
                 the guest pays a fault for each page that is seen; neither dirty bits nor sampling",
                "nothing on this host; observe less often, or place guests on a newer host",
            ),
            _ => Check::ok(NAME, format!("table walk of {tables}, with accessed and dirty bits")),
        }
    }
}

fn first(intel: bool, amd: bool) -> Option<Vendor> {
    match (intel, amd) {
        (true, _) => Some(Vendor::Intel),
        (_, true) => Some(Vendor::Amd),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::report::Verdict::{Fail, Ok, Warn};

    const INTEL: Kvm = Kvm {
        cpu: Some(Vendor::Intel),
        cpu_marks: true,
        loaded: Some(Vendor::Intel),
        device: true,
        tables: Some(true),
        marks: Some(true),
        tdp_mmu: Some(true),
    };
    const AMD: Kvm =
        Kvm { cpu: Some(Vendor::Amd), cpu_marks: false, loaded: Some(Vendor::Amd), marks: None, ..INTEL };

    #[test]
    fn guests_need_a_processor_a_module_and_a_device() {
        for (kvm, verdict, mend) in [
            (INTEL, Ok, ""),
            (AMD, Ok, ""),
            (Kvm { device: false, ..AMD }, Fail, "dmesg"),
            (Kvm { loaded: None, ..AMD }, Fail, "modprobe kvm_amd"),
            (Kvm::default(), Fail, "firmware"),
        ] {
            let check = kvm.judge();
            assert_eq!(check.verdict, verdict, "{check:?}");
            assert!(check.mend.unwrap_or_default().contains(mend));
        }
    }

    #[test]
    fn the_daemon_names_who_tells() {
        const TABLES: Sources = Sources { tables: true, notifier: false };
        const BOTH: Sources = Sources { tables: true, notifier: true };
        const NOTIFIER: Sources = Sources { tables: false, notifier: true };
        for (kvm, sources) in [
            (INTEL, TABLES),
            (AMD, TABLES),
            (Kvm { tables: None, tdp_mmu: None, marks: None, ..INTEL }, TABLES),
            (Kvm { tables: Some(false), ..INTEL }, NOTIFIER),
            (Kvm { tables: Some(false), ..AMD }, NOTIFIER),
            (Kvm { tdp_mmu: Some(false), ..AMD }, NOTIFIER),
            (Kvm { marks: Some(false), ..INTEL }, BOTH),
            (Kvm { marks: Some(false), tdp_mmu: Some(false), ..INTEL }, NOTIFIER),
        ] {
            assert_eq!(kvm.sources(), sources, "{kvm:?}");
            // Doctor says the same in more words.
            assert_eq!(kvm.judge_back_end().verdict == Ok, sources == TABLES, "{kvm:?}");
        }
    }

    #[test]
    fn says_who_tells_and_what_is_lost() {
        for (kvm, verdict, text, mend) in [
            (INTEL, Ok, "table walk of EPT", ""),
            (AMD, Ok, "table walk of NPT", ""),
            // What a kernel does not tell is taken to be as usual.
            (Kvm { tables: None, tdp_mmu: None, marks: None, ..INTEL }, Ok, "EPT", ""),
            (Kvm { tables: Some(false), ..INTEL }, Warn, "ept=0", "modprobe kvm_intel ept=1"),
            (Kvm { tables: Some(false), ..AMD }, Warn, "npt=0", "modprobe kvm_amd npt=1"),
            (Kvm { tdp_mmu: Some(false), ..AMD }, Warn, "tdp_mmu=N", "modprobe kvm tdp_mmu=Y"),
            (Kvm { marks: Some(false), ..INTEL }, Warn, "eptad=0", "eptad=1"),
            (Kvm { marks: Some(false), cpu_marks: false, ..INTEL }, Warn, "before Haswell", "newer host"),
            (Kvm::default(), Warn, "not known", "KVM"),
        ] {
            let check = kvm.judge_back_end();
            assert_eq!(check.verdict, verdict, "{check:?}");
            assert!(check.text.contains(text), "{check:?}");
            assert!(check.mend.unwrap_or_default().contains(mend));
        }
    }
}
