// SPDX-License-Identifier: MIT OR Apache-2.0
//! A kernel that watches itself: Debian's source of the main line, built with
//! KASAN, lockdep, RCU's and the sleep checks, kmemleak and UBSAN, and with only
//! the drivers that a micro host needs. Not in CI: building takes a quarter of an
//! hour, and tests run five times slower on it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::Lab;
use crate::cache::Key;
use crate::debian::{self, Recipe};
use crate::kernel::{Kernel, Line};
use crate::proc;

/// What is switched on; all else is off.
const CONFIG: &str = include_str!("../debug-kernel.config");

/// What a build of the kernel takes besides the compiler.
const PACKAGES: &[&str] = &[
    "bc",
    "bison",
    "flex",
    "gcc",
    "kmod",
    "libc6-dev",
    "libelf-dev",
    "libssl-dev",
    "linux-source-6.12",
    "make",
    "perl",
    "xz-utils",
];

const CONFIGURE_TIMEOUT: Duration = Duration::from_secs(5 * 60);
const BUILD_TIMEOUT: Duration = Duration::from_secs(2 * 3600);

/// Where source and objects stand in the tree.
const FOLDER: &str = "/linux";
/// Where the modules are installed in the tree.
const INSTALLED: &str = "/installed";

const CONFIGURE: &str = "\
set -e
mkdir -p /linux
tar -xf /usr/src/linux-source-6.12.tar.xz -C /linux --strip-components=1
cd /linux
cp /lab.config lab.config
make allnoconfig KCONFIG_ALLCONFIG=lab.config
";
/// In the end object files are needed no more, but for those of the tools that
/// build modules.
const BUILD: &str = "\
set -e
cd /linux
make -j$(nproc) bzImage modules
make INSTALL_MOD_PATH=/installed modules_install
find . -name '*.o' -not -path './scripts/*' -not -path './tools/*' -delete
find . -name '*.a' -delete
rm -f vmlinux /usr/src/linux-source-6.12.tar.xz
";

/// The kernel; built when it is not in the cache.
pub fn kernel(lab: &Lab) -> Result<Kernel> {
    let tree = debian::tree(
        lab,
        "debug-kernel-tree",
        &Recipe { suites: &["trixie"], packages: PACKAGES, ..Recipe::default() },
    )?;
    let key = Key::new("1").text(CONFIG).item(&tree).text(CONFIGURE).text(BUILD);
    let root = lab.cache.get_or_build("debug-kernel", &key, |root| build(lab, &tree, root))?;
    let folder = root.join(INSTALLED.trim_start_matches('/')).join("lib/modules");
    let release = fs::read_dir(&folder)
        .with_context(|| format!("reading {}", folder.display()))?
        .find_map(|entry| entry.ok()?.file_name().into_string().ok())
        .with_context(|| format!("no modules in {}", folder.display()))?;
    Ok(Kernel {
        line: Line::V6_12Debug,
        image: root.join("linux/arch/x86/boot/bzImage"),
        modules: folder.join(&release),
        release,
        build: FOLDER.into(),
        build_reads_proc: true,
        root,
    })
}

/// Builds in a copy of `tree`, which becomes `root`.
fn build(lab: &Lab, tree: &Path, root: &Path) -> Result<()> {
    let log = lab.log("debug-kernel");
    let step = lab.progress.step("building the debug kernel, a quarter of an hour on two cores");
    let mut copy = Command::new("cp");
    copy.arg("--archive").arg(tree).arg(root);
    proc::run(&mut copy, &log, CONFIGURE_TIMEOUT)?;
    fs::write(root.join("lab.config"), CONFIG).context("writing the kernel's configuration")?;
    step.note("unpacking and configuring");
    proc::run(&mut debian::inside(root, CONFIGURE), &log, CONFIGURE_TIMEOUT)?;
    let missing = missing(CONFIG, &fs::read_to_string(root.join("linux/.config"))?);
    if !missing.is_empty() {
        bail!("the kernel does not take these settings: {}", missing.join(", "));
    }
    step.note("compiling");
    proc::run(&mut debian::inside(root, BUILD), &log, BUILD_TIMEOUT)?;
    step.done("");
    Ok(())
}

/// The settings that were asked for and did not come out: a dependency changed.
fn missing<'a>(asked: &'a str, config: &str) -> Vec<&'a str> {
    let got: Vec<&str> = config.lines().collect();
    asked.lines().filter(|line| line.starts_with("CONFIG_") && !got.contains(line)).collect()
}

/// `cargo xtask lab build-debug-kernel`.
pub fn prepare(lab: &Lab) -> Result<()> {
    let kernel = kernel(lab)?;
    lab.progress.line(&format!("the debug kernel {} is ready in {}", kernel.release, kernel.root.display()));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_setting_that_was_not_taken_is_named() {
        assert_eq!(
            missing("# a\nCONFIG_A=y\nCONFIG_B=m\n", "CONFIG_A=y\n# CONFIG_B is not set\n"),
            ["CONFIG_B=m"]
        );
        assert!(missing(CONFIG, CONFIG).is_empty());
    }
}
