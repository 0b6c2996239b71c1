// SPDX-License-Identifier: MIT OR Apache-2.0
//! The host under test: its programs, its kernel module, its libvirt.

use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Where the lab unpacks what is tested.
pub const PAYLOAD: &str = "/payload";

const HOOK: &str = "/etc/libvirt/hooks/qemu.d/ept-virt";
const MODULE: &str = "kvm_ept_sample";

/// Emulated hosts take seconds for what others do in milliseconds.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(60);

/// A killed daemon's sessions end with it.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(10);

/// Puts the host into the state that each scenario starts from: hook installed,
/// module loaded, no daemon, no domain.
pub fn reset() -> Result<()> {
    install_hook()?;
    for domain in virsh(&["list", "--name"])?.split_whitespace() {
        virsh(&["destroy", domain])?;
    }
    let defined = virsh(&["list", "--all", "--name"])?;
    if !defined.trim().is_empty() {
        // One virsh for all: each takes half a second to begin with.
        let undefine = |domain| format!("undefine --managed-save {domain}");
        let commands: Vec<String> = defined.split_whitespace().map(undefine).collect();
        virsh(&[&commands.join("; ")])?;
        let left = virsh(&["list", "--all", "--name"])?;
        ensure!(left.trim().is_empty(), "domains that can not be undefined: {left}");
    }
    insert_module()
}

/// Runs virsh; its output, or an error with what it said.
pub fn virsh(args: &[&str]) -> Result<String> {
    let mut command = Command::new("virsh");
    command.arg("--quiet").args(args);
    succeed(&mut command)
}

/// Ends libvirtd; guests run on.
pub fn stop_libvirtd() -> Result<()> {
    let pid = libvirtd()?;
    kill(pid, Signal::SIGTERM).context("ending libvirtd")?;
    wait_until("libvirtd ends", COMMAND_TIMEOUT, || Ok(!Path::new(&format!("/proc/{pid}")).exists()))
}

/// Starts libvirtd.
pub fn start_libvirtd() -> Result<()> {
    succeed(Command::new("libvirtd").arg("-d")).map(drop)
}

/// Loads the module unless it is loaded.
pub fn insert_module() -> Result<()> {
    if module_loaded() {
        return Ok(());
    }
    succeed(Command::new("insmod").arg(format!("{PAYLOAD}/{MODULE}.ko"))).map(drop)
}

/// Tries to unload the module.
pub fn remove_module() -> Result<()> {
    succeed(Command::new("rmmod").arg(MODULE)).map(drop)
}

/// Whether the module is loaded.
pub fn module_loaded() -> bool {
    Path::new("/sys/module").join(MODULE).exists()
}

/// Unloads the module, which nobody uses any more.
pub fn release_module() -> Result<()> {
    if !module_loaded() {
        return Ok(());
    }
    let path = format!("/sys/module/{MODULE}/refcnt");
    let mut users = String::new();
    wait_until("nobody uses the module", RELEASE_TIMEOUT, || {
        users = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
        Ok(users.trim() == "0")
    })
    .with_context(|| format!("it has {} users", users.trim()))?;
    remove_module()
}

/// Runs a command to its end; its standard output, or an error with all it said.
pub fn succeed(command: &mut Command) -> Result<String> {
    succeed_within(command, COMMAND_TIMEOUT)
}

/// As [`succeed`], within another time.
pub fn succeed_within(command: &mut Command, timeout: Duration) -> Result<String> {
    let out = run_within(command, timeout)?;
    if !out.status.success() {
        bail!("{}: {}: {}", name(command), out.status, String::from_utf8_lossy(&out.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Runs a command to its end, whatever that is, within [`COMMAND_TIMEOUT`].
pub fn run(command: &mut Command) -> Result<Output> {
    run_within(command, COMMAND_TIMEOUT)
}

fn run_within(command: &mut Command, timeout: Duration) -> Result<Output> {
    let name = name(command);
    eprintln!("running {name}");
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {name}"))?;
    let pid = Pid::from_raw(i32::try_from(child.id())?);
    let waiter = thread::spawn(move || child.wait_with_output());
    let deadline = Instant::now() + timeout;
    while !waiter.is_finished() {
        if Instant::now() > deadline {
            kill(pid, Signal::SIGKILL)?;
            bail!("{name} took more than {} s", timeout.as_secs());
        }
        thread::sleep(Duration::from_millis(10));
    }
    match waiter.join() {
        Ok(output) => output.with_context(|| format!("waiting for {name}")),
        Err(_) => bail!("waiting for {name} panicked"),
    }
}

/// Waits until `done` says so; an error that names `what` after `timeout`.
pub fn wait_until(what: &str, timeout: Duration, mut done: impl FnMut() -> Result<bool>) -> Result<()> {
    // Standard error is the host's console: where a run that hangs is looked at.
    eprintln!("waiting until {what}");
    let deadline = Instant::now() + timeout;
    while !done()? {
        if Instant::now() > deadline {
            bail!("{what}: not within {} s", timeout.as_secs());
        }
        thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

fn install_hook() -> Result<()> {
    let hook = Path::new(HOOK);
    if hook.exists() {
        return Ok(());
    }
    if let Some(dir) = hook.parent() {
        fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    }
    fs::copy(format!("{PAYLOAD}/ept-virt-hook"), hook).context("installing the hook")?;
    // libvirt looks for hooks when it starts and when it is told to reload.
    kill(libvirtd()?, Signal::SIGHUP).context("reloading libvirtd")
}

/// Takes away the hook, and has libvirt forget that there was one.
pub fn uninstall_hook() -> Result<()> {
    fs::remove_file(HOOK).with_context(|| format!("removing {HOOK}"))?;
    kill(libvirtd()?, Signal::SIGHUP).context("reloading libvirtd")
}

/// The number in a daemon's pid file.
pub fn read_pid(file: &Path) -> Result<Pid> {
    let text = fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    Ok(Pid::from_raw(text.trim().parse().with_context(|| format!("{}: {text:?}", file.display()))?))
}

/// The line of libvirt: 9, 11...
pub fn libvirt_major() -> Result<u32> {
    let version = succeed(Command::new("libvirtd").arg("--version"))?;
    let number = version.split_whitespace().last().and_then(|number| number.split('.').next());
    number.and_then(|major| major.parse().ok()).with_context(|| format!("libvirt's version in {version:?}"))
}

fn libvirtd() -> Result<Pid> {
    read_pid(Path::new("/run/libvirtd.pid"))
}

fn name(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy()];
    words.extend(command.get_args().map(|arg| arg.to_string_lossy()));
    words.join(" ")
}
