// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask deb`: the product's Debian packages, by Debian's own tools, and what
//! lintian says of them.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::Lab;
use crate::apt::{self, Need, need};
use crate::cache::Key;
use crate::kmod::is_source;
use crate::{proc, product};

/// What building and judging packages takes, besides what building the product does.
pub const NEEDS: &[Need] = &[
    need("debhelper", "builds Debian packages"),
    need("dh-dkms", "makes the kernel module's package"),
    need("dpkg-dev", "builds Debian packages"),
    need("lintian", "judges Debian packages"),
    need("make", "installs the product into them"),
];

/// All of it but seconds is compilation.
const BUILD_TIMEOUT: Duration = Duration::from_secs(30 * 60);
const TOOL_TIMEOUT: Duration = Duration::from_secs(300);

/// What packages are made of, in the project's root.
const SOURCE_FOLDERS: [&str; 7] = ["cli", "core", "debian", "docs", "kmod", "libvirt-hook", "xml-schemas"];
const SOURCE_FILES: [&str; 4] = ["Cargo.lock", "Cargo.toml", "Makefile", "lab/src/deb.rs"];

/// What debhelper leaves in debian/ while it builds.
const STAGING: [&str; 4] =
    ["/debian/.debhelper/", "/debian/ept-virt/", "/debian/ept-virt-dkms/", "/debian/tmp/"];
const STAGED: [&str; 5] =
    [".debhelper", ".debhelper.log", ".substvars", "/debian/files", "/debhelper-build-stamp"];

/// Added to a version, it makes the next one.
const NEXT: &str = "+next";

/// Both packages, as files.
pub struct Packages {
    /// Command line, daemon and hook.
    pub program: PathBuf,
    /// The module's source for DKMS.
    pub dkms: PathBuf,
}

/// The packages that tests install.
pub struct Tested {
    /// As they are built.
    pub first: Packages,
    /// The same as a later version, whose configuration file differs.
    pub next: Packages,
}

/// Builds the packages for people to install, and has them judged.
pub fn run(lab: &Lab) -> Result<bool> {
    apt::ensure(lab, &[product::NEEDS, NEEDS].concat())?;
    let folder = product::target_dir(lab).join("deb");
    let packages = build(lab, "release", &folder)?;
    println!("{}\n{}", packages.program.display(), packages.dkms.display());
    judge(lab, &packages)?;
    Ok(true)
}

/// The packages in the cache: of the profile that the lab's programs have, which
/// builds in a quarter of the time.
pub fn tested(lab: &Lab) -> Result<Tested> {
    let mut key = Key::new("packages 1");
    for folder in SOURCE_FOLDERS {
        key = key.tree(&lab.root.join(folder), &is_packaged)?;
    }
    for file in SOURCE_FILES {
        key = key.file(&lab.root.join(file))?;
    }
    let folder = lab.cache.get_or_build("packages", &key, |folder| {
        let first = build(lab, "lab", &folder.join("first"))?;
        judge(lab, &first)?;
        make_next(lab, &first, &folder.join("next"))
    })?;
    Ok(Tested { first: find(&folder.join("first"))?, next: find(&folder.join("next"))? })
}

/// Whether a file is part of what is packaged, and not left by a build.
fn is_packaged(path: &Path) -> bool {
    let text = path.to_string_lossy();
    let left =
        STAGING.iter().any(|folder| text.contains(folder)) || STAGED.iter().any(|end| text.ends_with(end));
    let in_module = text.contains("/kmod/") && !text.ends_with("/dkms.conf");
    !left && (!in_module || is_source(path))
}

/// Builds both packages into `folder`.
fn build(lab: &Lab, profile: &str, folder: &Path) -> Result<Packages> {
    let step = lab.progress.step(format!("building Debian packages ({profile})"));
    if folder.exists() {
        fs::remove_dir_all(folder).with_context(|| format!("removing {}", folder.display()))?;
    }
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    let mut build = rules(lab)?;
    build.args(["clean", "binary"]).env("PROFILE", profile).env("DEB_DIR", folder);
    proc::run(&mut build, &lab.log(&format!("deb-{profile}")), BUILD_TIMEOUT)?;
    // As editors and patch leave it: none of debhelper's to clean away.
    let foreign = folder.join("foreign.orig");
    fs::write(&foreign, "").with_context(|| format!("writing {}", foreign.display()))?;
    proc::run(rules(lab)?.arg("clean"), &lab.log("deb-clean"), TOOL_TIMEOUT)?;
    fs::remove_file(&foreign).context("cleaning after a build took a file that is not the build's")?;
    product::check_static(&product::target_dir(lab).join(profile).join("ept-virt-hook"))?;
    step.done("");
    find(folder)
}

/// debian/rules, called as dpkg-buildpackage does, which itself would leave files
/// beside the checkout.
fn rules(lab: &Lab) -> Result<Command> {
    let mut rules = Command::new(lab.root.join("debian/rules"));
    product::in_project(lab, &mut rules);
    rules
        .env("CARGO", product::cargo_program())
        .env("CARGO_TARGET_DIR", product::target_dir(lab))
        // debian/control says so: the files in the packages are root's, whoever builds.
        .env("DEB_RULES_REQUIRES_ROOT", "no");
    // debhelper gives its commands an empty home.
    let home = env::var_os("HOME").context("HOME is not set, and cargo needs it")?;
    for (name, folder) in [("CARGO_HOME", ".cargo"), ("RUSTUP_HOME", ".rustup")] {
        if env::var_os(name).is_none() {
            rules.env(name, Path::new(&home).join(folder));
        }
    }
    Ok(rules)
}

/// Has lintian judge the packages: an error for an error or a warning of it that
/// debian/ does not override, with a reason.
fn judge(lab: &Lab, packages: &Packages) -> Result<()> {
    let step = lab.progress.step("lintian");
    let mut lintian = Command::new("lintian");
    lintian.args(["--allow-root", "--fail-on=error,warning"]).args([&packages.program, &packages.dkms]);
    proc::run(&mut lintian, &lab.log("lintian"), TOOL_TIMEOUT)?;
    step.done("");
    Ok(())
}

/// Makes a later version of both packages in `folder`, with another line in the
/// configuration file.
fn make_next(lab: &Lab, first: &Packages, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    for package in [&first.program, &first.dkms] {
        let tree = folder.join("tree");
        let deb = |args: &[&Path]| {
            let mut command = Command::new("dpkg-deb");
            command.arg("--root-owner-group").args(args);
            proc::run(&mut command, &lab.log("dpkg-deb"), TOOL_TIMEOUT)
        };
        deb(&[Path::new("--raw-extract"), package, &tree])?;
        edit(&tree.join("DEBIAN/control"), next_control)?;
        let config = tree.join("etc/ept-virt/ept-virt.toml");
        if config.exists() {
            edit(&config, |text| text + "# Of the next version.\n")?;
        }
        deb(&[Path::new("--build"), &tree, folder])?;
        fs::remove_dir_all(&tree).with_context(|| format!("removing {}", tree.display()))?;
    }
    Ok(())
}

/// The control file of the next version.
fn next_control(text: String) -> String {
    let line = |line: &str| match line.starts_with("Version: ") {
        true => format!("{line}{NEXT}\n"),
        false => format!("{line}\n"),
    };
    text.lines().map(line).collect()
}

fn edit(path: &Path, change: impl FnOnce(String) -> String) -> Result<()> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    fs::write(path, change(text)).with_context(|| format!("writing {}", path.display()))
}

/// The packages in a folder, one of each.
fn find(folder: &Path) -> Result<Packages> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    let files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    let one = |start: &str| {
        let named =
            |file: &&PathBuf| file.file_name().is_some_and(|name| name.to_string_lossy().starts_with(start));
        let found: Vec<&PathBuf> = files.iter().filter(named).collect();
        ensure!(found.len() == 1, "{} packages {start}* in {}", found.len(), folder.display());
        Ok(found[0].clone())
    };
    Ok(Packages { program: one("ept-virt_")?, dkms: one("ept-virt-dkms_")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(path: &str) -> String {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    #[test]
    fn all_packages_have_the_workspaces_version() {
        let version = env!("CARGO_PKG_VERSION");
        for (file, wanted) in [
            ("debian/changelog", format!("ept-virt ({version}) ")),
            ("kmod/dkms.conf", format!("PACKAGE_VERSION=\"{version}\"\n")),
        ] {
            assert!(read(file).contains(&wanted), "{file} does not say {wanted}");
        }
    }

    #[test]
    fn the_next_version_differs_in_nothing_else() {
        let control = "Package: ept-virt\nVersion: 0.1.0\nDepends: libc6 (>= 2.34)\n".to_owned();
        let next = "Package: ept-virt\nVersion: 0.1.0+next\nDepends: libc6 (>= 2.34)\n";
        assert_eq!(next_control(control), next);
    }

    #[test]
    fn what_a_build_leaves_is_not_packaged() {
        for (path, packaged) in [
            ("/x/debian/control", true),
            ("/x/debian/ept-virt/usr/bin/ept-virt", false),
            ("/x/debian/ept-virt.postinst", true),
            ("/x/debian/ept-virt.postinst.debhelper", false),
            ("/x/kmod/vm.c", true),
            ("/x/kmod/dkms.conf", true),
            ("/x/kmod/vm.o", false),
        ] {
            assert_eq!(is_packaged(Path::new(path)), packaged, "{path}");
        }
    }
}
