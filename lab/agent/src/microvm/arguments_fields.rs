// SPDX-License-Identifier: MIT OR Apache-2.0
//! Structures with one wrong field, bit by bit, and pointers in them that lead
//! nowhere.

use std::os::fd::AsRawFd;

use anyhow::{Result, ensure};
use ept_virt_core::uapi::{
    self, KesAttach, KesHarvest, KesMemslot, KesMemslots, KesSampleSet, KesSampleStats, MAX_FREQ_HZ,
    MAX_PAGES, MAX_RING_RECORDS,
};
use libc::{EFAULT, EINVAL, EISCONN};

use super::abi::HARVEST_FLAGS;
use super::arguments::{ATTACH, Bench, DETACH, HARVEST, MEMSLOTS, SET, STATS, State, call};
use super::machine::PAGES;
use super::places::{Place, bytes_of, from_bytes};

const A: State = State::Attached;

pub fn all(bench: &mut Bench) -> Result<()> {
    attach(bench)?;
    memslots(bench)?;
    harvest_bits(bench)?;
    harvest_ranges(bench)?;
    sample_set(bench)
}

fn attach(bench: &mut Bench) -> Result<()> {
    let vm_fd = bench.machine.vm_fd().as_raw_fd();
    let good = KesAttach { vm_fd, ..Default::default() };
    for bit in 0..32 {
        let wrong = KesAttach { flags: 1 << bit, ..good };
        bench.expect_of(&format!("ATTACH flag {bit}"), State::Fresh, ATTACH.number, &wrong, EINVAL)?;
        // Wrong in two ways, the call itself comes first.
        let worse = KesAttach { vm_fd: -1, ..wrong };
        bench.expect_of("ATTACH flags and descriptor", A, ATTACH.number, &worse, EINVAL)?;
    }
    for bit in 0..192 {
        let mut wrong = good;
        wrong.reserved[bit / 64] = 1 << (bit % 64);
        bench.expect_of(
            &format!("ATTACH reserved bit {bit}"),
            State::Fresh,
            ATTACH.number,
            &wrong,
            EINVAL,
        )?;
    }
    bench.expect_of("a second ATTACH", A, ATTACH.number, &good, EISCONN)?;
    bench.expect_of("a first ATTACH", State::Fresh, ATTACH.number, &good, 0)?;
    bench.expect("DETACH", State::Fresh, DETACH.number, 0, 0)
}

fn memslots(bench: &mut Bench) -> Result<()> {
    for bit in 0..128 {
        let mut wrong = KesMemslots::default();
        wrong.reserved[bit / 64] = 1 << (bit % 64);
        bench.expect_of(&format!("GET_MEMSLOTS reserved bit {bit}"), A, MEMSLOTS.number, &wrong, EINVAL)?;
    }
    // Fields that only the module writes may hold anything.
    for bit in 0..96 {
        let mut odd = KesMemslots::default();
        if bit < 64 {
            odd.generation = 1 << bit
        } else {
            odd.count = 1 << (bit - 64)
        }
        bench.expect_of("GET_MEMSLOTS with old results", A, MEMSLOTS.number, &odd, 0)?;
        let out: KesMemslots = from_bytes(&bench.places.get(Place::Good, size_of::<KesMemslots>())?);
        ensure!(out.count == 1 && out.generation < 1 << 32, "old results were kept: {out:?}");
    }
    Ok(())
}

fn harvest_bits(bench: &mut Bench) -> Result<()> {
    let good = KesHarvest { gfn_count: 64, ..Default::default() };
    for bit in (0..32).filter(|bit| HARVEST_FLAGS >> bit & 1 == 0) {
        let wrong = KesHarvest { flags: 1 << bit, ..good };
        bench.expect_of(&format!("HARVEST flag {bit}"), A, HARVEST.number, &wrong, EINVAL)?;
        let wrong = KesHarvest { flags: HARVEST_FLAGS | 1 << bit, ..good };
        bench.expect_of(&format!("HARVEST flag {bit} and others"), A, HARVEST.number, &wrong, EINVAL)?;
    }
    for bit in 0..256 {
        let mut wrong = good;
        wrong.reserved[bit / 64] = 1 << (bit % 64);
        bench.expect_of(&format!("HARVEST reserved bit {bit}"), A, HARVEST.number, &wrong, EINVAL)?;
    }
    // What only the module writes may hold anything, and none of it is kept.
    let mut odd = good;
    odd.gfn_next = u64::MAX;
    odd.stats = from_bytes(&vec![0xEE; size_of_val(&odd.stats)]);
    bench.expect_of("HARVEST with old results", A, HARVEST.number, &odd, 0)?;
    let out: KesHarvest = from_bytes(&bench.places.get(Place::Good, size_of::<KesHarvest>())?);
    ensure!(out.gfn_next == 64 && out.stats.sources & !3 == 0 && out.stats.dirty == 0, "{out:?}");
    Ok(())
}

/// Ranges at both ends of what 64 bits can name.
fn harvest_ranges(bench: &mut Bench) -> Result<()> {
    const TOP: u64 = u64::MAX;
    // Start, count, whether the range is one.
    let ranges = [
        (0, 0, false),
        (TOP, 0, false),
        (0, MAX_PAGES + 1, false),
        (0, 1 << 63, false),
        (0, TOP, false),
        (TOP, 1, false),
        (TOP, TOP, false),
        (TOP - 63, 65, false),
        (TOP - 62, 64, false),
        (TOP - MAX_PAGES + 1, MAX_PAGES, false),
        (0, 1, true),
        (PAGES - 1, 2, true),
        (TOP - 1, 1, true),
        (TOP - 64, 64, true),
        (TOP - 64, 63, true),
        (TOP - 100, 64, true),
        (TOP - (1 << 15), 64, true),
        (TOP - (1 << 15), 1 << 15, true),
        (TOP - (1 << 15) - 5, 1 << 15, true),
        (TOP - (1 << 16), 1 << 16, true),
        (TOP - (1 << 16) - 1, 1 << 16, true),
        ((1 << 52) - 32, 64, true),
        ((1 << 48) - 32, 64, true),
        ((1 << 36) - 32, 64, true),
        ((1 << 63) - 32, 64, true),
    ];
    let flags = uapi::HARVEST_CLEAR_ACCESSED | uapi::HARVEST_CLEAR_DIRTY | uapi::HARVEST_FLUSH;
    for (gfn_start, gfn_count, is_range) in ranges {
        // Room for the bits of 64 pages and no more: bits beyond would show.
        let mut bits = [0_u64; 2 * (1 << 16) / 64 + 4];
        let words = gfn_count.div_ceil(64).min(bits.len() as u64) as usize;
        bits.fill(0xA5A5_A5A5_A5A5_A5A5);
        let mut levels = [0xA5_u8; 512];
        let request = KesHarvest {
            gfn_start,
            gfn_count,
            mapped: bits.as_mut_ptr() as u64,
            levels: levels.as_mut_ptr() as u64,
            flags: if is_range && gfn_start < PAGES { 0 } else { flags },
            // Nobody waits for 64 TiB of nothing, nor for ever.
            budget_ns: 1_000_000_000,
            ..Default::default()
        };
        let what = format!("HARVEST of {gfn_count:#x} pages from {gfn_start:#x}");
        bench.expect_of(&what, A, HARVEST.number, &request, if is_range { 0 } else { EINVAL })?;
        let written = if is_range { words } else { 0 };
        let untouched = bits[written..].iter().all(|word| *word == 0xA5A5_A5A5_A5A5_A5A5);
        ensure!(untouched, "{what}: wrote more than {written} words");
        if is_range {
            let out: KesHarvest = from_bytes(&bench.places.get(Place::Good, size_of::<KesHarvest>())?);
            ensure!(out.gfn_next == gfn_start + gfn_count, "{what}: ended at {:#x}", out.gfn_next);
            ensure!(gfn_start < PAGES || out.stats.mapped_4k == 0, "{what}: {:?}", out.stats);
            ensure!(gfn_start < PAGES || bits[..written].iter().all(|word| *word == 0), "{what}: pages");
            let units = uapi::level_count(gfn_start, gfn_count);
            ensure!(levels[units..].iter().all(|level| *level == 0xA5), "{what}: more than {units} levels");
        }
    }
    Ok(())
}

fn sample_set(bench: &mut Bench) -> Result<()> {
    let good = KesSampleSet { access: uapi::ACCESS_READ, freq_hz: 10, ..Default::default() };
    let stop = KesSampleSet::default();
    let set = |bench: &mut Bench, what: &str, request: KesSampleSet, want| {
        bench.expect_of(&format!("SAMPLE_SET {what}"), A, SET.number, &request, want)
    };
    for start in [good, stop] {
        for bit in 0..32 {
            set(bench, &format!("flag {bit}"), KesSampleSet { flags: 1 << bit, ..start }, EINVAL)?;
        }
        for bit in 3..32 {
            set(bench, &format!("access {bit}"), KesSampleSet { access: 1 << bit, ..start }, EINVAL)?;
        }
        for bit in 0..192 {
            let mut wrong = start;
            wrong.reserved[bit / 64] = 1 << (bit % 64);
            set(bench, &format!("reserved bit {bit}"), wrong, EINVAL)?;
        }
        for ring_records in [MAX_RING_RECORDS + 1, 1 << 31, u32::MAX] {
            set(bench, &format!("ring {ring_records}"), KesSampleSet { ring_records, ..start }, EINVAL)?;
        }
    }
    for freq_hz in [MAX_FREQ_HZ + 1, 1 << 31, u32::MAX] {
        set(bench, &format!("at {freq_hz} Hz"), KesSampleSet { freq_hz, ..good }, EINVAL)?;
    }
    set(bench, "of no access", KesSampleSet { access: 0, ..good }, EINVAL)?;
    sample_set_running(bench, good)
}

/// What is refused only while sampling runs.
fn sample_set_running(bench: &mut Bench, good: KesSampleSet) -> Result<()> {
    let set = |bench: &mut Bench, request: KesSampleSet| {
        let argument = bench.places.put(Place::Good, &bytes_of(&request))?;
        anyhow::Ok(call(&bench.attached, SET.number, argument))
    };
    // The smallest ring, then the same by other words, then others.
    ensure!(set(bench, KesSampleSet { ring_records: 1, ..good })? == 0, "sampling with one record");
    for (ring_records, want) in [(0, 0), (1, 0), (2, EINVAL), (MAX_RING_RECORDS, EINVAL)] {
        let got = set(bench, KesSampleSet { ring_records, ..good })?;
        ensure!(got == want, "a ring of {ring_records} while one of 1 is in use: errno {got}");
    }
    let running = uapi::sample_stats(&bench.attached)?;
    ensure!(running.freq_hz == 10, "a refused call changed the rate: {running:?}");
    // Stopping looks at the limits of the ring's size, not at the ring in use.
    let stop = KesSampleSet { freq_hz: 0, access: 0, ring_records: 64, ..good };
    let got = set(bench, KesSampleSet { ring_records: MAX_RING_RECORDS + 1, ..stop })?;
    ensure!(got == EINVAL, "stopping with too large a ring: errno {got}");
    ensure!(uapi::sample_stats(&bench.attached)?.freq_hz == 10, "a refused stop stopped");
    let got = set(bench, stop)?;
    ensure!(got == 0, "stopping with another ring's size: errno {got}");
    let stopped = uapi::sample_stats(&bench.attached)?;
    ensure!(stopped.freq_hz == 0 && stopped.armed_now == 0, "{stopped:?}");
    bench.counted += 7;
    // What was counted would differ from one snapshot to the next only while it runs.
    bench.expect_of("SAMPLE_STATS", A, STATS.number, &KesSampleStats::default(), 0)
}

/// Pointers within the structures, at every kind of address.
pub fn buffers(bench: &mut Bench) -> Result<()> {
    for place in Place::ALL {
        harvest_buffers(bench, place)?;
        slot_buffers(bench, place)?;
    }
    // Too many nodes, also where nobody asked for pages on them.
    for (on_nodes, nodes_bits) in [(0, 1025), (0, u32::MAX), (8, 1025), (8, 1 << 31)] {
        let request = KesHarvest { gfn_count: 64, on_nodes, nodes: 8, nodes_bits, ..Default::default() };
        bench.expect_of(&format!("HARVEST of {nodes_bits} nodes"), A, HARVEST.number, &request, EINVAL)?;
    }
    let request = KesHarvest { gfn_count: 64, on_nodes: 8, ..Default::default() };
    bench.expect_of("HARVEST on nodes without nodes", A, HARVEST.number, &request, EINVAL)
}

fn harvest_buffers(bench: &mut Bench, place: Place) -> Result<()> {
    type Field = (&'static str, fn(&mut KesHarvest, u64));
    let outputs: [Field; 5] = [
        ("accessed", |request, pointer| request.accessed = pointer),
        ("dirty", |request, pointer| request.dirty = pointer),
        ("mapped", |request, pointer| request.mapped = pointer),
        ("levels", |request, pointer| request.levels = pointer),
        ("on_nodes", |request, pointer| request.on_nodes = pointer),
    ];
    let nodes = [1_u64; 16];
    for (name, field) in outputs {
        // Eight bytes for 64 pages of one 2 MiB unit; levels take one of them.
        let bytes = if name == "levels" { 1 } else { 8 };
        let pointer = bench.places.put(place, &vec![0; bytes])?;
        let mut request = KesHarvest { gfn_count: 64, nodes_bits: 1024, ..Default::default() };
        request.nodes = nodes.as_ptr() as u64;
        field(&mut request, pointer);
        // A null pointer asks for nothing.
        let want = if place.writable() || place == Place::Null { 0 } else { EFAULT };
        let what = format!("HARVEST with {name} {place:?}");
        let argument = std::ptr::from_mut(&mut request) as u64;
        bench.expect(&what, A, HARVEST.number, argument, want)?;
        if place.writable() {
            bench.places.get(place, bytes)?;
        }
    }
    let mut bits = 0_u64;
    let pointer = bench.places.put(place, &bytes_of(&nodes))?;
    let mut request = KesHarvest { gfn_count: 64, nodes_bits: 1024, nodes: pointer, ..Default::default() };
    request.on_nodes = std::ptr::from_mut(&mut bits) as u64;
    let want = match place {
        Place::Null => EINVAL,
        _ if place.readable() => 0,
        _ => EFAULT,
    };
    let argument = std::ptr::from_mut(&mut request) as u64;
    bench.expect(&format!("HARVEST with nodes {place:?}"), A, HARVEST.number, argument, want)
}

/// The one slot of the machine, handed over at `place`.
fn slot_buffers(bench: &mut Bench, place: Place) -> Result<()> {
    for capacity in [0, 1, 2, 32764, 1 << 31, u32::MAX] {
        let content = vec![0; size_of::<KesMemslot>()];
        let pointer = bench.places.put(place, &content)?;
        let mut request = KesMemslots { slots: pointer, capacity, ..Default::default() };
        let want = if capacity == 0 || place.writable() { 0 } else { EFAULT };
        let argument = std::ptr::from_mut(&mut request) as u64;
        let what = format!("GET_MEMSLOTS of {capacity} at {place:?}");
        bench.expect(&what, A, MEMSLOTS.number, argument, want)?;
        if want != 0 {
            ensure!(request.count == 0, "{what}: refused, and counted {}", request.count);
            continue;
        }
        ensure!(request.count == 1, "{what}: {} slots", request.count);
        if place.writable() {
            let got = bench.places.get(place, content.len())?;
            let slot: KesMemslot = from_bytes(&got);
            ensure!(capacity > 0 || got == content, "{what}: wrote without room");
            ensure!(capacity == 0 || slot.page_count == PAGES, "{what}: {slot:?}");
        }
    }
    Ok(())
}
