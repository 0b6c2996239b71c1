// SPDX-License-Identifier: MIT OR Apache-2.0

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Mutex, MutexGuard};

use super::*;

mod along;

const SLOW: u32 = 1;

/// A process's pages, and a kernel that treats failures as Linux's
/// do_pages_move() does.
#[derive(Default)]
struct FakeKernel {
    /// Address of each resident page, and its node.
    pages: BTreeMap<u64, u32>,
    /// First pages of huge pages, which move as a whole.
    huge: BTreeSet<u64>,
    /// The same of pages of 64 KiB.
    medium: BTreeSet<u64>,
    /// Pages with an extra reference: migrating them fails.
    pinned: BTreeSet<u64>,
    /// Pages that the kernel refuses to isolate, and with which errno.
    refused: BTreeMap<u64, i32>,
    /// A call of itself fails.
    call_error: Option<i32>,
    /// So many calls that ask for places work, and those behind them fail.
    places_left: Option<usize>,
    free_pages: u64,
    /// Size of all pages, if they are of hugetlbfs, and how many are free on a node.
    hugetlb: Option<(u64, u64)>,
    /// Becomes true in the first call.
    stop: Option<Arc<AtomicBool>>,
    exited: bool,
    calls: usize,
    /// 4 KiB pages that moved, in all and in the largest call.
    moved: u64,
    largest_call: u64,
}

impl FakeKernel {
    fn with_pages(addresses: impl IntoIterator<Item = u64>) -> Self {
        let pages = addresses.into_iter().map(|address| (address, 0)).collect();
        Self { pages, free_pages: 1 << 20, ..Self::default() }
    }

    /// The first page of the page of the host around an address, and its 4 KiB pages.
    fn folio(&self, address: u64) -> (u64, u64) {
        let first = |pages: u64| address / (pages * PAGE_BYTES) * pages * PAGE_BYTES;
        match address {
            _ if self.huge.contains(&first(512)) => (first(512), 512),
            _ if self.medium.contains(&first(16)) => (first(16), 16),
            _ => (address, 1),
        }
    }

    fn move_page(&mut self, address: u64, node: u32) {
        let (first, count) = self.folio(address);
        for (_, place) in self.pages.range_mut(first..first + count * PAGE_BYTES) {
            self.moved += u64::from(*place != node);
            *place = node;
        }
    }

    /// Migrates a list, all or what can be; the number of failures.
    fn migrate_list(&mut self, list: &[u64], node: u32) -> u64 {
        let (failed, moved): (Vec<u64>, Vec<u64>) = list.iter().partition(|a| self.pinned.contains(a));
        moved.into_iter().for_each(|address| self.move_page(address, node));
        failed.len() as u64
    }

    fn migrate(&mut self, addresses: &[u64], node: u32, statuses: &mut [i32]) -> io::Result<u64> {
        self.calls += 1;
        let before = self.moved;
        let result = self.migrate_call(addresses, node, statuses);
        self.largest_call = self.largest_call.max(self.moved - before);
        result
    }

    fn migrate_call(&mut self, addresses: &[u64], node: u32, statuses: &mut [i32]) -> io::Result<u64> {
        if let Some(stop) = &self.stop {
            stop.store(true, Ordering::Relaxed);
        }
        if let Some(errno) = self.call_error {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let (mut start, mut isolated) = (0, BTreeSet::new());
        for (index, address) in addresses.iter().enumerate() {
            let decided = match (self.refused.get(address), self.pages.get(address)) {
                (Some(errno), _) => -errno,
                (None, None) => -libc::ENOENT,
                (None, Some(place)) if *place == node => node as i32,
                // It was isolated with another part of it.
                (None, Some(_)) if isolated.contains(&self.folio(*address)) => -libc::EBUSY,
                (None, Some(_)) => {
                    isolated.insert(self.folio(*address));
                    continue;
                }
            };
            statuses[index] = decided;
            let failed = self.migrate_list(&addresses[start..index], node);
            if failed > 0 {
                return Ok(failed + (addresses.len() - index - 1) as u64);
            }
            statuses[start..index].fill(node as i32);
            start = index + 1;
            isolated.clear();
        }
        let failed = self.migrate_list(&addresses[start..], node);
        if failed == 0 {
            statuses[start..].fill(node as i32);
        }
        Ok(failed)
    }
}

#[derive(Clone)]
struct Fake(Arc<Mutex<FakeKernel>>);

impl Fake {
    fn kernel(&self) -> MutexGuard<'_, FakeKernel> {
        self.0.lock().unwrap()
    }
}

impl Pages for Fake {
    fn is_alive(&self) -> bool {
        !self.kernel().exited
    }

    fn places(&self, addresses: &[u64], statuses: &mut [i32]) -> io::Result<()> {
        let mut kernel = self.kernel();
        if let Some(left) = &mut kernel.places_left {
            *left = left.checked_sub(1).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        }
        for (address, status) in addresses.iter().zip(statuses) {
            *status = kernel.pages.get(address).map_or(-libc::ENOENT, |node| *node as i32);
        }
        Ok(())
    }

    fn migrate(&self, addresses: &[u64], node: u32, statuses: &mut [i32]) -> io::Result<u64> {
        self.kernel().migrate(addresses, node, statuses)
    }

    fn node_memory(&self, _node: u32) -> Result<NodeMemory, TopologyError> {
        let free_bytes = self.kernel().free_pages * PAGE_BYTES;
        Ok(NodeMemory { total_bytes: 0, free_bytes })
    }

    fn renew(&self) {}

    fn hugetlb_page(&self, _address: u64) -> Option<u64> {
        self.kernel().hugetlb.map(|(bytes, _)| bytes)
    }

    fn hugetlb_free(&self, _node: u32, page_bytes: u64) -> u64 {
        self.kernel()
            .hugetlb
            .filter(|(bytes, _)| *bytes == page_bytes)
            .map_or(0, |(bytes, free)| bytes * free)
    }
}

fn mover(kernel: FakeKernel) -> (KernelMover, Fake) {
    let fake = Fake(Arc::new(Mutex::new(kernel)));
    (KernelMover { pages: Box::new(fake.clone()), hugetlb: None, regions: Regions::default() }, fake)
}

fn page(index: u64) -> u64 {
    0x7f00_0000_0000 + index * PAGE_BYTES
}

fn small(index: u64) -> MoveUnit {
    MoveUnit { gfn: index, hva: page(index), pages: 1 }
}

fn slow() -> NodeSet {
    NodeSet::from_iter([SLOW])
}

fn apply(mover: &mut KernelMover, units: &[MoveUnit]) -> MoveOutcome {
    mover.apply(units, &slow(), &AtomicBool::new(false)).unwrap()
}

fn result_of(outcome: &MoveOutcome, gfn: u64) -> Result<(), Refused> {
    outcome.units.iter().find(|(unit, _)| unit.gfn == gfn).unwrap().1
}

#[test]
fn moves_all_in_few_calls() {
    let (mut mover, fake) = mover(FakeKernel::with_pages((0..1000).map(page)));
    let units: Vec<_> = (0..1000).map(small).collect();
    let outcome = apply(&mut mover, &units);
    assert_eq!(outcome.moved_bytes(), 1000 * PAGE_BYTES);
    assert_eq!(outcome.tried_bytes(), outcome.moved_bytes());
    assert!(fake.kernel().pages.values().all(|node| *node == SLOW));
    assert_eq!(fake.kernel().calls, 2);
}

#[test]
fn every_unit_has_a_result_and_the_right_reason() {
    let mut kernel = FakeKernel::with_pages((0..100).map(page));
    kernel.pinned = [page(10), page(11), page(70)].into();
    kernel.refused = [(page(30), libc::EACCES), (page(31), libc::EBUSY)].into();
    kernel.pages.remove(&page(40));
    kernel.pages.insert(page(50), SLOW);
    let (mut mover, fake) = mover(kernel);
    let units: Vec<_> = (0..100).map(small).collect();
    let outcome = apply(&mut mover, &units);
    assert_eq!(outcome.units.len(), 100);
    let expected = [
        (10, Refused::Busy),
        (11, Refused::Busy),
        (30, Refused::Shared),
        (31, Refused::Busy),
        (40, Refused::NotPresent),
        (50, Refused::AlreadyThere),
        (70, Refused::Busy),
    ];
    for (gfn, refused) in expected {
        assert_eq!(result_of(&outcome, gfn), Err(refused), "page {gfn}");
        let place = fake.kernel().pages.get(&page(gfn)).copied();
        assert!(refused == Refused::AlreadyThere || place != Some(SLOW), "page {gfn}");
    }
    assert_eq!(outcome.moved_bytes(), 93 * PAGE_BYTES);
    let mut refused = RefusedBytes::default();
    refused.add(&outcome);
    let wire = refused.to_wire();
    assert_eq!(wire.iter().map(|refusal| refusal.bytes).sum::<u64>(), 7 * PAGE_BYTES);
    let reasons: Vec<&str> = wire.iter().map(|refusal| refusal.reason.as_str()).collect();
    assert_eq!(reasons, ["already-there", "busy", "not-present", "shared"]);
}

#[test]
fn all_pages_pinned_takes_one_call() {
    let mut kernel = FakeKernel::with_pages((0..512).map(page));
    kernel.pinned = (0..512).map(page).collect();
    let (mut mover, fake) = mover(kernel);
    let units: Vec<_> = (0..512).map(small).collect();
    let outcome = apply(&mut mover, &units);
    assert!(outcome.units.iter().all(|(_, result)| *result == Err(Refused::Busy)));
    assert_eq!(fake.kernel().calls, 1);
}

#[test]
fn a_cpuset_and_a_shared_page_are_told_apart_though_both_are_eacces() {
    let mut kernel = FakeKernel::with_pages((0..3).map(page));
    kernel.call_error = Some(libc::EACCES);
    let (mut mover, fake) = mover(kernel);
    let outcome = apply(&mut mover, &[small(0), small(1)]);
    assert_eq!(outcome.units.len(), 2);
    assert_eq!(result_of(&outcome, 0), Err(Refused::NotPermitted));
    assert!(Refused::NotPermitted.explanation().contains("strict"));
    fake.kernel().call_error = None;
    fake.kernel().refused = [(page(2), libc::EACCES)].into();
    assert_eq!(result_of(&apply(&mut mover, &[small(2)]), 2), Err(Refused::Shared));
}

#[test]
fn errors_of_a_call_have_reasons() {
    for (errno, refused) in [
        (libc::ENOMEM, Refused::NodeFull),
        (libc::EPERM, Refused::NotPermitted),
        (libc::ENODEV, Refused::Failed),
    ] {
        let mut kernel = FakeKernel::with_pages([page(0)]);
        kernel.call_error = Some(errno);
        let outcome = apply(&mut mover(kernel).0, &[small(0)]);
        assert_eq!(result_of(&outcome, 0), Err(refused));
    }
}

#[test]
fn no_page_is_called_absent_when_places_are_not_told() {
    let units: Vec<_> = (0..4).map(small).collect();
    let kernel = || {
        let mut kernel = FakeKernel::with_pages((0..4).map(page));
        kernel.refused = [(page(1), libc::EACCES)].into();
        kernel.pinned = [page(3)].into();
        kernel
    };
    let (mut untold, fake) = mover(FakeKernel { places_left: Some(0), ..kernel() });
    let mut nodes = vec![Some(0)];
    untold.places(&[page(0)], &mut nodes).unwrap();
    assert_eq!(nodes, []);
    let outcome = apply(&mut untold, &units);
    assert!(outcome.units.iter().all(|(_, result)| *result == Err(Refused::Failed)));
    assert_eq!((outcome.units.len(), fake.kernel().calls), (4, 0));
    // Nor when they are told no longer after the move: then its own word counts.
    let outcome = apply(&mut mover(FakeKernel { places_left: Some(1), ..kernel() }).0, &units);
    let results: Vec<_> = (0..4).map(|gfn| result_of(&outcome, gfn)).collect();
    assert_eq!(results, [Ok(()), Err(Refused::Shared), Err(Refused::Busy), Err(Refused::Busy)]);
}

#[test]
fn leaves_room_on_the_target() {
    let mut kernel = FakeKernel::with_pages((0..10).map(page));
    kernel.free_pages = 4;
    let (mut mover, _) = mover(kernel);
    let units: Vec<_> = (0..10).map(small).collect();
    assert_eq!(mover.room(&slow()), 4 * PAGE_BYTES);
    let outcome = apply(&mut mover, &units);
    assert_eq!(outcome.moved_bytes(), 4 * PAGE_BYTES);
    assert_eq!(result_of(&outcome, 9), Err(Refused::NodeFull));
}

#[test]
fn a_huge_page_moves_by_its_first_address() {
    let mut kernel = FakeKernel::with_pages((0..512).map(page));
    kernel.huge = [page(0)].into();
    let (mut mover, fake) = mover(kernel);
    let outcome = apply(&mut mover, &[MoveUnit { gfn: 0, hva: page(0), pages: 512 }]);
    assert_eq!(outcome.units.len(), 1);
    assert_eq!(outcome.moved_bytes(), 512 * PAGE_BYTES);
    assert!(fake.kernel().pages.values().all(|node| *node == SLOW));
}

#[test]
fn a_huge_page_that_was_split_moves_page_by_page() {
    let mut kernel = FakeKernel::with_pages((0..512).map(page));
    kernel.pinned = [page(100)].into();
    let (mut mover, fake) = mover(kernel);
    let outcome = apply(&mut mover, &[MoveUnit { gfn: 0, hva: page(0), pages: 512 }]);
    assert_eq!(outcome.tried_bytes(), 512 * PAGE_BYTES);
    assert_eq!(outcome.moved_bytes(), 511 * PAGE_BYTES);
    assert_eq!(result_of(&outcome, 100), Err(Refused::Busy));
    assert_eq!(fake.kernel().pages.values().filter(|node| **node == SLOW).count(), 511);
}

fn huge(index: u64) -> MoveUnit {
    MoveUnit { gfn: index * 512, hva: page(index * 512), pages: 512 }
}

/// A kernel with huge pages, each resident as a whole.
fn huge_kernel(count: u64) -> FakeKernel {
    let huge = (0..count).map(|index| page(index * 512)).collect();
    FakeKernel { huge, ..FakeKernel::with_pages((0..count * 512).map(page)) }
}

#[test]
fn a_batch_is_bounded_in_units_and_in_bytes() {
    let small: Vec<_> = (0..2000).map(small).collect();
    assert_eq!(batch(&small).len(), BATCH_UNITS);
    let huge: Vec<_> = (0..100).map(huge).collect();
    assert_eq!(batch(&huge).iter().map(unit_bytes).sum::<u64>(), BATCH_BYTES);
    let giant = [MoveUnit { gfn: 0, hva: 0, pages: 1 << 18 }];
    assert_eq!(batch(&giant).len(), 1);
    assert_eq!(batch(&[]).len(), 0);
}

/// However much was asked for, and whatever fails meanwhile.
#[test]
fn a_cancelled_move_ends_with_the_call_that_is_under_way() {
    let stop = Arc::new(AtomicBool::new(false));
    let (mut mover, fake) = mover(FakeKernel { stop: Some(Arc::clone(&stop)), ..huge_kernel(64) });
    let units: Vec<_> = (0..64).map(huge).collect();
    let outcome = mover.apply(&units, &slow(), &stop).unwrap();
    assert_eq!((outcome.tried_bytes(), fake.kernel().calls), (BATCH_BYTES, 1));

    // Each page that fails takes another call.
    stop.store(false, Ordering::Relaxed);
    let mut kernel = FakeKernel::with_pages((0..512).map(page));
    kernel.pinned = (0..512).step_by(2).map(page).collect();
    kernel.refused = (1..512).step_by(2).map(|index| (page(index), libc::EACCES)).collect();
    kernel.stop = Some(Arc::clone(&stop));
    let (mut mover, fake) = self::mover(kernel);
    let units: Vec<_> = (0..512).map(small).collect();
    let outcome = mover.apply(&units, &slow(), &stop).unwrap();
    assert_eq!(fake.kernel().calls, 1);
    assert!(!outcome.units.is_empty() && outcome.units.len() < 512, "{}", outcome.units.len());
}

#[test]
fn pages_of_hugetlbfs_need_room_in_the_pool_or_in_free_memory() {
    const HUGE: u64 = 2 << 20;
    let units: Vec<_> = (0..4).map(huge).collect();
    for (free_pages, pool, moved) in [(0, 3, 3), (1024, 0, 2), (512, 2, 3), (4096, 0, 4)] {
        let kernel = FakeKernel { free_pages, hugetlb: Some((HUGE, pool)), ..huge_kernel(4) };
        let outcome = apply(&mut mover(kernel).0, &units);
        assert_eq!(outcome.moved_bytes(), moved * HUGE, "{free_pages} free pages, {pool} in the pool");
        let refused = outcome.units.iter().filter(|(_, result)| *result == Err(Refused::HugetlbFull)).count();
        assert_eq!(refused as u64, 4 - moved);
    }
    // Known as soon as one was asked about.
    let (mut mover, _) =
        self::mover(FakeKernel { free_pages: 0, hugetlb: Some((HUGE, 3)), ..huge_kernel(4) });
    mover.places(&[page(0)], &mut Vec::new()).unwrap();
    assert_eq!(mover.room(&slow()), 3 * HUGE);
    // The kernel's own word for it.
    let kernel = FakeKernel { hugetlb: Some((HUGE, 4)), call_error: Some(libc::ENOMEM), ..huge_kernel(4) };
    let outcome = apply(&mut self::mover(kernel).0, &units);
    assert!(outcome.units.iter().all(|(_, result)| *result == Err(Refused::HugetlbFull)));
}

#[test]
fn no_part_of_a_page_of_1_gib_is_tried() {
    let kernel = FakeKernel { hugetlb: Some((1 << 30, 4)), ..huge_kernel(2) };
    let (mut mover, fake) = mover(kernel);
    let outcome = apply(&mut mover, &[huge(0), small(512)]);
    assert!(outcome.units.iter().all(|(_, result)| *result == Err(Refused::TooLarge)), "{outcome:?}");
    assert_eq!(fake.kernel().pages.values().filter(|node| **node == SLOW).count(), 0);
}

#[test]
fn stops_between_batches_and_when_the_process_ends() {
    let (mut mover, fake) = mover(FakeKernel::with_pages((0..10).map(page)));
    let stopped = mover.apply(&[small(0)], &slow(), &AtomicBool::new(true)).unwrap();
    assert_eq!(stopped.units, []);
    fake.kernel().exited = true;
    let gone = mover.apply(&[small(0)], &slow(), &AtomicBool::new(false));
    assert_eq!(gone, Err(ProcessGone));
    assert_eq!(mover.places(&[page(0)], &mut Vec::new()), Err(ProcessGone));
    fake.kernel().exited = false;
    fake.kernel().call_error = Some(libc::ESRCH);
    let gone = mover.apply(&[small(0)], &slow(), &AtomicBool::new(false));
    assert_eq!(gone, Err(ProcessGone));
}

#[test]
fn tells_how_far_the_kernel_came() {
    const U: i32 = STATUS_UNKNOWN;
    assert_eq!(tried_until(&[U, U, 1, U, U]), 2);
    assert_eq!(tried_until(&[1, -2, U, U, 1, U]), 4);
    assert_eq!(tried_until(&[U, U, U]), 3);
    assert_eq!(tried_until(&[1]), 1);
}

/// The real system call, on our own memory. One node is enough to see that
/// arguments and answers are understood.
#[test]
fn asks_the_real_kernel() {
    let process = Arc::new(Process::open(std::process::id() as i32).unwrap());
    let mut mover = KernelMover::new(process, Path::new("/sys").into());
    let memory = vec![1u8; 64 * PAGE_BYTES as usize];
    let first = (memory.as_ptr() as u64).next_multiple_of(PAGE_BYTES);
    let mut nodes = Vec::new();
    mover.places(&[first, first + PAGE_BYTES, PAGE_BYTES], &mut nodes).unwrap();
    let Some(node) = nodes[0] else {
        eprintln!("SKIP: this kernel does not tell where pages lie");
        return;
    };
    assert_eq!(nodes[2], None, "nothing is mapped at the second page of the address space");
    let unit = |hva| MoveUnit { gfn: 0, hva, pages: 1 };
    let here = NodeSet::from_iter([node]);
    let stop = AtomicBool::new(false);
    let outcome = mover.apply(&[unit(first), unit(PAGE_BYTES)], &here, &stop).unwrap();
    let results: Vec<_> = outcome.units.iter().map(|(_, result)| *result).collect();
    assert_eq!(results, [Err(Refused::AlreadyThere), Err(Refused::NotPresent)]);
    let nowhere = NodeSet::from_iter([1000]);
    let outcome = mover.apply(&[unit(first)], &nowhere, &stop).unwrap();
    assert_eq!(outcome.units[0].1, Err(Refused::Failed));
    // Past the check for room, so that the system call itself refuses.
    assert_eq!(mover.migrate(&[first], 1000, &stop).unwrap(), [Err(Refused::Failed)]);
}
