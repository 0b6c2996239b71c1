// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the AMD host boots from.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::Lab;
use crate::cache::Key;
use crate::cpio::Cpio;
use crate::debian::{self, BuildTree};
use crate::proc;

const INITRAMFS_INIT: &str = include_str!("../../amd/initramfs-init");
const HOST_INIT: &str = include_str!("../../amd/host-init");

/// What Debian has as modules and the host needs; what these need in turn is
/// looked up, except crc32c_generic, which erofs asks for only by algorithm.
const MODULES: [&str; 6] = ["virtio_blk", "crc32c_generic", "erofs", "overlay", "ccp", "kvm_amd"];

const TOOL_TIMEOUT: Duration = Duration::from_secs(120);

/// The root image: the host's Debian tree as erofs.
pub fn root(lab: &Lab) -> Result<PathBuf> {
    let tree = debian::host_tree(lab)?;
    let key = Key::new("erofs 1").item(&tree);
    lab.cache.get_or_build("amd-root", &key, |image| {
        let step = lab.progress.step("making the AMD host's root image");
        proc::run(
            Command::new("mkfs.erofs").arg("-zlz4").arg(image).arg(&tree),
            &lab.log("mkfs-erofs"),
            TOOL_TIMEOUT,
        )?;
        step.done("");
        Ok(())
    })
}

/// The initramfs: busybox, both init scripts and kernel modules.
pub fn initramfs(lab: &Lab, tree: &BuildTree) -> Result<PathBuf> {
    let host = debian::host_tree(lab)?;
    let key = Key::new("initramfs 1")
        .item(&tree.root)
        .item(&host)
        .text(INITRAMFS_INIT)
        .text(HOST_INIT)
        .texts(&MODULES);
    lab.cache.get_or_build("amd-initramfs", &key, |out| {
        let mut archive = Cpio::default();
        archive.content("init", INITRAMFS_INIT.as_bytes())?;
        archive.content("host-init", HOST_INIT.as_bytes())?;
        archive.directory("bin")?;
        archive.file("bin/busybox", &host.join("usr/bin/busybox"))?;
        archive.directory("modules")?;
        let mut order = String::new();
        for module in load_order(&tree.modules(), &MODULES)? {
            let name = stem(&module);
            archive.content(&format!("modules/{name}.ko"), &unpack(&module)?)?;
            order += &format!("{name}.ko\n");
        }
        archive.content("modules/order", order.as_bytes())?;
        fs::write(out, archive.finish()?).with_context(|| format!("writing {}", out.display()))
    })
}

/// The modules of `names` and all that they need, each after what it needs.
fn load_order(folder: &Path, names: &[&str]) -> Result<Vec<PathBuf>> {
    let path = folder.join("modules.dep");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let needs: HashMap<String, (&str, Vec<&str>)> = text
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(module, needs)| {
            let needs = needs.split_whitespace().collect();
            (stem(Path::new(module)), (module, needs))
        })
        .collect();
    let mut order: Vec<&str> = Vec::new();
    for name in names {
        let Some((module, needs)) = needs.get(*name) else {
            bail!("{} has no module {name}", path.display());
        };
        // modules.dep lists all that is needed, what must come first last.
        for wanted in needs.iter().rev().chain([module]) {
            if !order.contains(wanted) {
                order.push(wanted);
            }
        }
    }
    Ok(order.into_iter().map(|module| folder.join(module)).collect())
}

/// A module's name: that of its file, with underscores, without `.ko.xz`.
fn stem(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = name.split('.').next().unwrap_or_default();
    name.replace('-', "_")
}

fn unpack(module: &Path) -> Result<Vec<u8>> {
    let out =
        Command::new("xz").args(["--decompress", "--stdout"]).arg(module).output().context("running xz")?;
    if !out.status.success() {
        bail!("unpacking {}: {}", module.display(), String::from_utf8_lossy(&out.stderr));
    }
    Ok(out.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need() {
        let folder = std::env::temp_dir().join(format!("ept-virt-dep-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let dep = "k/kvm-amd.ko.xz: k/ccp.ko.xz k/kvm.ko.xz k/irq.ko.xz\nk/kvm.ko.xz: k/irq.ko.xz\n\
                   k/irq.ko.xz:\nk/ccp.ko.xz:\n";
        fs::write(folder.join("modules.dep"), dep).unwrap();
        let order = load_order(&folder, &["ccp", "kvm_amd"]).unwrap();
        let names: Vec<String> = order.iter().map(|p| stem(p)).collect();
        assert_eq!(names, ["ccp", "irq", "kvm", "kvm_amd"]);
        assert!(load_order(&folder, &["absent"]).is_err());
        fs::remove_dir_all(&folder).unwrap();
    }
}
