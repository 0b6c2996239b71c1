// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the project is built from: licences, sources and advisories of its
//! dependencies, whether each is used, and the oldest Rust that builds it.
//!
//! The tools come from cargo's own registry, once, and stay in the lab's cache.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::Lab;
use crate::cache::Key;
use crate::debian::{self, Bind, Recipe, Suite};
use crate::verdict::Tally;
use crate::{proc, product};

/// A program that cargo installs.
struct Tool {
    name: &'static str,
    /// All checkouts use the same, so that a newer one fails none of them overnight.
    version: &'static str,
}

const DENY: Tool = Tool { name: "cargo-deny", version: "0.20.2" };
const MACHETE: Tool = Tool { name: "cargo-machete", version: "0.9.2" };

/// Building a tool takes a few minutes of two CPUs.
const INSTALL_TIMEOUT: Duration = Duration::from_secs(20 * 60);

/// What a tool takes once it is there, also where it waits for a network in vain.
const TOOL_TIMEOUT: Duration = Duration::from_secs(3 * 60);

/// The first time all dependencies are checked.
const CHECK_TIMEOUT: Duration = Duration::from_secs(20 * 60);

/// Downloading the crates, which mostly are there.
const FETCH_TIMEOUT: Duration = Duration::from_secs(5 * 60);

/// What builds the project on Debian.
const RUST_PACKAGES: [&str; 6] = ["cargo", "gcc", "libc6-dev", "libvirt-dev", "pkg-config", "rustc"];

/// What is run with Debian's Rust: a folder of crates stands in for the registry.
const CHECK: &str = "cd /src && exec cargo check --workspace --all-targets --locked --offline \
    --target-dir /target --config 'source.crates-io.replace-with=\"crates\"' \
    --config 'source.crates.directory=\"/crates\"'";

/// What cargo-deny says when it can not get the database of advisories.
const NO_DATABASE: &str = "failed to fetch advisory database";

/// What cargo says of a tool, or of what that needs, that is too new for its Rust.
const NEEDS_NEWER_RUST: [&str; 2] = ["it requires rustc", "is not supported by the following packages"];

/// Runs all checks of dependencies.
pub fn check(lab: &Lab, tally: &Tally) {
    tally.try_check("unused-dependencies", || judged(run(lab, &MACHETE, &[])));
    let checks = ["check", "licenses", "bans", "sources"];
    tally.try_check("licences-and-sources", || judged(run(lab, &DENY, &checks)));
    tally.try_check("advisories", || judged(run(lab, &DENY, &["check", "advisories"])));
    tally.try_check("oldest-rust", || oldest_rust(lab));
}

/// What a tool's outcome says of the project: nothing, where it could not look.
fn judged(outcome: Result<()>) -> Result<Result<String, String>> {
    let said = outcome.as_ref().err().map(|error| format!("{error:#}")).unwrap_or_default();
    if said.contains(NO_DATABASE) {
        Ok(Err("the database of RustSec can not be fetched from here".into()))
    } else if NEEDS_NEWER_RUST.iter().any(|words| said.contains(words)) {
        Ok(Err("this machine's Rust is too old for the tool that looks".into()))
    } else {
        outcome.map(|()| Ok(String::new()))
    }
}

/// Runs a tool in the project's root.
fn run(lab: &Lab, tool: &Tool, args: &[&str]) -> Result<()> {
    let program = install(lab, tool)?;
    let log = lab.log(&[tool.name, args.last().copied().unwrap_or("run")].join("-"));
    let mut command = Command::new(program);
    // By this variable they tell whether cargo called them, and with its subcommand.
    command.args(args).current_dir(&lab.root).env_remove("CARGO");
    proc::run(&mut command, &log, TOOL_TIMEOUT)
}

/// The tool's program, built when it is not there yet.
fn install(lab: &Lab, tool: &Tool) -> Result<PathBuf> {
    let key = Key::new("cargo-tool-1").text(tool.version);
    let installed = lab.cache.get_or_build(tool.name, &key, |dir| {
        let step = lab.progress.step(format!("building {} {}", tool.name, tool.version));
        let mut command = product::cargo(lab);
        command
            .args(["install", tool.name, "--version", tool.version, "--locked", "--no-track"])
            // It runs for seconds and is built once: without optimisation in half the time.
            .arg("--debug")
            .env("CARGO_PROFILE_DEV_DEBUG", "0")
            .env("CARGO_TARGET_DIR", dir.join("target"))
            .arg("--root")
            .arg(dir);
        proc::run(&mut command, &lab.log(&format!("{}-install", tool.name)), INSTALL_TIMEOUT)?;
        let target = dir.join("target");
        fs::remove_dir_all(&target).with_context(|| format!("removing {}", target.display()))?;
        step.done("");
        Ok(())
    })?;
    Ok(installed.join("bin").join(tool.name))
}

/// Checks all code with the Rust that Cargo.toml names as the oldest: Debian's own, as
/// its packages bring it.
fn oldest_rust(lab: &Lab) -> Result<Result<String, String>> {
    if !nix::unistd::geteuid().is_root() {
        return Ok(Err("Debian's Rust runs in a tree, which takes root's rights (chroot, mounts)".into()));
    }
    let recipe = Recipe { suites: &[Suite::MAIN.name()], packages: &RUST_PACKAGES, ..Recipe::default() };
    let tree = debian::tree(lab, "rust-tree", &recipe)?;
    let version = rust_version(&fs::read_to_string(lab.root.join("Cargo.toml"))?)?;
    let compiler = compiler(&tree)?;
    ensure!(
        is_release_of(&compiler, &version),
        "Debian {} has {compiler}, and Cargo.toml calls {version} the oldest Rust: raise one of them",
        Suite::MAIN
    );
    let crates = crates(lab)?;
    let target = product::target_dir(lab).join("oldest-rust");
    fs::create_dir_all(&target).with_context(|| format!("creating {}", target.display()))?;
    let binds =
        [Bind::read(&lab.root, "/src"), Bind::read(&crates, "/crates"), Bind::write(&target, "/target")];
    let mut command = debian::enter(&tree, &binds, CHECK);
    proc::run(&mut command, &lab.log("oldest-rust"), CHECK_TIMEOUT)?;
    Ok(Ok(format!("{compiler} of Debian {} builds it", Suite::MAIN)))
}

/// The sources of all crates that Cargo.lock names, as this machine's cargo gets them: it
/// knows the way to the registry.
fn crates(lab: &Lab) -> Result<PathBuf> {
    let key = Key::new("crates 1").file(&lab.root.join("Cargo.lock"))?;
    lab.cache.get_or_build("crates", &key, |dir| {
        let mut command = product::cargo(lab);
        command.args(["vendor", "--locked", "--versioned-dirs"]).arg(dir);
        proc::run(&mut command, &lab.log("crates"), FETCH_TIMEOUT)
    })
}

/// What a tree's compiler says that it is.
fn compiler(tree: &Path) -> Result<String> {
    let output = debian::enter(tree, &[], "rustc --version").output().context("running Debian's rustc")?;
    ensure!(
        output.status.success(),
        "Debian's rustc in {} does not run: {}",
        tree.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Whether `rustc 1.85.1 (...)` is a release of `1.85`.
fn is_release_of(compiler: &str, version: &str) -> bool {
    let release = compiler.split_whitespace().nth(1).and_then(|release| release.strip_prefix(version));
    release.is_some_and(|patch| patch.is_empty() || patch.starts_with('.'))
}

/// What Cargo.toml calls `rust-version`.
fn rust_version(manifest: &str) -> Result<String> {
    let value = manifest.lines().find_map(|line| line.strip_prefix("rust-version = "));
    match value.map(|value| value.trim_matches('"')) {
        Some(version) if !version.is_empty() => Ok(version.to_owned()),
        _ => bail!("Cargo.toml names no rust-version"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_rust_is_the_one_that_cargo_is_told() {
        assert_eq!(rust_version(include_str!("../../Cargo.toml")).unwrap(), env!("CARGO_PKG_RUST_VERSION"));
        assert!(rust_version("[workspace]\nversion = \"1\"\n").is_err());
    }

    #[test]
    fn packages_and_readers_are_told_the_same_version() {
        let version = env!("CARGO_PKG_RUST_VERSION");
        for (text, says) in [
            (include_str!("../../README.md"), format!("Rust\n{version} or newer")),
            (include_str!("../../debian/control"), format!("\n cargo (>= {version}),\n")),
            (include_str!("../../rpm/ept-virt.spec"), format!(" cargo >= {version}\n")),
        ] {
            assert!(text.contains(&says), "{says:?}");
        }
    }

    #[test]
    fn a_release_is_one_of_the_version() {
        assert!(is_release_of("rustc 1.85.1 (4eb161250 2025-03-15) (built from a source tarball)", "1.85"));
        assert!(is_release_of("rustc 1.85.0 (4d91de4e4 2025-02-17)", "1.85.0"));
        for other in ["rustc 1.86.0 (05f9846f8 2025-03-31)", "rustc 1.850.0", "rustc 1.8.0", "rustc", ""] {
            assert!(!is_release_of(other, "1.85"), "{other}");
        }
    }
}
