// SPDX-License-Identifier: MIT OR Apache-2.0
//! libvirt's hook: installed, and seen by libvirt.

use crate::hook::{Found, Hooks};

use super::processes::LibvirtDaemon;
use super::report::Check;

/// What tells whether libvirt knows of the hook.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen<'a> {
    /// libvirt's daemon, when it runs.
    pub libvirt: Option<&'a LibvirtDaemon>,
    /// How often the hook called our daemon, when that answers.
    pub nudges: Option<u64>,
}

/// Whether a domain that starts is noticed at once.
pub fn judge(hooks: &Hooks, seen: Seen<'_>) -> Check {
    const NAME: &str = "hook";
    const WITHOUT: &str =
        "changes are noticed seconds later, and required=\"yes\" keeps no domain from starting";
    let path = hooks.path.display();
    match hooks.found {
        Found::Missing => Check::warn(NAME, format!("is not installed: {WITHOUT}"), "ept-virt hook install"),
        Found::Foreign => Check::warn(
            NAME,
            format!("{path} is not ours: {WITHOUT}"),
            "move that file to another name in the same directory; then `ept-virt hook install`",
        ),
        Found::NotExecutable => Check::warn(
            NAME,
            format!("{path} is not executable, and libvirt leaves it out: {WITHOUT}"),
            "ept-virt hook install",
        ),
        Found::Unreadable => Check::warn(
            NAME,
            format!("{path} can not be read, so whose it is is not known"),
            "run this as root",
        ),
        Found::Installed if seen.nudges.is_some_and(|nudges| nudges > 0) => {
            Check::ok(NAME, format!("{path} is installed, and libvirt calls it"))
        }
        Found::Installed => match seen.libvirt {
            Some(libvirt) if hooks.others.is_empty() && hooks.changed > Some(libvirt.looked) => Check::warn(
                NAME,
                format!(
                    "{path} came after {} had started, as the first hook; unless it has been told to reload since, it does not know",
                    libvirt.name
                ),
                format!("systemctl reload {}", libvirt.name),
            ),
            Some(_) => Check::ok(NAME, format!("{path} is installed, and libvirt knows it")),
            None => Check::ok(NAME, format!("{path} is installed; libvirt will see it when it starts")),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::doctor::report::Verdict::{Ok, Warn};

    #[test]
    fn a_first_hook_needs_a_reload_unless_it_was_called_already() {
        let libvirt = LibvirtDaemon { name: "virtqemud".into(), looked: 1000 };
        let hooks = |found, others: &[&str], changed| Hooks {
            path: PathBuf::from("/hooks/qemu.d/ept-virt"),
            found,
            others: others.iter().map(PathBuf::from).collect(),
            changed: Some(changed),
        };
        let with = |nudges| Seen { libvirt: Some(&libvirt), nudges };
        let mine = |others: &[&str], changed| hooks(Found::Installed, others, changed);
        for (hooks, seen, verdict, mend) in [
            (mine(&[], 2000), with(None), Warn, "systemctl reload virtqemud"),
            (mine(&[], 2000), with(Some(0)), Warn, "systemctl reload virtqemud"),
            (mine(&[], 2000), with(Some(1)), Ok, ""),
            (mine(&[], 500), with(None), Ok, ""),
            (mine(&["/hooks/qemu"], 2000), with(None), Ok, ""),
            (mine(&[], 2000), Seen::default(), Ok, ""),
            (hooks(Found::Missing, &[], 0), with(None), Warn, "ept-virt hook install"),
            (hooks(Found::NotExecutable, &[], 0), with(None), Warn, "ept-virt hook install"),
            (hooks(Found::Foreign, &[], 0), with(None), Warn, "another name"),
            (hooks(Found::Unreadable, &[], 0), with(None), Warn, "root"),
        ] {
            let check = judge(&hooks, seen);
            assert_eq!(check.verdict, verdict, "{check:?}");
            assert!(check.mend.unwrap_or_default().contains(mend));
        }
    }
}
