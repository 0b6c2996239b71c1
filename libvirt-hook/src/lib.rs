// SPDX-License-Identifier: MIT OR Apache-2.0
//! What libvirt's hook for QEMU domains does, without the program around it.

pub mod nudge;
pub mod veto;

use std::ffi::OsStr;
use std::time::Duration;

/// All that the hook may take.
pub const TIME_LIMIT: Duration = Duration::from_millis(200);

/// Of it, what is left to the kernel, which loads the program and takes its
/// memory back.
pub const TIME_TO_EXIT: Duration = Duration::from_millis(30);

/// Of it, what is kept to say that the daemon did not answer.
pub const TIME_TO_TELL: Duration = Duration::from_millis(40);

/// What an operation of libvirt asks of the hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Judge whether the domain may start: [`veto::reason`].
    Judge,
    /// Send the daemon this line: [`nudge::send`].
    Nudge(Vec<u8>),
    /// Nothing.
    Nothing,
}

impl Action {
    /// What is to be done when libvirt does `operation` with `domain`. libvirt's
    /// further words, SUB-OPERATION and EXTRA, change nothing.
    pub fn of(domain: &OsStr, operation: &OsStr) -> Self {
        if operation == "prepare" {
            Action::Judge
        } else if nudge::wanted(operation) {
            Action::Nudge(nudge::line(domain, operation))
        } else {
            Action::Nothing
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As docs/PROMISES.md has it.
    #[test]
    fn the_limit_is_200_milliseconds() {
        assert_eq!(TIME_LIMIT, Duration::from_millis(200));
        assert!(TIME_TO_EXIT + TIME_TO_TELL < TIME_LIMIT / 2);
    }

    #[test]
    fn each_operation_has_its_action() {
        let action = |operation: &str| Action::of(OsStr::new("vm1"), OsStr::new(operation));
        assert_eq!(action("prepare"), Action::Judge);
        for operation in ["started", "stopped", "release", "reconnect", "attach"] {
            let line = format!("{{\"v\":1,\"cmd\":\"nudge\",\"op\":\"{operation}\",\"domain\":\"vm1\"}}\n");
            assert_eq!(action(operation), Action::Nudge(line.into_bytes()));
        }
        for operation in ["start", "migrate", "restore", "", "Prepare", "prepare "] {
            assert_eq!(action(operation), Action::Nothing, "{operation}");
        }
    }
}
