// SPDX-License-Identifier: MIT OR Apache-2.0
//! One daemon at a time for a QEMU: two would clear each other's accessed bits, and
//! move each other's pages back.
//!
//! Daemons with sockets and libvirts of their own do not know of each other otherwise.
//! The claim is a lock on a file of root's, which ends with the process that holds it.

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind as Io};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::fcntl::Flock;

use super::files;

/// The same for all daemons, whatever else they are told. Its parent is also the
/// directory of the socket, which a group may enter.
pub const CLAIMS_DIR: &str = "/run/ept-virt/claims";

/// A claim on a process.
pub struct Claim {
    path: PathBuf,
    file: Flock<File>,
}

impl Claim {
    /// Claims the process `pid`, by a file in `dir`. [`Io::WouldBlock`] when another
    /// daemon has it.
    pub fn take(dir: &Path, pid: i32) -> io::Result<Self> {
        if let Some(parent) = dir.parent() {
            DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
        }
        files::own_dir(dir)?;
        let path = dir.join(pid.to_string());
        loop {
            let claim = Self { file: files::lock_alone(&path)?, path: path.clone() };
            // Whoever had it may have removed the file between our opening and locking.
            if claim.holds() {
                return Ok(claim);
            }
        }
    }

    /// Whether the file is still the one that others look at: systemd removes the
    /// directory with the service of another daemon.
    pub fn holds(&self) -> bool {
        let key = |data: fs::Metadata| (data.dev(), data.ino());
        let ours = self.file.metadata().map(key);
        matches!((ours, fs::symlink_metadata(&self.path).map(key)), (Ok(ours), Ok(there)) if ours == there)
    }

    /// Takes it again if its file was removed.
    pub fn renew(&mut self) -> io::Result<()> {
        if self.holds() {
            return Ok(());
        }
        let name = self.path.file_name().and_then(|name| name.to_str()?.parse().ok());
        match (self.path.parent().map(Path::to_owned), name) {
            (Some(dir), Some(pid)) => Self::take(&dir, pid).map(|claim| *self = claim),
            _ => Err(Io::InvalidInput.into()),
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // Before the lock goes, so that no one removes what another has claimed.
        if self.holds() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Why a claim could not be had, in plain words.
pub fn explain(error: &io::Error) -> String {
    match error.kind() {
        Io::WouldBlock => {
            "another ept-virt daemon, or a worker that hangs, observes it already: stop one of the two".into()
        }
        _ => format!("it can not be claimed in {CLAIMS_DIR}: {error}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scratch::Scratch;

    #[test]
    fn a_process_has_one_daemon() {
        let root = Scratch::new();
        let dir = root.join("run/claims");
        let mut first = Claim::take(&dir, 7).unwrap();
        let error = Claim::take(&dir, 7).map(drop).unwrap_err();
        assert_eq!(error.kind(), Io::WouldBlock);
        assert!(explain(&error).contains("another ept-virt daemon"));
        let other = Claim::take(&dir, 8).unwrap();
        // As systemd does when another daemon's service ends.
        fs::remove_dir_all(&dir).unwrap();
        assert!(!first.holds());
        first.renew().unwrap();
        assert!(first.holds());
        drop(other);
        assert_eq!(Claim::take(&dir, 7).map(drop).unwrap_err().kind(), Io::WouldBlock);
        // Too late: somebody else has it.
        fs::remove_file(dir.join("7")).unwrap();
        let second = Claim::take(&dir, 7).unwrap();
        assert_eq!(first.renew().unwrap_err().kind(), Io::WouldBlock);
        drop(first);
        assert!(second.holds(), "what is another's is not removed");
        drop(second);
        assert!(!dir.join("7").exists());
    }
}
