// SPDX-License-Identifier: MIT OR Apache-2.0

use ept_virt_core::budget::Why;
use ept_virt_core::units::BytesPerSecond;

use super::*;

const MIB: u64 = 1 << 20;
const NOW: Duration = Duration::from_secs(50);

/// A host with as much free on each node, of 1000 MiB, and as much page cache.
fn host(free: Arc<Mutex<(u64, u64)>>) -> Arc<Budget> {
    let look = move |node| match node {
        9 => Err(TopologyError::Missing { path: "/sys/node9".into(), line: "MemFree:" }),
        _ => {
            let (free, cache) = *lock(&free);
            Ok((NodeMemory { total_bytes: 1000 * MIB, free_bytes: free * MIB }, cache * MIB))
        }
    };
    let limits = HostLimits { dram_reserve: Share::from_percent(10), ..HostLimits::default() };
    Arc::new(Budget::with(limits, Box::new(look)))
}

fn with_free(free: u64) -> Arc<Budget> {
    host(Arc::new(Mutex::new((free, 0))))
}

fn nodes(list: &[u32]) -> NodeSet {
    NodeSet::from_iter(list.iter().copied())
}

fn claim(weight: u32, held: u64) -> Claim {
    let all = Bytes(600 * MIB);
    Claim { weight, floor: Bytes(0), ceiling: all, demand: all, held: Bytes(held * MIB), movable: true }
}

fn grant(seat: &Seat, claim: Claim, now: Duration) -> u64 {
    seat.claim(&nodes(&[0]), claim, now).unwrap().bytes.0 / MIB
}

#[test]
fn what_is_free_but_for_the_reserve_is_shared_with_what_is_held() {
    let budget = with_free(300);
    let (a, b) = (budget.seat(), budget.seat());
    // Who is alone may have all that is there.
    assert_eq!(grant(&a, claim(100, 300), NOW), 500);
    // A new one is served at once, and the other hears of it when it asks again.
    assert_eq!(grant(&b, claim(100, 100), NOW), 300);
    assert_eq!(grant(&a, claim(100, 300), NOW), 300);
    b.holds(Bytes(300 * MIB));
    // With 300 held by each there are 800 for both. Of that the second one shall have
    // 200, and gives back 75 at a time.
    assert_eq!(grant(&a, claim(300, 300), NOW + SETTLE_INTERVAL), 575);
    assert_eq!(grant(&b, claim(100, 300), NOW + SETTLE_INTERVAL), 225);
    drop(a);
    assert_eq!(budget.seats(), 1);
    assert_eq!(grant(&b, claim(100, 300), NOW + 2 * SETTLE_INTERVAL), 500);
}

#[test]
fn who_has_not_claimed_yet_takes_nothing_and_gives_nothing() {
    let budget = with_free(300);
    let (a, silent) = (budget.seat(), budget.seat());
    assert_eq!(grant(&a, claim(1, 300), NOW), 500);
    silent.holds(Bytes(100 * MIB));
    assert_eq!(grant(&a, claim(1, 300), NOW + SETTLE_INTERVAL), 500);
}

#[test]
fn who_is_not_moved_keeps_what_it_has() {
    let budget = with_free(100);
    let (a, observed) = (budget.seat(), budget.seat());
    let still = observed.claim(&nodes(&[0]), Claim { movable: false, ..claim(1000, 400) }, NOW).unwrap();
    assert_eq!((still.bytes, still.why), (Bytes(400 * MIB), Why::Held));
    assert_eq!(grant(&a, claim(1, 200), NOW), 200);
}

#[test]
fn the_page_cache_drives_nobody_out_and_need_does() {
    let free = Arc::new(Mutex::new((20, 500)));
    let budget = host(Arc::clone(&free));
    let seat = budget.seat();
    assert_eq!(grant(&seat, claim(1, 300), NOW), 300);
    *lock(&free) = (20, 70);
    assert_eq!(grant(&seat, claim(1, 300), NOW + SETTLE_INTERVAL), 300, "there is a little slack");
    *lock(&free) = (20, 30);
    assert_eq!(
        grant(&seat, claim(1, 300), NOW + 2 * SETTLE_INTERVAL),
        262,
        "of the 100, 87.5 are to be there"
    );
}

#[test]
fn domains_share_the_nodes_that_they_have_in_common() {
    let budget = with_free(200);
    let (a, b, c) = (budget.seat(), budget.seat(), budget.seat());
    let on = |seat: &Seat, list: &[u32], held: u64| {
        seat.claim(&nodes(list), claim(100, held), NOW).unwrap().target.0 / MIB
    };
    assert_eq!(on(&a, &[0], 100), 200);
    assert_eq!(on(&b, &[1], 100), 200);
    assert_eq!(on(&a, &[0], 100), 200);
    // One that may have memory of both joins them: 200 free and 400 held.
    assert_eq!(on(&c, &[0, 1], 200), 200);
    assert_eq!(on(&c, &[0, 1], 200), 200);
}

#[test]
fn a_node_that_does_not_tell_gives_nothing_more() {
    let budget = with_free(500);
    let seat = budget.seat();
    let grant = seat.claim(&nodes(&[9]), claim(1, 300), NOW).unwrap();
    assert_eq!(grant.bytes, Bytes(300 * MIB));
}

#[test]
fn moves_of_all_keep_within_one_cap() {
    let budget = with_free(0);
    let (a, b) = (budget.seat(), budget.seat());
    assert_eq!((a.burst_bytes(), a.take(u64::MAX, NOW)), (u64::MAX, Ok(())));
    budget.configure(HostLimits { bandwidth: Some(BytesPerSecond(40 * MIB)), ..HostLimits::default() });
    assert_eq!(a.burst_bytes(), 2 * MIB);
    assert_eq!(a.take(2 * MIB, NOW), Ok(()));
    assert_eq!(b.take(2 * MIB, NOW), Err(Some(Duration::from_millis(50))));
    // It is the other's turn.
    assert!(a.take(2 * MIB, NOW + Duration::from_millis(50)).is_err());
    assert_eq!(b.take(2 * MIB, NOW + Duration::from_millis(50)), Ok(()));
    budget.configure(HostLimits::default());
    assert_eq!(a.take(u64::MAX, NOW), Ok(()));
}
