// SPDX-License-Identifier: MIT OR Apache-2.0
//! One thread for each domain that is observed.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ept_virt_core::domain::RunningDomain;
use ept_virt_core::migrate::{KernelMover, ProcessGone};
use ept_virt_core::process::{Process, ProcessError, find_vm_fd};
use ept_virt_core::sampler::{KernelSampler, SamplerError};
use ept_virt_core::wire::{DomainState, RoundStatus};
use log::{debug, info, warn};
use std::os::fd::AsFd;

use super::guest::{Guest, Moves, Orders, Pace};
use super::state::Cell;

/// The part of a round's time that the first look at all pages may take.
const FIRST_SURVEY_DIVISOR: u32 = 2;

/// The part that later looks may take.
const SURVEY_DIVISOR: u32 = 64;

/// Shortest time between the starts of two rounds, whatever a policy says.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(10);

/// What a worker needs to begin.
pub struct Attachment {
    process: Arc<Process>,
    sampler: KernelSampler,
}

/// Finds the domain's process and VM, and binds the kernel module to it; or says
/// why it can not be observed.
pub fn attach(domain: &RunningDomain) -> Result<Attachment, String> {
    if let Some(kind) = domain.kind().filter(|kind| kind != "kvm") {
        return Err(format!(
            "the domain runs without KVM (type='{kind}'): there are no second-level page tables to read. Use <domain type='kvm'>"
        ));
    }
    let pid = domain.read_pid().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            format!("the pid of its QEMU is not known: {} is missing", domain.pid_file().display())
        }
        _ => format!("the pid of its QEMU is not known: {}: {error}", domain.pid_file().display()),
    })?;
    let process = Process::open_qemu(pid, &domain.uuid).map_err(|error| explain(&error))?;
    let vm = find_vm_fd(&process).map_err(|error| explain(&error))?;
    let mut sampler = KernelSampler::open().map_err(|error| error.to_string())?;
    sampler.attach(vm.as_fd()).map_err(|error| error.to_string())?;
    Ok(Attachment { process: Arc::new(process), sampler })
}

fn explain(error: &ProcessError) -> String {
    match error.hint() {
        Some(hint) => format!("{error}: {hint}"),
        None => error.to_string(),
    }
}

/// How a worker ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// It was told to.
    Stopped,
    /// The guest has ended.
    Gone,
    /// It can not go on.
    Failed(String),
}

impl From<ProcessGone> for End {
    fn from(_: ProcessGone) -> Self {
        End::Gone
    }
}

impl From<SamplerError> for End {
    fn from(error: SamplerError) -> Self {
        match error {
            SamplerError::VmGone => End::Gone,
            other => End::Failed(other.to_string()),
        }
    }
}

/// A running worker. Dropping it stops it.
pub struct Worker {
    orders: Option<Sender<Orders>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<End>>,
}

impl Worker {
    /// Starts the worker of a domain.
    pub fn spawn(attachment: Attachment, cell: Arc<Cell>, orders: Orders, name: &str) -> io::Result<Self> {
        let Attachment { process, sampler } = attachment;
        let started = Instant::now();
        let mover = KernelMover::new(Arc::clone(&process), Path::new("/sys").into());
        let guest =
            Guest::new(Box::new(sampler), Box::new(mover), cell.memory(), orders, started.elapsed());
        let (sender, receiver) = mpsc::channel();
        let stop = Arc::new(AtomicBool::new(false));
        let run = Run {
            guest,
            process,
            cell,
            orders: receiver,
            stop: Arc::clone(&stop),
            started,
            round: None,
            name: name.to_owned(),
        };
        // The kernel keeps 15 bytes of a thread's name.
        let thread = thread::Builder::new().name(format!("vm {name}")).spawn(move || run.run())?;
        Ok(Self { orders: Some(sender), stop, thread: Some(thread) })
    }

    /// Gives other orders. A worker that has ended does not mind.
    pub fn order(&self, orders: Orders) {
        if let Some(sender) = &self.orders {
            let _ = sender.send(orders);
        }
    }

    /// Whether the thread has ended.
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Stops the worker, if it has not ended, and says how it ended.
    pub fn finish(mut self) -> End {
        self.join()
    }

    fn join(&mut self) -> End {
        self.stop.store(true, Ordering::Relaxed);
        // A closed channel wakes the thread.
        self.orders = None;
        match self.thread.take().map(JoinHandle::join) {
            None => End::Stopped,
            Some(Ok(end)) => end,
            Some(Err(_)) => End::Failed("the worker failed by a fault in ept-virt; see the daemon's log".into()),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.join();
    }
}

/// What the thread owns.
struct Run {
    guest: Guest,
    process: Arc<Process>,
    cell: Arc<Cell>,
    orders: Receiver<Orders>,
    stop: Arc<AtomicBool>,
    started: Instant,
    round: Option<RoundStatus>,
    name: String,
}

impl Run {
    fn run(mut self) -> End {
        info!("domain {:?}: observing process {}", self.name, self.process.pid());
        let end = self.rounds();
        match &end {
            End::Stopped => debug!("domain {:?}: no longer observed", self.name),
            End::Gone => info!("domain {:?}: its QEMU has ended", self.name),
            End::Failed(reason) => warn!("domain {:?} can not be observed: {reason}", self.name),
        }
        end
    }

    /// Round after round; returns how it ended.
    fn rounds(&mut self) -> End {
        let mut next = Instant::now();
        loop {
            match self.rest_until(next).and_then(|()| self.one_round(&mut next)) {
                Ok(()) => {}
                Err(end) => return end,
            }
        }
    }

    /// One round and what moves until the next, which begins at `next`.
    fn one_round(&mut self, next: &mut Instant) -> Result<(), End> {
        let begun = Instant::now();
        if !self.process.is_alive() {
            return Err(End::Gone);
        }
        self.round = Some(self.guest.round(self.now())?);
        let interval = self.guest.orders().policy.sampling.interval.max(SHORTEST_INTERVAL);
        // Rounds that could not be held in time are left out, not caught up with.
        *next = (*next + interval).max(begun);
        let divisor = if self.guest.surveyed() { SURVEY_DIVISOR } else { FIRST_SURVEY_DIVISOR };
        self.guest.survey(Instant::now() + interval / divisor)?;
        let moves = self.guest.plan(self.now(), interval);
        self.publish();
        self.move_until(moves, *next)?;
        self.publish();
        Ok(())
    }

    fn move_until(&mut self, mut moves: Moves, end: Instant) -> Result<(), End> {
        loop {
            let pace = self.guest.move_some(&mut moves, self.now(), &self.stop)?;
            let until = match pace {
                Pace::Done => return Ok(()),
                Pace::More => Instant::now(),
                Pace::Wait(time) => Instant::now() + time,
            };
            // Other orders make the plan void; so does the next round.
            if until >= end || self.wait_until(until)? {
                return Ok(());
            }
        }
    }

    /// Waits, obeying orders that come meanwhile.
    fn rest_until(&mut self, until: Instant) -> Result<(), End> {
        while self.wait_until(until)? {}
        Ok(())
    }

    /// Waits for a time or for orders, which it obeys; says whether it was
    /// orders.
    fn wait_until(&mut self, until: Instant) -> Result<bool, End> {
        match self.orders.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Err(RecvTimeoutError::Timeout) => Ok(false),
            Err(RecvTimeoutError::Disconnected) => Err(End::Stopped),
            Ok(orders) => {
                self.guest.obey(orders, self.now());
                self.publish();
                Ok(true)
            }
        }
    }

    /// Shows what was found.
    fn publish(&self) {
        let state = if self.guest.orders().place() { DomainState::Placing } else { DomainState::Observing };
        let reason = self.guest.hindrance(self.now());
        let (bytes, slots) = self.guest.size();
        let moves = self.guest.totals();
        self.cell.update(|status| {
            status.pid = Some(self.process.pid());
            status.state = state;
            status.reason = reason;
            status.memory_bytes = bytes.0;
            status.slots = slots;
            status.round.clone_from(&self.round);
            status.moves = moves;
        });
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }
}
