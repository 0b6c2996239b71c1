// SPDX-License-Identifier: MIT OR Apache-2.0
//! virtqemud, which runs QEMU's guests where libvirt's one daemon is split up (the
//! default upstream and in Fedora). Debian ships libvirtd only: no package of bookworm,
//! trixie, sid or experimental has it. So the lab builds it from Debian's own source of
//! the libvirt that its hosts run: the daemon alone, which takes libvirt's libraries and
//! its QEMU driver from Debian's packages, as libvirtd does.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::Lab;
use crate::apt;
use crate::cache::Key;
use crate::debian::{self, Recipe, Suite};
use crate::flavour::Flavour;
use crate::proc;

const SUITE: Suite = Suite::MAIN;

/// What Debian's source needs for this daemon, of its many build dependencies.
const PACKAGES: &[&str] = &[
    "gcc",
    "gettext",
    "libc6-dev",
    "libglib2.0-dev",
    "libgnutls28-dev",
    "libjson-c-dev",
    "libnl-3-dev",
    "libnl-route-3-dev",
    "libnuma-dev",
    "libtirpc-dev",
    "libxml2-dev",
    "libxml2-utils",
    "meson",
    "ninja-build",
    "patch",
    "pkgconf",
    "python3",
    "rpcsvc-proto",
    "xsltproc",
    "xz-utils",
];

/// The folders are those of Debian's build (debian/rules), as virtqemud has their names
/// compiled in; of the options only those that it can not be built without, but for
/// libnl, which libvirt 11.3 does not compile without.
const BUILD: &str = "\
set -e
cd /libvirt
tar -xf libvirt_*.orig.tar.xz --strip-components=1
tar -xf libvirt_*.debian.tar.xz
sed 's/#.*//; /^ *$/d' debian/patches/series | while read -r name; do
	patch --silent -p1 < debian/patches/$name
done
meson setup build --auto-features=disabled --buildtype=release \
	--prefix=/usr --libexecdir=/usr/lib/libvirt --libdir=lib/x86_64-linux-gnu \
	--sysconfdir=/etc --localstatedir=/var -Drunstatedir=/run -Dinitconfdir=/etc/default \
	-Ddriver_qemu=enabled -Ddriver_remote=enabled -Ddriver_libvirtd=enabled \
	-Djson_c=enabled -Dlibnl=enabled -Dnumactl=enabled -Dinit_script=none \
	-Dqemu_user=libvirt-qemu -Dqemu_group=libvirt-qemu -Drpath=disabled \
	-Ddocs=disabled -Dtests=disabled
ninja -C build src/virtqemud
strip build/src/virtqemud
";

const SETUP_TIMEOUT: Duration = Duration::from_secs(300);
/// Of 290 files on one core that others use as well.
const BUILD_TIMEOUT: Duration = Duration::from_secs(45 * 60);

/// The daemon, if it was built, for hosts of the suite that it is made for.
pub fn built(lab: &Lab, flavour: Flavour) -> Result<Option<PathBuf>> {
    if flavour.suite != SUITE {
        return Ok(None);
    }
    Ok(lab.cache.get("virtqemud", &key(&version(lab)?)))
}

/// `cargo xtask lab build-virtqemud`.
pub fn prepare(lab: &Lab) -> Result<()> {
    let version = version(lab)?;
    let program = lab.cache.get_or_build("virtqemud", &key(&version), |out| build(lab, &version, out))?;
    lab.progress.line(&format!("virtqemud {version} is ready in {}", program.display()));
    Ok(())
}

fn key(version: &str) -> Key {
    Key::new("1").text(version).texts(PACKAGES).text(BUILD)
}

/// Of the hosts' libvirt: the libraries refuse a daemon of another one.
fn version(lab: &Lab) -> Result<String> {
    let host = debian::host_tree(lab, Flavour::script(SUITE))?;
    let out = Command::new("dpkg-query")
        .arg(format!("--admindir={}", host.join("var/lib/dpkg").display()))
        .args(["--show", "--showformat=${Version}", "libvirt-daemon"])
        .output()
        .context("running dpkg-query")?;
    let version = String::from_utf8_lossy(&out.stdout).trim().to_owned();
    ensure!(
        out.status.success() && !version.is_empty(),
        "the host's tree has no libvirt-daemon: {}",
        String::from_utf8_lossy(&out.stderr).trim()
    );
    Ok(version)
}

fn build(lab: &Lab, version: &str, out: &Path) -> Result<()> {
    let tree = debian::tree(
        lab,
        "virtqemud-tree",
        &Recipe { suites: &[SUITE.name()], packages: PACKAGES, ..Recipe::default() },
    )?;
    let log = lab.log("virtqemud");
    let step = lab.progress.step(format!("building virtqemud {version}, some minutes on two cores"));
    let root = lab.run_folder("virtqemud")?.join("root");
    let mut copy = Command::new("cp");
    copy.arg("--archive").arg(&tree).arg(&root);
    proc::run(&mut copy, &log, SETUP_TIMEOUT)?;
    step.note("downloading its source");
    download(lab, &root, version)?;
    step.note("compiling");
    proc::run(&mut debian::inside(&root, BUILD), &log, BUILD_TIMEOUT)?;
    let program = root.join("libvirt/build/src/virtqemud");
    fs::copy(&program, out).with_context(|| format!("copying {}", program.display()))?;
    step.done("");
    Ok(())
}

/// Puts the two archives of libvirt's source into the tree's /libvirt. apt checks them
/// against the archive's signed lists. It is this machine's, which knows the way to the
/// network, and works on the tree's configuration.
fn download(lab: &Lab, root: &Path, version: &str) -> Result<()> {
    let folder = root.join("libvirt");
    fs::create_dir(&folder).with_context(|| format!("creating {}", folder.display()))?;
    let list = root.join("etc/apt/sources.list.d/source.list");
    let line = format!("deb-src {} {} main\n", apt::mirror(lab)?, SUITE.name());
    fs::write(&list, line).with_context(|| format!("writing {}", list.display()))?;
    let apt_get = |args: &[&str]| {
        let mut command = Command::new("apt-get");
        command
            .current_dir(&folder)
            .arg(format!("--option=Dir={}", root.display()))
            .arg(format!("--option=Dir::State::status={}", root.join("var/lib/dpkg/status").display()))
            .arg("--option=APT::Sandbox::User=root")
            .args(args);
        proc::run(&mut command, &lab.log("virtqemud-source"), SETUP_TIMEOUT)
    };
    apt_get(&["--quiet", "update"])?;
    let source = format!("libvirt={version}");
    // Not the .dsc, which not every mirror keeps.
    for part in ["--tar-only", "--diff-only"] {
        apt_get(&["--quiet", "source", "--download-only", part, &source])
            .with_context(|| format!("downloading the source of libvirt {version}"))?;
    }
    Ok(())
}
