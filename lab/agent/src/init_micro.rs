// SPDX-License-Identifier: MIT OR Apache-2.0
//! PID 1 of micro hosts: loads KVM from the initramfs, runs the tests that
//! the kernel command line names, and switches the machine off.
//!
//! The host has no disk and no user space but this program. What it reports
//! goes to port 0xE9, which the emulators copy to a file byte by byte: unlike the
//! serial console it loses nothing when the machine stops.

use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};

use crate::report::judge;
use crate::{microvm, stuck};

/// The file of one module per line, in the order of loading. Parameters stand on
/// the kernel command line, as `MODULE.PARAMETER=VALUE`.
const MODULE_LIST: &str = "/modules/load";
const DEBUG_PORT: u64 = 0xE9;
/// Bochs ends when it reads the word "Shutdown" here; QEMU, told to watch this
/// port, at the first letter.
const SHUTDOWN_PORT: u64 = 0x8900;
/// No test takes half as long, on a busy machine either.
const TEST_LIMIT: Duration = Duration::from_secs(270);

/// Sets the machine up, runs the tests and ends the machine. Comes back only
/// when the machine can not be ended.
pub fn run() -> Result<()> {
    mount_kernel_filesystems()?;
    let wire = Wire::open()?;
    let cmdline = fs::read_to_string("/proc/cmdline").context("cannot read /proc/cmdline")?;
    let host = parameter(&cmdline, "ept.host=").unwrap_or("micro");
    match load_modules(&wire, &cmdline) {
        Ok(()) => run_tests(&wire, host, &requested_tests(&cmdline))?,
        Err(error) => wire.line(&judge(host, || Err(error)).line())?,
    }
    end(&wire)
}

/// Says that this was all, and ends the machine.
fn end(wire: &Wire) -> Result<()> {
    wire.line("EPT-DONE")?;
    wire.put(SHUTDOWN_PORT, b"Shutdown")?;
    bail!("the machine went on after it was told to stop at port {SHUTDOWN_PORT:#x}")
}

/// The tests of `ept.tests=a,b`; without it all but those of `ept.without=c,d`.
fn requested_tests(cmdline: &str) -> Vec<&str> {
    let names = |prefix| parameter(cmdline, prefix).map(|list| list.split(',').collect::<Vec<_>>());
    names("ept.tests=").unwrap_or_else(|| {
        let without = names("ept.without=").unwrap_or_default();
        microvm::names().filter(|name| !without.contains(name)).collect()
    })
}

fn run_tests(wire: &Wire, host: &str, tests: &[&str]) -> Result<()> {
    for test in tests {
        let name = format!("{host}/{test}");
        wire.line(&format!("running {name}"))?;
        // A test that hangs holds what the next ones need: it is the last.
        let tell = |why: String| {
            let told = wire.line(&judge(&name, || bail!("{why}")).line()).and_then(|()| end(wire));
            if let Err(error) = told {
                eprintln!("{error:#}");
            }
        };
        let verdict = stuck::watch(TEST_LIMIT, tell, || judge(&name, || microvm::run(test)));
        wire.line(&verdict.line())?;
    }
    Ok(())
}

/// The value of a parameter on the kernel command line.
fn parameter<'a>(cmdline: &'a str, prefix: &str) -> Option<&'a str> {
    cmdline.split_whitespace().find_map(|word| word.strip_prefix(prefix))
}

fn mount_kernel_filesystems() -> Result<()> {
    for (kind, target) in
        [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("debugfs", "/sys/kernel/debug")]
    {
        fs::create_dir_all(target).with_context(|| format!("cannot make {target}"))?;
        mount(Some(kind), target, Some(kind), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("cannot mount {kind} on {target}"))?;
    }
    Ok(())
}

fn load_modules(wire: &Wire, cmdline: &str) -> Result<()> {
    let list = fs::read_to_string(MODULE_LIST).with_context(|| format!("cannot read {MODULE_LIST}"))?;
    for file in list.lines() {
        let start = Instant::now();
        let module =
            File::open(format!("/modules/{file}")).with_context(|| format!("cannot open module {file}"))?;
        let parameters = module_parameters(cmdline, file);
        let words = CString::new(parameters.as_str()).context("a module's parameters hold a zero byte")?;
        finit_module(&module, &words, ModuleInitFlags::empty())
            .with_context(|| format!("cannot load module {file}; the console log says why"))?;
        wire.line(&format!("loaded {file} {parameters} in {} ms", start.elapsed().as_millis()))?;
    }
    Ok(())
}

/// What the command line says to the module in `file`, as modprobe would pass it.
fn module_parameters(cmdline: &str, file: &str) -> String {
    let prefix = file.trim_end_matches(".ko").replace('-', "_") + ".";
    let words: Vec<&str> = cmdline.split_whitespace().filter_map(|word| word.strip_prefix(&prefix)).collect();
    words.join(" ")
}

/// The emulator's ports, through /dev/port: a byte written at an offset of it
/// goes to the port of that number.
struct Wire {
    ports: File,
}

impl Wire {
    fn open() -> Result<Self> {
        let ports = OpenOptions::new().write(true).open("/dev/port").context("cannot open /dev/port")?;
        Ok(Self { ports })
    }

    fn line(&self, text: &str) -> Result<()> {
        self.put(DEBUG_PORT, text.as_bytes())?;
        self.put(DEBUG_PORT, b"\n")
    }

    /// Byte by byte: a longer write would go on to the next ports.
    fn put(&self, port: u64, bytes: &[u8]) -> Result<()> {
        for byte in bytes.chunks(1) {
            self.ports.write_all_at(byte, port).with_context(|| format!("cannot write to port {port:#x}"))?;
        }
        Ok(())
    }
}
