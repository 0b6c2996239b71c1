// SPDX-License-Identifier: MIT OR Apache-2.0
use super::*;
use crate::kernel_checks;

#[test]
fn names_are_unique_and_found() {
    let names = names();
    for name in &names {
        assert_eq!(names.iter().filter(|other| *other == name).count(), 1, "{name}");
        assert_eq!(named(&[name.to_string()]).len(), 1);
    }
    assert!(named(&["no-such-boot".to_owned()]).is_empty());
}

#[test]
fn every_line_runs_on_both_makers() {
    for line in [Line::V6_1, Line::V6_12, Line::V7_3] {
        for amd in [true, false] {
            let runs = |boot: &&Boot| boot.kernel == line && (boot.host == Host::Amd) == amd;
            assert!(TESTS.iter().any(|boot| runs(&boot)), "{line}, amd: {amd}");
        }
    }
}

#[test]
fn every_patch_runs_on_both_makers() {
    let patched: Vec<&Boot> = all().chain(BENCHES).filter(|boot| boot.patched).collect();
    assert!(patched.iter().all(|boot| kernel_checks::LINES.contains(&boot.kernel)));
    for line in kernel_checks::LINES {
        for amd in [true, false] {
            let runs = |boot: &&Boot| boot.patched && boot.kernel == line && (boot.host == Host::Amd) == amd;
            assert!(TESTS.iter().any(|boot| runs(&boot)), "{line}, amd: {amd}");
        }
    }
}

#[test]
fn chosen_tests_replace_those_of_the_boot() {
    let boot = small("x", Cpu::Haswell, Tests::Only(&["a", "b"]));
    assert!(boot.command_line(&Wishes::default()).contains("ept.tests=a,b "));
    let wishes = Wishes { only: vec!["c".into()], words: vec!["ept.slow=2".into()], timeout: None };
    let only = boot.command_line(&wishes);
    assert!(only.contains(" ept.slow=2 "), "{only}");
    assert!(only.contains("ept.tests=c ") && !only.contains("a,b"), "{only}");
    assert!(only.ends_with("-- init-micro"), "{only}");
}

#[test]
fn command_lines_fit_the_kernels_buffer() {
    for boot in all().chain(BENCHES) {
        assert!(boot.command_line(&Wishes::default()).len() < 2000, "{}", boot.name);
    }
}
