// SPDX-License-Identifier: MIT OR Apache-2.0
//! What micro hosts boot: a kernel, and an initramfs of KVM's modules, ours, and
//! one program.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::Lab;
use crate::boots::{Boot, Flavour, Host};
use crate::cache::Key;
use crate::cpio::Cpio;
use crate::kernel::Kernel;
use crate::micro::Target;
use crate::{intel_kernel, kmod, kvm_patch, modules, proc};

const TOOL_TIMEOUT: Duration = Duration::from_secs(120);

/// Modules that tests load themselves when they need them: RAM disks.
const ON_DEMAND: &[&str] = &["brd"];

/// The kernel's boot image in this flavour.
pub fn kernel(lab: &Lab, kernel: &Kernel, flavour: Flavour) -> Result<PathBuf> {
    if flavour == Flavour::Stock {
        return Ok(kernel.image.clone());
    }
    let key = Key::new("2").file(&kernel.image)?.text(intel_kernel::LOADER);
    lab.cache.get_or_build(&format!("flat-kernel-{}", kernel.line), &key, |out| {
        let work = out.with_extension("work");
        fs::create_dir_all(&work).with_context(|| format!("creating {}", work.display()))?;
        intel_kernel::flatten(lab, &kernel.image, &work, out)?;
        fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))
    })
}

/// Makes the initramfs, in `work`.
pub fn initramfs(lab: &Lab, boot: &Boot, target: &Target, agent: &Path, work: &Path) -> Result<PathBuf> {
    let mut archive = Cpio::default();
    archive.file("init", agent)?;
    archive.directory("modules")?;
    let mut load = String::new();
    // Not there in kernels that were built for the lab alone.
    for packed in modules::load_order(&target.kernel.modules, ON_DEMAND).unwrap_or_default() {
        let name = format!("modules/{}.ko", modules::stem(&packed));
        archive.content(&name, &modules::unpack(&packed)?)?;
    }
    let kvm = match boot.host {
        Host::Amd => "kvm_amd",
        Host::Intel(_) => "kvm_intel",
    };
    let patched = if boot.patched { Some(kvm_patch::modules(lab, &target.kernel)?) } else { None };
    for packed in modules::load_order(&target.kernel.modules, &[kvm])? {
        let name = format!("{}.ko", modules::stem(&packed));
        let module = work.join(&name);
        let file = patched.as_deref().and_then(|folder| kvm_patch::module(folder, &packed));
        fs::write(&module, modules::unpack(&file.unwrap_or(packed))?)
            .with_context(|| format!("writing {}", module.display()))?;
        if boot.flavour == Flavour::Fast {
            strip_call_sites(lab, boot, &module)?;
        }
        archive.file(&format!("modules/{name}"), &module)?;
        load += &format!("{name}\n");
    }
    archive.file(&format!("modules/{}", kmod::NAME), &target.module)?;
    load += &format!("{}\n", kmod::NAME);
    archive.directory("modules/unknown-kernel")?;
    archive.file(&format!("modules/unknown-kernel/{}", kmod::NAME), &target.unknown)?;
    if boot.bench_module {
        // Its test loads it.
        let module = kmod::build_bench(lab, &target.kernel)?;
        archive.file(&format!("modules/{}", kmod::BENCH_NAME), &module)?;
    }
    archive.content("modules/load", load.as_bytes())?;
    let initramfs = work.join("initramfs");
    fs::write(&initramfs, archive.finish()?).with_context(|| format!("writing {}", initramfs.display()))?;
    Ok(initramfs)
}

/// Removes the list of ftrace call sites from a module.
fn strip_call_sites(lab: &Lab, boot: &Boot, module: &Path) -> Result<()> {
    let mut command = Command::new("objcopy");
    command.args(["--remove-section", "__mcount_loc"]).arg(module);
    proc::run(&mut command, &lab.log(&format!("{}-objcopy", boot.name)), TOOL_TIMEOUT)
}
