// SPDX-License-Identifier: MIT OR Apache-2.0
//! The program itself. libvirt waits for it at each start of a domain.

use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::resource::{Usage, UsageWho, getrusage};

const HOOK: &str = env!("CARGO_BIN_EXE_ept-virt-hook");

/// libvirt would wait for itself.
#[test]
fn it_links_no_libvirt() {
    let Ok(output) = Command::new("readelf").args(["--dynamic", "--wide", HOOK]).output() else {
        println!("SKIP it_links_no_libvirt: no readelf; install binutils");
        return;
    };
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout).unwrap();
    for line in text.lines().filter(|line| line.contains("(NEEDED)")) {
        let c = ["libc.so", "libgcc_s.so", "libm.so", "ld-linux"];
        assert!(c.iter().any(|name| line.contains(&format!("[{name}"))), "{line}");
    }
    // Nor does it open one when it runs.
    assert!(!std::fs::read(HOOK).unwrap().windows(10).any(|bytes| bytes == b"libvirt.so"));
}

/// By the CPU's time, from the fork to the exit, in the fastest of many runs: how
/// long the machine lets it wait is not its doing.
#[test]
fn it_starts_in_less_than_five_milliseconds() {
    let fastest = (0..50).map(|_| cpu_time(&["vm1", "migrate", "begin", "-"])).min().unwrap();
    assert!(fastest < Duration::from_millis(5), "{fastest:?}");
}

fn cpu_time(arguments: &[&str]) -> Duration {
    let before = children();
    let mut command = Command::new(HOOK);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    assert!(command.status().unwrap().success());
    children() - before
}

/// The CPU's time of all children that have ended.
fn children() -> Duration {
    let time =
        |time: nix::sys::time::TimeVal| Duration::new(time.tv_sec() as u64, time.tv_usec() as u32 * 1000);
    let usage: Usage = getrusage(UsageWho::RUSAGE_CHILDREN).unwrap();
    time(usage.user_time()) + time(usage.system_time())
}
