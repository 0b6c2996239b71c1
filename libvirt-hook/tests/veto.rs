// SPDX-License-Identifier: MIT OR Apache-2.0
//! The one case in which the hook fails, so that libvirt does not start the
//! domain and virsh shows what the hook says.

mod common;

use std::fs;
use std::os::unix::net::UnixListener;

use common::{DAEMONS, Daemon, Hook, Kind, Scratch, words};

fn domain(attributes: &str) -> String {
    format!(
        "<domain type='kvm'><name>vm1</name><metadata><placement \
         xmlns='https://ept-virt.org/xmlns/placement/1.0' {attributes}/></metadata></domain>"
    )
}

/// One line, which says why, but for a configuration that is shown where it is wrong.
fn refused(hook: &Hook, attributes: &str, why: &str) {
    let (code, said) = hook.prepare(&domain(attributes));
    assert_eq!(code, Some(1), "{attributes}: {said}");
    let begin = "ept-virt-hook: the domain's placement policy is required, and can not be served: ";
    let reason =
        said.strip_prefix(begin).and_then(|said| said.strip_suffix('\n')).unwrap_or_else(|| panic!("{said}"));
    assert!(reason.contains(why) && (why == "ept-virt.toml" || !reason.contains(char::is_control)), "{said}");
}

#[test]
fn only_a_required_policy_keeps_a_domain_from_starting() {
    let scratch = Scratch::new();
    let hook = scratch.hook();
    for harmless in [domain("mode='observe'"), domain("mode='plase'"), "<domain/>".into(), "<domain".into()] {
        assert_eq!(hook.prepare(&harmless), (Some(0), String::new()), "{harmless}");
    }
    refused(&hook, "required='yes' mode='plase'", "did you mean \"place\"?");
    refused(&hook, "required='yes' mode='&#10;&#x9b;31m'", "is unknown");
    refused(&hook, "required='yes'", "modprobe kvm_ept_sample");
    fs::create_dir(scratch.path("proc")).unwrap();
    fs::write(scratch.path("proc/kvm_ept_sample"), "").unwrap();
    refused(&hook, "required='yes'", "systemctl start ept-virt");
    let _daemon = UnixListener::bind(scratch.socket()).unwrap();
    assert_eq!(hook.prepare(&domain("required='yes'")), (Some(0), String::new()));
    refused(&hook, "required='yes' mode='place'", "the host's memory is not known");
    fs::create_dir_all(scratch.path("etc/ept-virt")).unwrap();
    fs::write(scratch.path("etc/ept-virt/ept-virt.toml"), "nonsense").unwrap();
    refused(&hook, "required='yes'", "ept-virt.toml");
    // A broken configuration is no domain's fault.
    assert_eq!(hook.prepare(&domain("mode='place'")), (Some(0), String::new()));
}

/// An invalid policy is refused whatever the daemon does, and only at prepare.
#[test]
fn nothing_but_prepare_is_refused() {
    let invalid = domain("required='yes' mode='plase'");
    for kind in DAEMONS {
        let daemon = Daemon::new(kind);
        refused(&daemon.hook(), "required='yes' mode='plase'", "did you mean \"place\"?");
        for operation in
            ["start", "started", "stopped", "release", "migrate", "restore", "reconnect", "attach"]
        {
            daemon.hook().run(&words(&["vm1", operation, "begin", "-"]), invalid.as_bytes());
        }
    }
}

/// Who is required to be served is not, by a daemon that takes no calls.
#[test]
fn a_daemon_that_is_not_there_can_not_serve() {
    for kind in DAEMONS {
        let daemon = Daemon::new(kind);
        let hook = daemon.hook();
        fs::create_dir(hook.root.join("proc")).unwrap();
        fs::write(hook.root.join("proc/kvm_ept_sample"), "").unwrap();
        match kind {
            Kind::None | Kind::Dead => refused(&hook, "required='yes'", "systemctl start ept-virt"),
            Kind::Silent | Kind::Stuck => assert_eq!(hook.prepare(&domain("required='yes'")).0, Some(0)),
            Kind::Full => {
                // Unless the machine is so busy that no time is left to refuse.
                let (code, said) = hook.prepare(&domain("required='yes'"));
                let in_time = code == Some(1) && said.contains("systemctl start ept-virt");
                assert!(in_time || code == Some(0) && said.contains("in time"), "{code:?} {said}");
            }
        }
        assert_eq!(hook.prepare(&domain("")), (Some(0), String::new()));
    }
}

/// More than is read.
#[test]
fn a_doubt_is_no_veto() {
    let scratch = Scratch::new();
    let head =
        "<domain><metadata><placement xmlns='https://ept-virt.org/xmlns/placement/1.0' required='yes'/>";
    let huge = format!("{head}</metadata><!--{}--></domain>", "x".repeat(17 << 20));
    let (code, said) = scratch.hook().prepare(&huge);
    assert_eq!(code, Some(0));
    assert!(said.contains("whatever its policy says"), "{said}");
}
