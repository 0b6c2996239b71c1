// SPDX-License-Identifier: MIT OR Apache-2.0
//! A guest that runs a guest of its own (L2) under nested paging: by AMD's SVM
//! here, by Intel's VMX in `nested_vmx.rs`.
//!
//! KVM shadows the nested page tables of such a guest, and what L2 accesses is
//! marked in the shadows alone. Without KVM's word, L2's memory looks idle. An L2
//! without nested paging runs on tables of its own that the module walks.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, ensure};
use ept_virt_core::sampler::{Harvest, HarvestRequest, KernelSampler, Level, Sources};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment};
use kvm_ioctls::Kvm;

use super::Outcome;
use super::huge::anon_huge_kib;
use super::lifecycle::churn_on;
use super::machine::{
    ALL, ALL_CLEAR, CODE_GFN, Machine, Memory, PAGE, PAGES, Pages, SPREAD, Touch, expect_nothing_last,
    expect_same, gfns, harvest, program,
};
use super::nested_vmx;

/// L1's own page tables: identity, by 2 MiB.
pub const L1_TABLES: u64 = 2;
const VMCB_GFN: u64 = 8;
/// Where SVM saves L1's state while L2 runs.
const SAVE_GFN: u64 = 9;
/// L2's nested tables: identity, one of level 4, 3 and 2 each, then the last level.
pub const NESTED_TABLES: u64 = 10;
/// Tables of the last level that map all memory once more behind itself.
const SECOND_TABLES: u64 = 128;
/// From here on only L2 touches memory.
const L2_START: u64 = 512;
/// Apart from all of [`SPREAD`].
pub const L2_CODE_GFN: u64 = PAGES - 256;

/// Present, writable, user: nested paging checks accesses as a user's.
const TABLE_FLAGS: u64 = 7;
const HUGE_FLAG: u64 = 1 << 7;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Vendor {
    Amd,
    Intel,
}

/// How L1's nested tables map L2's memory.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Nested {
    Small,
    /// Small, without accessed bits, as L1 may choose on Intel.
    Tracked,
    /// Small, and all memory a second time.
    Twice,
    Huge,
    /// Not at all: L2 runs on L1's own addresses.
    Off,
}

/// Exactly the pages that L2 touches, in each round, with 4 KiB nested pages.
pub fn exact() -> Result<Outcome> {
    exact_rounds(Nested::Small)
}

/// As [`exact`], on shadows without accessed bits: KVM alone knows.
pub fn tracked() -> Result<Outcome> {
    if vendor() == Some(Vendor::Amd) {
        return Ok(Outcome::Skip("nested paging of AMD always has accessed bits".into()));
    }
    exact_rounds(Nested::Tracked)
}

fn exact_rounds(nested: Nested) -> Result<Outcome> {
    let Some((mut machine, mut sampler)) = machine(Memory::small_pages(PAGES)?, SPREAD, nested)? else {
        return Ok(skipped());
    };
    let want = l2_pages();
    let mut other = machine.observe()?;
    for round in 1..=3 {
        machine.run_round()?;
        for time in 1..=2 {
            let peek = harvest(if time == 1 { &mut sampler } else { &mut other }, ALL)?;
            expect_same(&format!("round {round}, peek {time}"), &by_l2(&peek), &want)?;
        }
        let seen = harvest(&mut sampler, ALL_CLEAR)?;
        expect_same(&format!("accessed by L2 in round {round}"), &by_l2(&seen), &want)?;
        ensure!(seen.stats.sources.notifier && seen.stats.sources.tables, "{:?}", seen.stats.sources);
        ensure!(
            gfns(&seen.accessed, 0).contains(&CODE_GFN),
            "L1's own program is not among the accessed pages"
        );
        ensure!(gfns(&seen.mapped, 0).is_disjoint(&want), "L1 has mapped pages of L2");
        ensure!(seen.levels[1] == Level::Page4K, "level of 2 MiB: {:?}", seen.levels[1]);
        ensure!(seen.stats.flushes == 1, "{} flushes, not 1", seen.stats.flushes);
        ensure!(seen.stats.accessed == gfns(&seen.accessed, 0).len() as u64, "the statistics differ");
        let rest = harvest(&mut sampler, ALL_CLEAR)?;
        ensure!(rest.stats.accessed == 0, "{} pages accessed while both guests rested", rest.stats.accessed);
    }
    let pieces = in_pieces(&mut machine, &mut sampler)?;
    expect_same("accessed by L2, in pieces", &pieces, &want)?;
    expect_nothing_last(&mut sampler)?;
    Ok(Outcome::Pass(format!("{} pages of a nested guest in each of 3 rounds, 0 at rest", want.len())))
}

/// As [`exact`], where two entries of the shadows map each page: KVM alone knows.
pub fn twice() -> Result<Outcome> {
    // Goes over the end of the memory, to 200 pages again, and over no table.
    let pages = Pages { base: 0x23_0000, stride: 0x4_0000, count: 456 };
    let Some((mut machine, mut sampler)) = machine(Memory::small_pages(PAGES)?, pages, Nested::Twice)? else {
        return Ok(skipped());
    };
    let touched = pages.gfns().into_iter().map(|gfn| gfn % PAGES).chain([L2_CODE_GFN]);
    let want: BTreeSet<u64> = touched.filter(|gfn| *gfn >= L2_START).collect();
    for round in 1..=3 {
        machine.run_round()?;
        expect_same(&format!("round {round}, peek"), &by_l2(&harvest(&mut sampler, ALL)?), &want)?;
        let seen = harvest(&mut sampler, ALL_CLEAR)?;
        expect_same(&format!("accessed by L2 in round {round}"), &by_l2(&seen), &want)?;
        let rest = harvest(&mut sampler, ALL_CLEAR)?;
        ensure!(rest.stats.accessed == 0, "{} pages accessed while both guests rested", rest.stats.accessed);
    }
    Ok(Outcome::Pass(format!(
        "{} pages, most of them mapped twice, in each of 3 rounds, 0 at rest",
        want.len()
    )))
}

/// Harvests that clear, beside a nested guest whose memory comes and goes.
pub fn churn() -> Result<Outcome> {
    let Some((machine, _)) = machine(Memory::small_pages(PAGES)?, SPREAD, Nested::Small)? else {
        return Ok(skipped());
    };
    churn_on(machine, ALL_CLEAR, L2_CODE_GFN)
}

/// Nested pages of 2 MiB on host memory of 2 MiB: one bit for all pages.
pub fn huge() -> Result<Outcome> {
    let memory = Memory::map(PAGES as usize * PAGE, 2 << 20, 0)?;
    memory.advise(0, memory.bytes(), libc::MADV_HUGEPAGE)?;
    let pages = Pages { base: 8 << 20, stride: 4 << 20, count: 3 };
    let Some((mut machine, mut sampler)) = machine(memory, pages, Nested::Huge)? else {
        return Ok(skipped());
    };
    let got_kib = anon_huge_kib(&machine.memory)?;
    if got_kib * 1024 < machine.memory.bytes() as u64 {
        return Ok(Outcome::Skip(format!("the host gave {got_kib} KiB of transparent huge pages, not all")));
    }
    let units: BTreeSet<u64> = pages.gfns().into_iter().chain([L2_CODE_GFN]).map(|gfn| gfn / 512).collect();
    let want: BTreeSet<u64> = units.iter().flat_map(|unit| unit * 512..(unit + 1) * 512).collect();
    for round in 1..=3 {
        machine.run_round()?;
        let peek = harvest(&mut sampler, ALL)?;
        ensure!(peek.levels[4] == Level::Huge2M, "level of 2 MiB: {:?}", peek.levels[4]);
        expect_same(&format!("round {round}, peek"), &by_l2(&peek), &want)?;
        // A range that cuts a mapping reads its bit and leaves it set.
        let cut = HarvestRequest { gfn_start: 8 << 8, gfn_count: 256, ..ALL_CLEAR };
        let half = harvest(&mut sampler, cut)?.stats;
        ensure!(half.accessed == 256 && half.entries_cleared == 0, "half a huge page: {half:?}");
        let seen = harvest(&mut sampler, ALL_CLEAR)?;
        expect_same(&format!("accessed by L2 in round {round}"), &by_l2(&seen), &want)?;
        let rest = harvest(&mut sampler, ALL_CLEAR)?;
        ensure!(rest.stats.accessed == 0, "{} pages accessed while both guests rested", rest.stats.accessed);
    }
    Ok(Outcome::Pass(format!(
        "{} units of 2 MiB of a nested guest in each of 3 rounds, 0 at rest",
        units.len()
    )))
}

/// An L2 without nested paging: the tables tell all, and KVM is not asked. On Intel
/// up to 6.12 the CPU writes no bits then: what L2 has mapped counts as accessed.
pub fn direct() -> Result<Outcome> {
    let Some((mut machine, mut sampler)) = machine(Memory::small_pages(PAGES)?, SPREAD, Nested::Off)? else {
        return Ok(skipped());
    };
    let want = l2_pages();
    let mut blind = false;
    for round in 1..=3 {
        machine.run_round()?;
        let seen = harvest(&mut sampler, ALL_CLEAR)?;
        expect_same(&format!("accessed by L2 in round {round}"), &by_l2(&seen), &want)?;
        ensure!(want.is_subset(&gfns(&seen.mapped, 0)), "L2 has accessed what is not mapped");
        ensure!(seen.stats.sources == Sources { tables: true, notifier: false }, "{:?}", seen.stats.sources);
        let rest = by_l2(&harvest(&mut sampler, ALL_CLEAR)?);
        blind = rest == want;
        ensure!(blind || rest.is_empty(), "{} pages accessed while both guests rested", rest.len());
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let old = ["6.1.", "6.12."].iter().any(|line| release.starts_with(line));
    let want_blind = old && vendor() == Some(Vendor::Intel);
    ensure!(blind == want_blind, "accessed at rest: {blind}, expected {want_blind} on {release}");
    let rest = if blind { "at rest too: the CPU writes no bits" } else { "0 at rest" };
    Ok(Outcome::Pass(format!("{} pages of a nested guest, by the tables alone, {rest}", want.len())))
}

fn skipped() -> Outcome {
    Outcome::Skip("KVM does not let guests run guests: needs kvm_amd.nested=1 or kvm_intel.nested=1".into())
}

fn l2_pages() -> BTreeSet<u64> {
    SPREAD.gfns().into_iter().chain([L2_CODE_GFN]).collect()
}

fn by_l2(seen: &Harvest) -> BTreeSet<u64> {
    gfns(&seen.accessed, 0).split_off(&L2_START)
}

/// Ranges that begin and end anywhere, read and cleared.
fn in_pieces(machine: &mut Machine, sampler: &mut KernelSampler) -> Result<BTreeSet<u64>> {
    machine.run_round()?;
    let mut pieces = BTreeSet::new();
    let mut gfn_start = L2_START;
    for gfn_count in (1..).step_by(74).map(|length: u64| length | 1) {
        let gfn_count = gfn_count.min(PAGES - gfn_start);
        let seen = harvest(sampler, HarvestRequest { gfn_start, gfn_count, ..ALL_CLEAR })?;
        pieces.extend(gfns(&seen.accessed, gfn_start));
        gfn_start += gfn_count;
        if gfn_start == PAGES {
            break;
        }
    }
    let rest = harvest(sampler, HarvestRequest { gfn_start: L2_START, gfn_count: PAGES - L2_START, ..ALL })?;
    ensure!(rest.stats.accessed == 0, "{} pages left after all pieces were cleared", rest.stats.accessed);
    Ok(pieces)
}

/// Whether KVM lets guests of this host run guests, and how.
fn vendor() -> Option<Vendor> {
    let on = |module| {
        let path = format!("/sys/module/{module}/parameters/nested");
        fs::read_to_string(path).is_ok_and(|text| ["1", "Y"].contains(&text.trim()))
    };
    if on("kvm_amd") { Some(Vendor::Amd) } else { on("kvm_intel").then_some(Vendor::Intel) }
}

/// A machine whose guest runs an L2 that goes over `pages`, and a session;
/// nothing on hosts without nested guests.
fn machine(memory: Memory, pages: Pages, nested: Nested) -> Result<Option<(Machine, KernelSampler)>> {
    let Some(vendor) = vendor() else { return Ok(None) };
    memory.populate();
    let mut machine = Machine::new(memory)?;
    identity(&machine.memory, L1_TABLES, Nested::Huge);
    if nested != Nested::Off {
        identity(&machine.memory, NESTED_TABLES, nested);
    }
    enter_long_mode(&mut machine, vendor)?;
    let put = |gfn: u64, data: &[u8]| machine.memory.write(gfn as usize * PAGE, data);
    let end_round = match vendor {
        Vendor::Amd => {
            put(CODE_GFN, &l1_program());
            put(VMCB_GFN, &vmcb(nested != Nested::Off));
            [0x0F, 0x01, 0xD9] // vmmcall
        }
        Vendor::Intel => {
            nested_vmx::load(&machine, nested)?;
            nested_vmx::END_ROUND
        }
    };
    put(L2_CODE_GFN, &program(pages, Touch::Write, &end_round));
    let sampler = machine.observe()?;
    Ok(Some((machine, sampler)))
}

/// Tables of four levels from page `first` on that map the memory to itself. Those
/// of L1 go on behind it: an L2 with page tables of its own uses them.
fn identity(memory: &Memory, first: u64, size: Nested) {
    let entry = |gfn: u64, index: u64, value: u64| {
        memory.write(gfn as usize * PAGE + index as usize * 8, &(value | TABLE_FLAGS).to_le_bytes());
    };
    for gfn in first..first + 3 {
        memory.write(gfn as usize * PAGE, &[0; PAGE]);
    }
    entry(first, 0, (first + 1) << 12);
    entry(first + 1, 0, (first + 2) << 12);
    let units = PAGES / 512;
    if size == Nested::Huge {
        (0..2 * units).for_each(|unit| entry(first + 2, unit, unit << 21 | HUGE_FLAG));
        return;
    }
    let last_level = (0..units).map(|unit| (unit, unit, first + 3 + unit));
    let second = (0..units).map(|unit| (units + unit, unit, SECOND_TABLES + unit));
    for (at, unit, table) in last_level.chain(second.filter(|_| size == Nested::Twice)) {
        entry(first + 2, at, table << 12);
        (0..512).for_each(|index| entry(table, index, (unit * 512 + index) << 12));
    }
}

/// 64-bit code that runs L2 until it ends a round, and says so to user space.
fn l1_program() -> Vec<u8> {
    let address = |gfn: u64| ((gfn as usize * PAGE) as u32).to_le_bytes();
    let mut code = vec![0xB9, 0x17, 0x01, 0x01, 0xC0]; // mov ecx, VM_HSAVE_PA
    code.push(0xB8); // mov eax, save area
    code.extend(address(SAVE_GFN));
    code.extend([0x31, 0xD2, 0x0F, 0x30]); // xor edx, edx; wrmsr
    let start = code.len();
    code.push(0xB8); // mov eax, VMCB
    code.extend(address(VMCB_GFN));
    code.extend([0xC7, 0x80]); // mov dword [rax + RIP of L2], its program
    code.extend((VMCB_RIP as u32).to_le_bytes());
    code.extend(address(L2_CODE_GFN));
    code.extend([0x0F, 0x01, 0xD8]); // vmrun
    code.extend([0xE6, 0x10]); // out round port, al
    code.extend([0xEB, (start as isize - code.len() as isize - 2) as i8 as u8]); // jmp start
    code
}

/// Offset of RIP in a VMCB: AMD APM volume 2, appendix B, as all of [`vmcb`].
const VMCB_RIP: usize = 0x578;

/// L2 in flat protected mode without paging, under nested paging or not.
fn vmcb(nested_paging: bool) -> [u8; PAGE] {
    let mut vmcb = [0; PAGE];
    let mut put = |offset: usize, data: &[u8]| vmcb[offset..offset + data.len()].copy_from_slice(data);
    put(0x00C, &(1u32 << 31).to_le_bytes()); // intercept shutdown
    put(0x010, &0b11u32.to_le_bytes()); // intercept vmrun, vmmcall
    put(0x058, &1u32.to_le_bytes()); // ASID
    put(0x090, &u64::from(nested_paging).to_le_bytes());
    put(0x0B0, &(NESTED_TABLES << 12).to_le_bytes()); // nested CR3
    for (offset, selector, attributes) in [
        (0x400, 0x10u16, 0xC93u16), // ES
        (0x410, 8, 0xC9B),          // CS
        (0x420, 0x10, 0xC93),       // SS
        (0x430, 0x10, 0xC93),       // DS
        (0x440, 0x10, 0xC93),       // FS
        (0x450, 0x10, 0xC93),       // GS
        (0x490, 0x18, 0x08B),       // TR
    ] {
        put(offset, &selector.to_le_bytes());
        put(offset + 2, &attributes.to_le_bytes());
        put(offset + 4, &u32::MAX.to_le_bytes()); // limit
    }
    put(0x4D0, &0x1000u64.to_le_bytes()); // EFER: SVME
    put(0x558, &0x11u64.to_le_bytes()); // CR0: PE, ET
    put(0x560, &0x400u64.to_le_bytes()); // DR7
    put(0x568, &0xFFFF_0FF0u64.to_le_bytes()); // DR6
    put(0x570, &2u64.to_le_bytes()); // RFLAGS
    put(VMCB_RIP, &(L2_CODE_GFN << 12).to_le_bytes());
    put(0x668, &0x0007_0406_0007_0406u64.to_le_bytes()); // PAT
    vmcb
}

/// Puts the vCPU before L1's program, in 64-bit mode, with SVM or VMX allowed.
fn enter_long_mode(machine: &mut Machine, vendor: Vendor) -> Result<()> {
    let cpuid = Kvm::new()?.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("KVM_GET_SUPPORTED_CPUID")?;
    machine.vcpu.set_cpuid2(&cpuid).context("KVM_SET_CPUID2")?;
    let mut sregs = machine.vcpu.get_sregs().context("KVM_GET_SREGS")?;
    let flat = kvm_segment {
        limit: u32::MAX,
        selector: 0x10,
        type_: 3,
        present: 1,
        s: 1,
        g: 1,
        db: 1,
        ..Default::default()
    };
    sregs.cs = kvm_segment { selector: 8, type_: 11, l: 1, db: 0, ..flat };
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = flat;
    }
    sregs.cr3 = L1_TABLES << 12;
    sregs.efer |= 1 << 10 | 1 << 8; // LMA, LME
    match vendor {
        Vendor::Amd => {
            sregs.cr0 |= 1 << 31 | 1; // PG, PE
            sregs.cr4 |= 1 << 5; // PAE
            sregs.efer |= 1 << 12; // SVME
        }
        Vendor::Intel => (sregs.cr0, sregs.cr4) = (nested_vmx::CR0, nested_vmx::CR4),
    }
    machine.vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")?;
    let regs = kvm_regs { rip: CODE_GFN * PAGE as u64, rflags: 2, ..Default::default() };
    machine.vcpu.set_regs(&regs).context("KVM_SET_REGS")
}
