// SPDX-License-Identifier: MIT OR Apache-2.0
//! The project's own binaries, built on the build machine.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use crate::Lab;
use crate::amd::Payload;
use crate::apt::{Need, need};
use crate::cpio::Cpio;
use crate::{modules, package_life, proc};

const TARGET: &str = "x86_64-unknown-linux-gnu";
/// What building and testing the product takes.
pub const NEEDS: &[Need] = &[
    need("libvirt-dev", "the CLI links libvirt"),
    need("gcc", "links Rust programs"),
    need("binutils", "tells whether they are static"),
    need("libc6-dev", "links Rust programs"),
    need("pkg-config", "finds libvirt"),
    need("libxml2-utils", "holds the policy's grammar against its parser"),
    need("mandoc", "reads the manual pages"),
];

/// What guests load when they are told to.
const GUEST_MODULES: [&str; 2] = ["virtio_balloon", "virtio_mem"];

/// What a package of the product has besides programs.
const UNIT: &[u8] = include_bytes!("../../cli/dist/ept-virt.service");
const CONFIG: &[u8] = include_bytes!("../../cli/dist/ept-virt.toml");
/// Its install section is followed on hosts that have the packages.
const README: &[u8] = include_bytes!("../../README.md");

/// Of the workspace: release without link-time optimisation, which builds in a
/// quarter of the time.
const PROFILE: &str = "--profile=lab";

/// The first build compiles all dependencies.
const BUILD_TIMEOUT: Duration = Duration::from_secs(20 * 60);

/// The project's binaries.
pub struct Product {
    /// CLI and daemon.
    pub cli: PathBuf,
    /// libvirt's qemu hook.
    pub hook: PathBuf,
}

/// All that an emulated AMD host is given to test or show.
pub struct Installation {
    /// CLI, daemon and hook.
    pub product: Product,
    /// kvm_ept_sample.ko for the host's kernel, unless the host has it.
    pub module: Option<PathBuf>,
    /// The static program inside hosts and guests.
    pub agent: PathBuf,
    /// The kernel that guests boot.
    pub kernel: PathBuf,
    /// Folder of that kernel's modules.
    pub modules: PathBuf,
    /// libvirt's daemon for QEMU alone, where it was built.
    pub virtqemud: Option<PathBuf>,
    /// Debian packages, for hosts on which they are installed.
    pub packages: Option<package_life::Packages>,
}

impl Installation {
    /// The files for the host; `run` is the shell script that it starts with.
    pub fn payload(&self, run: &str) -> Result<Payload> {
        let mut initramfs = Cpio::default();
        initramfs.file("init", &self.agent)?;
        for module in modules::load_order(&self.modules, &GUEST_MODULES)? {
            initramfs.content(&format!("{}.ko", modules::stem(&module)), &modules::unpack(&module)?)?;
        }
        let payload = Payload::new(run)?;
        let payload = match &self.virtqemud {
            Some(program) => payload.file("virtqemud", program)?,
            None => payload,
        };
        let payload = match &self.module {
            Some(module) => payload.file("kvm_ept_sample.ko", module)?,
            None => payload,
        };
        let payload = match &self.packages {
            Some(packages) => packages.add_to(payload)?,
            None => payload,
        };
        payload
            .file("lab-agent", &self.agent)?
            .file("ept-virt", &self.product.cli)?
            .file("ept-virt-hook", &self.product.hook)?
            .content("ept-virt.service", UNIT)?
            .content("ept-virt.toml", CONFIG)?
            .content("README.md", README)?
            .file("vmlinuz", &self.kernel)?
            .content("guest.cpio", &initramfs.finish()?)
    }
}

/// Builds CLI and hook.
pub fn build(lab: &Lab) -> Result<Product> {
    let step = lab.progress.step("building ept-virt");
    let mut command = cargo(lab);
    command.args(["build", PROFILE, "--package=ept-virt"]);
    proc::run(&mut command, &lab.log("cargo-product"), BUILD_TIMEOUT)?;
    step.done("");
    let cli = target_dir(lab).join("lab/ept-virt");
    // libvirt waits for its hooks: this one loads no libraries.
    Ok(Product { cli, hook: build_hook(lab)? })
}

/// Builds the hook.
pub fn build_hook(lab: &Lab) -> Result<PathBuf> {
    build_static(lab, "ept-virt-hook")
}

/// Builds the static program that runs inside hosts and guests.
pub fn build_agent(lab: &Lab) -> Result<PathBuf> {
    build_static(lab, "ept-virt-lab-agent")
}

/// Builds a program that loads no libraries, and makes sure of it.
fn build_static(lab: &Lab, package: &str) -> Result<PathBuf> {
    let step = lab.progress.step(format!("building {package}"));
    // A folder of its own: other flags would rebuild everything each time.
    let target_dir = target_dir(lab).join("static");
    let mut command = cargo(lab);
    command
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
        .args(["build", PROFILE, "--package", package])
        .args(["--target", TARGET])
        .arg("--target-dir")
        .arg(&target_dir);
    proc::run(&mut command, &lab.log(&format!("cargo-{package}")), BUILD_TIMEOUT)?;
    let program = target_dir.join(TARGET).join("lab").join(package);
    check_static(&program)?;
    step.done("");
    Ok(program)
}

/// Fails for a program that loads a library or an interpreter.
pub fn check_static(program: &Path) -> Result<()> {
    let output =
        Command::new("readelf").args(["--wide", "--program-headers", "--dynamic"]).arg(program).output();
    let output = output.context("running readelf, of Debian's binutils")?;
    let headers = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success() && headers.contains("LOAD"), "{} is not a program", program.display());
    match headers.lines().find(|line| line.contains("INTERP") || line.contains("(NEEDED)")) {
        None => Ok(()),
        Some(line) => bail!("{} is not static: {}", program.display(), line.trim()),
    }
}

/// Cargo in the project's root.
pub fn cargo(lab: &Lab) -> Command {
    let mut command = Command::new(cargo_program());
    in_project(lab, &mut command);
    command
}

/// Which cargo it is.
pub fn cargo_program() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// Has a command run in the project's root, without the variables that our own `cargo
/// run` set for this program: they would only make crates rebuild.
pub fn in_project(lab: &Lab, command: &mut Command) {
    command.current_dir(&lab.root);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("CARGO_PKG_")
            || name.to_string_lossy().starts_with("CARGO_MANIFEST_")
        {
            command.env_remove(name);
        }
    }
}

/// Where cargo puts what it builds.
pub fn target_dir(lab: &Lab) -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => lab.root.join(dir),
        None => lab.root.join("target"),
    }
}
