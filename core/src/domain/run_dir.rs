// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where a libvirt daemon keeps the pid files of its QEMU processes.

use std::env;
use std::path::{Path, PathBuf};

/// Of the system's daemon, be it libvirtd or virtqemud.
const SYSTEM: &str = "/run/libvirt/qemu";

/// Of a user's daemon, within the user's directory for it.
const SESSION: &str = "qemu/run";

/// The directory of the daemon behind `uri`, which is on this host.
pub fn of(uri: &str) -> PathBuf {
    let is_root = nix::unistd::geteuid().is_root();
    of_caller(uri, is_root, |name| env::var_os(name).map(PathBuf::from))
}

/// As [`of`], for a caller with this user and this environment.
///
/// A user's daemon has its sockets and its state in one directory, so that a
/// `socket=` in the URI tells it, too: that is how root follows a user's domains.
/// For root without that, `qemu:///session` is the system's daemon
/// (virConnectValidateURIPath() in libvirt's src/driver.c).
fn of_caller(uri: &str, is_root: bool, variable: impl Fn(&str) -> Option<PathBuf>) -> PathBuf {
    let (address, query) = uri.split_once('?').unwrap_or((uri, ""));
    let is_session = address.split_once("://").is_some_and(|(_, rest)| rest.ends_with("/session"));
    let socket = query.split('&').find_map(|pair| pair.strip_prefix("socket="));
    let beside_socket = socket.and_then(|socket| Path::new(socket).parent());
    match (is_session, beside_socket) {
        (true, Some(dir)) => dir.join(SESSION),
        (true, None) if !is_root => user_dir(variable).join(SESSION),
        _ => SYSTEM.into(),
    }
}

/// As virGetUserRuntimeDirectory() of libvirt's src/util/virutil.c.
fn user_dir(variable: impl Fn(&str) -> Option<PathBuf>) -> PathBuf {
    let set = |name: &str| variable(name).filter(|path| !path.as_os_str().is_empty());
    let base = set("XDG_RUNTIME_DIR").or_else(|| set("XDG_CACHE_HOME"));
    let base = base.or_else(|| Some(set("HOME")?.join(".cache")));
    base.unwrap_or_else(|| "/".into()).join("libvirt")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_user(uri: &str, variables: &[(&str, &str)]) -> String {
        let variable =
            |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| value.into());
        of_caller(uri, false, variable).display().to_string()
    }

    fn of_root(uri: &str) -> String {
        of_caller(uri, true, |_| Some("/run/user/0".into())).display().to_string()
    }

    #[test]
    fn the_system_s_daemons_have_one_place() {
        let runtime = [("XDG_RUNTIME_DIR", "/run/user/1000")];
        for uri in [
            "qemu:///system",
            "qemu+unix:///system?socket=/run/libvirt/virtqemud-sock",
            "test:///default",
            "",
            "session",
        ] {
            assert_eq!(of_user(uri, &runtime), SYSTEM, "{uri}");
            assert_eq!(of_root(uri), SYSTEM, "{uri}");
        }
        assert_eq!(of_root("qemu:///session"), SYSTEM);
    }

    #[test]
    fn a_user_s_daemon_has_the_user_s_place() {
        let variables =
            [("XDG_RUNTIME_DIR", "/run/user/1000"), ("XDG_CACHE_HOME", "/c"), ("HOME", "/home/a")];
        let session = |from: usize| of_user("qemu:///session", &variables[from..]);
        assert_eq!(session(0), "/run/user/1000/libvirt/qemu/run");
        assert_eq!(session(1), "/c/libvirt/qemu/run");
        assert_eq!(session(2), "/home/a/.cache/libvirt/qemu/run");
        assert_eq!(of_user("qemu:///session", &[("XDG_RUNTIME_DIR", "")]), "/libvirt/qemu/run");
        assert_eq!(of_user("qemu+unix:///session?mode=auto", &variables), session(0));
    }

    #[test]
    fn root_follows_a_user_s_daemon_by_its_socket() {
        let expected = "/run/user/1000/libvirt/qemu/run";
        for socket in ["libvirt-sock", "virtqemud-sock"] {
            let uri = format!("qemu+unix:///session?mode=direct&socket=/run/user/1000/libvirt/{socket}");
            assert_eq!(of_root(&uri), expected);
            assert_eq!(of_user(&uri, &[]), expected);
        }
    }
}
