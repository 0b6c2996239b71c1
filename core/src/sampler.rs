// SPDX-License-Identifier: MIT OR Apache-2.0
//! Observing a VM: which of its pages were accessed, written, are mapped, and
//! lie on the slow tier.
//!
//! [`Sampler`] is the one seam that unit tests replace; [`KernelSampler`] is the
//! kernel module.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use nix::libc;

use crate::topology::NodeSet;
use crate::uapi;

/// Why a VM can not be observed. Each text says what can be done.
#[derive(Debug, thiserror::Error)]
pub enum SamplerError {
    /// The module is not loaded.
    #[error("the kernel module is not loaded ({path} is missing): run `modprobe kvm_ept_sample`", path = uapi::PROC_PATH)]
    ModuleMissing,
    /// The caller lacks rights.
    #[error("not permitted to {operation}: run as root, or with CAP_SYS_ADMIN")]
    NotPermitted {
        /// What was tried.
        operation: &'static str,
    },
    /// Module and program do not fit.
    #[error(
        "the kernel module speaks ABI {module_major}.{module_minor}, this program {ours}: install the module and ept-virt of the same version",
        ours = uapi::ABI_VERSION >> 16
    )]
    WrongVersion {
        /// The module's major version.
        module_major: u32,
        /// The module's minor version.
        module_minor: u32,
    },
    /// The VM's process has exited.
    #[error("the VM's process has exited")]
    VmGone,
    /// Another session samples the VM.
    #[error("the VM is sampled by another session already: stop that one first")]
    Busy,
    /// The module refuses this VM or this kernel.
    #[error("{0}")]
    Unsupported(&'static str),
    /// Anything else.
    #[error("{operation} failed: {source}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// Gives an errno of the module the meaning that the ABI header documents.
pub(crate) fn explain(operation: &'static str, source: io::Error) -> SamplerError {
    match source.raw_os_error() {
        Some(libc::EPERM) => SamplerError::NotPermitted { operation },
        Some(libc::ESRCH) => SamplerError::VmGone,
        Some(libc::EBUSY) => SamplerError::Busy,
        Some(libc::ENODEV) => SamplerError::Unsupported("the descriptor is not a KVM VM"),
        Some(libc::ENXIO) => SamplerError::Unsupported(
            "KVM shadows this guest's page tables, so its accesses can not be sampled: load kvm with tdp_mmu=Y and kvm_intel with ept=1 or kvm_amd with npt=1",
        ),
        Some(libc::EACCES) => SamplerError::Unsupported(
            "the guest has private memory (SEV-SNP, TDX or guest_memfd), which the host can neither observe nor move",
        ),
        Some(libc::EOPNOTSUPP) => SamplerError::Unsupported(
            "nothing on this host tells it: the CPU keeps no accessed and dirty bits for guests (EPT A/D), or kvm_intel was loaded with eptad=0, or kvm with tdp_mmu=N",
        ),
        Some(libc::EUCLEAN) => SamplerError::Unsupported(
            "this kernel's KVM is not laid out as the module knows it: see the kernel log, and docs/KERNELS.md for the kernels supported",
        ),
        _ => SamplerError::Io { operation, source },
    }
}

/// The module behind a sampler.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ModuleInfo {
    /// Major and minor version of the ABI.
    pub abi: (u32, u32),
    /// Which hardware writes the bits.
    pub format: EntryFormat,
    /// Whether the dirty bit can be cleared.
    pub clear_dirty: bool,
    /// Whether the host's page reclaim can be told of accesses.
    pub keep_young: bool,
    /// Whether KVM has the patch of `kernel_patch`, which makes samples cheap.
    pub patched_kvm: bool,
}

/// Format of the second-level tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryFormat {
    /// Intel.
    Ept,
    /// AMD.
    Npt,
}

impl fmt::Display for EntryFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            EntryFormat::Ept => "EPT",
            EntryFormat::Npt => "NPT",
        })
    }
}

/// Who told what a harvest reports: the module asks KVM where the tables do not
/// tell the truth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sources {
    /// The second-level tables, walked by the module.
    pub tables: bool,
    /// KVM's MMU notifier.
    pub notifier: bool,
}

impl Sources {
    /// In plain words.
    pub fn words(self) -> &'static str {
        match (self.tables, self.notifier) {
            (true, false) => "table walk",
            (true, true) => "table walk and KVM's notifier",
            (false, true) => "KVM's notifier",
            (false, false) => "none: nothing is mapped",
        }
    }
}

/// A range of guest memory that is backed by one range of the VMM's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemSlot {
    /// First guest frame number.
    pub gfn_start: u64,
    /// Length in 4 KiB pages.
    pub page_count: u64,
    /// Address in the VMM.
    pub hva: u64,
    /// KVM's number.
    pub id: u32,
    /// A ROM.
    pub read_only: bool,
    /// Dirty logging is on: a migration or a display wants the dirty bits.
    pub dirty_log: bool,
}

impl MemSlot {
    /// Its guest frame numbers.
    pub fn frames(&self) -> Range<u64> {
        self.gfn_start..self.gfn_start + self.page_count
    }
}

/// Largest mapping within 2 MiB of guest-physical space.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Level {
    /// Nothing is mapped.
    #[default]
    None = uapi::LEVEL_NONE,
    /// Entries of 4 KiB.
    Page4K = uapi::LEVEL_4K,
    /// One entry of 2 MiB.
    Huge2M = uapi::LEVEL_2M,
    /// Part of an entry of 1 GiB.
    Huge1G = uapi::LEVEL_1G,
}

impl Level {
    pub(crate) fn from_byte(byte: u8) -> Self {
        match byte {
            uapi::LEVEL_4K => Level::Page4K,
            uapi::LEVEL_2M => Level::Huge2M,
            uapi::LEVEL_1G => Level::Huge1G,
            _ => Level::None,
        }
    }
}

/// What to harvest.
#[derive(Clone, Copy, Debug, Default)]
pub struct HarvestRequest {
    /// First guest frame number.
    pub gfn_start: u64,
    /// Length in 4 KiB pages.
    pub gfn_count: u64,
    /// Clear the accessed bits that are read.
    pub clear_accessed: bool,
    /// Clear the dirty bits that are read.
    pub clear_dirty: bool,
    /// Flush the guest's TLBs once at the end.
    pub flush: bool,
    /// Tell the host's page reclaim of the accesses whose bits are cleared, where
    /// the kernel can note it; see [`ModuleInfo::keep_young`].
    pub keep_young: bool,
}

/// What a harvest found. Reuse one value for many harvests: the buffers stay.
///
/// Bit `i % 64` of word `i / 64` stands for GFN `gfn_start + i`; bits past the
/// range are zero. A page can be accessed and not mapped: by a nested guest, or
/// where there are no tables to walk.
#[derive(Clone, Debug, Default)]
pub struct Harvest {
    /// Accessed since the bit was last cleared.
    pub accessed: Vec<u64>,
    /// Written since the bit was last cleared; see [`HarvestStats::dirty_untold`].
    pub dirty: Vec<u64>,
    /// Mapped for the guest.
    pub mapped: Vec<u64>,
    /// Mapped, and on a slow node.
    pub on_slow: Vec<u64>,
    /// One for each 2 MiB that the range touches, the first for `gfn_start >> 9`.
    pub levels: Vec<Level>,
    /// What it took.
    pub stats: HarvestStats,
    level_bytes: Vec<u8>,
}

impl Harvest {
    /// Gives all buffers the size for `gfn_count` pages from `gfn_start` on, all zero.
    pub fn reset(&mut self, gfn_start: u64, gfn_count: u64) {
        let words = gfn_count.div_ceil(64) as usize;
        let levels = uapi::level_count(gfn_start, gfn_count);
        for bitmap in [&mut self.accessed, &mut self.dirty, &mut self.mapped, &mut self.on_slow] {
            bitmap.clear();
            bitmap.resize(words, 0);
        }
        self.level_bytes.clear();
        self.level_bytes.resize(levels, uapi::LEVEL_NONE);
        self.levels.clear();
        self.levels.resize(levels, Level::None);
        self.stats = HarvestStats::default();
    }
}

/// What a harvest took and counted, in 4 KiB pages unless the name says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HarvestStats {
    /// Mapped by entries of 4 KiB.
    pub mapped_4k: u64,
    /// Mapped by entries of 2 MiB.
    pub mapped_2m: u64,
    /// Mapped by entries of 1 GiB.
    pub mapped_1g: u64,
    /// With the accessed bit.
    pub accessed: u64,
    /// With the dirty bit.
    pub dirty: u64,
    /// Nothing on this host tells what was written: `dirty` says nothing.
    pub dirty_untold: bool,
    /// On the slow tier.
    pub on_slow: u64,
    /// Table entries read.
    pub entries_read: u64,
    /// Table entries in which a bit was cleared.
    pub entries_cleared: u64,
    /// Time in the walk and the flush, in nanoseconds.
    pub time_ns: u64,
    /// TLB flushes of the whole VM.
    pub flushes: u32,
    /// Root tables walked.
    pub roots: u32,
    /// Calls of the kernel.
    pub calls: u32,
    /// Who told.
    pub sources: Sources,
}

impl HarvestStats {
    /// Adds what another harvest took; `roots` is the larger one.
    pub fn add(&mut self, other: &HarvestStats) {
        self.mapped_4k += other.mapped_4k;
        self.mapped_2m += other.mapped_2m;
        self.mapped_1g += other.mapped_1g;
        self.accessed += other.accessed;
        self.dirty += other.dirty;
        self.dirty_untold |= other.dirty_untold;
        self.on_slow += other.on_slow;
        self.entries_read += other.entries_read;
        self.entries_cleared += other.entries_cleared;
        self.time_ns += other.time_ns;
        self.flushes += other.flushes;
        self.roots = self.roots.max(other.roots);
        self.calls += other.calls;
        self.sources.tables |= other.sources.tables;
        self.sources.notifier |= other.sources.notifier;
    }
}

impl From<&uapi::KesHarvestStats> for HarvestStats {
    fn from(kernel: &uapi::KesHarvestStats) -> Self {
        HarvestStats {
            mapped_4k: kernel.mapped_4k,
            mapped_2m: kernel.mapped_2m,
            mapped_1g: kernel.mapped_1g,
            accessed: kernel.accessed,
            dirty: kernel.dirty,
            dirty_untold: false,
            on_slow: kernel.on_nodes,
            entries_read: kernel.entries_read,
            entries_cleared: kernel.entries_cleared,
            time_ns: kernel.time_ns,
            flushes: kernel.flushes,
            roots: kernel.roots,
            calls: 1,
            sources: Sources {
                tables: kernel.sources & uapi::SOURCE_TABLES != 0,
                notifier: kernel.sources & uapi::SOURCE_NOTIFIER != 0,
            },
        }
    }
}

/// A way to observe one VM.
pub trait Sampler: Send {
    /// The module behind it.
    fn info(&self) -> ModuleInfo;

    /// The guest's memory, sorted by address, and a number that changes with it.
    fn memslots(&mut self) -> Result<(u64, Vec<MemSlot>), SamplerError>;

    /// Harvests the whole range of `request` into `out`, which is reset first.
    fn harvest(
        &mut self,
        request: &HarvestRequest,
        slow_nodes: &NodeSet,
        out: &mut Harvest,
    ) -> Result<(), SamplerError>;
}

/// The kernel module as a [`Sampler`]: one open session.
#[derive(Debug)]
pub struct KernelSampler {
    file: File,
    info: ModuleInfo,
    /// The module said that it can not tell what was written.
    dirty_untold: bool,
}

impl KernelSampler {
    /// Opens a session and checks that module and program fit.
    pub fn open() -> Result<Self, SamplerError> {
        const OPERATION: &str = "open /proc/kvm_ept_sample";
        let file =
            OpenOptions::new().read(true).write(true).open(uapi::PROC_PATH).map_err(|source| match source
                .kind()
            {
                io::ErrorKind::NotFound => SamplerError::ModuleMissing,
                io::ErrorKind::PermissionDenied => SamplerError::NotPermitted { operation: OPERATION },
                _ => SamplerError::Io { operation: OPERATION, source },
            })?;
        let raw = uapi::get_info(&file).map_err(|source| explain("KES_GET_INFO", source))?;
        let abi = (raw.abi_version >> 16, raw.abi_version & 0xffff);
        if abi.0 != uapi::ABI_VERSION >> 16 {
            return Err(SamplerError::WrongVersion { module_major: abi.0, module_minor: abi.1 });
        }
        let format = match raw.entry_format {
            uapi::FORMAT_EPT => EntryFormat::Ept,
            uapi::FORMAT_NPT => EntryFormat::Npt,
            _ => {
                return Err(SamplerError::Unsupported(
                    "the kernel module reports a table format that this program does not know",
                ));
            }
        };
        let can = |feature| raw.features & feature != 0;
        let info = ModuleInfo {
            abi,
            format,
            clear_dirty: can(uapi::FEATURE_CLEAR_DIRTY),
            keep_young: can(uapi::FEATURE_KEEP_YOUNG),
            patched_kvm: can(uapi::FEATURE_PATCHED_KVM),
        };
        Ok(KernelSampler { file, info, dirty_untold: false })
    }

    /// The session's file, for what other modules ask of it.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Binds the session to a VM; `vm` may be closed afterwards.
    pub fn attach(&mut self, vm: BorrowedFd<'_>) -> Result<(), SamplerError> {
        uapi::attach(&self.file, vm).map_err(|source| explain("attach to the VM", source))
    }

    /// One call of the module, for what comes after the first `done` pages of the
    /// request. Where nothing tells what was written, all the rest is known.
    fn harvest_from(
        &mut self,
        done: u64,
        request: &HarvestRequest,
        flags: u32,
        slow_nodes: &NodeSet,
        out: &mut Harvest,
    ) -> Result<uapi::KesHarvest, SamplerError> {
        let HarvestRequest { gfn_start, gfn_count, clear_dirty, .. } = *request;
        let word = (done / 64) as usize;
        let unit = (((gfn_start + done) >> 9) - (gfn_start >> 9)) as usize;
        loop {
            let without_dirty = self.dirty_untold && !clear_dirty;
            let buffers = uapi::HarvestBuffers {
                accessed: &mut out.accessed[word..],
                dirty: if without_dirty { &mut [] } else { &mut out.dirty[word..] },
                mapped: &mut out.mapped[word..],
                on_nodes: if slow_nodes.is_empty() { &mut [] } else { &mut out.on_slow[word..] },
                levels: &mut out.level_bytes[unit..],
                nodes: slow_nodes.words(),
            };
            match uapi::harvest(&self.file, gfn_start + done, gfn_count - done, flags, buffers) {
                Err(source)
                    if source.raw_os_error() == Some(libc::EOPNOTSUPP) && !clear_dirty && !without_dirty =>
                {
                    self.dirty_untold = true;
                }
                result => return result.map_err(|source| explain("harvest", source)),
            }
        }
    }
}

impl Sampler for KernelSampler {
    fn info(&self) -> ModuleInfo {
        self.info
    }

    fn memslots(&mut self) -> Result<(u64, Vec<MemSlot>), SamplerError> {
        let (generation, slots) =
            uapi::get_memslots(&self.file).map_err(|source| explain("list the memory slots", source))?;
        let slots = slots
            .into_iter()
            .map(|slot| MemSlot {
                gfn_start: slot.gfn_start,
                page_count: slot.page_count,
                hva: slot.hva,
                id: slot.id,
                read_only: slot.flags & uapi::SLOT_READONLY != 0,
                dirty_log: slot.flags & uapi::SLOT_DIRTY_LOG != 0,
            })
            .collect();
        Ok((generation, slots))
    }

    fn harvest(
        &mut self,
        request: &HarvestRequest,
        slow_nodes: &NodeSet,
        out: &mut Harvest,
    ) -> Result<(), SamplerError> {
        let HarvestRequest { gfn_start, gfn_count, .. } = *request;
        let mut flags = 0;
        for (wanted, flag) in [
            (request.clear_accessed, uapi::HARVEST_CLEAR_ACCESSED),
            (request.clear_dirty, uapi::HARVEST_CLEAR_DIRTY),
            (request.flush, uapi::HARVEST_FLUSH),
            (request.keep_young && self.info.keep_young, uapi::HARVEST_KEEP_YOUNG),
        ] {
            flags |= if wanted { flag } else { 0 };
        }
        out.reset(gfn_start, gfn_count);
        // A signal ends a call early, after a whole number of chunks: go on there.
        let mut done: u64 = 0;
        while done < gfn_count {
            let unit = (((gfn_start + done) >> 9) - (gfn_start >> 9)) as usize;
            // Two calls may meet within one 2 MiB unit: the larger mapping counts.
            let level_before = out.level_bytes[unit];
            let result = self.harvest_from(done, request, flags, slow_nodes, out)?;
            let next = result.gfn_next.wrapping_sub(gfn_start);
            if next <= done || next > gfn_count || (next < gfn_count && next % 64 != 0) {
                return Err(SamplerError::Unsupported(
                    "the kernel module reported a harvest that makes no sense; nothing of it is used",
                ));
            }
            out.level_bytes[unit] = out.level_bytes[unit].max(level_before);
            done = next;
            out.stats.add(&HarvestStats::from(&result.stats));
        }
        out.stats.dirty_untold = self.dirty_untold;
        for (level, byte) in out.levels.iter_mut().zip(&out.level_bytes) {
            *level = Level::from_byte(*byte);
        }
        Ok(())
    }
}
