// SPDX-License-Identifier: MIT OR Apache-2.0
//! KVM's modules with the patch of kernel_patch: built by its script, against the
//! headers of one of the lab's kernels, from the source package of the same version.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::Lab;
use crate::apt::{self, Need, need};
use crate::cache::Key;
use crate::debian;
use crate::kernel::{Kernel, Line};
use crate::{kernel_checks, modules, proc};

/// What is built, by the names of files.
pub const MODULES: [&str; 3] = ["kvm.ko", "kvm-intel.ko", "kvm-amd.ko"];

/// What sparse says of the lines that the patch adds, beside the modules.
pub const SPARSE: &str = "sparse";

/// What unpacking the source takes.
pub const NEEDS: &[Need] = &[
    need("mmdebstrap", "unpacks the source of KVM"),
    need("xz-utils", "unpacks the source of KVM"),
    need("perl", "runs checkpatch.pl of the kernel"),
];

/// What of the source is kept: KVM, the headers that the patch adds to, and
/// checkpatch.pl with its lists.
const PARTS: [&str; 7] = [
    "Makefile",
    "arch/x86/include",
    "arch/x86/kvm",
    "virt/kvm",
    "scripts/checkpatch.pl",
    "scripts/const_structs.checkpatch",
    "scripts/spelling.txt",
];

/// Programs that the kernels' trees do not have, from the Debian of the tree.
const PROGRAMS: [&str; 2] = ["patch", "sparse"];

const UNPACK_TIMEOUT: Duration = Duration::from_secs(15 * 60);
const BUILD_TIMEOUT: Duration = Duration::from_secs(20 * 60);

/// KVM's source and what it is built and checked with.
pub struct Source {
    /// The folder: `source`, with [`PARTS`] as they are in a kernel's tree, and
    /// `bin`, with [`PROGRAMS`].
    pub folder: PathBuf,
}

impl Source {
    /// That of `kernel`; fetched when it is not in the cache (150 MB, half a minute).
    pub fn get(lab: &Lab, kernel: &Kernel) -> Result<Self> {
        let key = Key::new("kvm source 1").item(&kernel.root).texts(&PARTS).texts(&PROGRAMS);
        let name = format!("kvm-source-{}", kernel.line);
        let folder = lab.cache.get_or_build(&name, &key, |folder| {
            apt::ensure(lab, NEEDS)?;
            let step = lab.progress.step(format!("fetching the source of Linux {}", kernel.release));
            let all = folder.with_extension("all");
            remove(&all)?;
            unpack(lab, kernel, &name, &all, folder)?;
            remove(&all)?;
            step.done("");
            Ok(())
        })?;
        Ok(Self { folder })
    }
}

/// Unpacks the packages to `all`, and what is kept of them to `folder`.
fn unpack(lab: &Lab, kernel: &Kernel, name: &str, all: &Path, folder: &Path) -> Result<()> {
    let package = format!("linux-source-{}", kernel.line);
    let version = headers_version(kernel)?;
    let suites = debian::suites(kernel.line);
    let first = suites.first().context("a tree without a suite")?;
    let mirror = apt::mirror(lab)?;
    let log = lab.log(name);
    let mut command = Command::new("mmdebstrap");
    command
        .args(["--variant=extract", "--mode=root", "--format=directory"])
        .arg("--aptopt=APT::Install-Recommends \"false\"")
        .arg(format!("--include={package}={version},{}", PROGRAMS.join(",")))
        .arg(first)
        .arg(all)
        .args(suites.iter().map(|suite| format!("deb {mirror} {suite} main")));
    proc::run(&mut command, &log, UNPACK_TIMEOUT).with_context(|| {
        format!(
            "fetching {package} {version}. If the archive has a newer one only, remove {} so that \
             kernel, headers and source are fetched anew",
            kernel.root.display()
        )
    })?;
    let source = folder.join("source");
    let bin = folder.join("bin");
    for folder in [&source, &bin] {
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    }
    let mut tar = Command::new("tar");
    tar.arg("--extract").arg("--file").arg(all.join(format!("usr/src/{package}.tar.xz")));
    tar.arg("--directory").arg(&source).arg("--strip-components=1");
    tar.args(PARTS.map(|part| format!("{package}/{part}")));
    proc::run(&mut tar, &log, UNPACK_TIMEOUT)?;
    for program in PROGRAMS {
        fs::copy(all.join("usr/bin").join(program), bin.join(program))
            .with_context(|| format!("keeping {program}"))?;
    }
    Ok(())
}

/// The version of the headers package in the kernel's tree.
fn headers_version(kernel: &Kernel) -> Result<String> {
    let path = kernel.root.join("var/lib/dpkg/status");
    let status = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let package = format!("linux-headers-{}", kernel.release);
    version_of(&status, &package).with_context(|| format!("no {package} in {}", path.display()))
}

/// The version of a package in dpkg's status file.
fn version_of(status: &str, package: &str) -> Option<String> {
    let field = |entry: &str, name: &str| {
        entry.lines().find_map(|line| line.strip_prefix(name).map(|value| value.trim().to_owned()))
    };
    let mut entries = status.split("\n\n");
    let entry = entries.find(|entry| field(entry, "Package:").as_deref() == Some(package))?;
    field(entry, "Version:")
}

/// The folder with [`MODULES`] for `kernel`, patched and without debug information;
/// built when it is not in the cache (about a minute on two cores).
pub fn modules(lab: &Lab, kernel: &Kernel) -> Result<PathBuf> {
    let source = Source::get(lab, kernel)?;
    let patches = lab.root.join("kernel_patch");
    let key = Key::new("kvm patched 2")
        .item(&kernel.root)
        .item(&source.folder)
        .text(&kernel.release)
        .file(&patches.join("build"))?
        .text(diff_of(&read(&patch(lab, kernel.line))?));
    let name = format!("kvm-patched-{}", kernel.line);
    lab.cache.get_or_build(&name, &key, |out| {
        let step = lab.progress.step(format!("building patched KVM for {}", kernel.release));
        // Checkouts that share a tree do not share the folder.
        let folder = format!("kvm-{}", std::process::id());
        let work = kernel.root.join(&folder);
        let built = build_in(lab, kernel, &source, &folder, &name, out);
        remove(&work)?;
        built?;
        step.done("");
        Ok(())
    })
}

/// The patched module in `folder` that takes the place of `stock`, if one does.
pub fn module(folder: &Path, stock: &Path) -> Option<PathBuf> {
    let name = modules::stem(stock);
    MODULES.iter().find(|file| modules::stem(Path::new(file)) == name).map(|file| folder.join(file))
}

/// The patch for a kernel's line.
pub fn patch(lab: &Lab, line: Line) -> PathBuf {
    lab.root.join(format!("kernel_patch/linux-{line}.patch"))
}

/// What a patch changes: all but what its message says.
fn diff_of(patch: &str) -> &str {
    patch.find("\ndiff --git ").map_or(patch, |at| &patch[at..])
}

/// Builds in `folder` of the kernel's tree, which the caller removes.
fn build_in(lab: &Lab, kernel: &Kernel, source: &Source, folder: &str, name: &str, out: &Path) -> Result<()> {
    let work = kernel.root.join(folder);
    fs::create_dir_all(&work).with_context(|| format!("creating {}", work.display()))?;
    let log = lab.log(name);
    for from in [&source.folder.join("source"), &source.folder.join("bin"), &lab.root.join("kernel_patch")] {
        let mut copy = Command::new("cp");
        copy.args(["--recursive", "--dereference"]).arg(from).arg(&work);
        proc::run(&mut copy, &log, UNPACK_TIMEOUT)?;
    }
    let script = format!(
        "PATH=/{folder}/bin:$PATH exec sh /{folder}/kernel_patch/build --kernel {} \
         --source /{folder}/source --output /{folder}/out --jobs 2",
        kernel.release
    );
    proc::run(&mut debian::inside(&kernel.root, &script), &log, BUILD_TIMEOUT)?;
    let output = fs::read_to_string(&log).context("reading the build's log")?;
    if output.contains("warning:") || output.contains("WARNING:") {
        bail!("patched KVM builds with warnings\n{}", proc::log_tail(&log));
    }
    fs::create_dir(out).with_context(|| format!("creating {}", out.display()))?;
    if kernel.line == kernel_checks::SPARSE_LINE {
        fs::write(out.join(SPARSE), sparse(lab, kernel, folder, name)?)
            .context("writing what sparse says")?;
    }
    for module in MODULES {
        let built = work.join("out").join(module);
        ensure!(built.exists(), "the build left no {module}");
        fs::copy(&built, out.join(module)).with_context(|| format!("fetching {}", built.display()))?;
    }
    Ok(())
}

/// What sparse says of lines that the patch adds, after the build in `folder`.
fn sparse(lab: &Lab, kernel: &Kernel, folder: &str, name: &str) -> Result<String> {
    let added = added_lines(&read(&patch(lab, kernel.line))?);
    let kvm = "arch/x86/kvm/";
    let objects: Vec<String> = added
        .keys()
        .filter_map(|file| Some(file.strip_prefix(kvm)?.strip_suffix(".c")?.to_owned() + ".o"))
        .collect();
    let script = format!(
        "PATH=/{folder}/bin:$PATH exec make -C /{folder}/out/objects M=/{folder}/out/source/{kvm} C=2 \
         CHECK=sparse CONFIG_KVM_EPT_SAMPLE=y KCFLAGS=-DCONFIG_KVM_EPT_SAMPLE=1 {}",
        objects.join(" ")
    );
    let log = lab.log(&format!("{name}-sparse"));
    proc::run(&mut debian::inside(&kernel.root, &script), &log, BUILD_TIMEOUT)?;
    let told = kernel_checks::warnings(&log)?;
    Ok(told.iter().filter(|told| is_about(told, &added)).map(|told| format!("{told}\n")).collect())
}

/// The numbers of the lines that a patch adds, by file.
fn added_lines(patch: &str) -> BTreeMap<String, BTreeSet<u32>> {
    let (mut added, mut file, mut next) = (BTreeMap::new(), String::new(), 0);
    for line in diff_of(patch).lines() {
        if let Some(name) = line.strip_prefix("+++ b/") {
            file = name.to_owned();
        } else if let Some(hunk) = line.strip_prefix("@@ ") {
            let start = hunk.split_once('+').map_or("", |(_, new)| new);
            let digits = start.find(|c: char| !c.is_ascii_digit()).map_or(start, |end| &start[..end]);
            next = digits.parse().unwrap_or(0);
        } else if line.starts_with('+') && !line.starts_with("+++") {
            added.entry(file.clone()).or_insert_with(BTreeSet::new).insert(next);
            next += 1;
        } else if line.starts_with(' ') {
            next += 1;
        }
    }
    added
}

/// Whether a warning, FILE:LINE:COLUMN: TEXT, is about one of these lines.
fn is_about(warning: &str, lines: &BTreeMap<String, BTreeSet<u32>>) -> bool {
    let mut fields = warning.split(':');
    let (Some(path), Some(number)) = (fields.next(), fields.next().and_then(|text| text.parse().ok())) else {
        return false;
    };
    lines.iter().any(|(file, numbers)| path.ends_with(file) && numbers.contains(&number))
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("removing {}", path.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packages_own_version_is_found() {
        let status = "Package: linux-headers-1-common\nVersion: 1-1\n\nPackage: linux-headers-1\n\
                      Status: install ok installed\nVersion: 1-2~bpo\n\nPackage: z\nVersion: 3\n";
        assert_eq!(version_of(status, "linux-headers-1").as_deref(), Some("1-2~bpo"));
        assert_eq!(version_of(status, "linux-headers-2"), None);
    }

    #[test]
    fn the_module_and_the_patches_have_one_header() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
        let header = fs::read_to_string(root.join("kmod/kvm_patch.h")).unwrap();
        let mut patches = 0;
        for entry in fs::read_dir(root.join("kernel_patch")).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|e| e == "patch") {
                let added = added_file(&fs::read_to_string(&path).unwrap(), "asm/kvm_ept_sample.h");
                assert_eq!(added, header, "{}", path.display());
                patches += 1;
            }
        }
        assert!(patches > 0);
    }

    #[test]
    fn added_lines_are_counted_in_the_new_file() {
        let patch = "text\n+ not this\n\ndiff --git a/f.c b/f.c\n--- a/f.c\n+++ b/f.c\n\
                     @@ -3,3 +5,4 @@ f\n a\n-b\n+c\n+d\n e\n@@ -9 +12,2 @@\n f\n+g\n\
                     diff --git a/g.h b/g.h\n--- /dev/null\n+++ b/g.h\n@@ -0,0 +1 @@\n+h\n";
        let added = added_lines(patch);
        assert_eq!(added["f.c"], BTreeSet::from([6, 7, 13]));
        assert_eq!(added["g.h"], BTreeSet::from([1]));
        assert!(is_about("/x/f.c:7:3: warning: w", &added));
        assert!(!is_about("/x/f.c:8:3: warning: w", &added));
        assert!(!is_about("no place: warning: w", &added));
    }

    /// The text of a file that a patch adds, by the end of its path.
    fn added_file(patch: &str, path: &str) -> String {
        let (_, rest) = patch.split_once(&format!("{path}\n@@")).unwrap();
        let lines = rest.lines().skip(1).map_while(|line| line.strip_prefix('+'));
        lines.map(|line| format!("{line}\n")).collect()
    }
}
