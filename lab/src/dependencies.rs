// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the project is built from: licences, sources and advisories of its
//! dependencies, whether each is used, and the oldest Rust that builds it.
//!
//! The tools come from cargo's own registry, once, and stay in the lab's cache.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::Lab;
use crate::cache::Key;
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

/// What cargo-deny says when it can not get the database of advisories.
const NO_DATABASE: &str = "failed to fetch advisory database";

/// Runs all checks of dependencies.
pub fn check(lab: &Lab, tally: &Tally) {
    tally.check("unused-dependencies", || {
        run(lab, &MACHETE, &[])?;
        Ok(String::new())
    });
    tally.check("licences-and-sources", || {
        run(lab, &DENY, &["check", "licenses", "bans", "sources"])?;
        Ok(String::new())
    });
    tally.try_check("advisories", || match run(lab, &DENY, &["check", "advisories"]) {
        Err(error) if format!("{error:#}").contains(NO_DATABASE) => {
            Ok(Err("the database of RustSec can not be fetched from here".into()))
        }
        result => result.map(|()| Ok(String::new())),
    });
    tally.try_check("oldest-rust", || oldest_rust(lab));
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

/// Checks all code with the Rust that Cargo.toml names as the oldest. It is installed
/// beside the lab's other things, not among the user's toolchains.
fn oldest_rust(lab: &Lab) -> Result<Result<String, String>> {
    let version = rust_version(&fs::read_to_string(lab.root.join("Cargo.toml"))?)?;
    let key = Key::new("rust-1").text(&version);
    let toolchain = lab.cache.get_or_build("rust", &key, |dir| {
        let step = lab.progress.step(format!("installing Rust {version}"));
        let mut command = rustup(dir);
        command.args(["toolchain", "install", &version, "--profile", "minimal", "--no-self-update"]);
        proc::run(&mut command, &lab.log("rustup"), INSTALL_TIMEOUT)?;
        step.done("");
        Ok(())
    });
    let toolchain = match toolchain {
        Ok(toolchain) => toolchain,
        // clippy holds the standard library's part of it all the same.
        Err(error) => return Ok(Err(format!("no Rust {version} by rustup: {}", first_line(&error)))),
    };
    let target = product::target_dir(lab).join("oldest-rust");
    let mut command = rustup(&toolchain);
    command
        .args(["run", &version, "cargo", "check", "--workspace", "--locked"])
        .arg("--target-dir")
        .arg(target)
        .current_dir(&lab.root);
    proc::run(&mut command, &lab.log("oldest-rust"), CHECK_TIMEOUT)?;
    Ok(Ok(format!("Rust {version} builds it")))
}

/// rustup with a home of the lab's.
fn rustup(home: &Path) -> Command {
    let mut command = Command::new("rustup");
    // Those of the toolchain that runs this program.
    for name in ["CARGO", "RUSTC", "RUSTUP_TOOLCHAIN", "RUSTFLAGS"] {
        command.env_remove(name);
    }
    command.env("RUSTUP_HOME", home);
    command
}

/// What Cargo.toml calls `rust-version`.
fn rust_version(manifest: &str) -> Result<String> {
    let value = manifest.lines().find_map(|line| line.strip_prefix("rust-version = "));
    match value.map(|value| value.trim_matches('"')) {
        Some(version) if !version.is_empty() => Ok(version.to_owned()),
        _ => bail!("Cargo.toml names no rust-version"),
    }
}

fn first_line(error: &anyhow::Error) -> String {
    format!("{error:#}").lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_rust_is_the_one_that_cargo_is_told() {
        assert_eq!(rust_version(include_str!("../../Cargo.toml")).unwrap(), env!("CARGO_PKG_RUST_VERSION"));
        assert!(rust_version("[workspace]\nversion = \"1\"\n").is_err());
    }
}
