// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask`: emulated Intel and AMD hosts, and what runs on them.

mod amd;
mod apt;
mod bench;
mod bench_hook;
mod bench_placement;
mod boots;
mod cache;
mod cpio;
mod deb;
mod debian;
mod debug_kernel;
mod demo;
mod dependencies;
mod flavour;
mod fresh;
mod intel_bochs;
mod intel_kernel;
mod kernel;
mod kernel_checks;
mod kmod;
mod kvm_patch;
mod micro;
mod micro_amd;
mod micro_image;
mod micro_intel;
mod modinfo;
mod modules;
mod native;
mod once;
mod package_life;
mod prepare;
mod proc;
mod product;
mod progress;
mod rpm;
mod shell;
mod test;
mod verdict;
mod virtqemud;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

use cache::Cache;
use progress::Progress;

const DEMO_TIMEOUT: Duration = Duration::from_secs(300);

/// Emulated hosts with the product on them. Everything needed is installed or
/// built at the first use and kept in .lab-cache; logs are in .lab-cache/logs.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show a guest's idle memory leaving DRAM, live, on an emulated AMD host.
    Demo,
    /// Run all tests; ends with "N passed, N failed, N skipped".
    Test(test::Options),
    /// Compare what things cost with their alternatives, in the same run.
    Bench(bench::Options),
    /// Build Debian packages of the product into target/deb, and have lintian judge them.
    Deb,
    /// Run README's first commands on the last commit, in a Debian tree that has Rust and
    /// nothing else, and tell what they took.
    Fresh(fresh::Options),
    /// Open a shell on an emulated AMD host, with the product installed.
    Lab {
        #[command(subcommand)]
        what: Option<LabCommand>,
    },
}

#[derive(Subcommand)]
enum LabCommand {
    /// Build the kernel that watches itself, for `test --boot amd-debug intel-debug`.
    BuildDebugKernel,
    /// Build the daemon that Debian does not ship, for `test --amd virtqemud`.
    BuildVirtqemud,
}

/// What all parts of the lab share.
pub struct Lab {
    /// The project's root folder.
    pub root: PathBuf,
    /// Built images.
    pub cache: Cache,
    /// What is shown.
    pub progress: Progress,
}

impl Lab {
    fn new() -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .context("the lab's folder has no parent")?
            .to_path_buf();
        let cache = Cache::open(&root.join(cache::FOLDER))?;
        Ok(Self { root, cache, progress: Progress::new() })
    }

    /// A fresh folder for one emulated machine, which no other run of the lab
    /// uses. Those that killed runs left behind are removed.
    pub fn run_folder(&self, name: &str) -> Result<PathBuf> {
        let runs = self.cache.dir().join("runs");
        fs::create_dir_all(&runs).with_context(|| format!("creating {}", runs.display()))?;
        for entry in fs::read_dir(&runs).with_context(|| format!("reading {}", runs.display()))? {
            let path = entry?.path();
            let pid = path.extension().unwrap_or_default();
            if !Path::new("/proc").join(pid).exists() {
                remove_folder(&path)?;
            }
        }
        let path = runs.join(format!("{name}.{}", std::process::id()));
        if path.exists() {
            remove_folder(&path)?;
        }
        fs::create_dir(&path).with_context(|| format!("creating {}", path.display()))?;
        Ok(path)
    }

    /// The file that the output of a command goes to. Logs of the last run
    /// stay; the next run replaces them.
    pub fn log(&self, name: &str) -> PathBuf {
        self.cache.dir().join("logs").join(format!("{name}.log"))
    }
}

/// Removes a folder; another host that starts may do the same at the same time.
fn remove_folder(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.with_context(|| format!("removing {}", path.display())),
    }
}

fn main() -> ExitCode {
    // Before anything else: threads that exist earlier would take the signals.
    let outcome = proc::end_children_on_signals().and_then(|()| run(Cli::parse()));
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all is well.
fn run(cli: Cli) -> Result<bool> {
    let lab = Lab::new()?;
    match cli.command {
        Command::Demo => demo::run(&lab, "demo", DEMO_TIMEOUT),
        Command::Bench(options) => bench::run(&lab, &options),
        Command::Deb => deb::run(&lab),
        Command::Fresh(options) => fresh::run(&lab, &options),
        Command::Test(options) => test::run(&lab, &options),
        Command::Lab { what: None } => shell::run(&lab).map(|()| true),
        Command::Lab { what: Some(LabCommand::BuildDebugKernel) } => {
            debug_kernel::prepare(&lab).map(|()| true)
        }
        Command::Lab { what: Some(LabCommand::BuildVirtqemud) } => virtqemud::prepare(&lab).map(|()| true),
    }
}
