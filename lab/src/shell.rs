// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cargo xtask lab`: a shell on an emulated host.

use std::io::{self, IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::thread;

use anyhow::{Context, Result};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

use crate::Lab;
use crate::amd::Wire;
use crate::{prepare, proc};

/// The terminal as it was, for the way out.
static TERMINAL: Mutex<Option<Termios>> = Mutex::new(None);

/// Installs the product and starts a shell on the host's second serial port.
const RUN: &str = "\
exec 2>&1
busybox hostname amd
insmod kvm_ept_sample.ko
install -D ept-virt-hook /etc/libvirt/hooks/qemu.d/ept-virt
install ept-virt /usr/local/bin/
kill -HUP $(cat /run/libvirtd.pid)
ept-virt daemon >/run/ept-virt-daemon.log 2>&1 </dev/null &
busybox stty sane
cat <<'END'
An emulated AMD host: SVM, DRAM on node 0, slower memory on node 1.
  ./lab-agent example >vm.xml && virsh define vm.xml && virsh start guest
  ept-virt status            the daemon's log: /run/ept-virt-daemon.log
Leave with exit or Ctrl-D.
END
busybox setsid -c bash -i
";

/// Runs the shell until it ends.
pub fn run(lab: &Lab) -> Result<()> {
    let (host, files) = prepare::amd(lab)?;
    let mut machine = host.start(lab, "lab", files.payload(RUN)?, &Wire::Socket)?;
    let stream = machine.connect()?;
    raw_terminal()?;
    let outcome = relay(&stream);
    restore_terminal();
    outcome
}

/// Copies both ways until the host closes its side.
fn relay(stream: &UnixStream) -> Result<()> {
    let mut to_host = stream.try_clone().context("duplicating the connection")?;
    // Ends with the program: a read from the terminal can not be called off.
    thread::spawn(move || io::copy(&mut io::stdin().lock(), &mut to_host));
    let mut from_host = stream;
    let mut buffer = [0; 4096];
    loop {
        let read = match from_host.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).context("reading from the emulated host"),
        };
        let mut out = io::stdout().lock();
        out.write_all(&buffer[..read]).and_then(|()| out.flush()).context("writing to the terminal")?;
    }
}

/// Hands every key to the host; a pipe as input stays as it is.
fn raw_terminal() -> Result<()> {
    if !io::stdin().is_terminal() {
        return Ok(());
    }
    let saved = tcgetattr(io::stdin()).context("reading the terminal's settings")?;
    let mut raw = saved.clone();
    cfmakeraw(&mut raw);
    if let Ok(mut terminal) = TERMINAL.lock() {
        *terminal = Some(saved);
    }
    proc::at_signal_exit(restore_terminal);
    tcsetattr(io::stdin(), SetArg::TCSANOW, &raw).context("setting the terminal")
}

fn restore_terminal() {
    if let Some(saved) = TERMINAL.lock().ok().and_then(|mut terminal| terminal.take()) {
        // There is nobody to tell when the terminal is gone.
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &saved);
    }
}
