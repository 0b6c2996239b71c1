// SPDX-License-Identifier: MIT OR Apache-2.0
//! Opening the daemon's own files. It runs as root, and is told where they lie: no
//! link that somebody else may have left there is followed.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind as Io};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag};

/// Mode bits of those who may change what is in a directory and not its own.
const WRITABLE_BY_OTHERS: u32 = 0o022;

fn options() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.mode(0o600).custom_flags(OFlag::O_NOFOLLOW.bits());
    options
}

/// Opens a file for reading.
pub fn open(path: &Path) -> io::Result<File> {
    options().read(true).open(path)
}

/// Makes a file that nobody else has open, in place of what is there.
pub fn create_anew(path: &Path) -> io::Result<File> {
    remove(path)?;
    options().write(true).create_new(true).open(path)
}

/// Removes a file, if it is there.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != Io::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Removes a socket, if one is there, and nothing else.
pub fn remove_socket(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            Err(io::Error::new(Io::AlreadyExists, "what stands there is no socket, and is left alone"))
        }
        Ok(_) => remove(path),
        Err(error) if error.kind() == Io::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Takes a lock that one process at a time can have; [`Io::WouldBlock`] when another
/// one has it. Also a process that is killed lets it go.
pub fn lock_alone(path: &Path) -> io::Result<Flock<File>> {
    let file = options().write(true).create(true).truncate(false).open(path)?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
        Errno::EWOULDBLOCK => Io::WouldBlock.into(),
        other => other.into(),
    })
}

/// Makes a directory, or takes one whose files nobody else can exchange.
pub fn own_dir(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    let refuse = |why: String| Err(io::Error::new(Io::PermissionDenied, why));
    let us = nix::unistd::geteuid().as_raw();
    // A link to it may be an administrator's, but not anybody's.
    let (named, dir) = (fs::symlink_metadata(path)?, fs::metadata(path)?);
    if let Some(other) = [named.uid(), dir.uid()].into_iter().find(|uid| *uid != us) {
        return refuse(format!("it belongs to the user {other}, and has to belong to {us}"));
    }
    let mode = dir.mode() & 0o7777;
    match mode & WRITABLE_BY_OTHERS {
        0 => Ok(()),
        _ => refuse(format!("its mode is {mode:04o}, so that others may write to it: `chmod go-w` it")),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::scratch::Scratch;

    #[test]
    fn no_link_is_followed() {
        let dir = Scratch::new();
        let (victim, link) = (dir.join("victim"), dir.join("link"));
        fs::write(&victim, "precious").unwrap();
        symlink(&victim, &link).unwrap();
        assert!(lock_alone(&link).is_err());
        assert!(open(&link).is_err());
        drop(create_anew(&link).unwrap());
        assert!(fs::symlink_metadata(&link).unwrap().is_file());
        assert_eq!(fs::metadata(&link).unwrap().mode() & 0o777, 0o600);
        assert_eq!(fs::read(&victim).unwrap(), b"precious");
    }

    #[test]
    fn only_sockets_are_removed_as_sockets() {
        let dir = Scratch::new();
        let path = dir.join("socket");
        remove_socket(&path).unwrap();
        drop(UnixListener::bind(&path).unwrap());
        let link = dir.join("link");
        symlink(&path, &link).unwrap();
        assert!(remove_socket(&link).is_err());
        remove_socket(&path).unwrap();
        assert!(!path.exists());
        fs::write(&path, "precious").unwrap();
        let error = remove_socket(&path).unwrap_err();
        assert!(error.to_string().contains("no socket"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    }

    #[test]
    fn a_lock_has_one_holder() {
        let dir = Scratch::new();
        let path = dir.join("lock");
        let held = lock_alone(&path).unwrap();
        assert_eq!(lock_alone(&path).map(drop).unwrap_err().kind(), Io::WouldBlock);
        drop(held);
        lock_alone(&path).unwrap();
    }

    #[test]
    fn a_directory_of_others_is_not_taken() {
        let dir = Scratch::new();
        let set = |mode| fs::set_permissions(&*dir, fs::Permissions::from_mode(mode)).unwrap();
        for mode in [0o770, 0o702, 0o1777] {
            set(mode);
            let error = own_dir(&dir).unwrap_err();
            assert!(error.to_string().contains("others may write"), "{error}");
        }
        set(0o755);
        own_dir(&dir).unwrap();
        let link = dir.join("link");
        symlink(&*dir, &link).unwrap();
        own_dir(&link).unwrap();
        if nix::unistd::geteuid().is_root() {
            std::os::unix::fs::lchown(&link, Some(65534), None).unwrap();
            assert!(own_dir(&link).unwrap_err().to_string().contains("user 65534"));
        } else {
            assert!(own_dir(Path::new("/")).unwrap_err().to_string().contains("user 0"));
        }
    }
}
