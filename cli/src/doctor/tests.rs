// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whole hosts, captured below `tests/fixtures/doctor`, and what is said of them.

use std::path::PathBuf;

use ept_virt_core::domain::{Version, Versions};
use ept_virt_core::sampler::{EntryFormat, ModuleInfo};
use ept_virt_core::wire::Status;

use super::*;
use crate::golden::check;

fn libvirt(guests: Vec<libvirt::Guest>) -> LibvirtSays {
    let versions = Versions {
        library: Version::from_number(11_003_000),
        daemon: Some(Version::from_number(11_003_000)),
        hypervisor: Some(("QEMU".into(), Version::from_number(10_000_002))),
    };
    LibvirtSays { uri: "qemu:///system".into(), versions: Ok(versions), guests: Some(guests) }
}

/// A module, as it answers.
pub(super) const LOADED: ModuleInfo = ModuleInfo {
    abi: (1, 2),
    format: EntryFormat::Npt,
    clear_dirty: true,
    keep_young: true,
    patched_kvm: false,
};

/// A host of two tiers on which all is well.
fn good() -> Facts {
    let root = captured("amd-tiered");
    let mut status: Status = serde_json::from_str(include_str!("../../tests/fixtures/busy.json")).unwrap();
    status.daemon.version = env!("CARGO_PKG_VERSION").into();
    status.domains.retain(|domain| domain.name == "web-1");
    let guest = libvirt::Guest { name: "web-1".into(), allowed: "0-1".parse().ok() };
    let daemon = Daemon::Answers(Box::new(status));
    let facts = Facts::read(&root, |_| Module::Ready(LOADED), libvirt(vec![guest]), daemon);
    settled(facts)
}

/// A host with everything against it, in the hands of a newcomer.
fn bad() -> Facts {
    let root = captured("intel-troubled");
    let guest = libvirt::Guest { name: "evil\u{1b}[2Jname".into(), allowed: "0".parse().ok() };
    let daemon = Daemon::Away {
        problem: "no daemon listens at /run/ept-virt/ept-virt.sock".into(),
        mend: "start it, as root, with `systemctl start ept-virt`".into(),
    };
    let module = |_: &str| Module::NotLoaded;
    let facts = settled(Facts::read(&root, module, libvirt(vec![guest]), daemon));
    Facts { is_root: false, ..facts }
}

/// A machine that has nothing of what is needed.
fn empty() -> Facts {
    let root = captured("no such host");
    let module = |release: &str| Module::NotBuilt { release: release.into(), has_headers: true };
    let problem = "no daemon listens at SOCKET".to_owned();
    let daemon = Daemon::Away { problem, mend: "start it".into() };
    let mut facts = settled(Facts::read(&root, module, LibvirtSays::silent("qemu:///system", 5), daemon));
    // It names the place of the captured tree.
    facts.memory.tiers = facts.memory.tiers.map_err(|_| "cannot read /sys".into());
    facts
}

fn captured(name: &str) -> Root {
    Root::new(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/doctor").join(name))
}

/// Without what depends on the machine that runs the tests.
fn settled(mut facts: Facts) -> Facts {
    facts.is_root = true;
    facts.hooks.path = Root::new("/").join(HOOKS_DIR).join("qemu.d/ept-virt");
    facts.hooks.changed = Some(0);
    facts
}

#[test]
fn captured_hosts_are_judged() {
    const TERMINAL: Style = Style { color: true, unicode: true, width: 80, wrap: true };
    let report = |facts: &Facts| Report::new(judge(facts));
    let well = report(&good());
    assert_eq!(well.verdict, Verdict::Ok, "{well:?}");
    check("doctor-good.txt", &report::render(&well, &Style::PLAIN));
    let badly = report(&bad());
    assert_eq!(badly.verdict, Verdict::Fail);
    check("doctor-bad.txt", &report::render(&badly, &Style::PLAIN));
    check("doctor-bad-terminal.txt", &report::render(&badly, &TERMINAL));
    check("doctor-bad.json", &serde_json::to_string_pretty(&badly).unwrap());
    check("doctor-empty.txt", &report::render(&report(&empty()), &Style::PLAIN));
}

#[test]
fn every_check_has_a_name_of_its_own_and_a_mend_unless_it_is_well() {
    for facts in [good(), bad(), empty()] {
        let checks = judge(&facts);
        for (index, check) in checks.iter().enumerate() {
            assert!(checks[..index].iter().all(|other| other.check != check.check), "{check:?}");
            assert_eq!(check.mend.is_none(), check.verdict == Verdict::Ok, "{check:?}");
            assert!(check.mend.as_ref().is_none_or(|mend| !mend.is_empty()));
            assert!(check.check.len() <= 14);
        }
    }
}

#[test]
fn a_captured_host_is_read_in_full() {
    let facts = good();
    assert_eq!(facts.kernel.release, "6.12.95+deb13-amd64");
    assert_eq!(facts.kernel.secure_boot, Some(true));
    assert_eq!(facts.kernel.lockdown.as_deref(), Some("none"));
    assert_eq!(facts.kvm.loaded, Some(kvm::Vendor::Amd));
    assert_eq!(facts.kvm.tdp_mmu, Some(true));
    let libvirt = facts.processes.libvirt.unwrap();
    assert_eq!((libvirt.name.as_str(), libvirt.looked), ("virtqemud", 1_700_000_000 + 123));
    let facts = bad();
    assert_eq!(facts.rivals.damon_modules, ["damon_stat"]);
    assert_eq!(facts.rivals.damon_threads, 1);
    assert_eq!(facts.kernel.ptrace_scope, Some(3));
    assert_eq!(facts.pages.pools.len(), 1);
    assert_eq!(facts.pages.pools[0].full_nodes.to_string(), "1");
    assert_eq!(facts.pages.merged, 4711 + 289);
    assert!(facts.pages.merges);
    assert_eq!(facts.pages.available, Some(1 << 30));
}
