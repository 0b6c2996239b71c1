// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a call of the libvirt hook costs, on this machine: a process that comes,
//! reads the domain's XML, says a line and goes. libvirt waits for it.

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

use crate::Lab;
use crate::product;

const CALLS: u32 = 500;

/// As a domain of some devices has.
const XML_BYTES: usize = 16 << 10;

const POLICY: &str = "<metadata><placement xmlns='https://ept-virt.org/xmlns/placement/1.0' \
    mode='place'><dram share='40%'/></placement></metadata>";

/// Measures and prints a table.
pub fn run(lab: &Lab) -> Result<()> {
    let hook = product::build_hook(lab)?;
    let work = lab.run_folder("hook")?;
    let (xml, socket) = (work.join("xml"), work.join("socket"));
    let filler = "<!-- as much as devices take -->".repeat(XML_BYTES / 32);
    fs::write(&xml, format!("<domain type='kvm'><name>vm</name>{POLICY}{filler}</domain>"))
        .with_context(|| format!("writing {}", xml.display()))?;
    println!("\nA call of the hook with {} KiB of XML, on this machine, {CALLS} calls:\n", XML_BYTES >> 10);
    println!("{:<28} {:>9} {:>9} {:>9} {:>9}", "", "median", "99 %", "longest", "CPU");
    row("for comparison: true", &xml, || Command::new("true"))?;
    for daemon in [false, true] {
        if daemon {
            serve(&socket)?;
        }
        let with = if daemon { "with a daemon" } else { "no daemon" };
        for operation in ["prepare", "start", "started"] {
            row(&format!("{operation}, {with}"), &xml, || {
                let mut command = Command::new(&hook);
                command.args(["vm", operation, "begin", "-"]).env("EPT_VIRT_SOCKET", &socket);
                command
            })?;
        }
    }
    fs::remove_dir_all(&work).with_context(|| format!("removing {}", work.display()))
}

/// Takes the hook's lines, as the daemon does.
fn serve(socket: &Path) -> Result<()> {
    let listener =
        UnixListener::bind(socket).with_context(|| format!("listening at {}", socket.display()))?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // The hook ends without waiting for an answer.
            let _ = BufReader::new(stream).read_line(&mut String::new());
        }
    });
    Ok(())
}

fn row(what: &str, xml: &Path, make: impl Fn() -> Command) -> Result<()> {
    let before = cpu_us()?;
    let mut times = Vec::new();
    for _ in 0..CALLS {
        let input = File::open(xml).with_context(|| format!("opening {}", xml.display()))?;
        let begun = Instant::now();
        let done = make().stdin(input).stdout(Stdio::null()).stderr(Stdio::null()).status();
        let status = done.with_context(|| format!("running {what}"))?;
        times.push(begun.elapsed());
        if !status.success() {
            bail!("{what}: {status}");
        }
    }
    let cpu_ms = (cpu_us()? - before) as f64 / f64::from(CALLS) / 1e3;
    times.sort();
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let [median, most, longest] = [50, 99, 100].map(|percent| ms(times[(times.len() - 1) * percent / 100]));
    println!("{what:<28} {median:>6.2} ms {most:>6.2} ms {longest:>6.2} ms {cpu_ms:>6.2} ms");
    Ok(())
}

/// Time of all children that have ended.
fn cpu_us() -> Result<i64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN).context("asking for the time of children")?;
    Ok((usage.user_time() + usage.system_time()).num_microseconds())
}
