// SPDX-License-Identifier: MIT OR Apache-2.0
//! Our daemon, and what it says about its domains.

use std::path::Path;
use std::time::Duration;

use ept_virt_core::wire::{DomainState, DomainStatus, Status};
use nix::errno::Errno;
use nix::unistd::{AccessFlags, access};

use crate::client;

use super::report::Check;

/// How long the daemon may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// The daemon, as a try to ask it shows it.
#[derive(Clone, Debug, PartialEq)]
pub enum Daemon {
    /// It answers.
    Answers(Box<Status>),
    /// It listens, and we may not ask.
    NotForUs,
    /// It does not answer.
    Away {
        /// In plain words.
        problem: String,
        /// What to do.
        mend: String,
    },
}

impl Daemon {
    /// Asks it.
    pub fn ask(socket: &Path) -> Self {
        match client::status_within(socket, None, PATIENCE) {
            Ok(status) => Daemon::Answers(Box::new(status)),
            Err(_) if access(socket, AccessFlags::W_OK) == Err(Errno::EACCES) => Daemon::NotForUs,
            Err(failure) => {
                let mend = failure.what_to_do().unwrap_or("systemctl restart ept-virt").to_owned();
                Daemon::Away { problem: failure.message().to_owned(), mend }
            }
        }
    }

    /// Its answer.
    pub fn status(&self) -> Option<&Status> {
        match self {
            Daemon::Answers(status) => Some(status),
            _ => None,
        }
    }

    /// Whether it runs, in this version, and hears libvirt.
    pub fn judge(&self, our_version: &str) -> Check {
        const NAME: &str = "daemon";
        let daemon = match self {
            Daemon::Answers(status) => &status.daemon,
            Daemon::NotForUs => {
                return Check::warn(NAME, "runs, and answers only root and its group", "run this as root");
            }
            Daemon::Away { problem, mend } => return Check::fail(NAME, problem.clone(), mend.clone()),
        };
        if daemon.libvirt != "connected" {
            return Check::fail(
                NAME,
                format!("runs, but has no connection to {}: {}", daemon.libvirt_uri, daemon.libvirt),
                "see libvirt above; the daemon tries again by itself",
            );
        }
        if daemon.version != our_version {
            return Check::warn(
                NAME,
                format!("runs in version {}, while this program is {our_version}", daemon.version),
                "systemctl restart ept-virt; guests do not notice",
            );
        }
        Check::ok(NAME, format!("runs as pid {}, and follows {}", daemon.pid, daemon.libvirt_uri))
    }

    /// Whether all domains are observed, as far as they are to be.
    pub fn judge_domains(&self) -> Check {
        const NAME: &str = "domains";
        let Some(status) = self.status() else {
            return Check::warn(NAME, "not known without the daemon", "see daemon above");
        };
        let names = |is_in_trouble: fn(&DomainStatus) -> bool| {
            let troubled = status.domains.iter().filter(|domain| is_in_trouble(domain));
            troubled.map(|domain| format!("{:?}", domain.name)).collect::<Vec<_>>().join(", ")
        };
        let unobserved = names(|domain| domain.state == DomainState::Unobserved);
        let broken = names(|domain| domain.policy_error.is_some());
        let mut problems = Vec::new();
        if !unobserved.is_empty() {
            problems.push(format!("not observed: {unobserved}"));
        }
        if !broken.is_empty() {
            problems.push(format!("whose own policy is not in force: {broken}"));
        }
        match (problems.as_slice(), status.domains.len()) {
            ([], 0) => Check::ok(NAME, "none runs"),
            ([], count) => Check::ok(NAME, format!("{count} running, all observed that are to be")),
            (problems, count) => Check::warn(
                NAME,
                format!("of {count} running, {}", problems.join("; ")),
                "`ept-virt status DOMAIN` says why, and what to do",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::report::Verdict::{Fail, Ok as Good, Warn};

    fn busy() -> Status {
        serde_json::from_str(include_str!("../../tests/fixtures/busy.json")).unwrap()
    }

    #[test]
    fn says_what_is_wrong_with_the_daemon() {
        let answers = |change: fn(&mut Status)| {
            let mut status = busy();
            change(&mut status);
            Daemon::Answers(Box::new(status))
        };
        let away = Daemon::Away { problem: "no daemon listens".into(), mend: "start it".into() };
        for (daemon, verdict, words) in [
            (answers(|_| ()), Good, "pid 812"),
            (answers(|status| status.daemon.version = "0.0.9".into()), Warn, "0.0.9"),
            (answers(|status| status.daemon.libvirt = "gone".into()), Fail, "no connection"),
            (Daemon::NotForUs, Warn, "only root"),
            (away, Fail, "no daemon listens"),
        ] {
            let check = daemon.judge("0.1.0");
            assert_eq!(check.verdict, verdict, "{check:?}");
            assert!(check.text.contains(words), "{check:?}");
        }
    }

    #[test]
    fn names_domains_in_trouble() {
        let check = Daemon::Answers(Box::new(busy())).judge_domains();
        assert_eq!(check.verdict, Warn);
        assert!(
            check.text.starts_with("of 3 running, not observed: \"tcg\"; whose own policy"),
            "{}",
            check.text
        );
        let quiet = Status { domains: Vec::new(), ..busy() };
        assert_eq!(Daemon::Answers(Box::new(quiet)).judge_domains().verdict, Good);
        assert_eq!(Daemon::NotForUs.judge_domains().verdict, Warn);
    }
}
