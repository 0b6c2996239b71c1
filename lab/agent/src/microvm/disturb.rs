// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a VMM and a host do to a guest's memory while it runs.

use std::fs;

use anyhow::{Context, Result, bail, ensure};

use super::machine::{Machine, Memory, PAGE, PAGES};
use super::pattern::{Guest, MAX_VCPUS};

const HUGE: usize = 2 << 20;
/// The program's own 2 MiB are left alone by what drops memory.
const FROM: usize = HUGE;
/// Since Linux 6.1.
const MADV_COLLAPSE: i32 = 25;
/// From linux/mempolicy.h: pages that only this process maps.
const MPOL_MF_MOVE: libc::c_int = 1 << 1;

/// One of the things that are done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disturbance {
    /// One more vCPU, as long as there are fewer than eight.
    AddVcpu,
    /// A small slot comes, or goes.
    Slot,
    /// The guest's memory goes, and comes back.
    MainSlot,
    /// Dirty logging begins, or ends.
    DirtyLog,
    /// KVM's dirty log is taken and cleared.
    TakeLog,
    /// The host drops memory, and fills it again.
    Drop,
    /// The VMM takes its own right to write, and gives it back.
    Protect,
    /// The host makes huge pages of small ones.
    Collapse,
    /// The host splits mappings of huge pages.
    Split,
    /// Pages move to the other NUMA node.
    Move,
    /// Pages of equal content become one.
    Merge,
}

impl Disturbance {
    pub const ALL: [Disturbance; 11] = [
        Disturbance::AddVcpu,
        Disturbance::Slot,
        Disturbance::MainSlot,
        Disturbance::DirtyLog,
        Disturbance::TakeLog,
        Disturbance::Drop,
        Disturbance::Protect,
        Disturbance::Collapse,
        Disturbance::Split,
        Disturbance::Move,
        Disturbance::Merge,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Disturbance::AddVcpu => "add-vcpu",
            Disturbance::Slot => "slot",
            Disturbance::MainSlot => "main-slot",
            Disturbance::DirtyLog => "dirty-log",
            Disturbance::TakeLog => "take-log",
            Disturbance::Drop => "drop",
            Disturbance::Protect => "protect",
            Disturbance::Collapse => "collapse",
            Disturbance::Split => "split",
            Disturbance::Move => "move",
            Disturbance::Merge => "merge",
        }
    }

    pub fn named(name: &str) -> Result<Disturbance> {
        match Disturbance::ALL.into_iter().find(|how| how.name() == name) {
            Some(how) => Ok(how),
            None => bail!("there is no disturbance {name:?}"),
        }
    }
}

/// A guest and how far it was disturbed.
pub struct Disturbed {
    pub guest: Guest,
    extra: Memory,
    extra_slot: bool,
    logging: bool,
    node: u32,
    times: u64,
    merging: bool,
}

const KSM_RUN: &str = "/sys/kernel/mm/ksm/run";

impl Disturbed {
    pub fn new(guest: Guest) -> Result<Disturbed> {
        let extra = Memory::small_pages(64)?;
        Ok(Disturbed { guest, extra, extra_slot: false, logging: false, node: 0, times: 0, merging: false })
    }

    pub fn apply(&mut self, how: Disturbance) -> Result<()> {
        self.times += 1;
        self.guest.is_alive()?;
        match how {
            Disturbance::AddVcpu if self.guest.vcpus() < MAX_VCPUS => self.guest.add_vcpu(),
            Disturbance::AddVcpu => Ok(()),
            Disturbance::Slot => self.toggle_slot(),
            Disturbance::MainSlot => self.renew_main_slot(),
            Disturbance::DirtyLog => {
                self.logging = !self.logging;
                self.guest.machine.log_dirty(self.logging)
            }
            Disturbance::TakeLog if self.logging => self.take_log(),
            Disturbance::TakeLog => Ok(()),
            Disturbance::Drop => self.drop_some(),
            Disturbance::Protect => self.at_rest_with_rights(FROM, self.bytes() - FROM, libc::PROT_READ),
            Disturbance::Collapse => self.collapse(),
            Disturbance::Split => {
                // One small page in each huge one: the mapping around it is split.
                (FROM..self.bytes())
                    .step_by(4 * HUGE)
                    .try_for_each(|huge| self.at_rest_with_rights(huge + 7 * PAGE, PAGE, libc::PROT_READ))
            }
            Disturbance::Move => self.move_some(),
            Disturbance::Merge => self.merge(),
        }
        .with_context(|| how.name())
    }

    /// Ends the guest, checks what it left, and returns how many rounds it did.
    pub fn stop(&mut self) -> Result<u64> {
        if std::mem::take(&mut self.merging) {
            // Which makes pages of their own again, under the running guest.
            fs::write(KSM_RUN, "2").with_context(|| format!("cannot write to {KSM_RUN}"))?;
        }
        self.guest.stop()
    }

    /// Pages that are one page with another one now, on the whole host.
    pub fn merged(&self) -> u64 {
        let text = fs::read_to_string("/sys/kernel/mm/ksm/pages_sharing").unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }

    fn bytes(&self) -> usize {
        self.guest.machine.memory.bytes()
    }

    fn toggle_slot(&mut self) -> Result<()> {
        self.extra_slot = !self.extra_slot;
        let bytes = if self.extra_slot { self.extra.bytes() } else { 0 };
        self.guest.machine.set_slot(1, 0x1000_0000, &self.extra, bytes)
    }

    /// A guest that runs meanwhile would access what is not there.
    fn renew_main_slot(&mut self) -> Result<()> {
        let logging = self.logging;
        self.guest.at_rest(|machine| {
            machine.set_slot(0, 0, &machine.memory, 0)?;
            machine.log_dirty(logging)
        })
    }

    fn take_log(&self) -> Result<()> {
        let machine = &self.guest.machine;
        let log = machine.vm.get_dirty_log(0, self.bytes()).context("KVM_GET_DIRTY_LOG")?;
        ensure!(log.len() as u64 == PAGES / 64, "a log of {} words", log.len());
        Ok(())
    }

    /// A part of the memory, another one each time.
    fn part(&self) -> (usize, usize) {
        let parts = (self.bytes() - FROM) / (4 * HUGE);
        (FROM + self.times as usize % parts * 4 * HUGE, 4 * HUGE)
    }

    fn drop_some(&self) -> Result<()> {
        let (offset, bytes) = if self.times % 3 == 0 { (FROM, self.bytes() - FROM) } else { self.part() };
        self.guest.drop_memory(offset, bytes, libc::MADV_DONTNEED)
    }

    /// Gives pages of the VMM other rights, and then its own again.
    fn at_rest_with_rights(&self, offset: usize, bytes: usize, rights: i32) -> Result<()> {
        self.guest.at_rest(|machine| {
            machine.memory.protect(offset, bytes, rights)?;
            machine.memory.protect(offset, bytes, libc::PROT_READ | libc::PROT_WRITE)
        })
    }

    /// While the guest runs. A host that has no huge page to give may refuse.
    fn collapse(&self) -> Result<()> {
        let (offset, bytes) = self.part();
        let memory = &self.guest.machine.memory;
        memory.advise(offset, bytes, libc::MADV_HUGEPAGE)?;
        for huge in (offset..offset + bytes).step_by(HUGE) {
            // Not resident, not aligned, or none free: it stays as it is.
            let _ = memory.advise(huge, HUGE, MADV_COLLAPSE);
        }
        Ok(())
    }

    /// While the guest runs.
    fn move_some(&mut self) -> Result<()> {
        if !fs::exists("/sys/devices/system/node/node1")? {
            return Ok(());
        }
        self.node ^= 1;
        let (offset, bytes) = self.part();
        move_pages(&self.guest.machine, offset, bytes, self.node)
    }

    fn merge(&mut self) -> Result<()> {
        let (offset, bytes) = self.part();
        let memory = &self.guest.machine.memory;
        if !fs::exists(KSM_RUN)? || memory.advise(offset, bytes, libc::MADV_MERGEABLE).is_err() {
            return Ok(());
        }
        self.merging = true;
        fs::write("/sys/kernel/mm/ksm/pages_to_scan", "4096").context("cannot write to ksm/pages_to_scan")?;
        fs::write(KSM_RUN, "1").with_context(|| format!("cannot write to {KSM_RUN}"))
    }
}

/// Moves what is resident of a part of the memory to a node. Pages that are in
/// use at this moment stay.
fn move_pages(machine: &Machine, offset: usize, bytes: usize, node: u32) -> Result<()> {
    let pages: Vec<u64> =
        (offset..offset + bytes).step_by(PAGE).map(|at| machine.memory.address() + at as u64).collect();
    let (nodes, mut status) = (vec![node as i32; pages.len()], vec![0_i32; pages.len()]);
    // SAFETY: the kernel reads two and writes one array of as many entries as it
    // is told; moving a page does not change what the program sees.
    let result = unsafe {
        libc::syscall(
            libc::SYS_move_pages,
            0,
            pages.len(),
            pages.as_ptr(),
            nodes.as_ptr(),
            status.as_mut_ptr(),
            MPOL_MF_MOVE,
        )
    };
    ensure!(result >= 0, "move_pages: {}", std::io::Error::last_os_error());
    Ok(())
}
