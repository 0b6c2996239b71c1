// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the Intel host boots from: a CD with a Debian kernel and an initramfs
//! of KVM's modules, ours, and one program.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::Lab;
use crate::cache::Key;
use crate::cpio::Cpio;
use crate::debian::BuildTree;
use crate::intel_kernel;
use crate::proc;

/// From syslinux-common and isolinux.
const BOOT_LOADER: [&str; 2] =
    ["/usr/lib/ISOLINUX/isolinux.bin", "/usr/lib/syslinux/modules/bios/ldlinux.c32"];
const KVM_INTEL: &str = "kernel/arch/x86/kvm/kvm-intel.ko.xz";
const TOOL_TIMEOUT: Duration = Duration::from_secs(120);

/// What the host is made of.
pub struct Ingredients<'a> {
    /// The tree with the kernel's image and modules.
    pub tree: &'a BuildTree,
    /// kvm_ept_sample.ko for that kernel.
    pub sampler: &'a Path,
    /// The static program that is PID 1.
    pub agent: &'a Path,
}

/// Whether kernel and modules are as Debian ships them.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Flavour {
    /// Byte for byte.
    Stock,
    /// Kernel uncompressed, KVM's modules without their list of ftrace call
    /// sites, which alone takes longer to process than all the rest of a boot.
    Fast,
}

/// A kernel and its initramfs, as files.
pub struct Image {
    kernel: PathBuf,
    initramfs: PathBuf,
}

/// Makes the kernel and the initramfs; the latter in `work`.
pub fn build(lab: &Lab, from: &Ingredients, flavour: Flavour, work: &Path) -> Result<Image> {
    let initramfs = work.join("initramfs");
    fs::write(&initramfs, initramfs_content(lab, from, flavour)?)
        .with_context(|| format!("writing {}", initramfs.display()))?;
    Ok(Image { kernel: kernel(lab, from, flavour)?, initramfs })
}

/// Burns `image` to a CD that boots it with the kernel command line `cmdline`.
pub fn burn(lab: &Lab, image: &Image, cmdline: &str, work: &Path, cd: &Path) -> Result<()> {
    let root = work.join("cd");
    fs::create_dir_all(&root).with_context(|| format!("creating {}", root.display()))?;
    for file in BOOT_LOADER.map(Path::new) {
        let name = file.file_name().context("a file of the boot loader has no name")?;
        fs::copy(file, root.join(name)).with_context(|| format!("copying {}", file.display()))?;
    }
    // A cache may hold links to another's images; on the CD they would lead nowhere.
    let kernel = fs::canonicalize(&image.kernel)
        .with_context(|| format!("finding the kernel {}", image.kernel.display()))?;
    let config = format!("DEFAULT host\nLABEL host\n KERNEL /vmlinuz\n INITRD /initrd\n APPEND {cmdline}\n");
    fs::write(root.join("isolinux.cfg"), config)?;
    proc::run(
        Command::new("xorriso")
            .args(["-as", "mkisofs", "-quiet", "-graft-points"])
            .args(["-b", "isolinux.bin", "-c", "boot.cat"])
            .args(["-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"])
            .arg("-o")
            .arg(cd)
            .arg(&root)
            .arg(format!("/vmlinuz={}", kernel.display()))
            .arg(format!("/initrd={}", image.initramfs.display())),
        &lab.log("intel-cd"),
        TOOL_TIMEOUT,
    )
}

fn kernel(lab: &Lab, from: &Ingredients, flavour: Flavour) -> Result<PathBuf> {
    let vmlinuz = from.tree.kernel();
    if flavour == Flavour::Stock {
        return Ok(vmlinuz);
    }
    let key = Key::new("2").file(&vmlinuz)?.text(intel_kernel::LOADER);
    lab.cache.get_or_build("intel-kernel", &key, |out| {
        let work = out.with_extension("work");
        fs::create_dir_all(&work).with_context(|| format!("creating {}", work.display()))?;
        intel_kernel::flatten(lab, &vmlinuz, &work, out)?;
        fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))
    })
}

fn initramfs_content(lab: &Lab, from: &Ingredients, flavour: Flavour) -> Result<Vec<u8>> {
    let mut archive = Cpio::default();
    archive.file("init", from.agent)?;
    archive.directory("modules")?;
    let mut load = String::new();
    for module in kvm_modules(lab, from, flavour)? {
        let name = file_name(&module);
        archive.file(&format!("modules/{name}"), &module)?;
        load += &format!("{name}\n");
    }
    let sampler = file_name(from.sampler);
    archive.file(&format!("modules/{sampler}"), from.sampler)?;
    load += &format!("{sampler}\n");
    archive.content("modules/load", load.as_bytes())?;
    archive.finish()
}

/// kvm-intel and what it depends on, unpacked, in the order of loading.
fn kvm_modules(lab: &Lab, from: &Ingredients, flavour: Flavour) -> Result<Vec<PathBuf>> {
    let folder = from.tree.modules();
    let packed: Vec<PathBuf> = kvm_module_names(&folder)?.iter().map(|name| folder.join(name)).collect();
    let mut key = Key::new(match flavour {
        Flavour::Stock => "stock 1",
        Flavour::Fast => "fast 1",
    });
    for path in &packed {
        key = key.file(path)?;
    }
    let unpacked = lab.cache.get_or_build("intel-modules", &key, |out| {
        fs::create_dir(out).with_context(|| format!("creating {}", out.display()))?;
        packed.iter().try_for_each(|path| unpack(lab, path, flavour, out))
    })?;
    Ok(packed.iter().map(|path| unpacked.join(file_name(path).trim_end_matches(".xz"))).collect())
}

/// Paths below the modules' folder, the last being kvm-intel itself.
fn kvm_module_names(folder: &Path) -> Result<Vec<String>> {
    let list = folder.join("modules.dep");
    let text = fs::read_to_string(&list).with_context(|| format!("reading {}", list.display()))?;
    let needs = text
        .lines()
        .find_map(|line| line.strip_prefix(KVM_INTEL)?.strip_prefix(':'))
        .with_context(|| format!("{} does not know {KVM_INTEL}", list.display()))?;
    // modules.dep names the direct needs first.
    let needs = needs.split_whitespace().rev().map(str::to_owned);
    Ok(needs.chain([KVM_INTEL.to_owned()]).collect())
}

fn unpack(lab: &Lab, packed: &Path, flavour: Flavour, to: &Path) -> Result<()> {
    let copy = to.join(file_name(packed));
    fs::copy(packed, &copy).with_context(|| format!("copying {}", packed.display()))?;
    let log = lab.log("intel-modules");
    proc::run(Command::new("xz").arg("--decompress").arg(&copy), &log, TOOL_TIMEOUT)?;
    if flavour == Flavour::Fast {
        let module = copy.with_extension("");
        proc::run(
            Command::new("objcopy").args(["--remove-section", "__mcount_loc"]).arg(&module),
            &log,
            TOOL_TIMEOUT,
        )?;
    }
    Ok(())
}

fn file_name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}
