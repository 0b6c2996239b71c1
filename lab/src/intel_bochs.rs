// SPDX-License-Identifier: MIT OR Apache-2.0
//! The emulator of the Intel host: Bochs 3.0, built here from Debian's source
//! with VT-x and tuned to this machine, or the packaged Bochs when that fails.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::Lab;
use crate::apt::{self, Need, need};
use crate::cache::Key;
use crate::proc;

const SOURCE: &str = "pool/main/b/bochs/bochs_3.0+dfsg.orig.tar.xz";
/// As the signed index of Debian's sources (trixie, main) has it.
const SOURCE_SHA256: &str = "78f6c73d4a6472d5130a87ab9dc306d02c7c71ed8e25b3a8ef642e2a7acd282b";
const PATCH: &str = include_str!("../bochs/guest-interrupts.patch");
const COMPILER_FLAGS: &str = "-O3 -march=native -pipe";
const CONFIGURE: &[&str] = &[
    // What the emulated machine has.
    "--enable-x86-64",
    "--enable-cpu-level=6",
    "--enable-smp",
    "--enable-vmx=2",
    "--enable-svm",
    "--enable-avx",
    "--enable-evex",
    "--enable-memtype",
    "--enable-long-phy-address",
    "--enable-pci",
    "--enable-configurable-msrs",
    // Speed.
    "--enable-repeat-speedups",
    "--enable-fast-function-calls",
    "--enable-handlers-chaining",
    "--enable-trace-linking",
    "--disable-debugger",
    "--disable-gdb-stub",
    "--disable-plugins",
    // Neither a display nor a manual.
    "--disable-docbook",
    "--without-x",
    "--without-x11",
    "--with-nogui",
];
const UNPACK_TIMEOUT: Duration = Duration::from_secs(60);
const CONFIGURE_TIMEOUT: Duration = Duration::from_secs(5 * 60);
const COMPILE_TIMEOUT: Duration = Duration::from_secs(30 * 60);

/// An emulator that can be started.
pub enum Bochs {
    /// Our own build: the program's path.
    Built(PathBuf),
    /// Debian's package: an older Bochs with a debugger, four times slower,
    /// which never interrupts a guest that runs with interrupts off.
    Packaged,
}

/// What building the emulator takes.
pub const NEEDS: &[Need] = &[
    need("g++", "compiles the emulator of the Intel host"),
    need("make", "builds the emulator of the Intel host"),
    need("patch", "mends the emulator of the Intel host"),
    need("xz-utils", "unpacks the emulator's source and kernel modules"),
];

/// Builds the emulator, or takes it from the cache. Says so when it has to fall
/// back to the packaged one.
pub fn obtain(lab: &Lab) -> Result<Bochs> {
    apt::ensure(lab, NEEDS)?;
    let key =
        Key::new("1").text(SOURCE_SHA256).text(PATCH).text(COMPILER_FLAGS).texts(CONFIGURE).text(&cpu()?);
    let built = lab.cache.get_or_build("bochs", &key, |out| build(lab, out));
    let error = match built {
        Ok(program) => return Ok(Bochs::Built(program)),
        Err(error) => error,
    };
    lab.progress.line(&format!(
        "WARNING: Bochs 3.0 could not be built here: {error:#}\n\
         WARNING: going on with Debian's packaged Bochs, which is four times slower"
    ));
    apt::ensure(
        lab,
        &[
            need("bochs", "emulates the Intel host, as Bochs 3.0 could not be built"),
            need("bochs-term", "the packaged emulator's display for a terminal"),
        ],
    )?;
    Ok(Bochs::Packaged)
}

/// What `-march=native` depends on: the processor's name and abilities.
fn cpu() -> Result<String> {
    let text = fs::read_to_string("/proc/cpuinfo").context("reading /proc/cpuinfo")?;
    let first = text.split("\n\n").next().unwrap_or_default();
    Ok(first.lines().filter(|l| l.starts_with("model name") || l.starts_with("flags")).collect())
}

fn build(lab: &Lab, out: &Path) -> Result<()> {
    let work = lab.cache.dir().join("bochs-build");
    if work.exists() {
        fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))?;
    }
    fs::create_dir_all(&work).with_context(|| format!("creating {}", work.display()))?;
    let step = lab.progress.step("building Bochs 3.0, once for this machine");
    let log = lab.log("bochs-build");
    let archive = work.join("source.tar.xz");
    apt::download(lab, SOURCE, SOURCE_SHA256, &archive)?;
    let source = work.join("source");
    fs::create_dir(&source)?;
    proc::run(
        Command::new("tar")
            .args(["--extract", "--strip-components=1", "--file"])
            .arg(&archive)
            .arg("-C")
            .arg(&source),
        &log,
        UNPACK_TIMEOUT,
    )?;
    let patch = work.join("lab.patch");
    fs::write(&patch, PATCH)?;
    proc::run(
        Command::new("patch").current_dir(&source).args(["-p1", "--input"]).arg(&patch),
        &log,
        UNPACK_TIMEOUT,
    )?;
    step.note("configuring");
    proc::run(
        Command::new("./configure")
            .current_dir(&source)
            .args(CONFIGURE)
            .env("CFLAGS", COMPILER_FLAGS)
            .env("CXXFLAGS", COMPILER_FLAGS),
        &log,
        CONFIGURE_TIMEOUT,
    )?;
    step.note("compiling");
    let jobs = thread::available_parallelism().map_or(1, usize::from);
    proc::run(
        Command::new("make").current_dir(&source).arg(format!("--jobs={jobs}")).arg("bochs"),
        &log,
        COMPILE_TIMEOUT,
    )?;
    fs::copy(source.join("bochs"), out)
        .with_context(|| format!("copying the emulator to {}", out.display()))?;
    fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))?;
    step.done("");
    Ok(())
}

impl Bochs {
    /// The command that boots the machine described by `config`. What the
    /// machine writes to port 0xE9 appears on its standard output.
    pub fn command(&self, config: &Path) -> Command {
        match self {
            Self::Built(program) => {
                let mut command = Command::new(program);
                command.arg("-q").arg("-f").arg(config);
                command
            }
            Self::Packaged => {
                // It wants a terminal and stops in its debugger at the first
                // instruction: script(1) gives the one, the rc file the
                // command to continue.
                let start =
                    "echo continue > \"$CONFIG.rc\" && exec bochs -q -f \"$CONFIG\" -rc \"$CONFIG.rc\"";
                let mut command = Command::new("script");
                command
                    .args(["--quiet", "--flush", "--return", "--command", start, "/dev/null"])
                    .env("CONFIG", config)
                    .env("TERM", "vt100");
                command
            }
        }
    }

    /// The value of `display_library` in the machine's description.
    pub fn display(&self) -> &'static str {
        match self {
            Self::Built(_) => "nogui",
            Self::Packaged => "term",
        }
    }

    /// How much longer than with our own build everything takes.
    pub fn slowness(&self) -> u32 {
        match self {
            Self::Built(_) => 1,
            Self::Packaged => 4,
        }
    }
}
