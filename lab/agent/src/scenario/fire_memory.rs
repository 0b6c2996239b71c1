// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a host does to the memory of a guest behind its back, all of it under
//! harvests and sampling: huge pages split and collapse, pages merge and part,
//! everything moves from node to node, QEMU is killed.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ept_virt_core::process::Process;
use ept_virt_core::sampler::{KernelSampler, MemSlot};

use super::domain::{Domain, DomainSpec, Memory};
use super::hammer::{self, Hammer};
use super::truth::{self, Truth};
use super::{host, kill};
use crate::report::Outcome;

const PAGE_BYTES: u64 = 4096;

/// Equal pages for KSM, and how many of them come to differ.
const TWINS_MIB: u64 = 16;
const PARTED_MIB: u64 = 8;

const KSM: &str = "/sys/kernel/mm/ksm";
const KSM_TIMEOUT: Duration = Duration::from_secs(60);

const HUGE_ROUNDS: usize = 2;
const HUGE_TIMEOUT: Duration = Duration::from_secs(30);
const MOVE_ROUNDS: usize = 2;

/// Node numbers of the emulated host.
const FAST: i32 = 0;
const SLOW: i32 = 1;

/// The scenario.
pub fn run() -> Result<Outcome> {
    let spec = DomainSpec { memory: Memory::Anonymous, rest_mib: 96 + 16, ..DomainSpec::default() };
    let mut guest = spec.start()?;
    let truth = guest.wait_ready()?;
    guest.tell("patrol 64")?;
    let pid = guest.pid()?;
    let hammer = Hammer::start(pid)?;
    hammer.wait_seen()?;
    let mut sampler = hammer::attach(pid)?;
    let memory = hammer::largest_slot(&mut sampler)?;
    let mut said = Vec::new();
    for fire in [split_and_collapse, merge_and_part, move_around] {
        said.push(fire(&mut guest, &mut sampler, &memory, &truth)?);
        guest.check_data()?;
        hammer.wait_seen()?;
    }
    drop(sampler);
    kill::qemu(&guest)?;
    let seen = hammer.wait_gone()?;
    Ok(Outcome::Pass(format!("{}; {} harvests, {} samples", said.join("; "), seen.rounds, seen.samples)))
}

/// Huge pages of the host are split and made anew, in turn.
fn split_and_collapse(
    guest: &mut Domain,
    sampler: &mut KernelSampler,
    memory: &MemSlot,
    _: &Truth,
) -> Result<String> {
    let process = Process::open(guest.pid()?)?;
    let mut most = 0;
    for _ in 0..HUGE_ROUNDS {
        collapse(&process, memory)?;
        host::wait_until("the hot block is mapped by huge pages", HUGE_TIMEOUT, || {
            let (_, huge) = hammer::levels(sampler, memory)?;
            most = huge.max(most);
            Ok(huge >= 16)
        })?;
        split(&process, memory)?;
        let (_, left) = hammer::levels(sampler, memory)?;
        ensure!(left <= 4, "{left} huge mappings are left after all huge pages were split");
        write_setting("/proc/sys/vm/compact_memory", "1")?;
        guest.console.wait_passes()?;
    }
    Ok(format!("{most} huge mappings split {HUGE_ROUNDS} times"))
}

/// Equal pages of the guest become one of the host's, until they are written to.
fn merge_and_part(guest: &mut Domain, _: &mut KernelSampler, _: &MemSlot, _: &Truth) -> Result<String> {
    guest.tell(&format!("twins {TWINS_MIB}"))?;
    write_setting(&format!("{KSM}/pages_to_scan"), "8000")?;
    write_setting(&format!("{KSM}/sleep_millisecs"), "10")?;
    write_setting(&format!("{KSM}/run"), "1")?;
    let pid = guest.pid()?;
    let mut merged = 0;
    host::wait_until("equal pages are merged", KSM_TIMEOUT, || {
        merged = merged_kib(pid)?;
        Ok(merged >= (TWINS_MIB << 10) * 9 / 10)
    })
    .with_context(|| format!("{merged} KiB are merged"))?;
    guest.check_data()?;
    let before = merged_kib(pid)?;
    guest.tell(&format!("part-twins {PARTED_MIB}"))?;
    let parted = before.saturating_sub(merged_kib(pid)?);
    ensure!(
        parted >= (PARTED_MIB << 10) * 9 / 10,
        "{PARTED_MIB} MiB of {before} KiB merged were written to, only {parted} KiB parted"
    );
    guest.check_data()?;
    // Writes to all merged pages at once, by the host.
    write_setting(&format!("{KSM}/run"), "2")?;
    let rest = merged_kib(pid)?;
    write_setting(&format!("{KSM}/run"), "0")?;
    ensure!(rest == 0, "{rest} KiB are still merged");
    Ok(format!("{before} KiB merged, {parted} KiB parted by writes"))
}

/// The blocks move page by page, and the whole process at once.
fn move_around(guest: &mut Domain, _: &mut KernelSampler, memory: &MemSlot, truth: &Truth) -> Result<String> {
    let pid = guest.pid()?;
    let frames = truth.hot.union(&truth.idle);
    let addresses: Vec<u64> = frames.map(|gfn| memory.hva + (gfn - memory.gfn_start) * PAGE_BYTES).collect();
    for round in 0..MOVE_ROUNDS {
        for node in [SLOW, FAST] {
            truth::move_pages(pid, &addresses, node)?;
            expect_on(pid, &addresses, node)?;
        }
        // All of it, with what is not guest memory.
        let (from, to) = if round % 2 == 0 { (FAST, SLOW) } else { (SLOW, FAST) };
        truth::migrate_pages(pid, from, to)?;
        expect_on(pid, &addresses, to)?;
        guest.console.wait_passes()?;
    }
    Ok(format!("{} pages moved {} times", addresses.len(), MOVE_ROUNDS * 3))
}

/// Nine tenths at least: a page in use at the moment stays.
fn expect_on(pid: i32, addresses: &[u64], node: i32) -> Result<()> {
    let nodes = truth::count_nodes(pid, addresses)?;
    let there = nodes.get(&node).copied().unwrap_or(0);
    ensure!(there * 10 >= addresses.len() as u64 * 9, "pages by node, most expected on {node}: {nodes:?}");
    Ok(())
}

/// How much of a process's memory KSM has merged.
fn merged_kib(pid: i32) -> Result<u64> {
    let path = format!("/proc/{pid}/smaps");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let sizes = text.lines().filter_map(|line| line.strip_prefix("KSM:"));
    let parse = |size: &str| -> Result<u64> {
        size.trim().trim_end_matches(" kB").parse().with_context(|| format!("{path}: KSM:{size}"))
    };
    sizes.map(parse).sum()
}

/// Has the kernel split all huge pages of a range (Linux, split_huge_pages of
/// debugfs).
fn split(process: &Process, memory: &MemSlot) -> Result<()> {
    let end = memory.hva + memory.page_count * PAGE_BYTES;
    let range = format!("{},{:#x},{end:#x},0", process.pid(), memory.hva);
    write_setting("/sys/kernel/debug/split_huge_pages", &range)
}

/// Has the kernel make huge pages of a range. It gives up at the first piece
/// that it can not take, so each piece of 2 MiB is asked for alone.
fn collapse(process: &Process, memory: &MemSlot) -> Result<()> {
    const HUGE_BYTES: u64 = 2 << 20;
    const MADV_COLLAPSE: i32 = 25;
    let end = memory.hva + memory.page_count * PAGE_BYTES;
    let first = memory.hva.next_multiple_of(HUGE_BYTES);
    let mut done = 0;
    for start in (first..end - HUGE_BYTES + 1).step_by(HUGE_BYTES as usize) {
        let range = libc::iovec { iov_base: start as *mut libc::c_void, iov_len: HUGE_BYTES as usize };
        // SAFETY: the vector has one entry; its address is one of the other
        // process, is not followed here, and the advice changes no content.
        let result = unsafe {
            libc::syscall(
                libc::SYS_process_madvise,
                process.as_fd().as_raw_fd(),
                &raw const range,
                1,
                MADV_COLLAPSE,
                0,
            )
        };
        done += u32::from(result >= 0);
    }
    ensure!(done > 0, "no huge page could be made: {}", std::io::Error::last_os_error());
    Ok(())
}

fn write_setting(path: &str, value: &str) -> Result<()> {
    fs::write(Path::new(path), value).with_context(|| format!("writing {value:?} to {path}"))
}
