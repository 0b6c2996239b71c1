// SPDX-License-Identifier: MIT OR Apache-2.0
//! Every warning that doctor has, with its mend: the table in docs/OPERATING.md.
//! `UPDATE_GOLDEN=1 cargo test` writes it anew.

use std::path::{Path, PathBuf};

use ept_virt_core::domain::{Version, Versions};
use ept_virt_core::sampler::SamplerError;
use ept_virt_core::topology::{NodeSet, NumaBalancing, Tiers};
use ept_virt_core::wire::{DomainState, Status};

use super::kvm::Vendor;
use super::libvirt::Guest;
use super::pages::Pool;
use super::processes::LibvirtDaemon;
use super::tests::LOADED;
use super::*;
use crate::hook::Found;

/// All sources that judge, up to their tests.
const SOURCES: [&str; 13] = [
    include_str!("configuration.rs"),
    include_str!("daemon.rs"),
    include_str!("hook.rs"),
    include_str!("kernel.rs"),
    include_str!("kvm.rs"),
    include_str!("libvirt.rs"),
    include_str!("mod.rs"),
    include_str!("module.rs"),
    include_str!("pages.rs"),
    include_str!("processes.rs"),
    include_str!("rights.rs"),
    include_str!("rivals.rs"),
    include_str!("tiers.rs"),
];

fn of_kernel() -> Vec<Check> {
    let kernel = |release: &str| Kernel { release: release.into(), ..Kernel::default() };
    let locked = Kernel { lockdown: Some("integrity".into()), secure_boot: Some(true), ..Kernel::default() };
    let closed = Kernel { ptrace_scope: Some(3), ..Kernel::default() };
    vec![kernel("6.18.1").judge_version(false), locked.judge_signing(false), closed.judge_tracing()]
}

fn of_kvm() -> Vec<Check> {
    let intel = Kvm {
        cpu: Some(Vendor::Intel),
        cpu_marks: true,
        loaded: Some(Vendor::Intel),
        device: true,
        tables: Some(true),
        marks: Some(true),
        tdp_mmu: Some(true),
    };
    let switched_off = Kvm { marks: Some(false), ..intel };
    vec![
        Kvm { device: false, ..intel }.judge(),
        Kvm { loaded: None, ..intel }.judge(),
        Kvm::default().judge(),
        Kvm::default().judge_back_end(),
        Kvm { tables: Some(false), ..intel }.judge_back_end(),
        Kvm { tdp_mmu: Some(false), ..intel }.judge_back_end(),
        switched_off.judge_back_end(),
        Kvm { cpu_marks: false, ..switched_off }.judge_back_end(),
    ]
}

fn of_module() -> Vec<Check> {
    let other = SamplerError::WrongVersion { module_major: 2, module_minor: 0 };
    [
        Module::Replaced(LOADED),
        Module::NotForUs,
        Module::NotLoaded,
        Module::NotBuilt { release: "6.12.95+deb13-amd64".into(), has_headers: false },
        Module::NotBuilt { release: "6.12.95+deb13-amd64".into(), has_headers: true },
        Module::Unusable(other.to_string()),
    ]
    .map(|module| module.judge())
    .into()
}

fn of_memory() -> Vec<Check> {
    let memory = |tiers, balancing| Memory { tiers, nodes: Vec::new(), balancing: Ok(balancing) };
    let one = Tiers {
        fast: NodeSet::from_iter([0]),
        slow: NodeSet::default(),
        from: "one tier: the host has one NUMA node with memory".into(),
    };
    let unknown = memory(Err("cannot read /sys/devices/system/node/has_memory".into()), NumaBalancing::Off);
    vec![
        unknown.judge_tiers(),
        memory(Ok(one.clone()), NumaBalancing::Off).judge_tiers(),
        memory(Ok(one), NumaBalancing::Normal).judge_balancing(),
    ]
}

fn of_pages() -> Vec<Check> {
    let full = Pool { size_kib: 2048, pages: 8, full_nodes: NodeSet::from_iter([1]) };
    let pages = Pages {
        pools: vec![full],
        merged: 3 << 18,
        merges: true,
        available: Some(2 << 30),
        ..Pages::default()
    };
    let rivals =
        |damon_modules: &[&'static str]| Rivals { damon_modules: damon_modules.to_vec(), damon_threads: 1 };
    vec![rivals(&[]).judge(), rivals(&["damon_stat"]).judge(), pages.judge_pools(), pages.judge_merged()]
}

fn of_libvirt() -> Vec<Check> {
    let silent = LibvirtSays::silent("qemu:///system", 5);
    let old = Version::from_number(8_000_000);
    let versions = Versions { library: old, daemon: Some(old), hypervisor: None };
    let guest = Guest { name: "web".into(), allowed: "0".parse().ok() };
    let says =
        LibvirtSays { uri: "qemu:///system".into(), versions: Ok(versions), guests: Some(vec![guest]) };
    let nodes = NodeSet::from_iter([0, 1]);
    vec![silent.judge(), says.judge(), silent.judge_cpusets(&nodes), says.judge_cpusets(&nodes)]
}

fn of_hook() -> Vec<Check> {
    let libvirt = LibvirtDaemon { name: "libvirtd".into(), looked: 1000 };
    let seen = Seen { libvirt: Some(&libvirt), nudges: Some(0) };
    let judge = |found| {
        let path = PathBuf::from("/etc/libvirt/hooks/qemu.d/ept-virt");
        super::hook::judge(&Hooks { path, found, others: Vec::new(), changed: Some(2000) }, seen)
    };
    [Found::Missing, Found::Foreign, Found::NotExecutable, Found::Unreadable, Found::Installed]
        .map(judge)
        .into()
}

fn of_daemon() -> Vec<Check> {
    let answers = |change: fn(&mut Status)| {
        let mut status: Status =
            serde_json::from_str(include_str!("../../tests/fixtures/busy.json")).unwrap();
        status.domains.truncate(1);
        status.domains[0].name = "web".into();
        status.domains[0].policy_error = None;
        change(&mut status);
        Daemon::Answers(Box::new(status))
    };
    let away = Daemon::Away {
        problem: "no daemon listens at /run/ept-virt/ept-virt.sock".into(),
        mend:
            "start it, as root, with `systemctl start ept-virt` (or `ept-virt daemon`), or give its --socket"
                .into(),
    };
    let wrong = "there is no setting \"gruop\"; did you mean \"group\"?".into();
    vec![
        Configuration::Unreadable("Permission denied (os error 13)".into()).judge(),
        Configuration::Wrong(wrong).judge(),
        Daemon::NotForUs.judge("0.1.0"),
        away.judge("0.1.0"),
        answers(|status| status.daemon.libvirt = "does not answer since 30 s".into()).judge("0.1.0"),
        answers(|status| status.daemon.version = "0.0.9".into()).judge("0.1.0"),
        away.judge_domains(),
        answers(|status| {
            status.domains[0].state = DomainState::Unobserved;
            let mut broken = status.domains[0].clone();
            broken.state = DomainState::Observing;
            (broken.name, broken.policy_error) = ("db".into(), Some("mode='plaice'".into()));
            status.domains.push(broken);
        })
        .judge_domains(),
        rights::judge(false),
    ]
}

fn all() -> Vec<Check> {
    [of_kernel(), of_kvm(), of_module(), of_memory(), of_pages(), of_libvirt(), of_hook(), of_daemon()]
        .concat()
}

#[test]
fn the_document_has_every_warning_with_its_mend() {
    let all = all();
    for (index, check) in all.iter().enumerate() {
        assert!(check.mend.as_ref().is_some_and(|mend| !mend.is_empty()), "{check:?}");
        assert!(all[..index].iter().all(|other| other.text != check.text), "{check:?}");
    }
    // Each of these calls makes another warning. They are counted in the sources, lest
    // one be forgotten here.
    let code = SOURCES.map(|source| source.split("#[cfg(test)]\nmod tests {").next().unwrap());
    let calls = |name: &str| code.iter().map(|code| code.matches(name).count()).sum::<usize>();
    assert_eq!(calls("Check::warn(") + calls("Check::fail("), all.len(), "warnings without a line here");
    check_table(&table(&all));
}

fn table(checks: &[Check]) -> String {
    let cell = |text: &str| text.replace('|', "\\|").replace('<', "\\<");
    let mut table = "| check | | doctor says | what mends it |\n|---|---|---|---|\n".to_owned();
    for check in checks {
        let verdict = if check.verdict == Verdict::Fail { "fail" } else { "warn" };
        let mend = cell(check.mend.as_deref().unwrap_or_default());
        table += &format!("| {} | {verdict} | {} | {mend} |\n", check.check, cell(&check.text));
    }
    table
}

/// Holds the table of the document against this one.
fn check_table(table: &str) {
    const BEGIN: &str = "<!-- doctor -->\n";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/OPERATING.md");
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(BEGIN).unwrap();
    let (found, after) = rest.split_once("<!-- end -->").unwrap();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, format!("{before}{BEGIN}{table}<!-- end -->{after}")).unwrap();
    } else {
        assert!(found == table, "docs/OPERATING.md differs; the table is now:\n{table}");
    }
}
