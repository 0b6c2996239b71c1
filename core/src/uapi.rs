// SPDX-License-Identifier: MIT OR Apache-2.0
//! The kernel module's ABI in Rust: a mirror of `kmod/uapi/kvm_ept_sample.h`,
//! which is its manual, and the only file of the project that issues ioctls.
//!
//! `core/tests/abi.rs` compiles the header and compares every size, offset and
//! number with this file.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::libc;

/// Path of the module's file.
pub const PROC_PATH: &str = "/proc/kvm_ept_sample";

/// Version of the ABI that this file mirrors: major in the upper 16 bits.
pub const ABI_VERSION: u32 = 0x0001_0004;

/// [`KesInfo::entry_format`]: Intel's extended page tables.
pub const FORMAT_EPT: u32 = 1;
/// [`KesInfo::entry_format`]: AMD's nested page tables.
pub const FORMAT_NPT: u32 = 2;

/// [`KesInfo::features`]: harvest by walking the tables.
pub const FEATURE_HARVEST: u64 = 1 << 0;
/// [`KesInfo::features`]: the dirty bit can be cleared.
pub const FEATURE_CLEAR_DIRTY: u64 = 1 << 1;
/// [`KesInfo::features`]: sampling by access type.
pub const FEATURE_SAMPLE: u64 = 1 << 2;
/// [`KesInfo::features`]: harvest by KVM's MMU notifier, where tables do not tell.
pub const FEATURE_NOTIFIER: u64 = 1 << 3;
/// [`KesInfo::features`]: [`HARVEST_KEEP_YOUNG`].
pub const FEATURE_KEEP_YOUNG: u64 = 1 << 4;
/// [`KesInfo::features`]: KVM itself arms and restores entries, by the patch in
/// `kernel_patch`.
pub const FEATURE_PATCHED_KVM: u64 = 1 << 5;

/// [`KesMemslot::flags`]: a ROM.
pub const SLOT_READONLY: u32 = 1 << 0;
/// [`KesMemslot::flags`]: dirty logging is on.
pub const SLOT_DIRTY_LOG: u32 = 1 << 1;

/// [`KesHarvest::flags`]: read and clear the accessed bit.
pub const HARVEST_CLEAR_ACCESSED: u32 = 1 << 0;
/// [`KesHarvest::flags`]: read and clear the dirty bit.
pub const HARVEST_CLEAR_DIRTY: u32 = 1 << 1;
/// [`KesHarvest::flags`]: one TLB flush at the end.
pub const HARVEST_FLUSH: u32 = 1 << 2;
/// [`KesHarvest::flags`]: tell the host's page reclaim of what is cleared.
pub const HARVEST_KEEP_YOUNG: u32 = 1 << 3;

/// [`KesHarvestStats::sources`]: the tables themselves.
pub const SOURCE_TABLES: u32 = 1 << 0;
/// [`KesHarvestStats::sources`]: KVM's MMU notifier.
pub const SOURCE_NOTIFIER: u32 = 1 << 1;

/// Most pages of one harvest.
pub const MAX_PAGES: u64 = 1 << 34;

/// Level byte: nothing is mapped.
pub const LEVEL_NONE: u8 = 0;
/// Level byte: 4 KiB entries.
pub const LEVEL_4K: u8 = 1;
/// Level byte: a 2 MiB entry.
pub const LEVEL_2M: u8 = 2;
/// Level byte: a 1 GiB entry.
pub const LEVEL_1G: u8 = 3;

/// [`KesSampleSet::access`], [`KesSample::access`]: a read.
pub const ACCESS_READ: u32 = 1 << 0;
/// [`KesSampleSet::access`], [`KesSample::access`]: a write.
pub const ACCESS_WRITE: u32 = 1 << 1;
/// [`KesSampleSet::access`], [`KesSample::access`]: an instruction fetch.
pub const ACCESS_EXEC: u32 = 1 << 2;

/// Most faults a second that sampling can be set to.
pub const MAX_FREQ_HZ: u32 = 50_000;
/// Most records that can wait to be read.
pub const MAX_RING_RECORDS: u32 = 1 << 20;

/// [`KesSample::flags`]: a walk of the guest's page tables.
pub const SAMPLE_WALK: u8 = 1 << 0;

/// `struct kes_info`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct KesInfo {
    /// ABI version of the module.
    pub abi_version: u32,
    /// [`FORMAT_EPT`] or [`FORMAT_NPT`].
    pub entry_format: u32,
    /// `FEATURE_*`.
    pub features: u64,
    /// Pages between two looks at signals.
    pub chunk_pages: u32,
    /// Attached sessions on this host.
    pub sessions: u32,
    /// Zero.
    pub reserved: [u64; 5],
}

/// `struct kes_attach`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct KesAttach {
    /// Descriptor of the VM.
    pub vm_fd: i32,
    /// Zero.
    pub flags: u32,
    /// Zero.
    pub reserved: [u64; 3],
}

/// `struct kes_memslot`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KesMemslot {
    /// First guest frame number.
    pub gfn_start: u64,
    /// Length in 4 KiB pages.
    pub page_count: u64,
    /// Address in the VMM.
    pub hva: u64,
    /// KVM's slot number, the address space in the upper 16 bits.
    pub id: u32,
    /// `SLOT_*`.
    pub flags: u32,
}

/// `struct kes_memslots`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct KesMemslots {
    /// Pointer to [`KesMemslot`] entries.
    pub slots: u64,
    /// Entries that fit.
    pub capacity: u32,
    /// Entries that there are.
    pub count: u32,
    /// Changes with the set of slots.
    pub generation: u64,
    /// Zero.
    pub reserved: [u64; 2],
}

/// `struct kes_harvest_stats`; the header explains each field.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)] // the header is the manual
pub struct KesHarvestStats {
    pub mapped_4k: u64,
    pub mapped_2m: u64,
    pub mapped_1g: u64,
    pub accessed: u64,
    pub dirty: u64,
    pub on_nodes: u64,
    pub entries_read: u64,
    pub entries_cleared: u64,
    pub time_ns: u64,
    pub roots: u32,
    pub flushes: u32,
    pub chunks: u32,
    pub sources: u32,
}

/// `struct kes_harvest`; the header explains each field.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)] // the header is the manual
pub struct KesHarvest {
    pub gfn_start: u64,
    pub gfn_count: u64,
    pub accessed: u64,
    pub dirty: u64,
    pub mapped: u64,
    pub on_nodes: u64,
    pub levels: u64,
    pub nodes: u64,
    pub nodes_bits: u32,
    pub flags: u32,
    pub budget_ns: u64,
    pub gfn_next: u64,
    pub reserved: [u64; 4],
    pub stats: KesHarvestStats,
}

/// `struct kes_sample_set`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct KesSampleSet {
    /// `ACCESS_*`, or-ed.
    pub access: u32,
    /// Faults a second; 0 stops.
    pub freq_hz: u32,
    /// Records that can wait; 0: the default, or unchanged.
    pub ring_records: u32,
    /// Zero.
    pub flags: u32,
    /// Zero.
    pub reserved: [u64; 3],
}

/// `struct kes_sample`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KesSample {
    /// The page.
    pub gfn: u64,
    /// `CLOCK_MONOTONIC`.
    pub time_ns: u64,
    /// The VMM's number of the vCPU.
    pub vcpu: u32,
    /// One of `ACCESS_*`.
    pub access: u8,
    /// `LEVEL_*`.
    pub level: u8,
    /// `SAMPLE_*`.
    pub flags: u8,
    /// Zero.
    pub reserved: u8,
}

/// `struct kes_sample_stats`; the header explains each field.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs)] // the header is the manual
pub struct KesSampleStats {
    pub samples: u64,
    pub dropped: u64,
    pub unwanted: u64,
    pub armed: u64,
    pub released: u64,
    pub flushes: u64,
    pub armed_now: u32,
    pub unread: u32,
    pub hold_us: u32,
    pub freq_hz: u32,
    pub reserved: [u64; 4],
}

/// The ioctl numbers, for the test against the header.
pub mod number {
    use super::{KesAttach, KesHarvest, KesInfo, KesMemslots, KesSampleSet, KesSampleStats};

    const MAGIC: u8 = 0xE7;

    /// `KES_GET_INFO`.
    pub const GET_INFO: u64 = nix::request_code_read!(MAGIC, 0x00, size_of::<KesInfo>());
    /// `KES_ATTACH`.
    pub const ATTACH: u64 = nix::request_code_write!(MAGIC, 0x01, size_of::<KesAttach>());
    /// `KES_DETACH`.
    pub const DETACH: u64 = nix::request_code_none!(MAGIC, 0x02);
    /// `KES_GET_MEMSLOTS`.
    pub const GET_MEMSLOTS: u64 = nix::request_code_readwrite!(MAGIC, 0x03, size_of::<KesMemslots>());
    /// `KES_HARVEST`.
    pub const HARVEST: u64 = nix::request_code_readwrite!(MAGIC, 0x04, size_of::<KesHarvest>());
    /// `KES_SAMPLE_SET`.
    pub const SAMPLE_SET: u64 = nix::request_code_write!(MAGIC, 0x05, size_of::<KesSampleSet>());
    /// `KES_SAMPLE_STATS`.
    pub const SAMPLE_STATS: u64 = nix::request_code_read!(MAGIC, 0x06, size_of::<KesSampleStats>());
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `KES_GET_INFO`.
pub fn get_info(file: &File) -> io::Result<KesInfo> {
    let mut info = KesInfo::default();
    // SAFETY: the descriptor is open for the length of the call, and the number
    // encodes the size of exactly this structure, all of whose bit patterns are valid.
    check(unsafe { libc::ioctl(file.as_raw_fd(), number::GET_INFO, &mut info) })?;
    Ok(info)
}

/// `KES_ATTACH`. `vm` may be closed afterwards.
pub fn attach(file: &File, vm: BorrowedFd<'_>) -> io::Result<()> {
    let request = KesAttach { vm_fd: vm.as_raw_fd(), ..Default::default() };
    // SAFETY: as in `get_info`; the module only reads the structure.
    check(unsafe { libc::ioctl(file.as_raw_fd(), number::ATTACH, &request) })
}

/// `KES_DETACH`.
pub fn detach(file: &File) -> io::Result<()> {
    // SAFETY: takes no argument; the descriptor is open for the length of the call.
    check(unsafe { libc::ioctl(file.as_raw_fd(), number::DETACH) })
}

/// `KES_GET_MEMSLOTS`: the slots and their generation.
pub fn get_memslots(file: &File) -> io::Result<(u64, Vec<KesMemslot>)> {
    let mut slots: Vec<KesMemslot> = vec![KesMemslot::default(); 32];
    // The set can grow between two calls, each time to a finite size; KVM's own
    // limit is 32764 slots, which eleven doublings of 32 pass.
    for _ in 0..16 {
        let capacity = u32::try_from(slots.len()).unwrap_or(u32::MAX);
        let mut request = KesMemslots { slots: slots.as_mut_ptr() as u64, capacity, ..Default::default() };
        // SAFETY: as in `get_info`; `slots` stays alive and unmoved during the
        // call and has room for `capacity` entries.
        check(unsafe { libc::ioctl(file.as_raw_fd(), number::GET_MEMSLOTS, &mut request) })?;
        if request.count <= capacity {
            slots.truncate(request.count as usize);
            return Ok((request.generation, slots));
        }
        slots.resize((request.count as usize).next_power_of_two(), KesMemslot::default());
    }
    Err(io::Error::from_raw_os_error(libc::EAGAIN))
}

/// What one harvest call fills; every slice may be empty, then the module does
/// not report that bitmap.
pub struct HarvestBuffers<'a> {
    /// One bit per page.
    pub accessed: &'a mut [u64],
    /// One bit per page.
    pub dirty: &'a mut [u64],
    /// One bit per page.
    pub mapped: &'a mut [u64],
    /// One bit per page; needs `nodes`.
    pub on_nodes: &'a mut [u64],
    /// One byte per 2 MiB.
    pub levels: &'a mut [u8],
    /// The NUMA nodes that `on_nodes` asks about.
    pub nodes: &'a [u64],
}

/// Number of 2 MiB units that a range of GFNs touches.
pub fn level_count(gfn_start: u64, gfn_count: u64) -> usize {
    if gfn_count == 0 { 0 } else { (((gfn_start + gfn_count - 1) >> 9) - (gfn_start >> 9) + 1) as usize }
}

/// `KES_HARVEST`, once: the result's `gfn_next` says how far it came.
///
/// Fails with `EINVAL` when a slice that is not empty is too short for the range.
pub fn harvest(
    file: &File,
    gfn_start: u64,
    gfn_count: u64,
    flags: u32,
    buffers: HarvestBuffers<'_>,
) -> io::Result<KesHarvest> {
    let words = usize::try_from(gfn_count.div_ceil(64)).unwrap_or(usize::MAX);
    let HarvestBuffers { accessed, dirty, mapped, on_nodes, levels, nodes } = buffers;
    let too_short = |slice: &[u64]| !slice.is_empty() && slice.len() < words;
    if gfn_count > MAX_PAGES
        || [&*accessed, &*dirty, &*mapped, &*on_nodes].into_iter().any(too_short)
        || (!levels.is_empty() && levels.len() < level_count(gfn_start, gfn_count))
    {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let pointer = |slice: &mut [u64]| if slice.is_empty() { 0 } else { slice.as_mut_ptr() as u64 };
    let mut request = KesHarvest {
        gfn_start,
        gfn_count,
        accessed: pointer(accessed),
        dirty: pointer(dirty),
        mapped: pointer(mapped),
        on_nodes: pointer(on_nodes),
        levels: if levels.is_empty() { 0 } else { levels.as_mut_ptr() as u64 },
        nodes: if nodes.is_empty() { 0 } else { nodes.as_ptr() as u64 },
        nodes_bits: u32::try_from(nodes.len() * 64).unwrap_or(u32::MAX),
        flags,
        ..Default::default()
    };
    // SAFETY: as in `get_info`. Each pointer is null or that of a slice which
    // lives through the call and was checked above to hold the whole range;
    // `nodes` is only read.
    check(unsafe { libc::ioctl(file.as_raw_fd(), number::HARVEST, &mut request) })?;
    Ok(request)
}

/// `KES_SAMPLE_SET`.
pub fn sample_set(file: &File, access: u32, freq_hz: u32, ring_records: u32) -> io::Result<()> {
    let request = KesSampleSet { access, freq_hz, ring_records, ..Default::default() };
    // SAFETY: as in `get_info`; the module only reads the structure.
    check(unsafe { libc::ioctl(file.as_raw_fd(), number::SAMPLE_SET, &request) })
}

/// `KES_SAMPLE_STATS`.
pub fn sample_stats(file: &File) -> io::Result<KesSampleStats> {
    let mut stats = KesSampleStats::default();
    // SAFETY: as in `get_info`.
    check(unsafe { libc::ioctl(file.as_raw_fd(), number::SAMPLE_STATS, &mut stats) })?;
    Ok(stats)
}

/// `read(2)` of records into the front of `records`; returns how many came.
pub fn read_samples(file: &File, records: &mut [KesSample]) -> io::Result<usize> {
    let bytes = size_of_val(records);
    // SAFETY: the buffer is `records`, all of whose bit patterns are valid.
    let got = unsafe { libc::read(file.as_raw_fd(), records.as_mut_ptr().cast(), bytes) };
    usize::try_from(got).map(|got| got / size_of::<KesSample>()).map_err(|_| io::Error::last_os_error())
}
