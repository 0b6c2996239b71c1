// SPDX-License-Identifier: MIT OR Apache-2.0
//! Sampling a guest's accesses by type: which page, read, written or executed,
//! by which vCPU, when.
//!
//! Harvests tell of all pages whether they were accessed; samples tell of a few
//! accesses what they were. Both at once take a session each.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::sampler::{KernelSampler, Level, SamplerError, explain};
use crate::uapi::{self, KesSample};

/// Kinds of access, or-ed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct AccessSet {
    /// Reads.
    pub read: bool,
    /// Writes.
    pub write: bool,
    /// Fetches of instructions.
    pub exec: bool,
}

impl AccessSet {
    /// All kinds.
    pub const ALL: AccessSet = AccessSet { read: true, write: true, exec: true };
    /// Writes alone: the one set that leaves reads at full speed.
    pub const WRITE: AccessSet = AccessSet { read: false, write: true, exec: false };

    /// Reads some of the letters `r`, `w` and `x`, each once at most; none for
    /// anything else.
    pub fn from_letters(text: &str) -> Option<Self> {
        let mut set = AccessSet::default();
        for letter in text.chars() {
            let kind = match letter {
                'r' => &mut set.read,
                'w' => &mut set.write,
                'x' => &mut set.exec,
                _ => return None,
            };
            if std::mem::replace(kind, true) {
                return None;
            }
        }
        (!text.is_empty()).then_some(set)
    }

    fn bits(self) -> u32 {
        [(self.read, uapi::ACCESS_READ), (self.write, uapi::ACCESS_WRITE), (self.exec, uapi::ACCESS_EXEC)]
            .into_iter()
            .fold(0, |bits, (wanted, bit)| if wanted { bits | bit } else { bits })
    }
}

/// As [`AccessSet::from_letters`] reads it.
impl fmt::Display for AccessSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let letters = [(self.read, 'r'), (self.write, 'w'), (self.exec, 'x')];
        f.pad(&letters.iter().filter(|(set, _)| *set).map(|(_, letter)| letter).collect::<String>())
    }
}

/// What an access was.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// A read.
    Read,
    /// A write, or a read and a write in one instruction.
    Write,
    /// The fetch of an instruction.
    Exec,
}

/// One access of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sample {
    /// The page.
    pub gfn: u64,
    /// `CLOCK_MONOTONIC` of the host.
    pub time: Duration,
    /// The VMM's number of the vCPU.
    pub vcpu: u32,
    /// Its kind.
    pub access: Access,
    /// Size of the mapping of the page.
    pub level: Level,
    /// The CPU did it by itself, walking the guest's page tables.
    pub page_walk: bool,
}

impl From<&KesSample> for Sample {
    fn from(raw: &KesSample) -> Self {
        Sample {
            gfn: raw.gfn,
            time: Duration::from_nanos(raw.time_ns),
            vcpu: raw.vcpu,
            access: match u32::from(raw.access) {
                uapi::ACCESS_WRITE => Access::Write,
                uapi::ACCESS_EXEC => Access::Exec,
                _ => Access::Read,
            },
            level: Level::from_byte(raw.level),
            page_walk: raw.flags & uapi::SAMPLE_WALK != 0,
        }
    }
}

/// What sampling did since it started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SampleStats {
    /// Records made.
    pub samples: u64,
    /// Records lost because they were not read in time.
    pub dropped: u64,
    /// Faults of accesses that were not asked for.
    pub unwanted: u64,
    /// Mappings armed, to fault at the next access.
    pub armed: u64,
    /// Mappings released without an access.
    pub released: u64,
    /// Mappings armed at this moment.
    pub armed_now: u32,
    /// TLB flushes of the whole VM.
    pub flushes: u64,
    /// For how long mappings stay armed at most.
    pub hold: Duration,
}

/// Something that samples one VM. Unit tests replace it.
pub trait SampleSource: Send {
    /// Changes kinds and frequency; 0 pauses.
    fn set(&mut self, access: AccessSet, freq_hz: u32) -> Result<(), SamplerError>;

    /// Appends what was sampled and not read yet to `out`, without waiting.
    fn drain(&mut self, out: &mut Vec<Sample>) -> Result<(), SamplerError>;

    /// What was done so far.
    fn stats(&self) -> Result<SampleStats, SamplerError>;
}

impl SampleSource for Sampling {
    fn set(&mut self, access: AccessSet, freq_hz: u32) -> Result<(), SamplerError> {
        Sampling::set(self, access, freq_hz)
    }

    fn drain(&mut self, out: &mut Vec<Sample>) -> Result<(), SamplerError> {
        loop {
            let before = out.len();
            self.read(out, Duration::ZERO)?;
            // A call that brings less than it could has left nothing.
            if out.len() < before + BATCH {
                return Ok(());
            }
        }
    }

    fn stats(&self) -> Result<SampleStats, SamplerError> {
        Sampling::stats(self)
    }
}

/// Records fetched by one call.
const BATCH: usize = 1024;

/// A session that samples its VM, until it is dropped.
#[derive(Debug)]
pub struct Sampling {
    session: KernelSampler,
    batch: Vec<KesSample>,
}

impl Sampling {
    /// Starts sampling with an attached session: `freq_hz` faults a second that
    /// the guest pays for. Up to `ring_records` wait to be read, 0 for the
    /// module's default.
    pub fn start(
        session: KernelSampler,
        access: AccessSet,
        freq_hz: u32,
        ring_records: u32,
    ) -> Result<Self, SamplerError> {
        let sampling = Sampling { session, batch: vec![KesSample::default(); BATCH] };
        sampling.set_ring(access, freq_hz, ring_records)?;
        Ok(sampling)
    }

    /// Changes kinds and frequency; 0 pauses.
    pub fn set(&self, access: AccessSet, freq_hz: u32) -> Result<(), SamplerError> {
        self.set_ring(access, freq_hz, 0)
    }

    fn set_ring(&self, access: AccessSet, freq_hz: u32, ring_records: u32) -> Result<(), SamplerError> {
        uapi::sample_set(self.session.file(), access.bits(), freq_hz, ring_records)
            .map_err(|source| explain("sample the VM", source))
    }

    /// Ends sampling and unbinds the session from its VM.
    pub fn detach(self) -> Result<(), SamplerError> {
        uapi::detach(self.session.file()).map_err(|source| explain("detach from the VM", source))
    }

    /// Appends what there is to `out`, after waiting for the first sample for at
    /// most `timeout`. Returns whether more may come: `false` when sampling is
    /// paused and all was read.
    pub fn read(&mut self, out: &mut Vec<Sample>, timeout: Duration) -> Result<bool, SamplerError> {
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        let mut wait = [PollFd::new(self.as_fd(), PollFlags::POLLIN)];
        match poll(&mut wait, timeout) {
            Ok(0) | Err(Errno::EINTR) => return Ok(true),
            Ok(_) => {}
            Err(errno) => return Err(explain("wait for samples", errno.into())),
        }
        match uapi::read_samples(self.session.file(), &mut self.batch) {
            Ok(count) => {
                out.extend(self.batch.iter().take(count).map(Sample::from));
                Ok(true)
            }
            Err(error) if error.raw_os_error() == Some(Errno::ENODATA as i32) => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(true),
            Err(error) => Err(explain("read samples", error)),
        }
    }

    /// What was done so far.
    pub fn stats(&self) -> Result<SampleStats, SamplerError> {
        let raw = uapi::sample_stats(self.session.file())
            .map_err(|source| explain("read the statistics of sampling", source))?;
        Ok(SampleStats {
            samples: raw.samples,
            dropped: raw.dropped,
            unwanted: raw.unwanted,
            armed: raw.armed,
            released: raw.released,
            armed_now: raw.armed_now,
            flushes: raw.flushes,
            hold: Duration::from_micros(u64::from(raw.hold_us)),
        })
    }
}

/// For `poll(2)` beside other descriptors.
impl AsFd for Sampling {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.session.file().as_fd()
    }
}
