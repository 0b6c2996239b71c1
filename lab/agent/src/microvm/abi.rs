// SPDX-License-Identifier: MIT OR Apache-2.0
//! The ABI's promises: slots, and an errno of its own for each refusal.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd};

use anyhow::{Context, Result, ensure};
use ept_virt_core::sampler::Sampler;
use ept_virt_core::uapi::{self, KesAttach, KesHarvest, KesMemslots, number};

use super::Outcome;
use super::machine::{Machine, Memory, PAGES};

/// Slots as KVM was told, sorted, without KVM's own; the generation moves.
pub fn memslots() -> Result<Outcome> {
    let machine = Machine::standard()?;
    let mut sampler = machine.observe()?;
    let (first, slots) = sampler.memslots()?;
    ensure!(slots.len() == 1, "{} slots, expected 1: {slots:?}", slots.len());
    ensure!(
        (slots[0].gfn_start, slots[0].page_count, slots[0].hva) == (0, PAGES, machine.memory.address()),
        "{slots:?}"
    );
    let extra = Memory::small_pages(40)?;
    for slot in (1..=40_u32).rev() {
        // From the highest address to the lowest, one page each.
        machine.set_slot(slot, 0x1000_0000 + u64::from(slot) * 0x10_0000, &extra, super::machine::PAGE)?;
    }
    let (second, slots) = sampler.memslots()?;
    ensure!(slots.len() == 41, "{} slots, expected 41", slots.len());
    ensure!(slots.is_sorted_by_key(|slot| slot.gfn_start), "the slots are not sorted");
    ensure!(first != second, "the generation stayed at {first}");
    ensure!(sampler.memslots()?.0 == second, "the generation moved without a change");
    for slot in 1..=40 {
        machine.set_slot(slot, 0, &extra, 0)?;
    }
    Ok(Outcome::Pass("1 slot, then 41 in order; KVM's own left out".into()))
}

/// All flags of KES_HARVEST.
pub const HARVEST_FLAGS: u32 =
    uapi::HARVEST_CLEAR_ACCESSED | uapi::HARVEST_CLEAR_DIRTY | uapi::HARVEST_FLUSH | uapi::HARVEST_KEEP_YOUNG;

/// The errno of a raw call of the module, 0 when it succeeds.
pub fn errno<T>(file: &File, request: u64, argument: *mut T) -> i32 {
    // SAFETY: every argument below is null, an invalid address that the kernel
    // must refuse, or a live structure of the size that `request` encodes.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), request, argument) };
    if result == 0 { 0 } else { std::io::Error::last_os_error().raw_os_error().unwrap_or(-1) }
}

pub fn expect(what: &str, got: i32, want: i32) -> Result<()> {
    ensure!(got == want, "{what}: errno {got}, expected {want}");
    Ok(())
}

pub fn refusals() -> Result<Outcome> {
    let machine = Machine::standard()?;
    let session = OpenOptions::new().read(true).write(true).open(uapi::PROC_PATH)?;
    ensure!(uapi::get_info(&session)?.abi_version == uapi::ABI_VERSION, "another ABI version");
    let counted = attach_refusals(&machine, &session)? + call_refusals(&session)?;
    Ok(Outcome::Pass(format!("{counted} wrong calls refused, each with its errno")))
}

fn attach_refusals(machine: &Machine, session: &File) -> Result<u32> {
    let harvest = || KesHarvest { gfn_count: 1, ..Default::default() };
    expect("harvest before attach", errno(session, number::HARVEST, &mut harvest()), libc::ENOTCONN)?;
    let mut slots = KesMemslots::default();
    expect("slots before attach", errno(session, number::GET_MEMSLOTS, &mut slots), libc::ENOTCONN)?;
    expect(
        "detach before attach",
        errno(session, number::DETACH, std::ptr::null_mut::<u8>()),
        libc::ENOTCONN,
    )?;

    let named_alike = std::env::temp_dir().join("kvm-vm");
    std::fs::create_dir_all(std::env::temp_dir())?;
    let impostor = File::create(&named_alike).context("cannot create a file named kvm-vm")?;
    let kvm = File::open("/dev/kvm")?;
    for (what, fd, want) in [
        ("a file named kvm-vm", impostor.as_raw_fd(), libc::ENODEV),
        ("/dev/kvm", kvm.as_raw_fd(), libc::ENODEV),
        ("a vCPU", machine.vcpu.as_raw_fd(), libc::ENODEV),
        ("the session itself", session.as_raw_fd(), libc::ENODEV),
        ("no descriptor", -1, libc::EBADF),
    ] {
        let mut request = KesAttach { vm_fd: fd, ..Default::default() };
        expect(what, errno(session, number::ATTACH, &mut request), want)?;
    }
    std::fs::remove_file(named_alike)?;
    let vm_fd = machine.vm.as_raw_fd();
    let mut flagged = KesAttach { vm_fd, flags: 1, ..Default::default() };
    expect("an unknown flag", errno(session, number::ATTACH, &mut flagged), libc::EINVAL)?;
    let mut reserved = KesAttach { vm_fd, reserved: [0, 0, 1], ..Default::default() };
    expect("a reserved field", errno(session, number::ATTACH, &mut reserved), libc::EINVAL)?;
    uapi::attach(session, machine.vm_fd().as_fd())?;
    let mut again = KesAttach { vm_fd, ..Default::default() };
    expect("a second attach", errno(session, number::ATTACH, &mut again), libc::EISCONN)?;
    Ok(11)
}

fn call_refusals(session: &File) -> Result<u32> {
    let nowhere = 8 as *mut u8;
    expect("an unknown command", errno(session, 0xE7FF, std::ptr::null_mut::<u8>()), libc::ENOTTY)?;
    expect("info to nowhere", errno(session, number::GET_INFO, nowhere), libc::EFAULT)?;
    expect("harvest from nowhere", errno(session, number::HARVEST, nowhere), libc::EFAULT)?;
    let good = KesHarvest { gfn_count: 64, ..Default::default() };
    let wrong = [
        ("no pages", KesHarvest { gfn_count: 0, ..good }, libc::EINVAL),
        ("too many pages", KesHarvest { gfn_count: uapi::MAX_PAGES + 1, ..good }, libc::EINVAL),
        ("a range past the end", KesHarvest { gfn_start: u64::MAX - 3, ..good }, libc::EINVAL),
        ("an unknown flag", KesHarvest { flags: 1 << 31, ..good }, libc::EINVAL),
        ("a reserved field", KesHarvest { reserved: [0, 0, 0, 1], ..good }, libc::EINVAL),
        ("nodes missing", KesHarvest { on_nodes: 4096, ..good }, libc::EINVAL),
        ("too many nodes", KesHarvest { nodes: 4096, nodes_bits: 1025, ..good }, libc::EINVAL),
        ("a bitmap nowhere", KesHarvest { accessed: 8, ..good }, libc::EFAULT),
        ("levels nowhere", KesHarvest { levels: 8, ..good }, libc::EFAULT),
        ("nodes nowhere", KesHarvest { on_nodes: 8, nodes: 8, nodes_bits: 64, ..good }, libc::EFAULT),
        ("a kernel address", KesHarvest { accessed: 0xffff_8880_0000_0000, ..good }, libc::EFAULT),
    ];
    for (what, mut request, want) in wrong {
        expect(what, errno(session, number::HARVEST, &mut request), want)?;
    }
    let mut slots = KesMemslots { capacity: 8, slots: 8, ..Default::default() };
    expect("slots to nowhere", errno(session, number::GET_MEMSLOTS, &mut slots), libc::EFAULT)?;
    let mut slots = KesMemslots { reserved: [1, 0], ..Default::default() };
    expect("slots, a reserved field", errno(session, number::GET_MEMSLOTS, &mut slots), libc::EINVAL)?;
    let mut count_only = KesMemslots::default();
    expect("slots, counting only", errno(session, number::GET_MEMSLOTS, &mut count_only), 0)?;
    ensure!(count_only.count == 1, "counted {} slots", count_only.count);
    uapi::detach(session)?;
    Ok(3 + wrong.len() as u32 + 2)
}
