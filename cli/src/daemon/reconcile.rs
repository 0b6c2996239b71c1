// SPDX-License-Identifier: MIT OR Apache-2.0
//! Makes what is observed agree with what libvirt says is running. It does not
//! matter how often it looks, or which nudges were lost: each look is complete.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use ept_virt_core::devices::pinning;
use ept_virt_core::domain::{Activity, Jobs, Libvirt, RunningDomain};
use ept_virt_core::policy::{Config, Effective, Excluded, Layer, Mode, Policy};
use ept_virt_core::sampler::{KernelSampler, ModuleInfo, Sampler};
use ept_virt_core::topology::{Latencies, NumaBalancing, Tiers, numa_balancing, reclaims};
use ept_virt_core::wire::{DomainState, ModuleStatus};
use log::warn;

use super::budget::Budget;
use super::guest::Orders;
use super::keep::Keeper;
use super::logging::about;
use super::state::{Cell, Hold, Phase, Shared};
use super::worker::{self, Attachment, End, Worker};
use crate::attach::{Obstacle, Unattached};
use crate::bounded;
use crate::doctor::kvm::Kvm;
use crate::doctor::root::Root;

/// How long a domain's QEMU may keep the others waiting, once: attaching to it waits for
/// a lock on its memory, which it may hold for ever, as over a disk that hangs.
const ATTACH_LIMIT: Duration = Duration::from_secs(1);

/// The same for all domains that are met in one look.
const ALL_ATTACH_LIMIT: Duration = Duration::from_secs(5);

/// How long the disk may take with what is asked of domains, at the daemon's end.
const HOLDS_LIMIT: Duration = Duration::from_secs(2);

/// A domain that libvirt says is running.
struct Entry {
    cell: Arc<Cell>,
    /// The XML that was read last.
    xml: Option<String>,
    /// What it says about placement, or why that can not be read.
    said: Result<Option<Layer>, String>,
    policy: Policy,
    /// What the worker was told last.
    orders: Option<Orders>,
    /// An attempt to attach that has not ended yet.
    attempt: Option<Receiver<Result<Attachment, Unattached>>>,
    worker: Option<Worker>,
    /// Was told to stop in this look, and is waited for at its end.
    leaving: Option<Worker>,
}

/// All that is observed.
pub struct Reconciler {
    libvirt: Libvirt,
    shared: Arc<Shared>,
    entries: BTreeMap<String, Entry>,
    tiers: Tiers,
    config: Config,
    budget: Arc<Budget>,
    keeper: Option<Arc<Keeper>>,
    jobs: Option<Jobs>,
    /// Files of domains that ended while nobody looked were removed.
    tidied: bool,
    /// What of the configuration is not in force, and why.
    misconfigured: Option<String>,
}

impl Reconciler {
    /// Nothing is observed yet. Without a keeper no heat is kept.
    pub fn new(uri: &str, shared: Arc<Shared>, config: Config, keeper: Option<Keeper>) -> Self {
        let budget = Arc::new(Budget::new(config.host, "/sys".into()));
        Self {
            libvirt: Libvirt::new(uri),
            shared,
            entries: BTreeMap::new(),
            tiers: Tiers::default(),
            config,
            budget,
            keeper: keeper.map(Arc::new),
            jobs: None,
            tidied: false,
            misconfigured: None,
        }
    }

    /// Also asks which domains have jobs under way.
    pub fn ask(&mut self, jobs: Jobs) {
        self.jobs = Some(jobs);
    }

    /// Goes on with another configuration, from the next look on.
    pub fn configure(&mut self, config: Config) {
        for entry in self.entries.values_mut() {
            entry.judge(&config);
        }
        self.budget.configure(config.host);
        self.config = config;
    }

    /// What is wrong with the configuration, or nothing any more.
    pub fn misconfigured(&mut self, problem: Option<String>) {
        self.misconfigured = problem;
    }

    /// Looks at host and libvirt, and starts and stops workers accordingly.
    pub fn reconcile(&mut self) {
        self.look_at_host();
        self.shared.enter(Phase::Asks(Instant::now()));
        let running = self.libvirt.running();
        self.shared.enter(Phase::Works(Instant::now()));
        let said = match &running {
            Ok(_) => "connected".to_owned(),
            Err(error) => error.to_string(),
        };
        let before = std::mem::replace(&mut self.shared.facts().libvirt, said.clone());
        if before != said && running.is_err() {
            warn!("libvirt is away, what is observed already goes on: {said}");
        }
        match running {
            Ok(domains) => self.follow(&domains),
            // Guests outlive libvirtd, and so do their workers.
            Err(_) => self.entries.values_mut().for_each(Entry::reap),
        }
        self.warn_of_host();
    }

    /// Stops all workers.
    pub fn stop(&mut self) {
        let entries = std::mem::take(&mut self.entries);
        worker::stop_all(entries.into_values().filter_map(|entry| entry.worker).collect());
        if let Some(keeper) = &self.keeper {
            let holds = Arc::clone(&keeper.holds);
            // The disk may hang.
            bounded::within(HOLDS_LIMIT, move || holds.write());
        }
    }

    fn follow(&mut self, domains: &[RunningDomain]) {
        let running: BTreeSet<&str> = domains.iter().map(|domain| domain.uuid.as_str()).collect();
        let mut leaving = Vec::new();
        let gone: Vec<String> =
            self.entries.keys().filter(|uuid| !running.contains(uuid.as_str())).cloned().collect();
        for uuid in gone {
            self.shared.remove(&uuid);
            self.tidied = false;
            if let Some(mut entry) = self.entries.remove(&uuid) {
                entry.dismiss();
                leaving.extend(entry.leaving);
            }
        }
        let reclaims = reclaims(Path::new("/proc"), Path::new("/sys"));
        let patience = Instant::now() + ALL_ATTACH_LIMIT;
        for domain in domains {
            let entry = self.entries.entry(domain.uuid.clone()).or_insert_with(|| {
                about!(info, domain.name, domain.uuid, "domain {:?} ({}) runs", domain.name, domain.uuid);
                let held = self.keeper.as_ref().map(|keeper| keeper.holds.of(&domain.uuid, domain.id));
                let entry = Entry::new(domain, &self.config, held.unwrap_or_default());
                self.shared.insert(&domain.uuid, Arc::clone(&entry.cell));
                entry
            });
            let around = Around {
                host: &self.tiers,
                config: &self.config,
                budget: &self.budget,
                keeper: self.keeper.as_ref(),
                job: self.jobs.as_ref().is_some_and(|jobs| jobs.is_busy(&domain.uuid)),
                reclaims,
                patience,
            };
            if let Err(fault) = contain(|| entry.follow(domain, &around)) {
                about!(error, domain.name, domain.uuid, "domain {:?} is not observed: {fault}", domain.name);
                entry.fail(fault);
            }
        }
        // All were told before one is waited for, as some may hang.
        leaving.extend(self.entries.values_mut().filter_map(|entry| entry.leaving.take()));
        worker::stop_all(leaving);
        if let Some(keeper) = &self.keeper {
            let running = running.into_iter().map(str::to_owned).collect();
            self.tidied |= keeper.retain(running, !self.tidied);
        }
        if let Some(jobs) = &self.jobs {
            let places = |entry: &&Entry| entry.policy.mode == Mode::Place;
            jobs.ask(self.entries.values().filter(places).map(|entry| entry.cell.uuid()).collect());
        }
    }

    fn look_at_host(&mut self) {
        match Tiers::detect(Path::new("/sys")) {
            Ok(tiers) => self.tiers = tiers,
            Err(error) => self.tiers.from = format!("the host's memory is not known: {error}"),
        }
        let module = KernelSampler::open().map(|sampler| module_status(sampler.info()));
        let mut facts = self.shared.facts();
        facts.tiers = self.tiers.clone();
        (facts.module, facts.module_error) = match module {
            Ok(module) => (Some(module), None),
            Err(error) => (None, Some(error.to_string())),
        };
    }

    fn warn_of_host(&self) {
        let placing: Vec<&Entry> =
            self.entries.values().filter(|entry| entry.policy.mode == Mode::Place).collect();
        let mut warnings = Vec::new();
        warnings.extend(self.misconfigured.clone());
        if !placing.is_empty() {
            match numa_balancing(Path::new("/proc")) {
                Ok(balancing) => warnings.extend(balancing.trouble().map(|trouble| {
                    let mend = NumaBalancing::MEND;
                    format!("the kernel's NUMA balancing {trouble}: turn it off with `{mend}`")
                })),
                Err(error) => warnings.push(format!("whether NUMA balancing is on is not known: {error}")),
            }
            // Policies may name nodes of which the kernel does not know that they are slow.
            if placing.iter().any(|entry| entry.policy.tiers(&self.tiers).0.slow.is_empty()) {
                warnings.push(format!(
                    "policies ask for placement, but there is nowhere to place: {}",
                    self.tiers.from
                ));
            }
        }
        self.shared.facts().warnings = warnings;
    }
}

fn module_status(info: ModuleInfo) -> ModuleStatus {
    ModuleStatus {
        abi: format!("{}.{}", info.abi.0, info.abi.1),
        format: info.format.to_string(),
        back_end: Kvm::loaded(&Root::new("/")).sources().words().to_owned(),
        patched_kvm: info.patched_kvm,
    }
}

/// What an entry needs to know beside its domain.
struct Around<'a> {
    host: &'a Tiers,
    config: &'a Config,
    budget: &'a Arc<Budget>,
    keeper: Option<&'a Arc<Keeper>>,
    /// libvirt has a job on the domain.
    job: bool,
    /// The host takes memory away from its processes.
    reclaims: bool,
    /// From then on no QEMU is waited for.
    patience: Instant,
}

/// Does what concerns one domain. A fault of ours in it must not reach the others.
fn contain(work: impl FnOnce()) -> Result<(), String> {
    catch_unwind(AssertUnwindSafe(work))
        .map_err(|_| "a fault in ept-virt, please report it; see the daemon's log".into())
}

impl Entry {
    fn new(domain: &RunningDomain, config: &Config, held: Hold) -> Self {
        let cell = Arc::new(Cell::new(&domain.name, &domain.uuid));
        // Nobody else has the cell yet, so nothing else is asked for.
        let _ = cell.set_hold(&[Hold::None], held);
        let policy = Policy::default();
        let mut entry = Self {
            cell,
            xml: None,
            said: Ok(None),
            policy,
            orders: None,
            attempt: None,
            worker: None,
            leaving: None,
        };
        entry.judge(config);
        entry
    }

    /// Brings the worker in line with the domain as it is now.
    fn follow(&mut self, domain: &RunningDomain, around: &Around<'_>) {
        let mut before = None;
        self.cell.update(|status| {
            status.name.clone_from(&domain.name);
            before = std::mem::replace(&mut status.id, domain.id);
        });
        if before.zip(domain.id).is_some_and(|(before, now)| before != now) {
            // It ended and was started again between two looks.
            self.cell.release();
            self.attempt = None;
        }
        match &domain.xml {
            Ok(xml) if self.xml.as_ref() == Some(xml) => {}
            Ok(xml) => {
                self.said = Layer::from_domain_xml(xml).map_err(|error| error.to_string());
                self.judge(around.config);
                self.xml = Some(xml.clone());
            }
            // The policy that was read before holds.
            Err(error) => {
                let (name, uuid) = (&domain.name, &domain.uuid);
                about!(warn, name, uuid, "the XML of domain {name:?} can not be read: {error}");
            }
        }
        self.reap();
        let mut orders = orders(&self.policy, around.host);
        orders.suspended = domain.activity == Activity::Suspended;
        orders.current_memory = domain.current_memory;
        orders.keep_young = around.reclaims;
        if self.policy.mode == Mode::Place {
            if self.xml.is_none() {
                // It may well say that nothing is to be moved.
                let reason = "nothing is moved: the domain's XML could not be read yet";
                orders.obstacle = orders.obstacle.or_else(|| Some(reason.into()));
            }
            let xml = self.xml.as_deref().unwrap_or_default();
            orders.obstacle = orders.obstacle.or_else(|| pins(xml)).or_else(|| migrates(domain, around.job));
            match Excluded::resolve(&self.policy.exclude, xml) {
                Ok(excluded) => orders.excluded = excluded,
                Err(problem) => orders.obstacle = Some(format!("nothing is moved: {problem}")),
            }
        }
        let hold = self.cell.hold();
        if let Some(keeper) = around.keeper {
            keeper.holds.keep(&domain.uuid, domain.id, hold);
        }
        match hold {
            Hold::Paused if self.policy.mode == Mode::Place => {
                orders.obstacle = Some("nothing is moved: paused; `ept-virt resume` goes on".into());
            }
            Hold::Stopped => {
                self.switch_off(Some("stopped; `ept-virt start` goes on".into()));
                return;
            }
            _ => {}
        }
        match &self.worker {
            _ if self.policy.mode == Mode::Off => self.switch_off(None),
            Some(worker) if self.orders.as_ref() != Some(&orders) => worker.order(orders.clone()),
            Some(_) => {}
            None => self.start(domain, &orders, around),
        }
        self.orders = Some(orders);
    }

    /// Finds out what holds, by what the XML and the configuration say.
    fn judge(&mut self, config: &Config) {
        let said = self.said.as_ref().map_err(String::clone);
        let found = said.and_then(|layer| Effective::new(config, layer.as_ref()));
        let (policy, from, error) = match found {
            Ok(effective) => (effective.policy, from(&self.said, config), None),
            // Nobody can tell what was meant: observe, and move nothing.
            Err(error) => (Policy::default(), "default", Some(error)),
        };
        self.cell.update(|status| {
            if let Some(error) = error.as_ref().filter(|error| status.policy_error.as_ref() != Some(error)) {
                let (name, uuid) = (&status.name, &status.uuid);
                about!(warn, name, uuid, "the policy of domain {name:?} can not be read: {error}");
            }
            status.policy_from = from.to_owned();
            status.policy = policy.describe();
            status.policy_error = error;
        });
        self.policy = policy;
    }

    /// Forgets a worker that has ended by itself.
    fn reap(&mut self) {
        let Some(worker) = self.worker.take_if(|worker| worker.has_ended()) else { return };
        let end = worker.finish();
        if end == End::Gone {
            // What was asked for was asked of that process, not of the next.
            self.cell.release();
        }
        self.cell.clear(DomainState::Unobserved, Some(end.reason()));
    }

    /// Ends the worker after a fault of ours; the next look tries again.
    fn fail(&mut self, fault: String) {
        self.dismiss();
        self.cell.clear(DomainState::Unobserved, Some(fault));
    }

    /// Tells the worker to stop. Nobody waits here: others may have to be told.
    fn dismiss(&mut self) {
        self.attempt = None;
        if let Some(mut worker) = self.worker.take() {
            worker.stop();
            self.leaving = Some(worker);
        }
    }

    fn switch_off(&mut self, reason: Option<String>) {
        self.dismiss();
        self.cell.clear(DomainState::Off, reason);
    }

    /// Attaches to the domain's VM and starts its worker, or says why that can not be.
    fn start(&mut self, domain: &RunningDomain, orders: &Orders, around: &Around<'_>) {
        match self.attach(domain, around) {
            Ok(attachment) => {
                let cell = Arc::clone(&self.cell);
                match Worker::spawn(attachment, cell, around.budget, orders.clone(), &domain.name) {
                    Ok(worker) => self.worker = Some(worker),
                    Err(error) => self.fail(format!("cannot start a thread for it: {error}")),
                }
            }
            Err(Unattached { pid, obstacle }) => {
                self.cell.clear(DomainState::Unobserved, Some(obstacle.reason));
                self.cell.update(|status| status.pid = pid);
            }
        }
    }

    /// Waits for an attempt to attach, for a while if it begins now.
    fn attach(&mut self, domain: &RunningDomain, around: &Around<'_>) -> Result<Attachment, Unattached> {
        let not_yet =
            |reason: &str| Err(Unattached { pid: None, obstacle: Obstacle::of_domain(reason.into()) });
        let (attempt, limit) = match self.attempt.take() {
            Some(attempt) => (attempt, Duration::ZERO),
            None => {
                let left = around.patience.saturating_duration_since(Instant::now());
                let (domain, keeper) = (domain.clone(), around.keeper.cloned());
                let attempt = bounded::aside(move || worker::attach(&domain, keeper.as_ref()));
                (attempt, left.min(ATTACH_LIMIT))
            }
        };
        match attempt.recv_timeout(limit) {
            Ok(attached) => attached,
            Err(RecvTimeoutError::Timeout) => {
                self.attempt = Some(attempt);
                not_yet(
                    "its QEMU does not answer: it holds a lock on its memory, as when a disk hangs; waiting for it",
                )
            }
            Err(RecvTimeoutError::Disconnected) => not_yet(
                "attaching to it failed, by want of threads or a fault in ept-virt; see the daemon's log",
            ),
        }
    }
}

/// Who speaks about a domain, in a word.
fn from(said: &Result<Option<Layer>, String>, config: &Config) -> &'static str {
    match said {
        Ok(Some(_)) => "domain XML",
        _ if config.defaults.is_empty() => "default",
        _ => "host defaults",
    }
}

/// Whether the guest's memory is on its way, or about to be, so that it is left
/// where it is. Dirty logging, which the worker sees, begins after the job.
fn migrates(domain: &RunningDomain, job: bool) -> Option<String> {
    let what = match domain.activity {
        Activity::Arrives => "the guest's memory still comes from another host",
        _ if job => "libvirt works on the guest's memory, as for a migration or a save",
        _ => return None,
    };
    Some(format!("placement pauses: {what}"))
}

/// Memory that is pinned can not be moved: each try would be for nothing, and cost the
/// guest an unmapping.
fn pins(xml: &str) -> Option<String> {
    let device = pinning(xml)?;
    Some(format!("nothing is moved: pinned: all of the guest's memory is held for DMA by {device}"))
}

/// What a worker does under this policy on this host.
fn orders(policy: &Policy, host: &Tiers) -> Orders {
    let (tiers, obstacle) = policy.tiers(host);
    let obstacle = obstacle.map(|obstacle| format!("nothing is moved: {obstacle}"));
    let latencies = policy.dram.max_slowdown.map(|_| Latencies::detect(Path::new("/sys"), &tiers));
    Orders { obstacle, latencies, ..Orders::new(policy.clone(), tiers) }
}

#[cfg(test)]
#[path = "reconcile_tests.rs"]
mod tests;
