// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the fuzzer knows of a call that succeeded: what must hold in its results,
//! whatever else happened meanwhile.

use anyhow::{Context, Result, ensure};
use ept_virt_core::uapi::{self, KesHarvest, KesInfo, KesMemslot, KesMemslots, KesSample, KesSampleStats};
use nix::poll::PollFlags;

use super::fuzz_player::Player;
use super::fuzz_steps::{Buffer, Call, HarvestStep, ROOM_PAGES};
use super::machine::PAGES;
use super::places::{Place, from_bytes};

/// What rooms for results hold before the call.
pub const GUARD: u64 = 0xA5A5_5A5A_A5A5_5A5A;
/// The first page and the end of the small slot that comes and goes.
const EXTRA_SLOT: std::ops::Range<u64> = 0x1_0000..0x1_0040;

fn is_guests(gfn: u64) -> bool {
    gfn < PAGES || EXTRA_SLOT.contains(&gfn)
}

/// Fails when a result is not one. Of a read returns the time of its last record.
pub fn result(player: &mut Player, place: Place, call: &Call, count: usize, last_ns: u64) -> Result<u64> {
    match call {
        Call::Info => info(&out(player, place)?)?,
        Call::Stats => stats(&out(player, place)?)?,
        Call::Memslots { capacity, slots, .. } => {
            let request: KesMemslots = out(player, place)?;
            memslots(player, &request, *capacity, *slots)?;
        }
        Call::Harvest(step) => {
            let request: KesHarvest = out(player, place)?;
            harvest(player, step, &request)?;
        }
        Call::Read { .. } => return records(&player.places.get(place, count)?, last_ns),
        Call::Poll => {
            let known = (PollFlags::POLLIN | PollFlags::POLLHUP).bits() as usize;
            ensure!(count & !known == 0, "poll says {count:#x}");
        }
        _ => {}
    }
    Ok(last_ns)
}

fn out<T: Copy>(player: &mut Player, place: Place) -> Result<T> {
    Ok(from_bytes(&player.places.get(place, size_of::<T>())?))
}

fn info(info: &KesInfo) -> Result<()> {
    ensure!(info.abi_version >> 16 == uapi::ABI_VERSION >> 16 && info.reserved == [0; 5], "{info:?}");
    ensure!(info.chunk_pages > 0 && info.sessions < 100, "{info:?}");
    Ok(())
}

/// Each entry that was armed is accounted for, at any time.
fn stats(stats: &KesSampleStats) -> Result<()> {
    let sum = stats.samples + stats.dropped + stats.unwanted + stats.released + u64::from(stats.armed_now);
    ensure!(stats.armed == sum, "the counts do not add up: {stats:?}");
    ensure!(u64::from(stats.unread) <= stats.samples, "more to read than was recorded: {stats:?}");
    ensure!(stats.freq_hz <= uapi::MAX_FREQ_HZ && stats.reserved == [0; 4], "{stats:?}");
    Ok(())
}

fn memslots(player: &Player, request: &KesMemslots, capacity: u32, slots: Buffer) -> Result<()> {
    ensure!(request.count <= 2 && request.reserved == [0; 2], "{request:?}");
    if slots != Buffer::Good || capacity < request.count {
        return Ok(());
    }
    let words = size_of::<KesMemslot>() / 8;
    for slot in player.rooms[0][..request.count as usize * words].chunks(words) {
        let bytes: Vec<u8> = slot.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let slot: KesMemslot = from_bytes(&bytes);
        let is_known = slot.id < 2 && slot.flags & !(uapi::SLOT_DIRTY_LOG) == 0;
        ensure!(is_known && is_guests(slot.gfn_start) && slot.hva >> 47 == 0, "{slot:?}");
    }
    Ok(())
}

fn harvest(player: &Player, step: &HarvestStep, request: &KesHarvest) -> Result<()> {
    let end = step.gfn_start + step.gfn_count;
    ensure!(request.gfn_next > step.gfn_start && request.gfn_next <= end, "ended at {:#x}", request.gfn_next);
    ensure!(request.stats.sources & !3 == 0 && request.stats.chunks > 0, "{:?}", request.stats);
    let mapped = request.stats.mapped_4k + request.stats.mapped_2m + request.stats.mapped_1g;
    ensure!(mapped <= PAGES + 64 && request.stats.accessed <= mapped, "{:?}", request.stats);
    if step.gfn_count > ROOM_PAGES || request.gfn_next != end {
        return Ok(());
    }
    let words = step.gfn_count.div_ceil(64) as usize;
    for (index, buffer) in step.buffers.iter().enumerate() {
        let room = &player.rooms[index];
        match buffer {
            Buffer::Good if index < 4 => {
                ensure!(room[words..].iter().all(|word| *word == GUARD), "room {index} was overrun");
                bits(step, &room[..words]).with_context(|| format!("bitmap {index}"))?;
            }
            Buffer::Good => levels(step, room)?,
            Buffer::At(Place::Unaligned | Place::Good) => {}
            _ => ensure!(room.iter().all(|word| *word == GUARD), "room {index} was not offered"),
        }
    }
    if step.buffers[0] == Buffer::Good && step.buffers[2] == Buffer::Good {
        let stray = player.rooms[0][..words].iter().zip(&player.rooms[2]).any(|(a, mapped)| a & !mapped != 0);
        ensure!(!stray, "pages accessed that are not mapped");
    }
    Ok(())
}

fn bits(step: &HarvestStep, words: &[u64]) -> Result<()> {
    for (index, word) in words.iter().enumerate() {
        for bit in (0..64).filter(|bit| word >> bit & 1 == 1) {
            let page = index as u64 * 64 + bit;
            ensure!(page < step.gfn_count, "bit {page} beyond {} pages", step.gfn_count);
            ensure!(is_guests(step.gfn_start + page), "page {:#x} is none", step.gfn_start + page);
        }
    }
    Ok(())
}

fn levels(step: &HarvestStep, room: &[u64]) -> Result<()> {
    let units = uapi::level_count(step.gfn_start, step.gfn_count);
    let bytes: Vec<u8> = room.iter().flat_map(|word| word.to_ne_bytes()).collect();
    ensure!(bytes[..units].iter().all(|level| *level <= uapi::LEVEL_1G), "{:?}", &bytes[..units]);
    let guard = GUARD.to_ne_bytes();
    let kept = bytes.iter().enumerate().skip(units).all(|(at, byte)| *byte == guard[at % 8]);
    ensure!(kept, "more than {units} levels");
    Ok(())
}

fn records(bytes: &[u8], last_ns: u64) -> Result<u64> {
    ensure!(!bytes.is_empty() && bytes.len() % size_of::<KesSample>() == 0, "{} bytes", bytes.len());
    let mut last_ns = last_ns;
    for record in bytes.chunks(size_of::<KesSample>()) {
        let record: KesSample = from_bytes(record);
        ensure!(is_guests(record.gfn) && record.vcpu <= 8 && record.reserved == 0, "{record:?}");
        ensure!(matches!(record.access, 1 | 2 | 4) && record.flags == 0, "{record:?}");
        ensure!((uapi::LEVEL_4K..=uapi::LEVEL_2M).contains(&record.level), "{record:?}");
        ensure!(record.time_ns >= last_ns, "{record:?} comes after one of {last_ns}");
        last_ns = record.time_ns;
    }
    Ok(last_ns)
}
