// SPDX-License-Identifier: MIT OR Apache-2.0
//! The AMD host with libvirt: SVM with nested paging and two memory tiers, emulated by QEMU
//! without any help of the machine's own processor (TCG). It boots once; every
//! use starts from a snapshot in which libvirt is up. There is one for each flavour:
//! with the libvirt and the QEMU of a Debian suite, under a small init or systemd.

mod image;
mod payload;
mod qmp;
mod waker;

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::Lab;
use crate::apt::{self, Need, need};
use crate::cache::Key;
use crate::flavour::Flavour;
use crate::kernel::Kernel;
use crate::proc::{self, Child, log_tail};
use crate::verdict::Follower;

pub use payload::Payload;
use waker::Waker;
pub use waker::wakes;

const QEMU: &str = "qemu-system-x86_64";

/// What host-init says when the host can be snapshotted.
const READY: &str = "EPT-READY";

/// A cold boot takes 30 s, on a loaded machine twice that.
const BOOT_TIMEOUT: Duration = Duration::from_secs(240);
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(120);

/// The machine, the same for the boot and for each start from the snapshot.
/// Node 0 has the CPU; node 1 is slower memory without CPUs, and the HMAT tells
/// the kernel so. One CPU: with two emulated in parallel, QEMU 7.2 now and then
/// runs code that the other one has patched, and the kernel dies of an int3.
const MACHINE: &[&str] = &[
    "-nodefaults",
    "-no-user-config",
    "-no-reboot",
    "-display",
    "none",
    "-machine",
    "q35,hmat=on",
    "-accel",
    "tcg,thread=single,tb-size=512",
    "-cpu",
    "EPYC,+svm,+npt",
    "-smp",
    "1",
    "-m",
    "3G",
    "-object",
    "memory-backend-ram,id=fast,size=2G",
    "-object",
    "memory-backend-ram,id=slow,size=1G",
    "-numa",
    "node,nodeid=0,memdev=fast,cpus=0",
    "-numa",
    "node,nodeid=1,memdev=slow,initiator=0",
    "-numa",
    "dist,src=0,dst=1,val=20",
    "-numa",
    "hmat-lb,initiator=0,target=0,hierarchy=memory,data-type=access-latency,latency=80",
    "-numa",
    "hmat-lb,initiator=0,target=0,hierarchy=memory,data-type=access-bandwidth,bandwidth=100G",
    "-numa",
    "hmat-lb,initiator=0,target=1,hierarchy=memory,data-type=access-latency,latency=250",
    "-numa",
    "hmat-lb,initiator=0,target=1,hierarchy=memory,data-type=access-bandwidth,bandwidth=25G",
    "-append",
    "console=ttyS0 mitigations=off panic=-1 quiet",
];

/// What emulating the AMD host takes.
pub const NEEDS: &[Need] = &[
    need("qemu-system-x86", "emulates the AMD host"),
    need("erofs-utils", "makes the AMD host's root image"),
    need("xz-utils", "unpacks kernel modules"),
];

/// The host's files, all in the cache.
pub struct AmdHost {
    flavour: Flavour,
    kernel: PathBuf,
    initramfs: PathBuf,
    root: PathBuf,
    /// The machine's state with libvirt up.
    ready: PathBuf,
}

/// Where the host's second serial port goes.
pub enum Wire {
    /// Into this file.
    File(PathBuf),
    /// To whoever connects: see [`Machine::connect`].
    Socket,
}

/// A running host. It ends when this is dropped.
pub struct Machine {
    /// The emulator.
    pub qemu: Child,
    /// The kernel's console.
    pub console: PathBuf,
    work: PathBuf,
    _waker: Waker,
}

impl AmdHost {
    /// Makes all that is not in the cache: images, then the snapshot.
    pub fn prepare(lab: &Lab, kernel: &Kernel, flavour: Flavour) -> Result<Self> {
        apt::ensure(lab, NEEDS)?;
        let mut host = Self {
            flavour,
            kernel: kernel.image.clone(),
            initramfs: image::initramfs(lab, kernel, flavour)?,
            root: image::root(lab, flavour)?,
            ready: PathBuf::new(),
        };
        let key = Key::new("ready 1")
            .text(&qemu_version()?)
            .texts(MACHINE)
            .text(&kernel.release)
            .item(&kernel.root)
            .item(&host.initramfs)
            .item(&host.root);
        let name = flavour.item("amd-ready");
        host.ready = lab.cache.get_or_build(&name, &key, |state| host.boot_and_save(lab, state))?;
        Ok(host)
    }

    /// Starts the host from the snapshot and gives it `payload`. `name` stands
    /// in the names of the logs.
    pub fn start(&self, lab: &Lab, name: &str, payload: Payload, wire: &Wire) -> Result<Machine> {
        let work = lab.run_folder(name)?;
        payload.write(&work.join("payload"))?;
        let mut command = self.command(&work, lab, name, wire)?;
        command.env("SAVED", &self.ready).args(["-incoming", "exec:cat \"$SAVED\""]);
        Machine::spawn(lab, name, &mut command, work)
    }

    fn command(&self, work: &Path, lab: &Lab, name: &str, wire: &Wire) -> Result<Command> {
        if let Wire::File(path) = wire {
            // What an earlier run wrote must not count for this one.
            File::create(path).with_context(|| format!("creating {}", path.display()))?;
        }
        let wire = match wire {
            Wire::File(path) => format!("file:{}", path.display()),
            Wire::Socket => "unix:wire,server=on,wait=off".into(),
        };
        let mut command = Command::new(QEMU);
        command
            .current_dir(work)
            .args(MACHINE)
            .arg("-kernel")
            .arg(&self.kernel)
            .arg("-initrd")
            .arg(&self.initramfs)
            .arg("-drive")
            .arg(drive("root", &self.root) + ",readonly=on")
            .args(["-device", "virtio-blk-pci,drive=root"])
            .arg("-drive")
            .arg(drive("payload", Path::new("payload")))
            .args(["-device", "virtio-blk-pci,drive=payload"])
            .arg("-serial")
            .arg(format!("file:{}", console_log(lab, name).display()))
            .args(["-serial", &wire])
            .args(["-qmp", "unix:qmp,server=on,wait=off"]);
        Ok(command)
    }

    fn boot_and_save(&self, lab: &Lab, state: &Path) -> Result<()> {
        let name = self.flavour.item("amd-boot");
        let step = lab.progress.step(format!("booting the AMD host for the first time ({})", self.flavour));
        let work = lab.run_folder(&name)?;
        payload::write_empty(&work.join("payload"))?;
        let wire = lab.log(&format!("{name}-wire"));
        let mut command = self.command(&work, lab, &name, &Wire::File(wire.clone()))?;
        command.env("SAVED", state);
        let mut machine = Machine::spawn(lab, &name, &mut command, work)?;
        machine.wait_for_line(&wire, READY, BOOT_TIMEOUT)?;
        step.note("saving the snapshot");
        let mut monitor = machine.monitor()?;
        monitor.migrate("exec:cat > \"$SAVED\"", SNAPSHOT_TIMEOUT)?;
        step.done("");
        Ok(())
    }
}

impl Machine {
    fn spawn(lab: &Lab, name: &str, command: &mut Command, work: PathBuf) -> Result<Self> {
        let qemu = proc::spawn(command, &lab.log(&format!("{name}-qemu")))?;
        let progress = lab.progress.clone();
        let text = format!("AMD host: {name} stood still, and was woken (lab/src/amd/waker.rs)");
        let waker = Waker::watch(qemu.id(), move || progress.line(&text));
        Ok(Self { qemu, console: console_log(lab, name), work, _waker: waker })
    }

    /// Connects to the second serial port of a machine with [`Wire::Socket`].
    pub fn connect(&mut self) -> Result<UnixStream> {
        self.socket("wire")
    }

    fn monitor(&mut self) -> Result<qmp::Monitor> {
        qmp::Monitor::new(self.socket("qmp")?)
    }

    /// Connects to a socket in the emulator's working folder. Through /proc,
    /// because the path of a socket may be 107 bytes long and no more.
    fn socket(&mut self, name: &str) -> Result<UnixStream> {
        let path = format!("/proc/{}/cwd/{name}", self.qemu.id());
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match UnixStream::connect(&path) {
                Ok(stream) => return Ok(stream),
                Err(error) if Instant::now() > deadline => {
                    return Err(error).with_context(|| format!("connecting to the emulator's {name} socket"));
                }
                Err(_) => self.still_running()?,
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn wait_for_line(&mut self, file: &Path, wanted: &str, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        let mut follower = Follower::new(file);
        while !follower.lines()?.iter().any(|line| line == wanted) {
            self.still_running()?;
            if Instant::now() > deadline {
                bail!(
                    "the AMD host did not say {wanted} within {} s\n{}",
                    timeout.as_secs(),
                    log_tail(&self.console)
                );
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    fn still_running(&mut self) -> Result<()> {
        if let Some(status) = self.qemu.try_wait()? {
            bail!(
                "the AMD host's emulator {}\n{}\n{}",
                proc::describe(status),
                log_tail(self.qemu.log()),
                log_tail(&self.console)
            );
        }
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.qemu.kill();
        // A left-over folder is replaced by the next run of this process id.
        let _ = fs::remove_dir_all(&self.work);
    }
}

fn console_log(lab: &Lab, name: &str) -> PathBuf {
    lab.log(&format!("{name}-console"))
}

fn drive(id: &str, file: &Path) -> String {
    // A comma in QEMU's options is written twice.
    let file = file.to_string_lossy().replace(',', ",,");
    format!("if=none,id={id},format=raw,file={file}")
}

/// Snapshots are read only by the version that wrote them.
fn qemu_version() -> Result<String> {
    let out =
        Command::new(QEMU).arg("--version").output().with_context(|| format!("running {QEMU} --version"))?;
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}
