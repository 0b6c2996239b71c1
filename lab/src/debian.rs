// SPDX-License-Identifier: MIT OR Apache-2.0
//! Folder trees of Debian systems: the one that the kernel module is built in,
//! and the one that the emulated AMD host runs.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::Lab;
use crate::apt::{self, Need, need};
use crate::cache::Key;
use crate::proc;

/// The suite whose stock kernel the lab runs.
const SUITE: &str = "trixie";

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

/// libvirt and QEMU without recommends, and what the host's init uses.
const HOST_PACKAGES: [&str; 7] = [
    "busybox-static",
    "kmod",
    "libvirt-clients",
    "libvirt-daemon",
    "libvirt-daemon-driver-qemu",
    "numactl",
    "qemu-system-x86",
];

/// What unpacking a tree takes.
pub const NEEDS: &[Need] = &[
    need("mmdebstrap", "unpacks Debian trees for the emulated hosts"),
    need("gpg", "checks the archive's signatures for mmdebstrap"),
    need("debian-archive-keyring", "holds the archive's keys"),
];

/// A Debian tree with kernel, headers and compiler.
pub struct BuildTree {
    /// Its root folder.
    pub root: PathBuf,
    /// The kernel's release, as `uname -r` says it.
    pub release: String,
}

impl BuildTree {
    /// The tree, built when it is not in the cache (about 75 s).
    pub fn get(lab: &Lab) -> Result<Self> {
        let root = tree(lab, "build-tree", &BUILD_PACKAGES)?;
        let modules = root.join("lib/modules");
        let release = std::fs::read_dir(&modules)
            .with_context(|| format!("reading {}", modules.display()))?
            .filter_map(|e| e.ok()?.file_name().into_string().ok())
            .max()
            .with_context(|| format!("no kernel in {}", modules.display()))?;
        Ok(Self { root, release })
    }

    /// The compressed kernel image.
    pub fn kernel(&self) -> PathBuf {
        self.root.join(format!("boot/vmlinuz-{}", self.release))
    }

    /// The folder of the kernel's modules.
    pub fn modules(&self) -> PathBuf {
        self.root.join("lib/modules").join(&self.release)
    }
}

/// The tree of the AMD host (about 80 s).
pub fn host_tree(lab: &Lab) -> Result<PathBuf> {
    tree(lab, "host-tree", &HOST_PACKAGES)
}

fn tree(lab: &Lab, name: &str, packages: &[&str]) -> Result<PathBuf> {
    let key = Key::new("debian tree 1").text(SUITE).texts(&LEFT_OUT).texts(packages);
    lab.cache.get_or_build(name, &key, |root| {
        if !nix::unistd::geteuid().is_root() {
            bail!(
                "unpacking a Debian tree takes root's rights (chroot, device nodes): \
                 run this command as root once; the tree is then kept"
            );
        }
        apt::ensure(lab, NEEDS)?;
        let mirror = apt::mirror(lab)?;
        let step = lab.progress.step(format!("unpacking Debian {SUITE} ({name})"));
        let mut command = Command::new("mmdebstrap");
        command.args(["--variant=minbase", "--mode=root", "--format=directory"]);
        for pattern in LEFT_OUT {
            command.arg(format!("--dpkgopt=path-exclude={pattern}"));
        }
        command
            .arg("--aptopt=APT::Install-Recommends \"false\"")
            .arg(format!("--include={}", packages.join(",")))
            .arg(SUITE)
            .arg(root)
            .arg(&mirror);
        proc::run(&mut command, &lab.log(name), BOOTSTRAP_TIMEOUT)
            .with_context(|| format!("unpacking Debian {SUITE} from {mirror}"))?;
        step.done("");
        Ok(())
    })
}
