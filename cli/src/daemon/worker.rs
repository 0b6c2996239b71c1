// SPDX-License-Identifier: MIT OR Apache-2.0
//! One thread for each domain that is observed.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ept_virt_core::domain::RunningDomain;
use ept_virt_core::migrate::{KernelMover, Mover, ProcessGone};
use ept_virt_core::process::Process;
use ept_virt_core::sampler::{Sampler, SamplerError};
use ept_virt_core::wire::{DomainState, RoundStatus};
use log::{debug, info, warn};

use crate::attach::{self, Attached, Unattached};

use super::guest::{Guest, Moves, Orders, Pace};
use super::state::Cell;

/// The part of a round's time that the first look at all pages may take.
const FIRST_SURVEY_DIVISOR: u32 = 2;

/// The part that later looks may take.
const SURVEY_DIVISOR: u32 = 64;

/// Shortest time between the starts of two rounds, whatever a policy says.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(10);

/// Time between rounds for those who leave it to us.
const AUTO_INTERVAL: Duration = Duration::from_secs(1);

/// What a worker needs to begin.
pub struct Attachment {
    process: Arc<Process>,
    sampler: Box<dyn Sampler>,
    mover: Box<dyn Mover>,
}

/// Finds the domain's process and VM, and binds the kernel module to it; or says
/// why it can not be observed.
pub fn attach(domain: &RunningDomain) -> Result<Attachment, Unattached> {
    let Attached { process, sampler } = attach::attach(domain)?;
    let process = Arc::new(process);
    let mover = KernelMover::new(Arc::clone(&process), Path::new("/sys").into());
    Ok(Attachment { process, sampler: Box::new(sampler), mover: Box::new(mover) })
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

impl End {
    /// Why the domain is no longer observed, in plain words.
    pub fn reason(&self) -> String {
        match self {
            End::Stopped => "it is no longer to be observed".into(),
            End::Gone => "its QEMU has ended".into(),
            End::Failed(reason) => reason.clone(),
        }
    }
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
        let Attachment { process, sampler, mover } = attachment;
        let started = Instant::now();
        let guest = Guest::new(sampler, mover, cell.memory(), orders, started.elapsed());
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

    /// Asks the worker to stop, and does not wait until it has.
    pub fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // A closed channel wakes the thread.
        self.orders = None;
    }

    fn join(&mut self) -> End {
        self.stop();
        match self.thread.take().map(JoinHandle::join) {
            None => End::Stopped,
            Some(Ok(end)) => end,
            Some(Err(_)) => {
                End::Failed("the worker failed by a fault in ept-virt; see the daemon's log".into())
            }
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
        // At once, not when somebody looks for the thread.
        self.cell.clear(DomainState::Unobserved, Some(end.reason()));
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
        let asked = self.guest.orders().policy.sampling.interval;
        let interval = asked.unwrap_or(AUTO_INTERVAL).max(SHORTEST_INTERVAL);
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

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use ept_virt_core::migrate::MoveOutcome;
    use ept_virt_core::plan::MoveUnit;
    use ept_virt_core::policy::Policy;
    use ept_virt_core::sampler::{EntryFormat, Harvest, HarvestRequest, MemSlot, ModuleInfo};
    use ept_virt_core::topology::{NodeSet, Tiers};

    use super::*;

    /// A guest without memory: what counts here is the thread.
    struct NoMemory {
        fails: bool,
    }

    impl Sampler for NoMemory {
        fn info(&self) -> ModuleInfo {
            ModuleInfo { abi: (1, 0), format: EntryFormat::Ept, clear_dirty: false, keep_young: false }
        }

        fn memslots(&mut self) -> Result<(u64, Vec<MemSlot>), SamplerError> {
            if self.fails { Err(SamplerError::Unsupported("a test says no")) } else { Ok((1, Vec::new())) }
        }

        fn harvest(&mut self, _: &HarvestRequest, _: &NodeSet, _: &mut Harvest) -> Result<(), SamplerError> {
            Ok(())
        }
    }

    impl Mover for NoMemory {
        fn places(&mut self, _: &[u64], nodes: &mut Vec<Option<u32>>) -> Result<(), ProcessGone> {
            nodes.clear();
            Ok(())
        }

        fn room(&self, _: &NodeSet) -> u64 {
            0
        }

        fn apply(&mut self, _: &[MoveUnit], _: &NodeSet, _: &AtomicBool) -> Result<MoveOutcome, ProcessGone> {
            Ok(MoveOutcome::default())
        }
    }

    fn orders(interval: Duration) -> Orders {
        let mut policy = Policy::default();
        policy.sampling.interval = Some(interval);
        Orders { policy, tiers: Tiers::default(), obstacle: None }
    }

    /// A worker for a process that only sleeps.
    fn start(interval: Duration, fails: bool) -> (Worker, Child, Arc<Cell>) {
        let child = Command::new("sleep").arg("600").spawn().unwrap();
        let process = Arc::new(Process::open(child.id() as i32).unwrap());
        let (sampler, mover) = (Box::new(NoMemory { fails }), Box::new(NoMemory { fails }));
        let cell = Arc::new(Cell::new("vm1", "6695eb01"));
        let attachment = Attachment { process, sampler, mover };
        let worker = Worker::spawn(attachment, Arc::clone(&cell), orders(interval), "vm1").unwrap();
        (worker, child, cell)
    }

    fn wait_for(what: &str, condition: impl Fn() -> bool) {
        let started = Instant::now();
        while !condition() {
            assert!(started.elapsed() < Duration::from_secs(20), "waited in vain: {what}");
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn rounds(cell: &Cell) -> u64 {
        cell.status().round.map_or(0, |round| round.number)
    }

    #[test]
    fn holds_rounds_until_it_is_stopped() {
        let (worker, mut child, cell) = start(SHORTEST_INTERVAL, false);
        wait_for("three rounds", || rounds(&cell) >= 3);
        assert_eq!(cell.status().pid, Some(child.id() as i32));
        assert_eq!(cell.status().state, DomainState::Observing);
        assert_eq!(worker.finish(), End::Stopped);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn stops_and_obeys_in_the_middle_of_a_long_interval() {
        let (worker, mut child, cell) = start(Duration::from_secs(3600), false);
        wait_for("the first round", || rounds(&cell) == 1);
        worker.order(Orders { obstacle: Some("a test".into()), ..orders(Duration::from_secs(3600)) });
        wait_for("the orders", || cell.status().reason.as_deref() == Some("a test"));
        let asked = Instant::now();
        drop(worker);
        assert!(asked.elapsed() < Duration::from_secs(20));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn ends_with_the_guest() {
        let (worker, mut child, cell) = start(SHORTEST_INTERVAL, false);
        wait_for("the first round", || rounds(&cell) >= 1);
        child.kill().unwrap();
        wait_for("the end", || worker.has_ended());
        let status = cell.status();
        assert_eq!((status.state, status.pid, status.round), (DomainState::Unobserved, None, None));
        assert_eq!(worker.finish(), End::Gone);
        child.wait().unwrap();
    }

    #[test]
    fn says_why_it_can_not_go_on() {
        let (worker, mut child, _) = start(SHORTEST_INTERVAL, true);
        wait_for("the end", || worker.has_ended());
        assert_eq!(worker.finish(), End::Failed("a test says no".into()));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
