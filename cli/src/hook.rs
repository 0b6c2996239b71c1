// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ept-virt hook`: puts libvirt's hook in its place, and leaves those of others
//! alone.
//!
//! libvirt calls `hooks/qemu` and every executable file in `hooks/qemu.d`. Whether
//! there are any it asks only at its start and when it is reloaded, so the first
//! one needs a reload; one that joins others is called at once.

mod install;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use ept_virt_core::wire::HOOK_MARK;
use serde::Serialize;

use crate::failure::Failure;
use crate::output::{Output, print, write_text};
use crate::style::{Style, harmless};

/// Where libvirt looks for hooks.
pub const HOOKS_DIR: &str = "/etc/libvirt/hooks";

/// Our hook's name below [`HOOKS_DIR`].
const OUR_PLACE: &str = "qemu.d/ept-virt";

/// How executables begin.
const ELF: &[u8] = b"\x7fELF";

/// What has to be done for libvirt to see a first hook.
const RELOAD: &str = "systemctl reload libvirtd (or virtqemud)";

/// What to do with the hook.
#[derive(Debug, Args)]
pub struct HookArgs {
    /// libvirt's directory of hooks.
    #[arg(long, global = true, hide = true, value_name = "DIR", default_value = HOOKS_DIR)]
    dir: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Put the hook in its place, or a newer one in the place of an older.
    Install {
        /// The hook to install; without it ept-virt-hook beside this program.
        #[arg(long, value_name = "PATH")]
        from: Option<PathBuf>,
        /// Replace a file of that name that is not ours.
        #[arg(long)]
        force: bool,
    },
    /// Take our hook away, and no other.
    Uninstall,
    /// Show whether the hook is installed; exits with 1 when libvirt would not
    /// call it.
    Status(Output),
}

/// What stands at our place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Found {
    /// Nothing.
    Missing,
    /// Our hook.
    Installed,
    /// Our hook; libvirt leaves it out.
    NotExecutable,
    /// Something that is not ours.
    Foreign,
    /// Something that we may not read.
    Unreadable,
}

/// The hooks of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Hooks {
    /// Our place.
    pub path: PathBuf,
    /// What stands there.
    pub found: Found,
    /// Hooks of others that libvirt calls for QEMU's domains.
    pub others: Vec<PathBuf>,
    /// When our place was last changed, in seconds since 1970.
    pub changed: Option<u64>,
}

impl Hooks {
    /// Looks into a directory of hooks.
    pub fn look(dir: &Path) -> Self {
        let path = dir.join(OUR_PLACE);
        let named =
            fs::read_dir(dir.join("qemu.d")).into_iter().flatten().flatten().map(|entry| entry.path());
        let mut others: Vec<PathBuf> = named.chain([dir.join("qemu")]).collect();
        others.retain(|other| *other != path && is_executable(other));
        others.sort();
        // Of a link itself, which upgrades of what it leads to leave as it is.
        let changed = fs::symlink_metadata(&path).ok().and_then(|meta| u64::try_from(meta.ctime()).ok());
        Self { found: found(&path), path, others, changed }
    }
}

/// Runs one of the commands.
pub fn run(args: &HookArgs, style: &Style) -> Result<ExitCode, Failure> {
    match &args.command {
        Command::Install { from, force } => {
            let text = install::install(&args.dir, from.as_deref(), *force)?;
            write_text(&text)?;
        }
        Command::Uninstall => write_text(&install::uninstall(&args.dir)?)?,
        Command::Status(output) => {
            let hooks = Hooks::look(&args.dir);
            print(*output, &hooks, || render(&hooks, style))?;
            return Ok(ExitCode::from(u8::from(hooks.found != Found::Installed)));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn render(hooks: &Hooks, style: &Style) -> String {
    let (color, word) = match hooks.found {
        Found::Installed => ("32", "installed"),
        Found::Missing => ("33", "not installed: `ept-virt hook install`"),
        Found::NotExecutable => ("33", "not executable, so libvirt leaves it out: `ept-virt hook install`"),
        Found::Foreign => ("33", "not ours; `ept-virt hook install --force` replaces it"),
        Found::Unreadable => ("33", "not readable: run this as root"),
    };
    let mut text = format!("{}: {}\n", harmless(&hooks.path.to_string_lossy()), style.paint(color, word));
    for other in &hooks.others {
        text += &format!("{}: of others, left alone\n", harmless(&other.to_string_lossy()));
    }
    text
}

fn found(path: &Path) -> Found {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Found::Missing,
        Err(_) => return Found::Unreadable,
        Ok(_) => {}
    }
    match fs::read(path) {
        Ok(bytes) if !is_ours(&bytes) => Found::Foreign,
        Ok(_) if is_executable(path) => Found::Installed,
        Ok(_) => Found::NotExecutable,
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Found::Unreadable,
        // A directory, or a link that leads nowhere.
        Err(_) => Found::Foreign,
    }
}

/// Whether this is our hook, of whatever version.
fn is_ours(bytes: &[u8]) -> bool {
    bytes.starts_with(ELF) && bytes.windows(HOOK_MARK.len()).any(|window| window == HOOK_MARK.as_bytes())
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}
