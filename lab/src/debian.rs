// SPDX-License-Identifier: MIT OR Apache-2.0
//! Folder trees of Debian systems: those with a kernel, in which the module is
//! built for it, and those that emulated AMD hosts with libvirt run.

use std::ffi::OsStr;
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
use crate::{package_life, proc};

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

/// What hosts with systemd have for packages to be installed on: a kernel of their own,
/// its headers, and DKMS, which brings a compiler; perl as for [`BUILD_PACKAGES`], openssl
/// for DKMS to sign. And virt-install, for a guest that is not the lab's.
const SYSTEMD_PACKAGES: [&str; 6] =
    ["dkms", "linux-headers-amd64", "linux-image-amd64", "openssl", "perl", "virtinst"];

/// Modules for devices that the lab does not emulate: reading them takes depmod longest.
const MODULES_LEFT_OUT: [&str; 3] = [
    "/*lib/modules/*/kernel/drivers/[!bcv]*",
    "/*lib/modules/*/kernel/net/*",
    "/*lib/modules/*/kernel/sound/*",
];

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
pub fn suites(line: Line) -> &'static [&'static str] {
    match line {
        Line::V6_1 => &["bookworm"],
        Line::V6_12 | Line::V6_12Debug => &["trixie"],
        Line::V7_3 => &["trixie", "trixie-backports"],
    }
}

/// A stock kernel with headers and compiler; its tree is unpacked when it is not
/// in the cache (about 75 s).
pub fn kernel(lab: &Lab, line: Line) -> Result<Kernel> {
    let recipe = Recipe { suites: suites(line), packages: &BUILD_PACKAGES, ..Recipe::default() };
    let root = tree(lab, &format!("build-tree-{line}"), &recipe)?;
    kernel_in(root, line)
}

/// The kernel of a tree.
fn kernel_in(root: PathBuf, line: Line) -> Result<Kernel> {
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

/// The kernel that a host with libvirt boots: with systemd that of its own tree, for
/// which DKMS finds headers there; the one of the suite's backports where it was upgraded.
pub fn host_kernel(lab: &Lab, flavour: Flavour) -> Result<Kernel> {
    let line = match (flavour.init, flavour.suite) {
        (Init::Script, _) => return Line::MAIN.get(lab),
        (Init::Systemd, Suite::Trixie) | (Init::Upgraded, Suite::Bookworm) => Line::V6_12,
        (Init::Systemd, Suite::Bookworm) => Line::V6_1,
        (Init::Upgraded, Suite::Trixie) => Line::V7_3,
    };
    kernel_in(host_tree(lab, flavour)?, line)
}

/// The tree of an AMD host with libvirt (about 80 s; with systemd twice that).
pub fn host_tree(lab: &Lab, flavour: Flavour) -> Result<PathBuf> {
    let mut packages = HOST_PACKAGES.to_vec();
    let mut recipe = Recipe { suites: &[flavour.suite.name()], ..Recipe::default() };
    match flavour.init {
        // trixie's libvirt brings users, and systemd's units, by itself.
        Init::Script if flavour.suite == Suite::Bookworm => recipe.setup = Some(BOOKWORM_USERS),
        Init::Script => {}
        Init::Upgraded => return package_life::upgraded(lab, flavour.suite),
        Init::Systemd => {
            packages.extend(SYSTEMD_PACKAGES);
            recipe.left_out = &MODULES_LEFT_OUT;
        }
    }
    if flavour == Flavour::systemd(Suite::Bookworm) {
        packages.extend(BOOKWORM_SYSTEMD);
    }
    tree(lab, &flavour.item("host-tree"), &Recipe { packages: &packages, ..recipe })
}

/// What a tree is made of.
#[derive(Default)]
pub struct Recipe<'a> {
    /// Suites of Debian; what the last has is taken from there.
    pub suites: &'a [&'a str],
    /// Packages, whose recommends are left out.
    pub packages: &'a [&'a str],
    /// A shell's command that is run in it at the end.
    pub setup: Option<&'a str>,
    /// Patterns of paths that are not unpacked, besides documentation.
    pub left_out: &'a [&'a str],
}

/// A tree, unpacked when it is not in the cache.
pub fn tree(lab: &Lab, name: &str, recipe: &Recipe) -> Result<PathBuf> {
    let Recipe { suites, packages, setup, left_out } = recipe;
    let key = Key::new("debian tree 2").texts(suites).texts(&LEFT_OUT).texts(packages);
    let key = setup.iter().fold(key, |key, setup| key.text(setup)).texts(left_out);
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
        // What it mounts in the tree (the machine's /dev/shm too) ends with it, however it
        // ends: whoever removes an unfinished tree must not reach through.
        let mut command = Command::new("unshare");
        command.args(["--mount", "mmdebstrap"]);
        // The lab's hosts have an initramfs of their own.
        command.env("INITRD", "No");
        command.args(["--variant=minbase", "--mode=root", "--format=directory"]);
        for pattern in LEFT_OUT.iter().chain(*left_out) {
            command.arg(format!("--dpkgopt=path-exclude={pattern}"));
        }
        if let Some(setup) = setup {
            command.arg(format!("--customize-hook=chroot \"$1\" sh -c '{setup}'"));
        }
        if first != last {
            // Without the lists of its packages, apt would refuse to install anything later.
            command.arg(format!("--aptopt=APT::Default-Release \"{last}\""));
        }
        command
            .arg("--aptopt=APT::Install-Recommends \"false\"")
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

/// A file or folder of the build machine's, as a tree that is entered has it.
#[derive(Clone, Copy, Debug)]
pub struct Bind<'a> {
    from: &'a Path,
    to: &'a str,
    options: &'a str,
}

impl<'a> Bind<'a> {
    /// Has `from` at the tree's path `to`, for reading.
    pub fn read(from: &'a Path, to: &'a str) -> Self {
        Bind { from, to, options: "ro" }
    }

    /// Has `from` at the tree's path `to`, for writing too.
    pub fn write(from: &'a Path, to: &'a str) -> Self {
        Bind { from, to, options: "rw" }
    }
}

/// Where Debian keeps the certificates of all authorities in one file.
const CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// Mounts a tree with its changes in memory, and what is bound, in triples: from, to,
/// options. All of it ends with the namespace. Nothing is mounted through a link of the
/// tree's, which would lead out of it.
const ENTER: &str = r#"
set -e
tree=$1 memory=$1/mnt root=$1/mnt/root script=$2
shift 2
mount -t tmpfs tmpfs "$memory"
mkdir "$memory/upper" "$memory/work" "$root"
mount -t overlay -o "lowerdir=$tree,upperdir=$memory/upper,workdir=$memory/work" overlay "$root"
mount -t proc proc "$root/proc"
while [ $# -gt 0 ]; do
    if [ -d "$1" ]; then
        mkdir -p "$root$2"
    else
        mkdir -p "$root${2%/*}"
        rm -f "$root$2"
        touch "$root$2"
    fi
    mount --bind -o "$3" "$1" "$root$2"
    shift 3
done
exec chroot "$root" sh -c "$script"
"#;

/// Runs a shell's script as root in a tree with `binds`. The script may change the tree:
/// that stays in memory, unlike with [`inside`], and is gone at its end.
///
/// It has the build machine's way to the network (names, proxies, certificates), and of
/// its environment nothing else: programs are the tree's.
pub fn enter(root: &Path, binds: &[Bind<'_>], script: &str) -> Command {
    let certificates = std::env::var_os("SSL_CERT_FILE").unwrap_or_else(|| CERTIFICATES.into());
    let network = [
        Bind::read(Path::new("/etc/resolv.conf"), "/etc/resolv.conf"),
        Bind::read(Path::new(&certificates), CERTIFICATES),
    ];
    let proxies = std::env::vars_os().filter(|(name, _)| is_proxy(name));
    let mut command = Command::new("unshare");
    command
        .env_clear()
        .envs(proxies)
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("HOME", "/root")
        .env("LC_ALL", "C.UTF-8")
        .args(["--mount", "--pid", "--fork", "--kill-child", "sh", "-c", ENTER, "sh"])
        .arg(root)
        .arg(script);
    for bind in network.iter().filter(|bind| bind.from.exists()).chain(binds) {
        command.arg(bind.from).args([bind.to, bind.options]);
    }
    command
}

/// Whether a variable names a proxy, as `https_proxy` and `NO_PROXY` do.
fn is_proxy(name: &OsStr) -> bool {
    name.to_string_lossy().to_ascii_lowercase().ends_with("_proxy")
}
