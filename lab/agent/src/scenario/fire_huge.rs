// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest whose memory is pages of hugetlbfs, under harvests, sampling and a
//! daemon that places: they are seen as what they are, and move whole.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ept_virt_core::wire::DomainStatus;
use nix::mount::{MsFlags, mount};

use super::daemon::{self, Daemon};
use super::domain::{Domain, DomainSpec, Memory, policy};
use super::hammer::{self, Hammer};
use super::{host, kill};
use crate::report::Outcome;

/// Half of the guest is more than is granted, whatever is hot.
const SQUEEZE: &str = "<ev:sampling><ev:interval unit='ms'>500</ev:interval></ev:sampling>\
    <ev:dram><ev:max unit='MiB'>64</ev:max></ev:dram>\
    <ev:migration><ev:delay unit='s'>1</ev:delay></ev:migration>";

const MOUNT: &str = "/dev/hugepages";
const HUGE_BYTES: u64 = 2 << 20;

const TIMEOUT: Duration = Duration::from_secs(60);

/// The scenario.
pub fn run() -> Result<Outcome> {
    let spec =
        DomainSpec { memory: Memory::Hugetlbfs, policy: policy("place", SQUEEZE), ..DomainSpec::default() };
    let pages = u64::from(spec.memory_mib()) * (1 << 20) / HUGE_BYTES;
    set_pool(0, pages)?;
    set_pool(1, 0)?;
    mount_hugetlbfs()?;
    let daemon = Daemon::start()?;
    let mut guest = spec.start()?;
    guest.wait_ready()?;
    guest.tell("patrol 64")?;
    let hammer = Hammer::start(guest.pid()?)?;
    hammer.wait_seen()?;
    let huge = check_levels(&guest)?;
    // The kernel takes what it needs there from free memory, and gives the old
    // pages back: the pools change their sizes.
    let moved = wait_moved(&guest)?;
    let mut used = (0, 0);
    // A page on its way counts on both nodes.
    host::wait_until("all huge pages are in use, many on the slow node", TIMEOUT, || {
        used = (pool_used(0)?, pool_used(1)?);
        Ok(used.1 >= 8 && used.0 + used.1 == pages)
    })
    .with_context(|| format!("{pages} huge pages; in use on the nodes: {used:?}"))?;
    check_levels(&guest)?;
    guest.check_data()?;
    hammer.wait_seen()?;
    kill::qemu(&guest)?;
    let seen = hammer.wait_gone()?;
    daemon.stop()?;
    host::wait_until("all huge pages are given back", TIMEOUT, || Ok(pool_used(0)? + pool_used(1)? == 0))?;
    drop(guest);
    for node in [0, 1] {
        set_pool(node, 0)?;
    }
    Ok(Outcome::Pass(format!(
        "{huge} mappings of 2 MiB; {} MiB demoted; {} harvests, {} samples",
        moved >> 20,
        seen.rounds,
        seen.samples
    )))
}

/// libvirt looks for hugetlbfs when it starts.
fn mount_hugetlbfs() -> Result<()> {
    fs::create_dir_all(MOUNT).with_context(|| format!("creating {MOUNT}"))?;
    mount(Some("hugetlbfs"), MOUNT, Some("hugetlbfs"), MsFlags::empty(), Some("pagesize=2M"))
        .with_context(|| format!("mounting {MOUNT}"))?;
    host::stop_libvirtd()?;
    host::start_libvirtd()
}

/// The guest's memory is mapped by huge entries; how many there are.
fn check_levels(guest: &Domain) -> Result<usize> {
    let mut sampler = hammer::attach(guest.pid()?)?;
    let slot = hammer::largest_slot(&mut sampler)?;
    let mut levels = (0, 0);
    host::wait_until("the guest is mapped by huge entries", TIMEOUT, || {
        levels = hammer::levels(&mut sampler, &slot)?;
        // The slot begins at 1 MiB, in the middle of a unit.
        Ok(levels.1 >= 48 && levels.0 <= 1)
    })
    .with_context(|| format!("units of 2 MiB with small and with huge mappings: {levels:?}"))?;
    Ok(levels.1)
}

/// Waits until much was demoted; how many bytes.
fn wait_moved(guest: &Domain) -> Result<u64> {
    let moved = |domain: &DomainStatus| domain.moves.demoted_bytes;
    let status = daemon::wait_for(guest.name, "huge pages move", TIMEOUT, |d| moved(d) >= 16 << 20)?;
    Ok(moved(&status))
}

fn pool(node: u32) -> String {
    format!("/sys/devices/system/node/node{node}/hugepages/hugepages-2048kB")
}

fn set_pool(node: u32, pages: u64) -> Result<()> {
    let path = format!("{}/nr_hugepages", pool(node));
    fs::write(&path, pages.to_string()).with_context(|| format!("writing {path}"))?;
    let got = read_number(&path)?;
    ensure!(got == pages, "node {node} has {got} huge pages, {pages} were asked for");
    Ok(())
}

fn pool_used(node: u32) -> Result<u64> {
    let pool = pool(node);
    Ok(read_number(&format!("{pool}/nr_hugepages"))? - read_number(&format!("{pool}/free_hugepages"))?)
}

fn read_number(path: &str) -> Result<u64> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {path}"))?;
    text.trim().parse().with_context(|| format!("{path}: {text}"))
}
