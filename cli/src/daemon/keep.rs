// SPDX-License-Identifier: MIT OR Apache-2.0
//! Files that keep heat over a restart of the daemon: one for each domain, beside the
//! one of [`Holds`].
//!
//! They are written anew and renamed, never synced: heat is of no use after the
//! host booted, so what a power cut leaves is not believed anyhow. No lock of a
//! guest's memory is held while a file is read or written.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufReader, ErrorKind as Io, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ept_virt_core::heat::HeatParams;
use ept_virt_core::heat::store::{BLOCK_CELLS, Decoder, Encoder, Header, SlotRange, StoreError};
use ept_virt_core::memory::GuestMemory;
use ept_virt_core::migrate::TokenBucket;
use ept_virt_core::process::ProcessIdentity;
use log::{debug, info, warn};
use nix::fcntl::Flock;

use super::files;
use super::holds::Holds;
use super::state::lock;

/// Where the files stand unless told otherwise.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/ept-virt";

/// The most that is written for one domain in the mean, in bytes a second.
const WRITE_RATE: u64 = 4 << 20;

/// The same for the host, as long as its domains go on.
const HOST_WRITE_RATE: u64 = 8 << 20;

/// Bytes that are written at once.
const WRITE_BYTES: usize = 256 << 10;

/// How soon who waits for its turn sees that it has none any more.
const LONGEST_NAP: Duration = Duration::from_millis(100);

/// Even under the shortest delay, heat may be out by this much.
const SMALLEST_SKEW: Duration = Duration::from_millis(2500);

/// Shortest time between two writes of one domain's heat.
const SHORTEST_PAUSE: Duration = Duration::from_secs(10);

/// Ends of file names: good, being written, set aside.
const SUFFIXES: [&str; 3] = [".heat", ".heat.new", ".heat.bad"];

/// A directory of files, for this daemon alone.
pub struct Keeper {
    dir: PathBuf,
    /// Two daemons would remove each other's files.
    _lock: Flock<File>,
    /// What people asked for.
    pub holds: Arc<Holds>,
    /// UUIDs of the domains that run.
    running: Mutex<BTreeSet<String>>,
    /// A thread removes files of others.
    tidying: AtomicBool,
    /// What may be written, on the clock of `began`.
    bucket: Mutex<TokenBucket>,
    began: Instant,
}

impl Keeper {
    /// Takes the directory, which is made if it is missing.
    pub fn open(dir: &Path) -> io::Result<Self> {
        files::own_dir(dir)?;
        let lock = files::lock_alone(&dir.join("lock")).map_err(|error| match error.kind() {
            Io::WouldBlock => io::Error::other("another daemon keeps its files there"),
            _ => error,
        })?;
        Ok(Self {
            dir: dir.to_owned(),
            _lock: lock,
            holds: Arc::new(Holds::open(dir)?),
            running: Mutex::default(),
            tidying: AtomicBool::new(false),
            bucket: Mutex::new(TokenBucket::new(HOST_WRITE_RATE, Duration::ZERO)),
            began: Instant::now(),
        })
    }

    /// Asks to write `bytes`; how long to wait before asking again.
    fn pace(&self, bytes: u64) -> Option<Duration> {
        let now = self.began.elapsed();
        // A rate of zero, for which waiting would not help, is none of ours.
        lock(&self.bucket).take(bytes, now).err().flatten()
    }

    /// The file of a domain's process.
    pub fn file(self: &Arc<Self>, uuid: &str, process: ProcessIdentity) -> HeatFile {
        HeatFile {
            keeper: Arc::clone(self),
            uuid: uuid.to_owned(),
            process,
            void: Arc::default(),
            hurry: AtomicBool::new(false),
        }
    }

    /// Takes note of which domains run. If `tidy`, also removes the files of all
    /// others, in a thread of its own: the disk may hang. False: an earlier thread
    /// is still at it, so that this one has to be asked for again.
    pub fn retain(self: &Arc<Self>, running: BTreeSet<String>, tidy: bool) -> bool {
        self.holds.retain(&running);
        *lock(&self.running) = running;
        if !tidy || self.tidying.swap(true, Ordering::Relaxed) {
            return false;
        }
        let keeper = Arc::clone(self);
        let thread = thread::Builder::new().name("tidy".into()).spawn(move || {
            keeper.tidy();
            keeper.tidying.store(false, Ordering::Relaxed);
        });
        if let Err(error) = &thread {
            warn!("cannot start a thread that removes old heat: {error}");
            self.tidying.store(false, Ordering::Relaxed);
        }
        thread.is_ok()
    }

    fn tidy(&self) {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) => return warn!("cannot list {}: {error}", self.dir.display()),
        };
        for name in entries.filter_map(|entry| Some(entry.ok()?.file_name())) {
            // Asked each time: a domain may have been started since.
            if owner(&name).is_some_and(|uuid| !lock(&self.running).contains(uuid)) {
                remove(&self.dir.join(name));
            }
        }
    }

    fn path(&self, uuid: &str, suffix: &str) -> PathBuf {
        self.dir.join(format!("{uuid}{suffix}"))
    }
}

/// The UUID in a name that is one of ours.
fn owner(name: &OsStr) -> Option<&str> {
    let name = name.to_str()?;
    SUFFIXES.iter().find_map(|suffix| name.strip_suffix(suffix))
}

fn remove(path: &Path) {
    if let Err(error) = files::remove(path) {
        warn!("cannot remove {}: {error}", path.display());
    }
}

/// Heat that came back.
pub struct Recalled {
    /// When its last round was, by CLOCK_MONOTONIC.
    pub harvested_at: Duration,
    /// The cells of each slot that was wanted.
    pub slots: Vec<(SlotRange, Vec<u16>)>,
}

/// The file of one domain's process.
pub struct HeatFile {
    keeper: Arc<Keeper>,
    uuid: String,
    process: ProcessIdentity,
    /// What is written is no longer wanted: the guest has ended, or somebody else
    /// writes this file.
    void: Arc<AtomicBool>,
    /// Somebody waits until it is written.
    hurry: AtomicBool,
}

impl HeatFile {
    /// Reads what an earlier daemon wrote about this process not longer than
    /// `half_life` ago, of the slots that are wanted. What can not be used is
    /// removed, and what is damaged set aside.
    pub fn recall(
        &self,
        half_life: Duration,
        now: Duration,
        wanted: impl Fn(&SlotRange) -> bool,
    ) -> Option<Recalled> {
        let path = self.keeper.path(&self.uuid, ".heat");
        let file = match files::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == Io::NotFound => return None,
            Err(error) => {
                warn!("cannot read {}: {error}", path.display());
                return None;
            }
        };
        match self.read(file, half_life, now, wanted) {
            Ok(Ok(recalled)) => return Some(recalled),
            Ok(Err(reason)) => {
                debug!("{} is of no use: {reason}", path.display());
                remove(&path);
            }
            // The disk may do better next time.
            Err(error @ StoreError::Io(_)) => warn!("{}: {error}", path.display()),
            Err(error) => {
                let bad = self.keeper.path(&self.uuid, ".heat.bad");
                let (from, to) = (path.display(), bad.display());
                warn!(EPT_VIRT_UUID:% = self.uuid; "{from}: {error}; set aside as {to}");
                if let Err(error) = fs::rename(&path, &bad) {
                    warn!("cannot rename {}: {error}", path.display());
                }
            }
        }
        None
    }

    /// The heat, or why it is of no use.
    fn read(
        &self,
        file: File,
        half_life: Duration,
        now: Duration,
        wanted: impl Fn(&SlotRange) -> bool,
    ) -> Result<Result<Recalled, &'static str>, StoreError> {
        let decoder = Decoder::new(BufReader::with_capacity(1 << 20, file))?;
        let Header { uuid, process, harvested_at, .. } = decoder.header();
        if *uuid != self.uuid || *process != self.process {
            return Ok(Err("the domain was started again since"));
        }
        let harvested_at = *harvested_at;
        if now.checked_sub(harvested_at).is_none_or(|age| age > half_life) {
            return Ok(Err("it is older than a half-life"));
        }
        let slots = decoder.cells(wanted)?;
        Ok(if slots.is_empty() {
            Err("the guest has other memory slots now")
        } else {
            Ok(Recalled { harvested_at, slots })
        })
    }

    /// Writes what is known of the memory; the length of the file in bytes. The
    /// memory is locked for one block after the other, and copied at one go, before
    /// the disk is waited for: all of it is to be of the same time.
    pub fn save(&self, harvested_at: Duration, memory: &Mutex<GuestMemory>, haste: Haste) -> io::Result<u64> {
        let slots = lock(memory).settle();
        let (uuid, process) = (self.uuid.clone(), self.process.clone());
        let header = Header { uuid, process, harvested_at, slots };
        let bytes = self.encode(&header, memory, haste.skew())?;
        let new = self.keeper.path(&self.uuid, ".heat.new");
        let written = self.write(&new, &bytes, haste).and_then(|()| {
            self.check_wanted()?;
            fs::rename(&new, self.keeper.path(&self.uuid, ".heat"))
        });
        // What stands there may be another one's by now.
        let written = written.inspect_err(|_| {
            if self.check_wanted().is_ok() {
                remove(&new)
            }
        });
        written.map(|()| bytes.len() as u64)
    }

    fn check_wanted(&self) -> io::Result<()> {
        match self.void.load(Ordering::Relaxed) {
            true => Err(io::Error::other("it is no longer wanted")),
            false => Ok(()),
        }
    }

    fn encode(
        &self,
        header: &Header,
        memory: &Mutex<GuestMemory>,
        skew: Option<Duration>,
    ) -> io::Result<Vec<u8>> {
        let begun = Instant::now();
        let mut encoder = Encoder::new(Vec::new(), header)?;
        let mut block = Vec::with_capacity(BLOCK_CELLS);
        for slot in &header.slots {
            for start in (0..slot.page_count as usize).step_by(BLOCK_CELLS) {
                if !lock(memory).copy_cells(slot, start..start + BLOCK_CELLS, &mut block) {
                    return Err(io::Error::other("the guest's memory slots have just changed"));
                }
                self.check_wanted()?;
                encoder.block(&block)?;
                if skew.is_some_and(|most| begun.elapsed() > most) {
                    return Err(io::Error::other(
                        "copying it took longer than half of the policy's delay: the host is too busy",
                    ));
                }
            }
        }
        encoder.finish().map(|(bytes, _)| bytes)
    }

    fn write(&self, path: &Path, bytes: &[u8], haste: Haste) -> io::Result<()> {
        self.check_wanted()?;
        // Never into a file that somebody still writes.
        let mut file = files::create_anew(path)?;
        for chunk in bytes.chunks(WRITE_BYTES) {
            let pause = || {
                let waits = matches!(haste, Haste::Paced { .. }) && !self.hurry.load(Ordering::Relaxed);
                if waits { self.keeper.pace(chunk.len() as u64) } else { None }
            };
            while let Some(pause) = pause() {
                self.check_wanted()?;
                thread::sleep(pause.min(LONGEST_NAP));
            }
            self.check_wanted()?;
            file.write_all(chunk)?;
        }
        Ok(())
    }
}

/// How a file is written.
#[derive(Clone, Copy, Debug)]
pub enum Haste {
    /// While the guest's rounds go on: within the host's rate. Its pages are idle
    /// after `delay`.
    Paced {
        /// See [`HeatParams::delay`].
        delay: Duration,
    },
    /// For the last time, as fast as can be: somebody waits, and no round comes
    /// between.
    Last,
}

impl Haste {
    /// How far apart the times of cells in one file may lie. Who reads it takes all
    /// of them for the earliest, so that pages count as idle by this much too soon.
    fn skew(self) -> Option<Duration> {
        match self {
            Haste::Paced { delay } => Some((delay / 2).max(SMALLEST_SKEW)),
            Haste::Last => None,
        }
    }
}

/// Writes one domain's heat now and then, in threads of their own: a disk that
/// hangs must not keep the domain from its rounds.
pub struct Saver {
    file: Arc<HeatFile>,
    /// When it was written last, by CLOCK_MONOTONIC, or begun with.
    saved_at: Duration,
    last_bytes: u64,
    writing: Option<JoinHandle<io::Result<u64>>>,
    failed: bool,
}

impl Saver {
    /// Nothing is written yet.
    pub fn new(file: HeatFile, now: Duration) -> Self {
        Self { file: Arc::new(file), saved_at: now, last_bytes: 0, writing: None, failed: false }
    }

    /// The file that is written.
    pub fn file(&self) -> &HeatFile {
        &self.file
    }

    /// Begins to write if it is time to: twice in a half-life, so that what a crash
    /// leaves is young enough to be taken, or less often if that would be more than
    /// [`WRITE_RATE`].
    pub fn save_if_due(
        &mut self,
        now: Duration,
        params: HeatParams,
        harvested_at: Option<Duration>,
        memory: &Arc<Mutex<GuestMemory>>,
    ) {
        let Some(harvested_at) = harvested_at else { return };
        if now.saturating_sub(self.saved_at) < pause(params.half_life, self.last_bytes) {
            return;
        }
        if self.writing.as_ref().is_some_and(|writing| !writing.is_finished()) {
            return;
        }
        self.join();
        self.saved_at = now;
        let (file, memory) = (Arc::clone(&self.file), Arc::clone(memory));
        let haste = Haste::Paced { delay: params.delay };
        let thread = thread::Builder::new().name("heat".into());
        match thread.spawn(move || file.save(harvested_at, &memory, haste)) {
            Ok(writing) => self.writing = Some(writing),
            Err(error) => warn!("cannot start a thread that keeps heat: {error}"),
        }
    }

    /// Writes for the last time, before the memory is forgotten.
    pub fn finish(mut self, harvested_at: Option<Duration>, memory: &Mutex<GuestMemory>) {
        self.file.hurry.store(true, Ordering::Relaxed);
        self.join();
        if let Some(harvested_at) = harvested_at {
            let saved = self.file.save(harvested_at, memory, Haste::Last);
            self.take_note(saved);
        }
    }

    /// Becomes true when nothing is to be written any more.
    pub fn void(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.file.void)
    }

    /// Writes no more, and waits for the thread that does.
    pub fn discard(mut self) {
        self.file.void.store(true, Ordering::Relaxed);
        self.join();
    }

    /// Waits for the thread that writes.
    fn join(&mut self) {
        match self.writing.take().map(JoinHandle::join) {
            None => {}
            Some(Ok(saved)) => self.take_note(saved),
            Some(Err(_)) => warn!("keeping heat failed by a fault in ept-virt"),
        }
    }

    fn take_note(&mut self, saved: io::Result<u64>) {
        let domain = &self.file.uuid;
        match saved {
            Ok(bytes) => {
                debug!(EPT_VIRT_UUID:% = domain; "kept the heat of domain {domain}: {bytes} bytes");
                if std::mem::replace(&mut self.failed, false) {
                    info!(EPT_VIRT_UUID:% = domain; "the heat of domain {domain} is kept again");
                }
                self.last_bytes = bytes;
            }
            Err(_) if self.file.check_wanted().is_err() => {}
            Err(error) => {
                if !std::mem::replace(&mut self.failed, true) {
                    let dir = self.file.keeper.dir.display();
                    warn!(EPT_VIRT_UUID:% = domain; "cannot keep the heat of domain {domain} in {dir}: {error}");
                }
            }
        }
    }
}

/// Time between two writes.
fn pause(half_life: Duration, last_bytes: u64) -> Duration {
    (half_life / 2).max(SHORTEST_PAUSE).max(Duration::from_secs(last_bytes / WRITE_RATE))
}

#[cfg(test)]
#[path = "keep_tests.rs"]
mod tests;
