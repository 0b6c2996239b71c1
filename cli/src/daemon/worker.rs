// SPDX-License-Identifier: MIT OR Apache-2.0
//! One thread for each domain that is observed.

use std::io;
use std::mem;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use ept_virt_core::domain::RunningDomain;
use ept_virt_core::migrate::{KernelMover, Mover, Moves, ProcessGone};
use ept_virt_core::pace::{self, phase};
use ept_virt_core::process::Process;
use ept_virt_core::sampler::{Sampler, SamplerError};
use ept_virt_core::samples::Sampling as Samples;
use ept_virt_core::units::Bytes;
use ept_virt_core::wire::{DomainState, RoundStatus};
use log::warn;
use nix::time::{ClockId, clock_gettime};

use crate::attach::{self, Attached, Obstacle, Unattached};

use super::budget::Budget;
use super::claim::{self, CLAIMS_DIR, Claim};
use super::guest::{Guest, Orders, Pace};
use super::keep::{Keeper, Recalled, Saver};
use super::logging::about;
use super::sampling::{self, Sampling};
use super::slowdown::Watch;
use super::state::{Cell, Memory};

/// The part of a round's time that the first look at all pages may take.
const FIRST_SURVEY_DIVISOR: u32 = 2;

/// The part that later looks may take.
const SURVEY_DIVISOR: u32 = 64;

/// How long workers that were told to stop are waited for, all together. One that
/// hangs in the kernel, or on a disk, must not keep the other domains waiting for
/// good, nor many of them the watchdog.
const STOP_LIMIT: Duration = Duration::from_secs(8);

/// Between two looks whether it has stopped.
const STOP_PAUSE: Duration = Duration::from_millis(5);

/// The part of an interval by which a round may be late because the guest rests.
const WINDOW_LATEST: u32 = 2;

/// Looks at what is young so soon after a round come before all that follows a round.
const LOOK_FIRST: Duration = Duration::from_millis(100);

/// Between two looks whether a suspended guest is still there.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The first rounds of workers that start at once are spread over as much for each
/// of them, up to the limit. So that one alone need not wait.
const START_SPREAD: Duration = Duration::from_millis(10);

/// See [`START_SPREAD`].
const START_SPREAD_LIMIT: Duration = Duration::from_secs(1);

/// What a worker needs to begin.
pub struct Attachment {
    process: Arc<Process>,
    sampler: Box<dyn Sampler>,
    mover: Box<dyn Mover>,
    claim: Claim,
    /// None: the heat is not kept.
    saver: Option<Saver>,
}

/// Finds the domain's process and VM, and binds the kernel module to it; or says
/// why it can not be observed.
pub fn attach(domain: &RunningDomain, keeper: Option<&Arc<Keeper>>) -> Result<Attachment, Unattached> {
    let Attached { process, sampler } = attach::attach(domain)?;
    let process = Arc::new(process);
    let pid = process.pid();
    let claim = Claim::take(Path::new(CLAIMS_DIR), pid).map_err(|error| Unattached {
        pid: Some(pid),
        obstacle: Obstacle::of_domain(claim::explain(&error)),
    })?;
    let mover = KernelMover::new(Arc::clone(&process), Path::new("/sys").into());
    let saver = keeper.and_then(|keeper| match process.identity() {
        Ok(identity) => Some(Saver::new(keeper.file(&domain.uuid, identity), monotonic())),
        Err(error) => {
            let (name, uuid) = (&domain.name, &domain.uuid);
            about!(warn, name, uuid, "the heat of domain {name:?} is not kept: {error}");
            None
        }
    });
    Ok(Attachment { process, sampler: Box::new(sampler), mover: Box::new(mover), claim, saver })
}

/// CLOCK_MONOTONIC, which all of a boot share, and which stands still while the
/// host sleeps.
fn monotonic() -> Duration {
    // The kernel refuses no process this clock.
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from)
}

/// Samples the VM of a process by a session of its own, as one that samples is busy.
fn begin_sampling(process: Arc<Process>) -> Box<sampling::Begin> {
    Box::new(move |access, rate_hz, records| {
        let session = attach::attach_session(&process).map_err(|obstacle| obstacle.reason)?;
        let samples = Samples::start(session, access, rate_hz, records).map_err(|error| error.to_string())?;
        Ok(Box::new(samples))
    })
}

/// CPU time of this thread.
fn thread_time() -> Duration {
    // Nor this one.
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
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
    /// Nobody waits for it any longer: its heat is not to be kept.
    abandoned: Arc<AtomicBool>,
    thread: Option<JoinHandle<End>>,
}

impl Worker {
    /// Starts the worker of a domain.
    pub fn spawn(
        attachment: Attachment,
        cell: Arc<Cell>,
        budget: &Arc<Budget>,
        orders: Orders,
        name: &str,
    ) -> io::Result<Self> {
        let Attachment { process, sampler, mover, claim, saver } = attachment;
        let memory = cell.renew_memory();
        let mut guest = Guest::new(sampler, mover, Arc::clone(&memory), orders, monotonic());
        guest.sample_by(Sampling::new(begin_sampling(Arc::clone(&process))));
        let vcpus = Arc::clone(&process);
        guest.watch_by(Watch::new(Box::new(move || vcpus.guest_time().ok())));
        guest.sit(budget.seat());
        let spread = START_SPREAD.saturating_mul(budget.seats() as u32).min(START_SPREAD_LIMIT);
        let phase = phase(&cell.uuid());
        let (sender, receiver) = mpsc::channel();
        let stop = Arc::<AtomicBool>::default();
        let abandoned = saver.as_ref().map(Saver::void).unwrap_or_default();
        let run = Run {
            guest,
            process,
            cell,
            memory,
            orders: receiver,
            stop: Arc::clone(&stop),
            claim,
            saver,
            round: None,
            moves: Moves::default(),
            pace: pace::Pace::default(),
            between_cost: Duration::ZERO,
            phase,
            begin: Instant::now() + spread.mul_f64(phase),
            name: name.to_owned(),
        };
        // The kernel keeps 15 bytes of a thread's name.
        let thread = thread::Builder::new().name(format!("vm {name}")).spawn(move || run.run())?;
        Ok(Self { orders: Some(sender), stop, abandoned, thread: Some(thread) })
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
        self.join_until(Instant::now() + STOP_LIMIT)
    }

    fn join_until(&mut self, deadline: Instant) -> End {
        self.stop();
        let Some(thread) = self.thread.take() else { return End::Stopped };
        while !thread.is_finished() {
            if Instant::now() > deadline {
                self.abandoned.store(true, Ordering::Relaxed);
                let reason = format!("its worker did not stop within {STOP_LIMIT:?}, and is left to itself");
                warn!("{}: {reason}", thread.thread().name().unwrap_or_default());
                return End::Failed(reason);
            }
            thread::sleep(STOP_PAUSE);
        }
        thread.join().unwrap_or_else(|_| {
            End::Failed("the worker failed by a fault in ept-virt; see the daemon's log".into())
        })
    }
}

/// Stops workers, and waits for all of them no longer than for one.
pub fn stop_all(mut workers: Vec<Worker>) -> Vec<End> {
    // All are asked before one is waited for.
    workers.iter_mut().for_each(Worker::stop);
    let deadline = Instant::now() + STOP_LIMIT;
    workers.iter_mut().map(|worker| worker.join_until(deadline)).collect()
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
    memory: Memory,
    orders: Receiver<Orders>,
    stop: Arc<AtomicBool>,
    claim: Claim,
    saver: Option<Saver>,
    round: Option<RoundStatus>,
    /// What was planned last and is left.
    moves: Moves,
    pace: pace::Pace,
    /// CPU time that the last plan took, and what was harvested since the last round.
    between_cost: Duration,
    /// The domain's own part of an interval, so that rounds of many do not coincide.
    phase: f64,
    /// When the first round is.
    begin: Instant,
    name: String,
}

impl Run {
    fn run(mut self) -> End {
        let (name, uuid) = (self.name.clone(), self.cell.uuid());
        about!(info, name, uuid, "domain {name:?}: observing process {}", self.process.pid());
        let end = self.rounds();
        match &end {
            End::Stopped => about!(debug, name, uuid, "domain {name:?}: no longer observed"),
            End::Gone => about!(info, name, uuid, "domain {name:?}: its QEMU has ended"),
            End::Failed(reason) => about!(warn, name, uuid, "domain {name:?} can not be observed: {reason}"),
        }
        let harvested_at = self.guest.harvested_at(self.now());
        let Self { guest, saver, memory, process, cell, .. } = self;
        // A disk that hangs is to keep neither the VM nor the guest's part of DRAM.
        drop(guest);
        if let Some(saver) = saver {
            // Who is told to stop because the guest has ended may not have noticed.
            match end != End::Gone && process.is_alive() {
                true => saver.finish(harvested_at, &memory),
                // No one will ask for the heat of a guest that is gone.
                false => saver.discard(),
            }
        }
        // At once, not when somebody looks for the thread.
        cell.clear_by(&memory, DomainState::Unobserved, Some(end.reason()));
        end
    }

    /// Round after round; returns how it ended.
    fn rounds(&mut self) -> End {
        if let Err(end) = self.recall() {
            return end;
        }
        let mut next = self.begin;
        loop {
            match self.rest_until(next).and_then(|()| self.one_round(&mut next)) {
                Ok(()) => {}
                Err(end) => return end,
            }
        }
    }

    /// Goes on with the heat that an earlier daemon kept, if there is any.
    fn recall(&mut self) -> Result<(), End> {
        let Some(saver) = &self.saver else { return Ok(()) };
        let (now, half_life) = (self.now(), self.guest.orders().policy.half_life);
        let slots = self.guest.learn_slots()?;
        let recalled = saver.file().recall(half_life, now, |slot| slots.contains(slot));
        let Some(Recalled { harvested_at, slots: heat }) = recalled else { return Ok(()) };
        let found = self.guest.recall(heat, harvested_at);
        let age = now.saturating_sub(harvested_at).as_secs();
        let (name, uuid, all) = (&self.name, self.cell.uuid(), slots.len());
        about!(
            info,
            name,
            uuid,
            "domain {name:?}: its heat of {age} s ago came back, for {found} of {all} memory slots"
        );
        self.cell.update_by(&self.memory, |status| status.restored_s = Some(age));
        Ok(())
    }

    fn keep(&mut self) {
        let (now, params) = (self.now(), self.guest.orders().policy.heat_params());
        if let Some(saver) = &mut self.saver {
            saver.save_if_due(now, params, self.guest.harvested_at(now), &self.memory);
        }
    }

    /// One round and what moves until the next, which begins at `next`.
    fn one_round(&mut self, next: &mut Instant) -> Result<(), End> {
        let begun = Instant::now();
        if !self.process.is_alive() {
            return Err(End::Gone);
        }
        if let Err(error) = self.claim.renew() {
            return Err(End::Failed(claim::explain(&error)));
        }
        self.keep();
        if self.guest.rests() {
            // Only to see whether the guest is still there.
            *next = begun + LOOK_INTERVAL;
            self.publish();
            return Ok(());
        }
        if let Some(tap) = self.cell.take_tap() {
            self.guest.record(tap);
        }
        let before = thread_time();
        let round = self.guest.round(self.now())?;
        let cleared = Instant::now();
        let cost = thread_time().saturating_sub(before) + mem::take(&mut self.between_cost);
        let (interval, mut window) = self.next_round(&round, cost);
        // Rounds that could not be held in time are left out, not caught up with.
        *next = match round.number {
            1 => begun + interval / 4 + interval.mul_f64(self.phase),
            _ => (*next + interval).max(begun),
        };
        let time = next.saturating_duration_since(cleared);
        let looks: Vec<_> = self.pace.looks(&self.guest.pace_limits(), time).collect();
        // What comes next may take longer than the first of them.
        let (soon, later) = looks.split_at(looks.partition_point(|after| *after <= LOOK_FIRST));
        self.look(cleared, soon)?;
        self.guest.verify_places()?;
        self.round = Some(round);
        let divisor = if self.guest.surveyed() { SURVEY_DIVISOR } else { FIRST_SURVEY_DIVISOR };
        self.guest.survey(Instant::now() + interval / divisor)?;
        self.guest.claim(self.now());
        let (before, moves) = (thread_time(), mem::take(&mut self.moves));
        self.moves = self.guest.plan_if_due(moves, self.now(), interval);
        self.between_cost += thread_time().saturating_sub(before);
        self.publish();
        self.look(cleared, later)?;
        if !looks.is_empty() {
            window = self.pace.window(&self.guest.pace_limits());
        }
        match window {
            Some(window) => self.watch(window, *next, *next + interval / WINDOW_LATEST)?,
            None => self.move_until(*next)?,
        }
        self.publish();
        Ok(())
    }

    /// Looks what is young by these times after the last round, which ended at `cleared`;
    /// moves meanwhile.
    fn look(&mut self, cleared: Instant, looks: &[Duration]) -> Result<(), End> {
        for after in looks {
            self.move_until(cleared + *after)?;
            self.rest_until(cleared + *after)?;
            let at = cleared.elapsed();
            let young = self.young()?;
            self.pace.looked(at, young);
        }
        Ok(())
    }

    /// What is young by now.
    fn young(&mut self) -> Result<Bytes, End> {
        let before = thread_time();
        let young = self.guest.look()?;
        self.between_cost += thread_time().saturating_sub(before);
        Ok(young)
    }

    /// Moves until the window of the round at `next` begins, begins it, and waits for its
    /// end. Nothing moves in it: a page that does loses what was seen of it. A window that
    /// began late ends late; and while the guest rests in it, it goes on until `latest`.
    fn watch(&mut self, window: Duration, next: Instant, latest: Instant) -> Result<(), End> {
        let opens = next.checked_sub(window).unwrap_or(next);
        self.move_until(opens)?;
        self.rest_until(opens)?;
        let before = thread_time();
        self.guest.open_window(monotonic)?;
        self.between_cost += thread_time().saturating_sub(before);
        let mut ends = next.max(Instant::now() + window);
        self.rest_until(ends)?;
        while ends + window < latest && !self.tells_enough(window)? {
            ends += window;
            self.rest_until(ends)?;
        }
        Ok(())
    }

    /// Whether enough is young by now; if that can be found out in time.
    fn tells_enough(&mut self, window: Duration) -> Result<bool, End> {
        if !self.pace.may_look(window) {
            return Ok(true);
        }
        let young = self.young()?;
        Ok(self.guest.pace_limits().tells_enough(young))
    }

    /// Time to the next round, and the window of it.
    fn next_round(&mut self, round: &RoundStatus, cost: Duration) -> (Duration, Option<Duration>) {
        let limits = self.guest.pace_limits();
        let harvest = Duration::from_micros(round.harvest_us);
        match round.interval_ms {
            0 => (self.pace.first(&limits, cost, harvest), None),
            _ => {
                let (watched, young) = (Duration::from_micros(round.watched_us), Bytes(round.accessed_bytes));
                let next = self.pace.next(&pace::Round { watched, young, cost, harvest }, &limits);
                (next.interval, next.window)
            }
        }
    }

    fn move_until(&mut self, end: Instant) -> Result<(), End> {
        loop {
            let now = self.now();
            let pace = self.guest.move_some(&mut self.moves, now, &self.stop)?;
            let until = match pace {
                Pace::Done => return Ok(()),
                Pace::More => Instant::now(),
                Pace::Wait(time) => Instant::now() + time,
            };
            // Other orders make the plan void; so does the next plan.
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
                self.moves = Moves::default();
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
        let (moves, budget) = (self.guest.totals(), self.guest.budget_status());
        let (excluded, warnings) = self.guest.excluded();
        let (sampling, slowdown) = (self.guest.sampling(), self.guest.slowdown());
        let round = self.round.clone().map(|round| self.guest.with_places(round));
        self.cell.update_by(&self.memory, |status| {
            status.pid = Some(self.process.pid());
            status.state = state;
            status.reason = reason;
            status.memory_bytes = bytes.0;
            status.excluded_bytes = excluded.0;
            status.policy_warnings = warnings;
            status.sampling = sampling;
            status.slowdown = slowdown;
            status.slots = slots;
            status.round = round;
            status.budget = budget;
            status.moves = moves;
        });
    }

    fn now(&self) -> Duration {
        monotonic()
    }
}

#[cfg(test)]
#[path = "worker_tests.rs"]
mod tests;
