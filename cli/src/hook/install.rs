// SPDX-License-Identifier: MIT OR Apache-2.0
//! Putting the hook there and taking it away, each in one step: libvirt may call
//! hooks at any moment.

use std::env;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use super::{Found, Hooks, RELOAD, is_executable, is_ours};
use crate::failure::Failure;

/// What the hook's file is called where it is built or packaged.
const PROGRAM: &str = "ept-virt-hook";

/// Puts the hook in its place; returns what to tell.
pub fn install(dir: &Path, from: Option<&Path>, force: bool) -> Result<String, Failure> {
    let source = match from {
        Some(path) => path.to_owned(),
        None => beside_us()?,
    };
    let bytes = fs::read(&source).map_err(|error| {
        Failure::unreachable(format!("cannot read the hook {}: {error}", source.display()))
            .hint("name it with --from PATH; cargo build -p ept-virt-hook builds it")
    })?;
    if !is_ours(&bytes) {
        return Err(Failure::refused(format!("{} is not the hook of ept-virt", source.display()))
            .hint("name ept-virt-hook with --from PATH"));
    }
    let before = Hooks::look(dir);
    let path = before.path.display().to_string();
    match before.found {
        Found::Foreign | Found::Unreadable if !force => {
            return Err(Failure::refused(format!("{path} is there already, and not ours"))
                .hint("move it to another name in the same directory, or replace it with --force"));
        }
        Found::Installed if fs::read(&before.path).is_ok_and(|there| there == bytes) => {
            return Ok(format!("{path} is installed already\n"));
        }
        _ => {}
    }
    // Whatever is executable there was called before, and is no first hook.
    let was_called = is_executable(&before.path);
    put(dir, &before.path, &bytes).map_err(|error| cannot("install", &before.path, &error))?;
    let what = if before.found == Found::Missing { "installed" } else { "replaced" };
    let is_first = before.others.is_empty() && !was_called;
    Ok(match is_first {
        true => format!(
            "{path}: {what}. It is the first hook for QEMU here, and libvirt looks for a first one only when \
             it starts or is told to: {RELOAD}\n"
        ),
        false => format!("{path}: {what}. libvirt calls it from now on\n"),
    })
}

/// Takes our hook away; returns what to tell.
pub fn uninstall(dir: &Path) -> Result<String, Failure> {
    let hooks = Hooks::look(dir);
    let path = hooks.path.display();
    match hooks.found {
        Found::Missing => Ok(format!("{path} is not installed\n")),
        Found::Foreign | Found::Unreadable => Err(Failure::refused(format!("{path} is not ours, and stays"))
            .hint("remove it by hand if it is to go")),
        Found::Installed | Found::NotExecutable => {
            fs::remove_file(&hooks.path).map_err(|error| cannot("remove", &hooks.path, &error))?;
            Ok(format!("{path}: removed. libvirt calls it no more\n"))
        }
    }
}

/// The hook beside this program.
fn beside_us() -> Result<PathBuf, Failure> {
    let program = env::current_exe().and_then(fs::canonicalize);
    let program =
        program.map_err(|error| Failure::unreachable(format!("cannot find this program: {error}")))?;
    Ok(program.with_file_name(PROGRAM))
}

/// Writes the file under another name first. That is in the directory above:
/// libvirt would call what it finds in ours.
fn put(dir: &Path, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let parent = path.parent().unwrap_or(dir);
    DirBuilder::new().recursive(true).mode(0o755).create(parent)?;
    let draft = dir.join(format!(".{PROGRAM}.{}", std::process::id()));
    let written = write(&draft, bytes).and_then(|()| fs::rename(&draft, path));
    if written.is_err() {
        // It may not even be there.
        let _ = fs::remove_file(&draft);
    }
    written?;
    File::open(parent)?.sync_all()
}

fn write(draft: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o700).open(draft)?;
    file.write_all(bytes)?;
    // Whatever the umask says.
    file.set_permissions(fs::Permissions::from_mode(0o755))?;
    file.sync_all()
}

fn cannot(what: &str, path: &Path, error: &io::Error) -> Failure {
    let failure = Failure::unreachable(format!("cannot {what} {}: {error}", path.display()));
    match error.kind() {
        io::ErrorKind::PermissionDenied => failure.hint("run this command as root"),
        io::ErrorKind::IsADirectory | io::ErrorKind::DirectoryNotEmpty => {
            failure.hint("move that directory away")
        }
        _ => failure,
    }
}

#[cfg(test)]
mod tests {
    use ept_virt_core::wire::HOOK_MARK;

    use super::*;
    use crate::scratch::Scratch;

    struct Place(Scratch);

    impl Place {
        fn new() -> Self {
            Self(Scratch::new())
        }

        fn hooks(&self) -> PathBuf {
            self.0.join("hooks")
        }

        fn ours(&self) -> PathBuf {
            self.hooks().join("qemu.d/ept-virt")
        }

        /// What could be our hook of some version.
        fn hook(&self, version: &str) -> PathBuf {
            let path = self.0.join(version);
            fs::write(&path, format!("\x7fELF {HOOK_MARK}{version}")).unwrap();
            path
        }

        fn file(&self, name: &str, text: &str, mode: u32) -> PathBuf {
            let path = self.hooks().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            path
        }

        fn install(&self, version: &str) -> Result<String, Failure> {
            install(&self.hooks(), Some(&self.hook(version)), false)
        }
    }

    #[test]
    fn a_first_hook_needs_a_reload_and_the_next_does_not() {
        let place = Place::new();
        assert_eq!(Hooks::look(&place.hooks()).found, Found::Missing);
        let told = place.install("1").unwrap();
        assert!(told.contains("systemctl reload libvirtd"), "{told}");
        let meta = fs::metadata(place.ours()).unwrap();
        assert_eq!(meta.permissions().mode() & 0o7777, 0o755);
        assert_eq!(Hooks::look(&place.hooks()).found, Found::Installed);
        assert!(place.install("1").unwrap().contains("installed already"));
        let told = place.install("2").unwrap();
        assert!(told.contains("replaced. libvirt calls it"), "{told}");
        assert_eq!(fs::read(place.ours()).unwrap(), fs::read(place.hook("2")).unwrap());
        // Nothing is left that libvirt could call, or that nobody knows.
        let names = |dir: PathBuf| fs::read_dir(dir).unwrap().count();
        assert_eq!((names(place.hooks()), names(place.hooks().join("qemu.d"))), (1, 1));

        assert!(uninstall(&place.hooks()).unwrap().contains("removed"));
        assert!(uninstall(&place.hooks()).unwrap().contains("not installed"));
    }

    #[test]
    fn hooks_of_others_stay_as_they_are() {
        let place = Place::new();
        let others =
            [place.file("qemu", "#!/bin/sh\n", 0o755), place.file("qemu.d/zz", "#!/bin/sh\n", 0o755)];
        // Not executable: libvirt does not call it either.
        place.file("qemu.d/README", "text", 0o644);
        let told = place.install("1").unwrap();
        assert!(told.contains("libvirt calls it from now on"), "{told}");
        assert_eq!(Hooks::look(&place.hooks()).others, others);
        uninstall(&place.hooks()).unwrap();
        assert!(others.iter().all(|other| fs::read_to_string(other).unwrap() == "#!/bin/sh\n"));
    }

    #[test]
    fn what_is_not_ours_is_neither_replaced_nor_removed() {
        let place = Place::new();
        let text = format!("#!/bin/sh\n# calls {HOOK_MARK}\n");
        place.file("qemu.d/ept-virt", &text, 0o755);
        assert_eq!(Hooks::look(&place.hooks()).found, Found::Foreign);
        assert!(place.install("1").unwrap_err().to_string().contains("--force"));
        assert!(uninstall(&place.hooks()).is_err());
        assert_eq!(fs::read_to_string(place.ours()).unwrap(), text);
        let told = install(&place.hooks(), Some(&place.hook("1")), true).unwrap();
        assert!(told.contains("replaced"), "{told}");
        assert_eq!(Hooks::look(&place.hooks()).found, Found::Installed);
    }

    #[test]
    fn a_directory_in_its_place_is_told() {
        let place = Place::new();
        fs::create_dir_all(place.ours()).unwrap();
        assert_eq!(Hooks::look(&place.hooks()).found, Found::Foreign);
        let forced = install(&place.hooks(), Some(&place.hook("1")), true).unwrap_err().to_string();
        assert!(forced.contains("cannot install"), "{forced}");
        assert_eq!(fs::read_dir(place.hooks()).unwrap().count(), 1);
    }

    #[test]
    fn only_our_hook_is_installed_and_a_mode_is_mended() {
        let place = Place::new();
        let shell = place.file("other", "#!/bin/sh\n", 0o755);
        assert!(
            install(&place.hooks(), Some(&shell), false).unwrap_err().to_string().contains("is not the hook")
        );
        let missing = install(&place.hooks(), Some(&place.0.join("none")), false).unwrap_err().to_string();
        assert!(missing.contains("--from"), "{missing}");
        place.install("1").unwrap();
        fs::set_permissions(place.ours(), fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(Hooks::look(&place.hooks()).found, Found::NotExecutable);
        assert!(place.install("1").unwrap().contains("replaced"));
        assert_eq!(Hooks::look(&place.hooks()).found, Found::Installed);
    }
}
