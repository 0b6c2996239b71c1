// SPDX-License-Identifier: MIT OR Apache-2.0
//! What all threads share: the facts that the control socket shows.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ept_virt_core::memory::GuestMemory;
use ept_virt_core::plan;
use ept_virt_core::policy::Policy;
use ept_virt_core::topology::Tiers;
use ept_virt_core::wire::{
    DaemonStatus, DomainState, DomainStatus, ErrorKind, MAX_MAP_RUNS, MemoryMap, ModuleStatus, MoveTotals,
    Status,
};
use serde::{Deserialize, Serialize};

use super::tap::{self, Rounds, Tap};

/// Parts of the picture of a domain's memory.
const STRIP_CELLS: usize = 256;

/// From when on a call of libvirt that has not returned is worth telling.
const SLOW_LIBVIRT: Duration = Duration::from_secs(10);

/// Locks; a thread that panicked while it held the lock has left values that
/// are old at worst, which the next round replaces.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a person asked for beside the policy, until the domain ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Hold {
    /// Nothing.
    #[default]
    None,
    /// Move nothing.
    Paused,
    /// Do not even observe.
    Stopped,
}

/// One domain, as its worker, the reconciler and the server see it.
pub struct Cell {
    hold: Mutex<Hold>,
    status: Mutex<DomainStatus>,
    /// What the present worker knows of the guest's memory. Each worker has its
    /// own: whose memory this is no longer has nothing to say here. Locked before
    /// `status` where both are.
    memory: Mutex<Memory>,
    /// Who records wants the worker's rounds.
    rounds: tap::Socket,
}

/// What one worker knows of its guest's memory.
pub type Memory = Arc<Mutex<GuestMemory>>;

impl Cell {
    /// A domain of which only name and UUID are known.
    pub fn new(name: &str, uuid: &str) -> Self {
        let status = DomainStatus {
            name: name.to_owned(),
            uuid: uuid.to_owned(),
            id: None,
            pid: None,
            state: DomainState::Unobserved,
            reason: None,
            policy_from: String::new(),
            policy: String::new(),
            policy_error: None,
            policy_warnings: Vec::new(),
            memory_bytes: 0,
            excluded_bytes: 0,
            slots: 0,
            round: None,
            moves: MoveTotals::default(),
            sampling: None,
            slowdown: None,
            budget: None,
            restored_s: None,
            strip: Vec::new(),
        };
        let (hold, memory) = (Mutex::default(), Mutex::new(empty_memory()));
        Self { hold, status: Mutex::new(status), memory, rounds: tap::Socket::default() }
    }

    /// The domain's UUID.
    pub fn uuid(&self) -> String {
        lock(&self.status).uuid.clone()
    }

    /// Changes the status.
    pub fn update(&self, change: impl FnOnce(&mut DomainStatus)) {
        change(&mut lock(&self.status));
    }

    /// What a person asked for.
    pub fn hold(&self) -> Hold {
        *lock(&self.hold)
    }

    /// Asks for `hold` in place of `expected`; otherwise leaves it, and says what
    /// holds.
    pub fn set_hold(&self, expected: &[Hold], hold: Hold) -> Result<(), Hold> {
        let mut held = lock(&self.hold);
        match expected.contains(&held) {
            true => {
                *held = hold;
                Ok(())
            }
            false => Err(*held),
        }
    }

    /// Forgets what a person asked for.
    pub fn release(&self) {
        *lock(&self.hold) = Hold::None;
    }

    /// Memory of which nothing is known yet, for a worker that begins. Workers
    /// before it are no longer heard.
    pub fn renew_memory(&self) -> Memory {
        let memory = empty_memory();
        lock(&self.memory).clone_from(&memory);
        memory
    }

    /// Changes the status, if that is still up to the worker with this memory.
    pub fn update_by(&self, worker: &Memory, change: impl FnOnce(&mut DomainStatus)) {
        let memory = lock(&self.memory);
        if Arc::ptr_eq(&memory, worker) {
            self.update(change);
        }
    }

    /// Forgets all that a worker found.
    pub fn clear(&self, state: DomainState, reason: Option<String>) {
        let mut memory = lock(&self.memory);
        *memory = empty_memory();
        self.update(|status| forget(status, state, reason));
        drop(self.rounds.take());
    }

    /// Forgets all that the worker with this memory found, if nobody did so yet.
    pub fn clear_by(&self, worker: &Memory, state: DomainState, reason: Option<String>) {
        let mut memory = lock(&self.memory);
        if Arc::ptr_eq(&memory, worker) {
            *memory = empty_memory();
            self.update(|status| forget(status, state, reason));
            drop(self.rounds.take());
        }
    }

    /// Asks the worker for its rounds, or says why they can not be had.
    pub fn record(&self) -> Result<Rounds, String> {
        let status = lock(&self.status);
        if !matches!(status.state, DomainState::Observing | DomainState::Placing) {
            return Err(status.reason.clone().unwrap_or_else(|| "it is not observed".into()));
        }
        self.rounds.plug().ok_or_else(|| "it is being recorded already".into())
    }

    /// The tap that somebody who records has asked for.
    pub fn take_tap(&self) -> Option<Tap> {
        self.rounds.take()
    }

    /// Name and UUID.
    pub fn names(&self) -> (String, String) {
        let status = lock(&self.status);
        (status.name.clone(), status.uuid.clone())
    }

    fn memory(&self) -> Memory {
        Arc::clone(&lock(&self.memory))
    }

    /// The status with the picture of the memory.
    pub fn status(&self) -> DomainStatus {
        let mut status = lock(&self.status).clone();
        status.strip = plan::strip(&lock(&self.memory()).views(), STRIP_CELLS);
        status
    }

    /// The map of the memory, or why there is none.
    pub fn map(&self) -> Result<MemoryMap, (ErrorKind, String)> {
        let status = lock(&self.status).clone();
        let Some(round) = status.round else {
            let reason = status.reason.unwrap_or_else(|| "its first round has not ended yet".into());
            return Err((ErrorKind::NotObserved, reason));
        };
        // Before it is gathered: of a large guest it may be gigabytes.
        let runs = plan::map_runs(&lock(&self.memory()).views(), MAX_MAP_RUNS).ok_or_else(|| {
            (ErrorKind::Internal, format!("it is in more than {MAX_MAP_RUNS} pieces, too many for an answer"))
        })?;
        Ok(MemoryMap { name: status.name, round: round.number, runs })
    }
}

/// The memory of a domain that nobody observes.
fn empty_memory() -> Memory {
    Arc::new(Mutex::new(GuestMemory::new(Policy::default().heat_params())))
}

fn forget(status: &mut DomainStatus, state: DomainState, reason: Option<String>) {
    status.state = state;
    status.reason = reason;
    status.pid = None;
    status.policy_warnings = Vec::new();
    status.memory_bytes = 0;
    status.excluded_bytes = 0;
    status.slots = 0;
    status.round = None;
    status.moves = MoveTotals::default();
    status.sampling = None;
    status.slowdown = None;
    status.budget = None;
    status.restored_s = None;
}

/// What the main thread is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// It waits for something to do.
    Waits,
    /// It waits for libvirt's answer, since then.
    Asks(Instant),
    /// It works, since then.
    Works(Instant),
}

/// The daemon's own facts.
pub struct Facts {
    /// "connected", or why not.
    pub libvirt: String,
    /// What the main thread is at.
    phase: Phase,
    /// The kernel module, if it answers.
    pub module: Option<ModuleStatus>,
    /// Why it does not.
    pub module_error: Option<String>,
    /// Nudges received.
    pub nudges: u64,
    /// The last one.
    pub last_nudge: Option<String>,
    /// The host's tiers.
    pub tiers: Tiers,
    /// For people.
    pub warnings: Vec<String>,
}

impl Facts {
    fn libvirt(&self) -> String {
        match self.phase {
            Phase::Asks(since) if since.elapsed() > SLOW_LIBVIRT => {
                format!("does not answer since {} s", since.elapsed().as_secs())
            }
            _ => self.libvirt.clone(),
        }
    }
}

/// All that threads share.
pub struct Shared {
    started: Instant,
    uri: String,
    facts: Mutex<Facts>,
    domains: Mutex<BTreeMap<String, Arc<Cell>>>,
}

impl Shared {
    /// No domains, and libvirt not asked yet.
    pub fn new(uri: &str) -> Self {
        let facts = Facts {
            libvirt: "not asked yet".into(),
            // It begins with work of its own.
            phase: Phase::Works(Instant::now()),
            module: None,
            module_error: None,
            nudges: 0,
            last_nudge: None,
            tiers: Tiers::default(),
            warnings: Vec::new(),
        };
        Self {
            started: Instant::now(),
            uri: uri.to_owned(),
            facts: Mutex::new(facts),
            domains: Mutex::default(),
        }
    }

    /// The daemon's own facts.
    pub fn facts(&self) -> MutexGuard<'_, Facts> {
        lock(&self.facts)
    }

    /// What the main thread is at.
    pub fn phase(&self) -> Phase {
        self.facts().phase
    }

    /// The main thread goes on to something else.
    pub fn enter(&self, phase: Phase) {
        self.facts().phase = phase;
    }

    /// How it goes, in a line.
    pub fn summary(&self) -> String {
        let domains: Vec<Arc<Cell>> = lock(&self.domains).values().cloned().collect();
        let observed = |cell: &&Arc<Cell>| {
            matches!(lock(&cell.status).state, DomainState::Observing | DomainState::Placing)
        };
        let observing = domains.iter().filter(observed).count();
        let libvirt = self.facts().libvirt();
        format!("{observing} of {} domains observed; libvirt: {libvirt}", domains.len())
    }

    /// Adds a domain, by UUID.
    pub fn insert(&self, uuid: &str, cell: Arc<Cell>) {
        lock(&self.domains).insert(uuid.to_owned(), cell);
    }

    /// Removes a domain.
    pub fn remove(&self, uuid: &str) {
        lock(&self.domains).remove(uuid);
    }

    /// The domain of this name, id or UUID, looked for in this order, as
    /// [`DefinedDomain::find`](ept_virt_core::domain::DefinedDomain::find) does.
    pub fn find(&self, wanted: &str) -> Option<Arc<Cell>> {
        let domains = lock(&self.domains);
        let is = |matches: &dyn Fn(&DomainStatus) -> bool| {
            domains.values().find(|cell| matches(&lock(&cell.status))).map(Arc::clone)
        };
        is(&|status| status.name == wanted)
            .or_else(|| is(&|status| status.id.is_some_and(|id| id.to_string() == wanted)))
            .or_else(|| domains.get(&wanted.to_ascii_lowercase()).map(Arc::clone))
    }

    /// The status of the daemon, and of one domain or all.
    pub fn status(&self, only: Option<Arc<Cell>>) -> Status {
        // Cloned first: pictures take time, and others wait for the lock.
        let cells = only.map_or_else(|| lock(&self.domains).values().cloned().collect(), |cell| vec![cell]);
        let mut domains: Vec<DomainStatus> = cells.iter().map(|cell| cell.status()).collect();
        domains.sort_by(|a, b| a.name.cmp(&b.name));
        Status { daemon: self.daemon_status(), domains }
    }

    fn daemon_status(&self) -> DaemonStatus {
        let facts = self.facts();
        DaemonStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_s: self.started.elapsed().as_secs(),
            libvirt_uri: self.uri.clone(),
            libvirt: facts.libvirt(),
            module: facts.module.clone(),
            module_error: facts.module_error.clone(),
            nudges: facts.nudges,
            last_nudge: facts.last_nudge.clone(),
            fast_nodes: facts.tiers.fast.iter().collect(),
            slow_nodes: facts.tiers.slow.iter().collect(),
            tiers_from: facts.tiers.from.clone(),
            warnings: facts.warnings.clone(),
        }
    }
}
