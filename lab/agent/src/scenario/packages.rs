// SPDX-License-Identifier: MIT OR Apache-2.0
//! The Debian packages on a host with systemd, from `apt install` to purge, under a
//! guest that was there before.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use ept_virt_core::wire::{DEFAULT_SOCKET, DomainState, DomainStatus};
use nix::unistd::Group;

use super::daemon;
use super::domain::Domain;
use super::foreign;
use super::host::{self, PAYLOAD, virsh};
use super::readme::{self, Step};
use super::systemd::{self, journal, systemctl};
use super::truth::{self, Truth};
use crate::report::Outcome;

const CONFIG: &str = "/etc/ept-virt/ept-virt.toml";
const STATE: &str = "/var/lib/ept-virt";
const HOOK: &str = "/etc/libvirt/hooks/qemu.d/ept-virt";
const PROGRAM: &str = "/usr/bin/ept-virt";

/// Where DKMS looks for a module that is built already: /usr/share/ and the name of its
/// package. The lab had this one built by the package itself, in this host's tree.
const PREBUILT: &str = "/usr/share/kvm-ept-sample-dkms/kvm-ept-sample-0.1.0.dkms.tar.gz";

/// What must not be there when the packages are purged.
const TRACES: [&str; 8] = [
    HOOK,
    PROGRAM,
    "/etc/ept-virt",
    STATE,
    "/run/ept-virt",
    "/usr/lib/systemd/system/ept-virt.service",
    "/usr/src/kvm-ept-sample-0.1.0",
    "/var/lib/dkms/kvm-ept-sample",
];

/// apt and DKMS start hundreds of programs, at 50 ms each here.
const APT_TIMEOUT: Duration = Duration::from_secs(600);

/// Half-life and delay are those that all guests have: half a minute and more.
const PLACE_TIMEOUT: Duration = Duration::from_secs(180);
const TIMEOUT: Duration = Duration::from_secs(90);

/// Of the idle block's 64 MiB; what leaves at least.
const MOVED_MIB: u64 = 16;

/// The slower node of the emulated host.
const SLOW: i32 = 1;

/// Where README's commands are followed: whoever follows them has the packages there.
const FOLDER: &str = "/root";

/// Install, start, observe and place as README says; upgrade, remove, purge.
pub fn run() -> Result<Outcome> {
    if !systemd::runs()? {
        return Ok(Outcome::Skip("process 1 of this host is not systemd: use --systemd".into()));
    }
    make_bare()?;
    foreign::define_by_virt_install()?;
    let blocks = readme::blocks()?;
    let [made, install, start, look, place, placed] = &blocks[..] else {
        bail!("README's install section has {} blocks of commands, not six", blocks.len());
    };
    check_made(made)?;
    let installed = follow(install)?;
    check_installed()?;
    follow(start)?;
    let mut guest = Domain::started(foreign::VIRT_INSTALL)?;
    let truth = guest.wait_ready()?;
    check_observed(guest.name)?;
    follow(look)?;
    follow(place)?;
    let moved = wait_placed(&mut guest, &truth)?;
    observed(guest.name, "a round after that", |d| d.round.as_ref().is_some_and(|r| r.slow_bytes > 0))?;
    follow(placed)?;
    foreign::check_metadata(guest.name)?;
    let nova = check_nova()?;
    let qemu = guest.pid()?;
    let upgraded = upgrade(&guest)?;
    guest.console.wait_passes()?;
    guest.check_data()?;
    let purged = remove(&guest)?;
    guest.console.wait_passes()?;
    guest.check_data()?;
    ensure!(guest.pid()? == qemu && guest.state()? == "running", "the guest is {}", guest.state()?);
    bring_back(qemu)?;
    guest.check_data()?;
    virsh(&["destroy", guest.name])?;
    virsh(&["start", guest.name]).context("starting a guest after the purge")?;
    Ok(Outcome::Pass(format!(
        "README followed: installed in {} s, virt-install's guest: {moved}; nova's: {nova}; \
         upgraded in {} s, {purged}",
        installed.as_secs(),
        upgraded.as_secs()
    )))
}

/// Follows a block of README's where the packages are.
fn follow(steps: &[Step]) -> Result<Duration> {
    let began = Instant::now();
    steps.iter().try_for_each(|step| step.follow(FOLDER, APT_TIMEOUT))?;
    Ok(began.elapsed())
}

/// The packages were made by the lab, elsewhere; they must be those that README speaks of.
fn check_made(steps: &[Step]) -> Result<()> {
    let [step] = steps else { bail!("README makes the packages by {} commands", steps.len()) };
    ensure!(step.command == "cargo xtask deb", "README makes the packages by `{}`", step.command);
    let names: Vec<_> = step.output.iter().filter_map(|line| Path::new(line).file_name()).collect();
    ensure!(names.len() == 2, "README says that these are made: {:?}", step.output);
    for (name, from) in names.iter().zip(["first.deb", "first-dkms.deb"]) {
        let to = Path::new(FOLDER).join(name);
        fs::copy(format!("{PAYLOAD}/{from}"), &to).with_context(|| format!("copying {from}"))?;
        let fields = ["Package", "Version", "Architecture"].map(|field| format!("${{{field}}}"));
        let show = format!("--showformat={}.deb", fields.join("_"));
        let said = host::succeed(Command::new("dpkg-deb").arg("--show").arg(show).arg(&to))?;
        ensure!(to.ends_with(&said), "README speaks of {}, which is {said}", to.display());
    }
    Ok(())
}

/// A guest without a policy is observed, and nothing of it is moved.
pub fn check_observed(name: &str) -> Result<()> {
    let seen = observed(name, "rounds", |d| d.round.as_ref().is_some_and(|r| r.number > 2))?;
    let moved = seen.moves.demoted_bytes + seen.moves.promoted_bytes;
    ensure!(moved == 0, "{moved} bytes moved without a policy");
    let nudges = daemon::status()?.daemon.nudges;
    ensure!(nudges > 0, "libvirt does not call the hook that the package brought");
    Ok(())
}

/// A policy moves idle memory. 40 % of 192 MiB hold the hot block and the guest's
/// kernel, and not all of the idle block.
fn wait_placed(guest: &mut Domain, truth: &Truth) -> Result<String> {
    let began = Instant::now();
    let mut slow_mib = 0;
    host::wait_until("idle memory leaves DRAM", PLACE_TIMEOUT, || {
        let nodes = truth::pages_by_node(guest.pid()?, &daemon::map(guest.name)?, &truth.idle)?;
        slow_mib = (nodes.get(&SLOW).copied().unwrap_or(0) * 4096) >> 20;
        Ok(slow_mib >= MOVED_MIB)
    })
    .with_context(|| format!("{slow_mib} MiB of the idle block are on the slow node; {}", journal()))?;
    guest.check_data()?;
    Ok(format!("{slow_mib} MiB of idle memory moved {} s after the policy", began.elapsed().as_secs()))
}

/// A guest of nova's is seen and placed, and keeps what nova knows it by.
fn check_nova() -> Result<String> {
    let mut guest = foreign::of_nova().start()?;
    let truth = guest.wait_ready()?;
    check_observed(guest.name)?;
    let moved = place(&mut guest, &truth)?;
    foreign::check_metadata(guest.name)?;
    Ok(moved)
}

/// Gives a guest the policy that README gives, and waits for what it does.
pub fn place(guest: &mut Domain, truth: &Truth) -> Result<String> {
    let words = ["policy", "set", guest.name, "--mode", "place", "--dram", "40%"];
    host::succeed(Command::new(PROGRAM).args(words))?;
    wait_placed(guest, truth)
}

/// An upgrade keeps an edited configuration and heat, and restarts the daemon alone.
fn upgrade(guest: &Domain) -> Result<Duration> {
    let daemon = unit_pid()?;
    let config = read(CONFIG)? + "# ours\n";
    fs::write(CONFIG, &config).with_context(|| format!("writing {CONFIG}"))?;
    let took = install(&["next.deb", "next-dkms.deb"])?;
    ensure!(read(CONFIG)? == config, "the upgrade changed an edited {CONFIG}");
    ensure!(unit_pid()? != daemon, "the upgrade did not restart the daemon");
    observed(guest.name, "heat of before the upgrade", |d| d.restored_s.is_some())?;
    let warnings = daemon::doctor(TIMEOUT)?;
    ensure!(warnings.is_empty(), "after the upgrade doctor warns of {warnings:?}");
    check_replaced()?;
    Ok(took)
}

/// Doctor tells that an upgrade has brought another module than the one in the kernel:
/// here the same one, which says that it was built of other sources.
fn check_replaced() -> Result<()> {
    const SOURCES: &str = "/sys/module/kvm_ept_sample/srcversion";
    let file = host::succeed(Command::new("modinfo").args(["--field", "filename", "kvm_ept_sample"]))?;
    let (file, loaded) = (file.trim(), read(SOURCES)?);
    // The kernel's tools know a compressed module by its content, not by its name.
    let replace = format!(
        "mv {file} /root/kept && xz --decompress --force --stdout /root/kept | \
         LC_ALL=C sed 's/srcversion={}/srcversion={}/' >{file}",
        loaded.trim(),
        loaded.trim().chars().rev().collect::<String>()
    );
    host::succeed(Command::new("sh").args(["-c", &replace]))?;
    let warnings = daemon::doctor(TIMEOUT)?;
    host::succeed(Command::new("mv").args(["/root/kept", file]))?;
    ensure!(warnings == ["module"], "with another module on disk doctor warns of {warnings:?}");
    Ok(())
}

/// Removal takes programs, hook and module, and a purge all the rest.
fn remove(guest: &Domain) -> Result<String> {
    let removed = apt(&["remove", "ept-virt", "ept-virt-dkms"])?;
    let there = |path: &str| Path::new(path).exists();
    ensure!(!there(PROGRAM) && !there(HOOK) && !there(DEFAULT_SOCKET), "program, hook or socket are there");
    ensure!(there(CONFIG) && there(STATE), "removal took configuration or heat");
    ensure!(guest.state()? == "running", "the guest is {}", guest.state()?);
    let purged = apt(&["purge", "ept-virt", "ept-virt-dkms"])?;
    for trace in TRACES {
        ensure!(!there(trace), "{trace} is left");
    }
    ensure!(!host::module_loaded(), "the module is still loaded");
    ensure!(Group::from_name("ept-virt").context("looking for a group")?.is_none(), "the group is left");
    Ok(format!("removed in {} s, purged in {} s", removed.as_secs(), purged.as_secs()))
}

/// Without ept-virt memory comes back to DRAM by the kernel's own tool, as README says.
fn bring_back(qemu: i32) -> Result<()> {
    let before = slow_mappings(qemu)?;
    let (pid, slow) = (qemu.to_string(), SLOW.to_string());
    host::succeed_within(Command::new("migratepages").args([&pid, &slow, "0"]), APT_TIMEOUT)?;
    let after = slow_mappings(qemu)?;
    ensure!(before > 0 && after == 0, "{before} mappings had pages on the slow node, {after} have");
    Ok(())
}

/// How many writable mappings of a process have pages on the slow node.
fn slow_mappings(pid: i32) -> Result<usize> {
    let maps = read(&format!("/proc/{pid}/numa_maps"))?;
    let is_slow = |line: &&str| line.contains("anon=") && line.contains(&format!(" N{SLOW}="));
    Ok(maps.lines().filter(is_slow).count())
}

/// Takes away what scenarios start with: here the packages bring it.
fn make_bare() -> Result<()> {
    host::release_module()?;
    host::uninstall_hook()?;
    for trace in TRACES {
        ensure!(!Path::new(trace).exists(), "{trace} is there before the package");
    }
    let folder = Path::new(PREBUILT).parent().context("no folder")?;
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    fs::copy(format!("{PAYLOAD}/prebuilt.tar.gz"), PREBUILT).context("copying what DKMS built").map(drop)
}

fn install(packages: &[&str]) -> Result<Duration> {
    let files: Vec<String> = packages.iter().map(|name| format!("{PAYLOAD}/{name}")).collect();
    let mut words = vec!["-o", "Dpkg::Options::=--force-confold", "install"];
    words.extend(files.iter().map(String::as_str));
    apt(&words)
}

/// Runs apt-get; how long it took.
fn apt(words: &[&str]) -> Result<Duration> {
    let began = Instant::now();
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").args(["--quiet", "--yes"]).args(words);
    let said = host::succeed_within(&mut command, APT_TIMEOUT)?;
    eprintln!("{said}");
    Ok(began.elapsed())
}

/// The daemon runs, and nothing is in its way.
fn check_installed() -> Result<()> {
    host::succeed(Command::new("modprobe").arg("kvm_ept_sample"))?;
    ensure!(systemctl(&["is-enabled", "ept-virt.service"])?.trim() == "enabled", "the unit is not enabled");
    unit_pid()?;
    ensure!(Group::from_name("ept-virt").context("looking for a group")?.is_some(), "no group ept-virt");
    let doctor = daemon::doctor(TIMEOUT)?;
    eprintln!("doctor warns of {doctor:?}");
    Ok(())
}

/// The daemon's process; an error unless systemd has it running.
pub fn unit_pid() -> Result<i32> {
    let text = systemctl(&["show", "ept-virt.service", "--value", "--property", "MainPID"])?;
    let pid = text.trim().parse().with_context(|| format!("MainPID is {text:?}"))?;
    ensure!(pid > 0, "the daemon does not run: {}", journal());
    Ok(pid)
}

/// Waits until the daemon works on a guest and `good` holds for its status.
fn observed(name: &str, what: &str, good: impl Fn(&DomainStatus) -> bool) -> Result<DomainStatus> {
    let works = |d: &DomainStatus| matches!(d.state, DomainState::Observing | DomainState::Placing);
    daemon::wait_for(name, what, TIMEOUT, |d| works(d) && d.round.is_some() && good(d)).with_context(journal)
}

fn read(path: &str) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("reading {path}"))
}
