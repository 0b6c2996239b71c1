// SPDX-License-Identifier: MIT OR Apache-2.0

use std::process::{Child, Command};

use ept_virt_core::migrate::MoveOutcome;
use ept_virt_core::plan::MoveUnit;
use ept_virt_core::policy::{HostLimits, Policy};
use ept_virt_core::sampler::{EntryFormat, Harvest, HarvestRequest, MemSlot, ModuleInfo};
use ept_virt_core::topology::{NodeSet, Tiers};

use super::super::guest::share::SHORTEST_INTERVAL;
use super::*;
use crate::scratch::Scratch;

/// A call that does not come back until it is let go.
#[derive(Clone, Default)]
struct Gate(Arc<(AtomicBool, AtomicBool)>);

impl Gate {
    /// A worker waits there.
    fn is_met(&self) -> bool {
        self.0.0.load(Ordering::Relaxed)
    }

    fn open(&self) {
        self.0.1.store(true, Ordering::Relaxed);
    }

    fn pass(&self) {
        self.0.0.store(true, Ordering::Relaxed);
        while !self.0.1.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

const UUID: &str = "6695eb01-f6a4-8304-79aa-97f2502e193f";

/// A process that only sleeps, and ends with the test, also with one that fails.
struct Sleeper(Child);

impl Sleeper {
    fn end(&mut self) {
        self.0.kill().unwrap();
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A guest without memory: what counts here is the thread.
struct NoMemory {
    fault: Fault,
    /// Times that it was asked for its slots.
    asked: u32,
}

#[derive(Clone)]
enum Fault {
    None,
    /// The module refuses.
    Refused,
    /// A mistake of ours.
    Panic,
    /// The kernel does not come back from the call of this number.
    Hang(Gate, u32),
}

impl Sampler for NoMemory {
    fn info(&self) -> ModuleInfo {
        ModuleInfo {
            abi: (1, 0),
            format: EntryFormat::Ept,
            clear_dirty: false,
            keep_young: false,
            patched_kvm: false,
        }
    }

    fn memslots(&mut self) -> Result<(u64, Vec<MemSlot>), SamplerError> {
        self.asked += 1;
        match &self.fault {
            Fault::None => Ok((1, Vec::new())),
            Fault::Refused => Err(SamplerError::Unsupported("a test says no")),
            Fault::Hang(gate, call) => {
                if self.asked == *call {
                    gate.pass();
                }
                Ok((1, Vec::new()))
            }
            Fault::Panic => panic!("a test panics; this is no failure"),
        }
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
    Orders::new(policy, Tiers::default())
}

/// A claim beside those of real daemons.
fn claim(process: &Process) -> Claim {
    Claim::take(&std::env::temp_dir().join("ept-virt-test-claims"), process.pid()).unwrap()
}

fn budget() -> Arc<Budget> {
    Arc::new(Budget::new(HostLimits::default(), "/sys".into()))
}

/// A worker for a process that only sleeps.
fn start(interval: Duration, fault: Fault) -> (Worker, Sleeper, Arc<Cell>) {
    let cell = Arc::new(Cell::new("vm1", "6695eb01"));
    let (worker, child) = start_in(&cell, interval, fault);
    (worker, child, cell)
}

fn start_in(cell: &Arc<Cell>, interval: Duration, fault: Fault) -> (Worker, Sleeper) {
    let child = Sleeper(Command::new("sleep").arg("600").spawn().unwrap());
    let process = Arc::new(Process::open(child.0.id() as i32).unwrap());
    let (sampler, mover) =
        (Box::new(NoMemory { fault: fault.clone(), asked: 0 }), Box::new(NoMemory { fault, asked: 0 }));
    let claim = claim(&process);
    let attachment = Attachment { process, sampler, mover, claim, saver: None };
    let worker = Worker::spawn(attachment, Arc::clone(cell), &budget(), orders(interval), "vm1").unwrap();
    (worker, child)
}

/// A directory for heat, which goes with the test.
struct State(Scratch, Arc<Keeper>);

impl State {
    fn new() -> Self {
        let dir = Scratch::new();
        let keeper = Arc::new(Keeper::open(&dir).unwrap());
        Self(dir, keeper)
    }

    /// A worker that keeps its heat, and has one round in an hour.
    fn start(&self, fault: Fault) -> (Worker, Sleeper, Arc<Cell>) {
        let child = Sleeper(Command::new("sleep").arg("600").spawn().unwrap());
        let process = Arc::new(Process::open(child.0.id() as i32).unwrap());
        let saver = Saver::new(self.1.file(UUID, process.identity().unwrap()), monotonic());
        let (sampler, mover) =
            (Box::new(NoMemory { fault: fault.clone(), asked: 0 }), Box::new(NoMemory { fault, asked: 0 }));
        let claim = claim(&process);
        let attachment = Attachment { process, sampler, mover, claim, saver: Some(saver) };
        let cell = Arc::new(Cell::new("vm1", UUID));
        let orders = orders(Duration::from_secs(3600));
        let worker = Worker::spawn(attachment, Arc::clone(&cell), &budget(), orders, "vm1").unwrap();
        (worker, child, cell)
    }

    fn has_heat(&self) -> bool {
        self.0.join(format!("{UUID}.heat")).exists()
    }
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
    let (worker, child, cell) = start(SHORTEST_INTERVAL, Fault::None);
    wait_for("three rounds", || rounds(&cell) >= 3);
    assert_eq!(cell.status().pid, Some(child.0.id() as i32));
    assert_eq!(cell.status().state, DomainState::Observing);
    assert_eq!(worker.finish(), End::Stopped);
}

#[test]
fn stops_and_obeys_in_the_middle_of_a_long_interval() {
    let (worker, _child, cell) = start(Duration::from_secs(3600), Fault::None);
    wait_for("the first round", || rounds(&cell) == 1);
    worker.order(Orders { obstacle: Some("a test".into()), ..orders(Duration::from_secs(3600)) });
    wait_for("the orders", || cell.status().reason.as_deref() == Some("a test"));
    let asked = Instant::now();
    drop(worker);
    assert!(asked.elapsed() < Duration::from_secs(20));
}

#[test]
fn ends_with_the_guest() {
    let (worker, mut child, cell) = start(SHORTEST_INTERVAL, Fault::None);
    wait_for("the first round", || rounds(&cell) >= 1);
    child.end();
    wait_for("the end", || worker.has_ended());
    let status = cell.status();
    assert_eq!((status.state, status.pid, status.round), (DomainState::Unobserved, None, None));
    assert_eq!(worker.finish(), End::Gone);
}

#[test]
fn says_why_it_can_not_go_on() {
    let (worker, _child, _) = start(SHORTEST_INTERVAL, Fault::Refused);
    wait_for("the end", || worker.has_ended());
    assert_eq!(worker.finish(), End::Failed("a test says no".into()));
}

#[test]
fn one_domain_s_fault_is_no_other_s() {
    let (good, _good_child, good_cell) = start(SHORTEST_INTERVAL, Fault::None);
    let (bad, _bad_child, _) = start(SHORTEST_INTERVAL, Fault::Panic);
    wait_for("the end", || bad.has_ended());
    assert!(bad.finish().reason().contains("a fault in ept-virt"));
    let before = rounds(&good_cell);
    wait_for("more rounds", || rounds(&good_cell) > before);
    assert_eq!(good.finish(), End::Stopped);
}

#[test]
fn a_suspended_guest_goes_on_and_its_end_is_noticed() {
    let (worker, mut child, cell) = start(SHORTEST_INTERVAL, Fault::None);
    let suspend = |suspended| worker.order(Orders { suspended, ..orders(SHORTEST_INTERVAL) });
    let is_suspended = || cell.status().reason.is_some_and(|reason| reason.contains("suspended"));
    suspend(true);
    wait_for("the suspension", is_suspended);
    let before = rounds(&cell);
    suspend(false);
    wait_for("more rounds", || rounds(&cell) > before + 2);
    assert!(!is_suspended());
    suspend(true);
    wait_for("the suspension", is_suspended);
    child.end();
    wait_for("the end", || worker.has_ended());
    assert_eq!(worker.finish(), End::Gone);
}

#[test]
fn a_worker_that_hangs_is_left_to_itself() {
    let gate = Gate::default();
    let (mut worker, _child, cell) = start(SHORTEST_INTERVAL, Fault::Hang(gate.clone(), 1));
    wait_for("the hang", || gate.is_met());
    let end = worker.join_until(Instant::now() + Duration::from_millis(20));
    assert!(end.reason().contains("did not stop"), "{end:?}");
    assert!(worker.abandoned.load(Ordering::Relaxed));
    assert_eq!(worker.finish(), End::Stopped, "nobody waits again");
    assert_eq!(rounds(&cell), 0);
    gate.open();
}

#[test]
fn a_worker_that_was_left_to_itself_says_nothing_when_it_wakes() {
    let gate = Gate::default();
    let (mut old, _child, cell) = start(SHORTEST_INTERVAL, Fault::Hang(gate.clone(), 1));
    wait_for("the hang", || gate.is_met());
    old.join_until(Instant::now() + Duration::from_millis(20));
    cell.clear(DomainState::Unobserved, None);
    // Its only round ends before the old worker wakes: what is shown then is not
    // shown anew.
    let (new, child) = start_in(&cell, Duration::from_secs(3600), Fault::None);
    wait_for("the first round", || rounds(&cell) == 1);
    let shown = cell.status();
    assert_eq!(shown.pid, Some(child.0.id() as i32));
    gate.open();
    // Two hold the cell: the new worker and this test.
    wait_for("the old worker's end", || Arc::strong_count(&cell) == 2);
    assert_eq!(cell.status(), shown);
    assert_eq!(new.finish(), End::Stopped);
}

/// The first comes back only when the second has ended: had they been stopped one
/// by one, it would have been left to itself.
#[test]
fn all_are_asked_before_one_is_waited_for() {
    let gate = Gate::default();
    let (hanging, _child, _) = start(SHORTEST_INTERVAL, Fault::Hang(gate.clone(), 1));
    let (good, _good_child, cell) = start(SHORTEST_INTERVAL, Fault::None);
    wait_for("the hang", || gate.is_met());
    let opener = thread::spawn(move || {
        // Its worker holds it as well, while it lives.
        wait_for("the good one's end", || Arc::strong_count(&cell) == 1);
        gate.open();
    });
    assert_eq!(stop_all(vec![hanging, good]), [End::Stopped, End::Stopped]);
    opener.join().unwrap();
}

#[test]
fn heat_is_kept_of_guests_that_go_on_alone() {
    let state = State::new();
    let (worker, mut child, cell) = state.start(Fault::None);
    wait_for("the first round", || rounds(&cell) == 1);
    child.end();
    child.0.wait().unwrap();
    // It is told to stop before it can see that the guest has ended.
    assert_eq!(worker.finish(), End::Stopped);
    assert!(!state.has_heat());
    let (worker, _child, cell) = state.start(Fault::None);
    wait_for("the first round", || rounds(&cell) == 1);
    assert_eq!(worker.finish(), End::Stopped);
    assert!(state.has_heat());
}

#[test]
fn a_worker_that_was_left_to_itself_keeps_no_heat() {
    let state = State::new();
    let gate = Gate::default();
    // The second call is of the first round, which ends before it obeys.
    let (mut worker, _child, cell) = state.start(Fault::Hang(gate.clone(), 2));
    wait_for("the hang", || gate.is_met());
    worker.join_until(Instant::now());
    gate.open();
    wait_for("its end", || Arc::strong_count(&cell) == 1);
    assert!(!state.has_heat());
}
