// SPDX-License-Identifier: MIT OR Apache-2.0
//! Completion in bash, zsh and fish. The shell asks this program itself, which
//! knows its commands and options, and asks daemon or libvirt for domains; the
//! script that `ept-virt completion SHELL` prints only tells the shell to.

use std::env;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{CommandFactory, ValueEnum};
use clap_complete::env::{Bash, CompleteEnv, EnvCompleter, Fish, Zsh};
use clap_complete::{ArgValueCandidates, CompletionCandidate};
use ept_virt_core::domain::{self, DEFAULT_URI};
use ept_virt_core::policy::SETTINGS;
use ept_virt_core::wire::DEFAULT_SOCKET;

use crate::failure::Failure;
use crate::{Cli, bounded, client, output};

/// By which the script calls this program.
const VARIABLE: &str = "EPT_VIRT_COMPLETE";

/// Nobody waits longer for a key.
const PATIENCE: Duration = Duration::from_millis(300);

/// Of that, what the first who is asked may take.
const FIRST_PATIENCE: Duration = Duration::from_millis(150);

/// Shells that can be completed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    /// For ~/.bashrc: source <(ept-virt completion bash)
    Bash,
    /// For ~/.zshrc, after compinit: source <(ept-virt completion zsh)
    Zsh,
    /// For ~/.config/fish/config.fish: ept-virt completion fish | source
    Fish,
}

/// Answers a shell that asks what could come next, and ends; returns when no
/// shell asks.
pub fn answer_shell() {
    CompleteEnv::with_factory(Cli::command).var(VARIABLE).complete();
}

/// Prints the script for a shell.
pub fn script(shell: Shell) -> Result<(), Failure> {
    let completer: &dyn EnvCompleter = match shell {
        Shell::Bash => &Bash,
        Shell::Zsh => &Zsh,
        Shell::Fish => &Fish,
    };
    let mut script = Vec::new();
    completer
        .write_registration(VARIABLE, "ept-virt", "ept-virt", "ept-virt", &mut script)
        .map_err(|error| Failure::refused(format!("cannot write the script: {error}")))?;
    output::write_text(&String::from_utf8_lossy(&script))
}

/// Names of running domains.
pub fn running() -> ArgValueCandidates {
    ArgValueCandidates::new(|| names(&[by_daemon, by_libvirt]))
}

/// Names of all domains, running or defined.
pub fn defined() -> ArgValueCandidates {
    ArgValueCandidates::new(|| names(&[by_libvirt, by_daemon]))
}

/// Settings of a policy, each with its meaning.
pub fn settings() -> ArgValueCandidates {
    ArgValueCandidates::new(|| {
        let candidate = |setting: &ept_virt_core::policy::Setting| {
            CompletionCandidate::new(format!("{}=", setting.path())).help(Some(setting.help.into()))
        };
        SETTINGS.iter().map(candidate).collect()
    })
}

/// Someone who may know names, within a time.
type Source = fn(Duration) -> Option<Vec<String>>;

/// The names that the first knows who answers.
fn names(sources: &[Source]) -> Vec<CompletionCandidate> {
    let deadline = Instant::now() + PATIENCE;
    let left = || deadline.saturating_duration_since(Instant::now());
    let ask = |source: &Source| source(left().min(FIRST_PATIENCE)).filter(|names| !names.is_empty());
    sources.iter().find_map(ask).unwrap_or_default().into_iter().map(CompletionCandidate::new).collect()
}

fn by_daemon(limit: Duration) -> Option<Vec<String>> {
    let socket = typed(&["--socket"]).map_or_else(|| Path::new(DEFAULT_SOCKET).to_owned(), PathBuf::from);
    let status = client::status_within(&socket, None, limit).ok()?;
    Some(status.domains.into_iter().map(|domain| domain.name).collect())
}

fn by_libvirt(limit: Duration) -> Option<Vec<String>> {
    let variable = || env::var("LIBVIRT_DEFAULT_URI").ok().filter(|uri| !uri.is_empty());
    let uri = typed(&["-c", "--connect"]).or_else(variable).unwrap_or_else(|| DEFAULT_URI.into());
    if !is_asked(&uri) {
        return None;
    }
    bounded::within(limit, move || domain::names(&uri).ok())?
}

/// Whether the libvirt at `uri` may be asked because of a mere TAB: one that runs on
/// this host. Others would have ssh ask for a password in the middle of a line, or a
/// distant host be called at each key. A session's or an embedded libvirt would be
/// started by the question; and a name without a scheme is an alias for whatever
/// libvirt.conf says.
fn is_asked(uri: &str) -> bool {
    let Some((scheme, rest)) = uri.split_once("://") else { return false };
    let transport = scheme.split_once('+').map(|(_, transport)| transport);
    let path = rest.split(['?', '#']).next().unwrap_or_default();
    // Without a transport, a host is asked by TLS.
    matches!(transport, None | Some("unix"))
        && path.starts_with('/')
        && !matches!(path.trim_end_matches('/'), "/session" | "/embed")
}

/// What was typed for an option, so far as the shell has handed it over.
fn typed(options: &[&str]) -> Option<String> {
    value_of(options, &env::args_os().filter_map(|word| word.into_string().ok()).collect::<Vec<_>>())
}

fn value_of(options: &[&str], words: &[impl AsRef<OsStr>]) -> Option<String> {
    let words: Vec<&str> = words.iter().filter_map(|word| word.as_ref().to_str()).collect();
    let after = |pair: &[&str]| options.contains(&pair[0]).then(|| pair[1].to_owned());
    let joined = |word: &&str| {
        let (option, value) = word.split_once('=')?;
        options.contains(&option).then(|| value.to_owned())
    };
    words.windows(2).find_map(after).or_else(|| words.iter().find_map(joined))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_on_the_line_are_heeded() {
        let options = ["-c", "--connect"];
        for (line, value) in [
            ("ept-virt -c test:///default status x", Some("test:///default")),
            ("ept-virt status --connect=qemu:///session x", Some("qemu:///session")),
            ("ept-virt status -c", None),
            ("ept-virt status --colour=x", None),
        ] {
            let words: Vec<&str> = line.split(' ').collect();
            assert_eq!(value_of(&options, &words).as_deref(), value, "{line}");
        }
    }

    #[test]
    fn no_key_makes_a_connection_to_another_host() {
        for uri in [
            DEFAULT_URI,
            "qemu+unix:///system",
            "qemu:///system?socket=/run/libvirt/virtqemud-sock",
            "qemu+unix:///system?socket=/a://b",
            "test:///default",
            "xen:///",
        ] {
            assert!(is_asked(uri), "{uri}");
        }
        for uri in [
            "qemu+ssh://host/system",
            "qemu+ssh:///system",
            "qemu+libssh2://user@host:22/system?keyfile=k",
            "qemu+tls://host/system",
            "qemu+tcp://[::1]/system",
            "qemu+ext:///system?command=/bin/x",
            "qemu://host/system",
            "qemu+unix://host/system",
            "qemu:///session",
            "qemu+unix:///session?socket=/run/s",
            "qemu:///session/",
            "qemu:///embed?root=/tmp",
            "qemu+",
            "hail",
            "",
        ] {
            assert!(!is_asked(uri), "{uri}");
        }
    }

    #[test]
    fn the_first_who_knows_names_is_believed() {
        fn none(_: Duration) -> Option<Vec<String>> {
            None
        }
        fn nobody(_: Duration) -> Option<Vec<String>> {
            Some(Vec::new())
        }
        fn two(_: Duration) -> Option<Vec<String>> {
            Some(vec!["a".into(), "b".into()])
        }
        assert_eq!(names(&[none, nobody, two, none]).len(), 2);
        assert_eq!(names(&[none, nobody]).len(), 0);
    }
}
