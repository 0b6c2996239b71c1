// SPDX-License-Identifier: MIT OR Apache-2.0
//! Folder trees of Debian systems: those with a kernel, in which the module is
//! built for it, and those that emulated AMD hosts with libvirt run.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;

use crate::Lab;
use crate::apt::{self, Need, need};
use crate::cache::Key;
use crate::flavour::{Flavour, Init};
use crate::kernel::{Kernel, Line};
use crate::proc;

/// The Debian that a host with libvirt runs, whatever its kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Suite {
    /// libvirt 11.3, QEMU 10.0.
    Trixie,
    /// libvirt 9.0, QEMU 7.2.
    Bookworm,
}

const BOOTSTRAP_TIMEOUT: Duration = Duration::from_secs(15 * 60);

/// What nobody reads in an emulated host.
const LEFT_OUT: [&str; 5] = [
    "/usr/share/doc/*",
    "/usr/share/man/*",
    "/usr/share/locale/*",
    "/usr/share/info/*",
    "/var/lib/apt/lists/*debian*",
];

/// Headers and compiler (perl checks comments in a build with W=1) for the
/// module, and the kernel that it is loaded into:
/// from one run, so that their versions agree.
const BUILD_PACKAGES: [&str; 6] =
    ["linux-image-amd64", "linux-headers-amd64", "gcc", "make", "libc6-dev", "perl"];

/// libvirt and QEMU without recommends, what the host's init uses, and `kill`, which
/// units reload daemons with.
const HOST_PACKAGES: [&str; 8] = [
    "busybox-static",
    "kmod",
    "libvirt-clients",
    "libvirt-daemon",
    "libvirt-daemon-driver-qemu",
    "numactl",
    "procps",
    "qemu-system-x86",
];

/// Bookworm makes these users only with the package that brings systemd. The
/// numbers are those of trixie.
const BOOKWORM_USERS: &str = "groupadd --system libvirt && groupadd --system --force kvm \
    && groupadd --system --gid 64055 libvirt-qemu \
    && useradd --system --uid 64055 --gid kvm --groups libvirt-qemu \
    --home-dir /var/lib/libvirt --shell /usr/sbin/nologin libvirt-qemu";

/// What makes bookworm a host with systemd.
const BOOKWORM_SYSTEMD: [&str; 2] = ["libvirt-daemon-system", "systemd-sysv"];

/// What unpacking a tree takes.
pub const NEEDS: &[Need] = &[
    need("mmdebstrap", "unpacks Debian trees for the emulated hosts"),
    need("gpg", "checks the archive's signatures for mmdebstrap"),
    need("debian-archive-keyring", "holds the archive's keys"),
];

impl Suite {
    /// That of whoever does not ask for another.
    pub const MAIN: Self = Self::Trixie;

    /// As Debian calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Trixie => "trixie",
            Self::Bookworm => "bookworm",
        }
    }

    /// The name in the cache of something that each suite has one of.
    pub fn item(self, what: &str) -> String {
        match self {
            Self::MAIN => what.to_owned(),
            other => format!("{what}-{other}"),
        }
    }
}

impl fmt::Display for Suite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The suites that a kernel line's tree is made of. What the last of them has is
/// taken from there.
fn suites(line: Line) -> &'static [&'static str] {
    match line {
        Line::V6_1 => &["bookworm"],
        Line::V6_12 | Line::V6_12Debug => &["trixie"],
        Line::V7_3 => &["trixie", "trixie-backports"],
    }
}

/// A stock kernel with headers and compiler; its tree is unpacked when it is not
/// in the cache (about 75 s).
pub fn kernel(lab: &Lab, line: Line) -> Result<Kernel> {
    let root = tree(lab, &format!("build-tree-{line}"), suites(line), &BUILD_PACKAGES, None)?;
    let folder = root.join("lib/modules");
    let release = std::fs::read_dir(&folder)
        .with_context(|| format!("reading {}", folder.display()))?
        .filter_map(|e| e.ok()?.file_name().into_string().ok())
        .find(|release| release.starts_with(&format!("{line}.")))
        .with_context(|| format!("no kernel {line} in {}", folder.display()))?;
    let modules = folder.join(&release);
    // Newer packages have the image beside its modules.
    let image = [root.join(format!("boot/vmlinuz-{release}")), modules.join("vmlinuz")]
        .into_iter()
        .find(|image| image.exists())
        .with_context(|| format!("no image of kernel {release} in {}", root.display()))?;
    let build = format!("/lib/modules/{release}/build");
    Ok(Kernel { line, root, release, image, modules, build, build_reads_proc: line == Line::V7_3 })
}

/// The tree of an AMD host with libvirt (about 80 s).
pub fn host_tree(lab: &Lab, flavour: Flavour) -> Result<PathBuf> {
    let (more, setup): (&[&str], _) = match (flavour.suite, flavour.init) {
        (Suite::Trixie, _) => (&[], None),
        (Suite::Bookworm, Init::Script) => (&[], Some(BOOKWORM_USERS)),
        (Suite::Bookworm, Init::Systemd) => (&BOOKWORM_SYSTEMD, None),
    };
    let name = tree_owner(flavour).item("host-tree");
    tree(lab, &name, &[flavour.suite.name()], &[&HOST_PACKAGES, more].concat(), setup)
}

/// The flavour that the tree of a host is named after: trixie's libvirt brings systemd
/// and its units by itself, so that one tree serves both inits.
pub fn tree_owner(flavour: Flavour) -> Flavour {
    match flavour.suite {
        Suite::Trixie => Flavour::script(Suite::Trixie),
        Suite::Bookworm => flavour,
    }
}

/// A tree of `packages`, unpacked when it is not in the cache; `setup` is a shell's
/// command that is then run in it.
pub fn tree(
    lab: &Lab,
    name: &str,
    suites: &[&str],
    packages: &[&str],
    setup: Option<&str>,
) -> Result<PathBuf> {
    let key = Key::new("debian tree 2").texts(suites).texts(&LEFT_OUT).texts(packages);
    let key = setup.into_iter().fold(key, Key::text);
    lab.cache.get_or_build(name, &key, |root| {
        if !nix::unistd::geteuid().is_root() {
            bail!(
                "unpacking a Debian tree takes root's rights (chroot, device nodes): \
                 run this command as root once; the tree is then kept"
            );
        }
        apt::ensure(lab, NEEDS)?;
        let mirror = apt::mirror(lab)?;
        let (first, last) = suites.first().zip(suites.last()).context("a tree without a suite")?;
        let step = lab.progress.step(format!("unpacking Debian {last} ({name})"));
        let mut command = Command::new("mmdebstrap");
        // The lab's hosts have an initramfs of their own.
        command.env("INITRD", "No");
        command.args(["--variant=minbase", "--mode=root", "--format=directory"]);
        for pattern in LEFT_OUT {
            command.arg(format!("--dpkgopt=path-exclude={pattern}"));
        }
        if let Some(setup) = setup {
            command.arg(format!("--customize-hook=chroot \"$1\" sh -c '{setup}'"));
        }
        command
            .arg("--aptopt=APT::Install-Recommends \"false\"")
            .arg(format!("--aptopt=APT::Default-Release \"{last}\""))
            .arg(format!("--include={}", packages.join(",")))
            .arg(first)
            .arg(root)
            .args(suites.iter().map(|suite| format!("deb {mirror} {suite} main")));
        proc::run(&mut command, &lab.log(name), BOOTSTRAP_TIMEOUT)
            .with_context(|| format!("unpacking Debian {last} from {mirror}"))?;
        step.done("");
        Ok(())
    })
}

/// Runs a shell's script in a tree, with a /proc of its own: build tools read it.
pub fn inside(root: &Path, script: &str) -> Command {
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--pid", "--fork", "--kill-child"])
        .arg(format!("--mount-proc={}", root.join("proc").display()))
        .arg("chroot")
        .arg(root)
        .args(["sh", "-c", script]);
    command
}
