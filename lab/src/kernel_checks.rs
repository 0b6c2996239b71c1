// SPDX-License-Identifier: MIT OR Apache-2.0
//! What kernel people run on what they are sent: checkpatch.pl, and sparse. Both
//! for the patches of kernel_patch and for the module.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::Lab;
use crate::kernel::{Kernel, Line};
use crate::kvm_patch::{self, Source};
use crate::{kmod, proc};

/// The kernel lines that there are patches for.
pub const LINES: [Line; 2] = [Line::V6_12, Line::V7_3];

/// What checkpatch.pl says of the patches, and why that is as it should be.
const PATCH_EXCEPTIONS: &[(&str, &str)] = &[
    ("FILE_PATH_CHANGES", "the new files are in folders that MAINTAINERS has"),
    ("EXPORT_SYMBOL", "DEFINE_STATIC_KEY_FALSE, before it, defines what is exported"),
    ("MISSING_SIGN_OFF", "whoever sends it, signs it off"),
];

/// The same for the module, which is for several kernels and not in any.
const MODULE_EXCEPTIONS: &[(&str, &str)] = &[
    ("LINUX_VERSION_CODE", "one source for three kernel lines"),
    ("CONSTANT_COMPARISON", "the macro that compares versions has one on each side"),
    ("MACRO_ARG_UNUSED", "what some kernel lines do not have is a constant there"),
    ("ALLOC_WITH_SIZEOF", "kzalloc_obj() came after 6.12"),
    ("COMPLEX_MACRO", "for_each_user_slot() is the head of a loop"),
    ("ASSIGN_IN_IF", "for_each_user_slot() is the head of a loop"),
    ("BLOCK_COMMENT_STYLE", "beside members and values"),
];

/// The line with which sparse runs. Debian's newest, 0.6.4, does not understand the
/// headers of 7.3 (`__typeof_unqual__`), and 7.3's headers package lacks the script that
/// asks whether it would.
pub const SPARSE_LINE: Line = Line::V6_12;

/// How many files were checked, in words.
pub fn checkpatch(lab: &Lab) -> Result<String> {
    let newest = LINES.last().context("no kernel lines")?.get(lab)?;
    let script = Source::get(lab, &newest)?.folder.join("source/scripts/checkpatch.pl");
    for line in LINES {
        let patch = kvm_patch::patch(lab, line);
        // As a file it would be taken for source.
        let input = File::open(&patch).with_context(|| format!("opening {}", patch.display()))?;
        let mut command = checker(&script, PATCH_EXCEPTIONS);
        command.args(["--strict", "-"]).stdin(Stdio::from(input));
        judge(command).with_context(|| format!("checkpatch.pl on {}", patch.display()))?;
    }
    let files = module_files(&lab.root.join("kmod"))?;
    ensure!(files.len() > 20, "only {} files of the module found", files.len());
    let mut command = checker(&script, MODULE_EXCEPTIONS);
    command.arg("--file").args(&files);
    judge(command).context("checkpatch.pl on the module")?;
    Ok(format!("{} patches, {} files of the module", LINES.len(), files.len()))
}

fn checker(script: &Path, exceptions: &[(&str, &str)]) -> Command {
    let types: Vec<&str> = exceptions.iter().map(|(kind, _)| *kind).collect();
    let mut command = Command::new("perl");
    command.arg(script).args(["--no-tree", "--quiet", "--no-summary", "--show-types"]);
    command.arg(format!("--ignore={}", types.join(",")));
    command
}

/// Fails with what is said, if anything is.
fn judge(mut command: Command) -> Result<()> {
    let out = command.output().context("running perl")?;
    if !out.status.success() || !out.stdout.is_empty() {
        bail!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    }
    Ok(())
}

/// The module's own sources: not what a build left, and not what a bench builds.
fn module_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for folder in [folder.to_owned(), folder.join("uapi")] {
        for entry in fs::read_dir(&folder).with_context(|| format!("reading {}", folder.display()))? {
            let path = entry?.path();
            if path.is_file() && kmod::is_source(&path) && path.extension().is_some() {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

/// Builds patched KVM; runs sparse on the module and on the lines that the patch adds.
pub fn patch(lab: &Lab, kernel: &Kernel) -> Result<String> {
    let built = kvm_patch::modules(lab, kernel)?;
    if kernel.line != SPARSE_LINE {
        return Ok(format!("builds for {}", kernel.release));
    }
    kmod::check(lab, kernel, &Source::get(lab, kernel)?.folder.join("bin/sparse"))?;
    let checked = built.join(kvm_patch::SPARSE);
    let said = fs::read_to_string(&checked).with_context(|| format!("reading {}", checked.display()))?;
    ensure!(said.is_empty(), "sparse on what {} adds:\n{said}", kvm_patch::patch(lab, kernel.line).display());
    Ok(format!("builds for {}; sparse is content, with the module too", kernel.release))
}

/// A shared line, so that a log that is missing is not taken for a clean one.
pub fn warnings(log: &Path) -> Result<Vec<String>> {
    let text = fs::read_to_string(log).with_context(|| format!("reading {}", log.display()))?;
    ensure!(text.contains("CHECK "), "sparse did not run\n{}", proc::log_tail(log));
    let told = |line: &&str| line.contains(": warning:") || line.contains(": error:");
    Ok(text.lines().filter(told).map(str::to_owned).collect())
}
