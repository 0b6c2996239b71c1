// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a built module says about itself, as modinfo shows it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// Fails unless the module has the product's version, says what it is, and
/// describes each of its parameters.
pub fn check(module: &Path) -> Result<()> {
    let bytes = fs::read(module).with_context(|| format!("reading {}", module.display()))?;
    complete(&bytes).with_context(|| format!("modinfo of {}", module.display()))
}

fn complete(module: &[u8]) -> Result<()> {
    for field in ["description", "author", "license"] {
        ensure!(values(module, field).next().is_some(), "it has no {field}");
    }
    let version = values(module, "version").next();
    ensure!(version.as_deref() == Some(env!("CARGO_PKG_VERSION")), "its version is {version:?}");
    let names = |field| values(module, field).filter_map(|value| Some(value.split_once(':')?.0.to_owned()));
    let described: BTreeSet<String> = names("parm").collect();
    for parameter in names("parmtype") {
        ensure!(described.contains(&parameter), "parameter {parameter} has no description");
    }
    Ok(())
}

/// The values of all strings `field=value` in the module.
fn values<'a>(module: &'a [u8], field: &'a str) -> impl Iterator<Item = String> + 'a {
    module.split(|byte| *byte == 0).filter_map(move |string| {
        let value = string.strip_prefix(field.as_bytes())?.strip_prefix(b"=")?;
        Some(String::from_utf8_lossy(value).into_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const VERSION: &str = env!("CARGO_PKG_VERSION");

    fn source(name: &str) -> String {
        fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../kmod").join(name)).unwrap()
    }

    #[test]
    fn module_and_dkms_have_the_version_of_the_workspace() {
        assert!(source("version.h").contains(&format!("#define KES_VERSION\t\"{VERSION}\"\n")));
        assert!(source("dkms.conf").contains(&format!("PACKAGE_VERSION=\"{VERSION}\"\n")));
        for file in ["main.c", "unsupported.c"] {
            assert!(source(file).contains("MODULE_VERSION(KES_VERSION);"), "{file}");
        }
    }

    #[test]
    fn dkms_installs_what_the_makefile_builds() {
        let conf = source("dkms.conf");
        for line in [
            "BUILT_MODULE_NAME[0]=\"kvm_ept_sample\"",
            "DEST_MODULE_LOCATION[0]=\"/updates/dkms\"",
            "AUTOINSTALL=\"yes\"",
        ] {
            assert!(conf.lines().any(|is| is == line), "{line}");
        }
        assert!(source("Kbuild").contains("obj-m := kvm_ept_sample.o"));
        // DKMS says KERNELRELEASE to the Makefile, which is not the kernel's build then.
        assert!(!source("Makefile").contains("KERNELRELEASE"));
    }

    #[test]
    fn what_modinfo_lacks_is_named() {
        let module = |text: &str| text.replace('|', "\0").into_bytes();
        let whole = format!(
            "x|version={VERSION}|author=a|license=GPL|description=d|parmtype=p:bool|parm=p:what it does|"
        );
        complete(&module(&whole)).unwrap();
        for (without, word) in [("author=a|", "author"), ("parm=p:what it does|", "p has no description")] {
            let error = complete(&module(&whole.replace(without, ""))).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        let error = complete(&module(&whole.replace(VERSION, "9.9"))).unwrap_err().to_string();
        assert!(error.contains("9.9"), "{error}");
    }
}
