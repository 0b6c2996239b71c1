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
        self.misconfigured = None;
    }

    /// Tells of a fault of the configuration, until there is another.
    pub fn misconfigured(&mut self, problem: String) {
        self.misconfigured = Some(problem);
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
                (worker::attach_aside(domain, around.keeper), left.min(ATTACH_LIMIT))
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
mod tests {
    use ept_virt_core::topology::NodeSet;

    use super::*;

    fn host() -> Tiers {
        Tiers { fast: NodeSet::from_iter([0]), slow: NodeSet::from_iter([1]), from: "a test".into() }
    }

    const UUID: &str = "6695eb01-f6a4-8304-79aa-97f2502e193f";

    fn domain(xml: &str) -> RunningDomain {
        let (uuid, name, xml) = (UUID.into(), "vm1".into(), Ok(xml.into()));
        RunningDomain {
            uuid,
            name,
            id: None,
            xml,
            activity: Activity::Runs,
            current_memory: None,
            run_dir: "/nonexistent".into(),
        }
    }

    fn look(entry: &mut Entry, domain: &RunningDomain, job: bool) {
        look_under(&Config::default(), entry, domain, job);
    }

    fn look_under(config: &Config, entry: &mut Entry, domain: &RunningDomain, job: bool) {
        let budget = Arc::new(Budget::new(config.host, "/nonexistent".into()));
        let around = Around {
            host: &host(),
            config,
            budget: &budget,
            keeper: None,
            job,
            reclaims: false,
            patience: Instant::now() + Duration::from_secs(60),
        };
        entry.follow(domain, &around);
    }

    fn placing(fast: Option<u32>, slow: Option<u32>) -> Policy {
        let set = |node: Option<u32>| node.map(|node| NodeSet::from_iter([node]));
        Policy { mode: Mode::Place, fast_nodes: set(fast), slow_nodes: set(slow), ..Policy::default() }
    }

    #[test]
    fn says_what_is_in_the_way_of_placement() {
        assert_eq!(orders(&placing(None, None), &host()).obstacle, None);
        assert_eq!(orders(&placing(Some(1), None), &host()).tiers.slow, NodeSet::from_iter([0]));
        let obstacle = |policy: Policy, host: &Tiers| orders(&policy, host).obstacle.unwrap();
        assert!(obstacle(placing(None, Some(7)), &host()).contains("nodes 7 have no memory"));
        assert!(obstacle(placing(Some(1), Some(1)), &host()).contains("both tiers"));
        let one = Tiers { slow: NodeSet::default(), from: "one tier: a test".into(), ..host() };
        assert!(obstacle(placing(None, None), &one).contains("one tier: a test"));
        // Who only observes needs no second tier.
        let observing = orders(&Policy::default(), &one);
        assert_eq!(observing.obstacle, None);
        assert!(!observing.place());
    }

    #[test]
    fn a_broken_policy_is_told_and_nothing_moves() {
        let xml = "<domain type='qemu'><metadata>\n\
            <p:placement xmlns:p='https://ept-virt.org/xmlns/placement/1.0' mode='plaice'/>\n\
            </metadata></domain>";
        let mut entry = Entry::new(&domain(xml), &Config::default(), Hold::None);
        look(&mut entry, &domain(xml), false);
        let status = entry.cell.status();
        assert_eq!(status.policy_from, "default");
        assert!(status.policy_error.unwrap().contains("place"));
        assert_eq!(status.state, DomainState::Unobserved);
        assert!(status.reason.unwrap().contains("type='qemu'"));
        assert!(!entry.orders.as_ref().unwrap().place());

        let off = xml.replace("plaice", "off");
        look(&mut entry, &domain(&off), false);
        let status = entry.cell.status();
        assert_eq!((status.state, status.reason), (DomainState::Off, None));
        assert_eq!((status.policy_from.as_str(), status.policy_error), ("domain XML", None));
    }

    #[test]
    fn what_a_person_asked_for_goes_before_the_policy() {
        let xml = "<domain type='qemu'><metadata>\
            <p:placement xmlns:p='https://ept-virt.org/xmlns/placement/1.0' mode='place'/></metadata></domain>";
        let domain = domain(xml);
        let mut entry = Entry::new(&domain, &Config::default(), Hold::None);
        let mut held = |hold| {
            let before = entry.cell.hold();
            entry.cell.set_hold(&[before], hold).unwrap();
            look(&mut entry, &domain, false);
            (entry.cell.status().state, entry.orders.as_ref().is_some_and(Orders::place))
        };
        assert_eq!(held(Hold::None), (DomainState::Unobserved, true));
        assert_eq!(held(Hold::Paused), (DomainState::Unobserved, false));
        assert_eq!(held(Hold::Stopped).0, DomainState::Off);
        assert_eq!(held(Hold::None), (DomainState::Unobserved, true));
    }

    #[test]
    fn what_is_asked_of_a_run_does_not_hold_for_the_next() {
        let at = |id| RunningDomain { id: Some(id), ..domain("<domain type='qemu'/>") };
        let mut entry = Entry::new(&at(3), &Config::default(), Hold::Stopped);
        look(&mut entry, &at(3), false);
        assert_eq!(entry.cell.status().state, DomainState::Off);
        look(&mut entry, &at(4), false);
        assert_eq!(entry.cell.status().state, DomainState::Unobserved);
        assert_eq!(entry.cell.hold(), Hold::None);
    }

    #[test]
    fn jobs_and_arriving_memory_pause_placement() {
        let placing = "<domain type='qemu'><metadata>\
            <p:placement xmlns:p='https://ept-virt.org/xmlns/placement/1.0' mode='place'/></metadata></domain>";
        let mut running = domain(placing);
        let mut entry = Entry::new(&running, &Config::default(), Hold::None);
        let orders = |entry: &Entry| entry.orders.clone().unwrap();
        look(&mut entry, &running, true);
        assert!(orders(&entry).obstacle.unwrap().contains("as for a migration"));
        look(&mut entry, &running, false);
        assert!(orders(&entry).place());
        running.activity = Activity::Arrives;
        look(&mut entry, &running, false);
        assert!(orders(&entry).obstacle.unwrap().contains("from another host"));
        running.activity = Activity::Suspended;
        look(&mut entry, &running, false);
        assert!(orders(&entry).suspended && orders(&entry).obstacle.is_none());
        // Who does not place has nothing to pause.
        let mut observed = Entry::new(&domain("<domain type='qemu'/>"), &Config::default(), Hold::None);
        look(&mut observed, &domain("<domain type='qemu'/>"), true);
        assert_eq!(observed.orders.unwrap().obstacle, None);
    }

    #[test]
    fn what_is_excluded_is_found_in_the_domain_s_xml() {
        let policy = "<metadata><placement xmlns='https://ept-virt.org/xmlns/placement/1.0' mode='place'>\
            <exclude><memory alias='dimm0'/></exclude></placement></metadata>";
        let xml = |address: &str| {
            format!(
                "<domain type='qemu'>{policy}<devices><memory model='dimm'><target><size unit='MiB'>2</size></target>\
                 <alias name='dimm0'/>{address}</memory></devices></domain>"
            )
        };
        let mut running = domain(&xml("<address type='dimm' base='0x40000000'/>"));
        let mut entry = Entry::new(&running, &Config::default(), Hold::None);
        look(&mut entry, &running, false);
        let orders = entry.orders.clone().unwrap();
        let excluded = orders.excluded.frames.first();
        assert_eq!((excluded, orders.obstacle), (Some(&(0x40000..0x40200)), None));
        running.xml = Ok(xml(""));
        look(&mut entry, &running, false);
        let obstacle = entry.orders.clone().unwrap().obstacle.unwrap();
        assert!(obstacle.contains("\"dimm0\"") && obstacle.contains("does not tell where"), "{obstacle}");
    }

    #[test]
    fn memory_that_a_device_has_pinned_is_not_tried() {
        let xml = "<domain type='qemu'><metadata><placement mode='place' \
            xmlns='https://ept-virt.org/xmlns/placement/1.0'/></metadata><devices>\
            <hostdev mode='subsystem' type='pci'><alias name='hostdev0'/></hostdev></devices></domain>";
        let mut entry = Entry::new(&domain(xml), &Config::default(), Hold::None);
        look(&mut entry, &domain(xml), false);
        let obstacle = entry.orders.clone().unwrap().obstacle.unwrap();
        assert!(obstacle.contains("pinned") && obstacle.contains("(hostdev0)"), "{obstacle}");
        // Until it is unplugged.
        let without = xml.replace("<hostdev", "<hostdev-no").replace("</hostdev>", "</hostdev-no>");
        look(&mut entry, &domain(&without), false);
        assert!(entry.orders.unwrap().place());
    }

    #[test]
    fn nothing_moves_before_the_xml_was_read() {
        let defaults = Config::parse("[defaults]\nmode = \"place\"\n").unwrap();
        let unknown = RunningDomain { xml: Err("permission denied".into()), ..domain("") };
        let mut entry = Entry::new(&unknown, &defaults, Hold::None);
        assert_eq!(entry.policy.mode, Mode::Place);
        look_under(&defaults, &mut entry, &unknown, false);
        let obstacle = entry.orders.clone().unwrap().obstacle.unwrap();
        assert!(obstacle.contains("could not be read"), "{obstacle}");
        look_under(&defaults, &mut entry, &domain("<domain type='qemu'/>"), false);
        assert!(entry.orders.unwrap().place());
    }

    /// As of a QEMU whose memory is locked for good.
    #[test]
    fn who_does_not_answer_is_waited_for_once() {
        let mut entry = Entry::new(&domain("<domain/>"), &Config::default(), Hold::None);
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        entry.attempt = Some(receiver);
        look(&mut entry, &domain("<domain/>"), false);
        assert!(entry.attempt.is_some());
        assert!(entry.cell.status().reason.unwrap().contains("does not answer"));
        let obstacle = Obstacle::of_domain("a test".into());
        assert!(sender.send(Err(Unattached { pid: Some(7), obstacle })).is_ok());
        look(&mut entry, &domain("<domain/>"), false);
        let status = entry.cell.status();
        assert_eq!((status.pid, status.reason.as_deref()), (Some(7), Some("a test")));
        assert!(entry.attempt.is_none());
    }

    #[test]
    fn a_fault_is_contained() {
        assert_eq!(contain(|| {}), Ok(()));
        assert!(contain(|| panic!("a test panics; this is no failure")).unwrap_err().contains("a fault"));
        let mut entry = Entry::new(&domain("<domain/>"), &Config::default(), Hold::None);
        entry.fail("a fault".into());
        assert_eq!(entry.cell.status().reason.as_deref(), Some("a fault"));
    }

    /// libvirt's own test driver has one running domain, without KVM.
    #[test]
    fn shows_what_libvirt_says_is_running() {
        let shared = Arc::new(Shared::new("test:///default"));
        let mut reconciler = Reconciler::new("test:///default", Arc::clone(&shared), Config::default(), None);
        reconciler.reconcile();
        let status = shared.status(None);
        assert_eq!(status.daemon.libvirt, "connected");
        let [domain] = status.domains.as_slice() else { panic!("{status:?}") };
        assert_eq!((domain.name.as_str(), domain.state), ("test", DomainState::Unobserved));
        assert!(domain.reason.as_ref().unwrap().contains("type='test'"));
        assert_eq!(domain.id, Some(1));
        assert!(shared.find("test").is_some());
        assert!(shared.find("1").is_some());
        assert!(shared.find("01").is_none());
        assert!(shared.find(&domain.uuid.to_uppercase()).is_some());
        assert!(shared.find("other").is_none());
    }

    #[test]
    fn libvirt_away_is_told() {
        let uri = "qemu+unix:///system?socket=/nonexistent/libvirt-sock";
        let shared = Arc::new(Shared::new(uri));
        Reconciler::new(uri, Arc::clone(&shared), Config::default(), None).reconcile();
        assert!(shared.status(None).daemon.libvirt.contains("Is libvirtd or virtqemud running?"));
    }
}
