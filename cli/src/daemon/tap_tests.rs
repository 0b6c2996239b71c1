// SPDX-License-Identifier: MIT OR Apache-2.0

use std::io::BufReader;
use std::thread;

use ept_virt_core::record::Reader;
use ept_virt_core::sampler::Level;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn slot() -> MemSlot {
    MemSlot { gfn_start: 0, page_count: 64, hva: 0x1000, id: 0, read_only: false, dirty_log: false }
}

fn round(tap: &mut Tap, accessed: u64) -> bool {
    let mut harvest = Harvest::default();
    harvest.reset(0, 64);
    harvest.accessed[0] = accessed;
    tap.add(&slot(), &harvest);
    tap.end(Some(SECOND))
}

#[test]
fn a_round_that_nobody_has_time_for_goes_into_the_next() {
    let socket = Socket::default();
    let rounds = socket.plug().unwrap();
    let mut tap = socket.take().unwrap();
    for accessed in [1, 2, 4] {
        assert!(round(&mut tap, accessed));
    }
    let frame = |rounds: &Rounds| rounds.next_round().unwrap();
    let first = frame(&rounds);
    assert_eq!((first.slots[0].accessed[0], first.time), (1, SECOND));
    assert!(round(&mut tap, 8));
    let second = frame(&rounds);
    assert_eq!((second.slots[0].accessed[0], second.time), (14, 4 * SECOND));
    drop(rounds);
    assert!(!round(&mut tap, 16));
}

#[test]
fn parts_of_a_slot_become_one() {
    let socket = Socket::default();
    let rounds = socket.plug().unwrap();
    let mut tap = socket.take().unwrap();
    let whole = MemSlot { gfn_start: 300, page_count: 200, ..slot() };
    for (start, pages, level) in [(300, 128, Level::Page4K), (428, 72, Level::Huge2M)] {
        let mut harvest = Harvest::default();
        harvest.reset(start, pages);
        harvest.mapped[0] = start;
        harvest.levels[0] = level;
        tap.add(&whole, &harvest);
    }
    tap.add(&MemSlot { gfn_start: 512, ..slot() }, &Harvest::default());
    assert!(tap.end(None));
    let frame = rounds.next_round().unwrap();
    assert_eq!(frame.slots[0].mapped, [300, 0, 428, 0]);
    // Both touch the same 2 MiB; the larger mapping counts.
    assert_eq!(frame.slots[0].levels, [Level::Huge2M]);
    assert_eq!(frame.slots.len(), 2);
}

#[test]
fn a_domain_is_recorded_once_at_a_time() {
    let socket = Socket::default();
    let rounds = socket.plug().unwrap();
    assert!(socket.plug().is_none());
    drop(rounds);
    assert!(socket.plug().is_some() && socket.take().is_some() && socket.take().is_none());
}

#[test]
fn a_client_reads_a_recording_until_the_worker_ends() {
    let socket = Socket::default();
    let rounds = socket.plug().unwrap();
    let mut tap = socket.take().unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let server = thread::spawn(move || rounds.stream(&ours, "web-1", "u"));
    let mut reader = Reader::new(BufReader::new(theirs)).unwrap();
    assert_eq!((reader.header().domain.as_str(), reader.header().uuid.as_str()), ("web-1", "u"));
    assert!(round(&mut tap, 5));
    assert_eq!(reader.frame().unwrap().unwrap().slots[0].accessed[0], 5);
    drop(tap);
    assert!(reader.frame().unwrap().is_none());
    server.join().unwrap().unwrap();
}

#[test]
fn a_client_that_goes_is_noticed_between_rounds() {
    let socket = Socket::default();
    let rounds = socket.plug().unwrap();
    let _tap = socket.take().unwrap();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    assert!(!has_gone(&ours));
    // What it said and nobody read does not make it look alive.
    theirs.write_all(b"?").unwrap();
    assert!(!has_gone(&ours));
    let server = thread::spawn(move || rounds.stream(&ours, "web-1", "u"));
    drop(theirs);
    let _ = server.join().unwrap();
    assert!(socket.plug().is_some(), "another may record now");
}

#[test]
fn a_client_that_goes_is_noticed_however_fast_rounds_come() {
    let socket = Socket::default();
    let rounds = socket.plug().unwrap();
    let mut tap = socket.take().unwrap();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    theirs.write_all(b"?").unwrap();
    theirs.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(!has_gone(&ours), "it still listens");
    let server = thread::spawn(move || rounds.stream(&ours, "web-1", "u"));
    assert!(round(&mut tap, 1));
    drop(theirs);
    let begun = std::time::Instant::now();
    while round(&mut tap, 1) {
        assert!(begun.elapsed() < 30 * SECOND, "never noticed");
        thread::sleep(LOOK / 20);
    }
    let _ = server.join().unwrap();
}
