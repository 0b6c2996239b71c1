// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel module, built for one of the lab's kernels.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::Lab;
use crate::cache::Key;
use crate::kernel::Kernel;
use crate::{kernel_checks, modinfo, proc};

/// The module's file, as its Makefile names it.
pub const NAME: &str = "kvm_ept_sample.ko";
/// The file of the module that the benches compare with.
pub const BENCH_NAME: &str = "clear_young.ko";
const BUILD_TIMEOUT: Duration = Duration::from_secs(300);

/// A kernel version that the module does not know, as the headers would say it.
const UNKNOWN_VERSION: &str = "#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))\n\
                               #define LINUX_VERSION_CODE KERNEL_VERSION(8, 0, 0)\n";

/// Builds the module with W=1 in the Debian tree of its kernel; the build
/// machine's own compiler does not fit those headers. A warning is an error.
pub fn build(lab: &Lab, kernel: &Kernel) -> Result<PathBuf> {
    build_as(lab, kernel, &format!("kmod-{}", kernel.line), None)
}

/// As [`build`], but the headers say a version that the module does not know.
/// The kernel would load the result: it is the module that refuses.
pub fn build_unknown(lab: &Lab, kernel: &Kernel) -> Result<PathBuf> {
    build_as(lab, kernel, &format!("kmod-unknown-{}", kernel.line), Some(UNKNOWN_VERSION))
}

fn build_as(lab: &Lab, kernel: &Kernel, name: &str, version: Option<&str>) -> Result<PathBuf> {
    let sources = lab.root.join("kmod");
    let key = Key::new("kmod 3")
        .item(&kernel.root)
        .text(&kernel.release)
        .text(version.unwrap_or_default())
        .tree(&sources, &is_source)?;
    lab.cache.get_or_build(name, &key, |ko| {
        let step = lab.progress.step(format!("building the kernel module for {}: {name}", kernel.release));
        // Checkouts that share a tree do not share the folder.
        let folder = format!("build-{}-{name}", std::process::id());
        let work = kernel.root.join(&folder);
        let built = build_in(lab, kernel, &folder, name, version, ko);
        fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))?;
        built?;
        step.done("");
        Ok(())
    })
}

/// Builds in `folder` of the kernel's tree, which the caller removes.
fn build_in(
    lab: &Lab,
    kernel: &Kernel,
    folder: &str,
    name: &str,
    version: Option<&str>,
    ko: &Path,
) -> Result<()> {
    let work = kernel.root.join(folder);
    copy_sources(&lab.root.join("kmod"), &work)?;
    let mut make = make(kernel, folder);
    if let Some(version) = version {
        let headers = work.join("unknown/linux");
        fs::create_dir_all(&headers).with_context(|| format!("creating {}", headers.display()))?;
        fs::write(headers.join("version.h"), version)?;
        // These flags come before the kernel's own folders of headers.
        make.arg(format!("NOSTDINC_FLAGS=-nostdinc -I/{folder}/unknown"));
    }
    let log = lab.log(name);
    proc::run(&mut make, &log, BUILD_TIMEOUT)?;
    let output = fs::read_to_string(&log).context("reading the build's log")?;
    if output.contains("warning:") || output.contains("WARNING:") {
        bail!("the kernel module builds with warnings\n{}", proc::log_tail(&log));
    }
    modinfo::check(&work.join(NAME))?;
    fs::copy(work.join(NAME), ko).context("fetching the built module")?;
    Ok(())
}

/// Builds the module that the benches compare with, from kmod/bench.
pub fn build_bench(lab: &Lab, kernel: &Kernel) -> Result<PathBuf> {
    let sources = lab.root.join("kmod/bench");
    let key = Key::new("kmod bench 1").item(&kernel.root).text(&kernel.release).tree(&sources, &is_source)?;
    lab.cache.get_or_build(&format!("kmod-bench-{}", kernel.line), &key, |ko| {
        let folder = format!("bench-{}", std::process::id());
        let work = kernel.root.join(&folder);
        copy_sources(&sources, &work)?;
        proc::run(&mut make(kernel, &folder), &lab.log("kmod-bench"), BUILD_TIMEOUT)?;
        fs::copy(work.join(BENCH_NAME), ko).context("fetching the built module")?;
        fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))
    })
}

/// Runs `sparse` on the module's sources. A warning is an error. What was clean is
/// not checked again.
pub fn check(lab: &Lab, kernel: &Kernel, sparse: &Path) -> Result<()> {
    let sources = lab.root.join("kmod");
    let key =
        Key::new("kmod sparse 1").item(&kernel.root).text(&kernel.release).tree(&sources, &is_source)?;
    let name = format!("kmod-sparse-{}", kernel.line);
    lab.cache.get_or_build(&name, &key, |clean| {
        let step = lab.progress.step(format!("sparse on the kernel module for {}", kernel.release));
        let folder = format!("build-{}-{name}", std::process::id());
        let work = kernel.root.join(&folder);
        copy_sources(&sources, &work)?;
        fs::copy(sparse, work.join("sparse")).context("copying sparse")?;
        let log = lab.log(&name);
        let mut make = make(kernel, &folder);
        // Locks that are taken under a condition look wrong to sparse; lockdep, on the
        // kernel that watches itself, knows better.
        make.args(["C=2", &format!("CHECK=/{folder}/sparse"), "CF=-Wno-context"]);
        let told = proc::run(&mut make, &log, BUILD_TIMEOUT).and_then(|()| kernel_checks::warnings(&log));
        fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))?;
        let told = told?;
        ensure!(told.is_empty(), "sparse on the module for {}:\n{}", kernel.release, told.join("\n"));
        step.done("");
        fs::write(clean, "").context("noting what was clean")
    })?;
    Ok(())
}

/// The build of the sources in `folder` of the kernel's tree.
fn make(kernel: &Kernel, folder: &str) -> Command {
    let mut command = if kernel.build_reads_proc {
        // In namespaces of its own, so that the mount goes when the build ends.
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child"]);
        command.arg(format!("--mount-proc={}", kernel.root.join("proc").display())).arg("chroot");
        command
    } else {
        Command::new("chroot")
    };
    command.arg(&kernel.root);
    command.args(["make", "-j2", "-C", &kernel.build, &format!("M=/{folder}"), "W=1", "modules"]);
    command
}

/// Not what a build in the checkout left behind.
pub fn is_source(path: &Path) -> bool {
    let is_c = matches!(path.extension().and_then(|e| e.to_str()), Some("c" | "h" | "S"));
    let is_generated = path.to_string_lossy().ends_with(".mod.c");
    let is_make = matches!(path.file_name().and_then(|n| n.to_str()), Some("Makefile" | "Kbuild"));
    (is_c && !is_generated) || is_make
}

fn copy_sources(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("creating {}", to.display()))?;
    for entry in fs::read_dir(from).with_context(|| format!("reading {}", from.display()))? {
        let path = entry?.path();
        let target = to.join(path.file_name().unwrap_or_default());
        if path.is_dir() {
            copy_sources(&path, &target)?;
        } else if is_source(&path) {
            fs::copy(&path, &target).with_context(|| format!("copying {}", path.display()))?;
        }
    }
    Ok(())
}
