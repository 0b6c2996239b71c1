// SPDX-License-Identifier: MIT OR Apache-2.0
//! A kernel's modules: in which order to load them, and unpacked.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// The modules of `names` and all that they need, each after what it needs.
/// `folder` is the kernel's, with modules.dep.
pub fn load_order(folder: &Path, names: &[&str]) -> Result<Vec<PathBuf>> {
    let path = folder.join("modules.dep");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let order = order(&text, names).with_context(|| format!("in {}", path.display()))?;
    Ok(order.into_iter().map(|module| folder.join(module)).collect())
}

fn order<'a>(modules_dep: &'a str, names: &[&str]) -> Result<Vec<&'a str>> {
    let needs: HashMap<String, (&str, Vec<&str>)> = modules_dep
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(module, needs)| (stem(Path::new(module)), (module, needs.split_whitespace().collect())))
        .collect();
    let mut order: Vec<&str> = Vec::new();
    for name in names {
        let Some((module, needs)) = needs.get(*name) else {
            bail!("there is no module {name}");
        };
        // All that is needed is listed, what must come first last.
        for wanted in needs.iter().rev().chain([module]) {
            if !order.contains(wanted) {
                order.push(wanted);
            }
        }
    }
    Ok(order)
}

/// A module's name: that of its file, with underscores, without `.ko.xz`.
pub fn stem(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = name.split('.').next().unwrap_or_default();
    name.replace('-', "_")
}

/// The module itself, whether its file is compressed or not.
pub fn unpack(module: &Path) -> Result<Vec<u8>> {
    match module.extension().and_then(|e| e.to_str()) {
        Some("ko") => fs::read(module).with_context(|| format!("reading {}", module.display())),
        Some("xz") => {
            let out = Command::new("xz")
                .args(["--decompress", "--stdout"])
                .arg(module)
                .output()
                .context("running xz")?;
            if !out.status.success() {
                bail!("unpacking {}: {}", module.display(), String::from_utf8_lossy(&out.stderr));
            }
            Ok(out.stdout)
        }
        _ => bail!("{} is not a module, or compressed in a way not known here", module.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need() {
        let dep = "k/kvm-amd.ko.xz: k/ccp.ko.xz k/kvm.ko.xz k/irq.ko.xz\nk/kvm.ko.xz: k/irq.ko.xz\n\
                   k/irq.ko.xz:\nk/ccp.ko.xz:\n";
        let order = order(dep, &["ccp", "kvm_amd"]).unwrap();
        assert_eq!(order, ["k/ccp.ko.xz", "k/irq.ko.xz", "k/kvm.ko.xz", "k/kvm-amd.ko.xz"]);
    }

    #[test]
    fn compressed_or_not_a_module_has_one_name() {
        for file in ["a/kvm-amd.ko.xz", "a/kvm-amd.ko", "kvm_amd.ko"] {
            assert_eq!(stem(Path::new(file)), "kvm_amd");
            assert_eq!(order(&format!("{file}:"), &["kvm_amd"]).unwrap(), [file]);
        }
    }

    #[test]
    fn an_unknown_module_is_an_error() {
        assert!(order("k/kvm.ko:", &["absent"]).is_err());
    }
}
