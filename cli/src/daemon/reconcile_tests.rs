// SPDX-License-Identifier: MIT OR Apache-2.0

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
