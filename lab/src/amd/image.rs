// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the AMD host boots from.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::Lab;
use crate::cache::Key;
use crate::cpio::Cpio;
use crate::debian;
use crate::flavour::{Flavour, Init};
use crate::kernel::Kernel;
use crate::{modules, proc};

const INITRAMFS_INIT: &str = include_str!("../../amd/initramfs-init");
const HOST_INIT: &str = include_str!("../../amd/host-init");
const HOST_INIT_SYSTEMD: &str = include_str!("../../amd/host-init-systemd");
const HOST_PAYLOAD: &str = include_str!("../../amd/host-payload");

/// What Debian has as modules and the host needs; what these need in turn is
/// looked up.
const MODULES: [&str; 5] = ["virtio_blk", "erofs", "overlay", "ccp", "kvm_amd"];

/// What only some kernels have as modules, others built in or not at all. erofs asks for
/// crc32c by algorithm alone.
const MODULES_OF_SOME: [&str; 2] = ["virtio_pci", "crc32c_generic"];

const TOOL_TIMEOUT: Duration = Duration::from_secs(120);

/// The root image: the host's Debian tree as erofs.
pub fn root(lab: &Lab, flavour: Flavour) -> Result<PathBuf> {
    let tree = debian::host_tree(lab, flavour)?;
    let key = Key::new("erofs 1").item(&tree);
    lab.cache.get_or_build(&flavour.item("amd-root"), &key, |image| {
        let step = lab.progress.step(format!("making the AMD host's root image ({flavour})"));
        proc::run(
            Command::new("mkfs.erofs").arg("-zlz4").arg(image).arg(&tree),
            &lab.log(&flavour.item("mkfs-erofs")),
            TOOL_TIMEOUT,
        )?;
        step.done("");
        Ok(())
    })
}

/// The initramfs: busybox, the host's scripts and kernel modules.
pub fn initramfs(lab: &Lab, kernel: &Kernel, flavour: Flavour) -> Result<PathBuf> {
    let host = debian::host_tree(lab, flavour)?;
    let host_init = match flavour.init {
        Init::Script => HOST_INIT,
        Init::Systemd | Init::Upgraded => HOST_INIT_SYSTEMD,
    };
    let key = Key::new("initramfs 2")
        .item(&kernel.root)
        .item(&host)
        .text(INITRAMFS_INIT)
        .text(host_init)
        .text(HOST_PAYLOAD)
        .texts(&MODULES_OF_SOME)
        .texts(&MODULES);
    lab.cache.get_or_build(&flavour.item("amd-initramfs"), &key, |out| {
        let mut archive = Cpio::default();
        archive.content("init", INITRAMFS_INIT.as_bytes())?;
        archive.content("host-init", host_init.as_bytes())?;
        archive.content("host-payload", HOST_PAYLOAD.as_bytes())?;
        archive.directory("bin")?;
        archive.file("bin/busybox", &host.join("usr/bin/busybox"))?;
        archive.directory("modules")?;
        let mut order = String::new();
        let there = |name: &&str| modules::load_order(&kernel.modules, &[name]).is_ok();
        let names: Vec<&str> = MODULES_OF_SOME.into_iter().filter(there).chain(MODULES).collect();
        for module in modules::load_order(&kernel.modules, &names)? {
            let name = modules::stem(&module);
            archive.content(&format!("modules/{name}.ko"), &modules::unpack(&module)?)?;
            order += &format!("{name}.ko\n");
        }
        archive.content("modules/order", order.as_bytes())?;
        fs::write(out, archive.finish()?).with_context(|| format!("writing {}", out.display()))
    })
}
