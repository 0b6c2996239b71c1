// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest without libvirt: a QEMU of our own, and its monitor (QMP: one JSON
//! object per line).

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::console::{self, Console};
use super::host::PAYLOAD;

/// What each guest here has.
const MEMORY_MIB: u32 = 192;
const COMMAND_LINE: &str = "console=ttyS0 loglevel=1 nokaslr mitigations=off tsc=reliable no_timer_check \
    acpi=off panic=-1 HOT_MIB=32 IDLE_MIB=64 -- guest";

const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// A running QEMU; killed when dropped.
pub struct Qemu {
    child: Child,
    monitor: BufReader<UnixStream>,
    /// The line to its workload.
    pub console: Console,
}

impl Qemu {
    /// Starts a machine; it boots, or waits for the state of another one from
    /// the socket `incoming`.
    pub fn start(name: &'static str, incoming: Option<&str>) -> Result<Self> {
        let monitor = PathBuf::from(format!("/run/{name}.qmp"));
        for path in [&monitor, &console::socket_path(name)] {
            // What an earlier run left; what matters shows at the start.
            let _ = fs::remove_file(path);
        }
        Console::clear(name)?;
        let chardev = format!(
            "socket,id=console,server=on,wait=off,path={},logfile={}",
            console::socket_path(name).display(),
            console::log_path(name).display()
        );
        let log = File::create(format!("/run/{name}-qemu.log")).context("creating QEMU's log")?;
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"])
            .args(["-machine", "pc,accel=kvm", "-cpu", "host,-svm", "-m", &MEMORY_MIB.to_string()])
            .args(["-kernel", &format!("{PAYLOAD}/vmlinuz"), "-initrd", &format!("{PAYLOAD}/guest.cpio")])
            .args(["-append", COMMAND_LINE, "-chardev", &chardev, "-serial", "chardev:console"])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", monitor.display())]);
        if let Some(socket) = incoming {
            command.args(["-incoming", &format!("unix:{socket}")]);
        }
        let mut child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("starting QEMU")?;
        let stream = match connect(&monitor, &mut child) {
            Ok(stream) => stream,
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                let said = fs::read_to_string(format!("/run/{name}-qemu.log")).unwrap_or_default();
                return Err(error).with_context(|| format!("QEMU said: {said}"));
            }
        };
        let mut qemu = Self { child, monitor: BufReader::new(stream), console: Console::connect(name)? };
        qemu.receive()?;
        qemu.execute("qmp_capabilities", json!({}))?;
        Ok(qemu)
    }

    /// Its process id.
    pub fn pid(&self) -> Result<i32> {
        Ok(i32::try_from(self.child.id())?)
    }

    /// Has the monitor obey a command; its answer.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({"execute": command, "arguments": arguments});
        writeln!(self.monitor.get_mut(), "{request}")
            .with_context(|| format!("sending {command} to QEMU"))?;
        loop {
            let mut answer = self.receive()?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {command}: {error}");
            }
            // Anything else is an event.
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    fn receive(&mut self) -> Result<Value> {
        let mut line = String::new();
        let read = self.monitor.read_line(&mut line).context("reading from QEMU's monitor")?;
        if read == 0 {
            bail!("QEMU closed its monitor");
        }
        serde_json::from_str(&line).with_context(|| format!("reading the monitor's {line:?}"))
    }

    /// Ends it without warning, and takes its process away.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill().context("killing QEMU")?;
        self.child.wait().context("waiting for QEMU")?;
        Ok(())
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Waits for QEMU to make its monitor's socket.
fn connect(path: &PathBuf, child: &mut Child) -> Result<UnixStream> {
    let deadline = Instant::now() + START_TIMEOUT;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => {
                stream.set_read_timeout(Some(ANSWER_TIMEOUT)).context("bounding the wait for the monitor")?;
                return Ok(stream);
            }
            Err(error) if Instant::now() > deadline => {
                return Err(error).context("connecting to QEMU's monitor");
            }
            Err(_) => {}
        }
        if let Some(status) = child.try_wait().context("looking at QEMU")? {
            bail!("QEMU ended: {status}");
        }
        thread::sleep(Duration::from_millis(50));
    }
}
