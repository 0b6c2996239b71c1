// SPDX-License-Identifier: MIT OR Apache-2.0
//! The fuzzer's steps: calls and events drawn from a seed alone, so that the same
//! seed gives the same steps, whatever the kernel answered to those before.

use ept_virt_core::uapi;

use super::abi::HARVEST_FLAGS;
use super::arguments::CALLS;
use super::disturb::Disturbance;
use super::places::Place;
use super::random::Random;

/// Sessions of each thread; the session of this number is shared by all.
pub const FILES: usize = 3;
pub const SHARED: usize = FILES;
/// There is room for the bitmaps of this many pages.
pub const ROOM_PAGES: u64 = 1 << 16;
/// VMs of all threads.
pub const VMS: usize = 3;

/// What a descriptor in a request stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    Vm(usize),
    /// A VM whose process was killed, if there is one by now.
    DeadVm,
    /// A file of ours that is no VM.
    NoVm,
    Number(i32),
}

/// A buffer in a request: as the call needs it, none, or at a wrong address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Buffer {
    Good,
    None,
    At(Place),
}

impl Buffer {
    pub fn is_wrong(self) -> bool {
        matches!(self, Buffer::At(place) if !place.writable() && place != Place::Null)
    }
}

#[derive(Clone, Copy, Debug)]
pub struct HarvestStep {
    pub gfn_start: u64,
    pub gfn_count: u64,
    pub flags: u32,
    /// Accessed, dirty, mapped, on nodes, levels.
    pub buffers: [Buffer; 5],
    pub nodes: Buffer,
    pub nodes_bits: u32,
    pub reserved: u64,
}

#[derive(Clone, Copy, Debug)]
pub struct SetStep {
    pub access: u32,
    pub freq_hz: u32,
    pub ring_records: u32,
    pub flags: u32,
    pub reserved: u64,
}

/// A call on a session.
#[derive(Clone, Copy, Debug)]
pub enum Call {
    Info,
    Attach { target: Target, flags: u32, reserved: u64 },
    Detach,
    Memslots { capacity: u32, slots: Buffer, reserved: u64 },
    Harvest(HarvestStep),
    Set(SetStep),
    Stats,
    Read { bytes: usize },
    Poll,
    Number(u64),
}

#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// Closes what is open there first.
    Open {
        file: usize,
        nonblock: bool,
    },
    /// One call, with its structure or buffer at a place.
    Call {
        file: usize,
        place: Place,
        call: Call,
    },
    Disturb {
        vm: usize,
        how: Disturbance,
    },
    Check {
        vm: usize,
    },
    /// Its process is killed, and another one takes its place.
    Kill {
        vm: usize,
    },
}

impl Step {
    pub fn draw(random: &mut Random) -> Step {
        let file = if random.once_in(8) { SHARED } else { random.below(FILES as u64) as usize };
        let vm = random.below(VMS as u64) as usize;
        match random.below(1000) {
            0..40 => Step::Open { file, nonblock: !random.once_in(4) },
            40..120 => Step::Disturb { vm, how: random.pick(&Disturbance::ALL) },
            120..130 => Step::Check { vm },
            130..136 => Step::Kill { vm },
            _ => Step::Call { file, place: place(random), call: Call::draw(random) },
        }
    }
}

/// Mostly a good one: what is refused at once tests little.
fn place(random: &mut Random) -> Place {
    match random.below(8) {
        0 => random.pick(&Place::ALL),
        1 => Place::Unaligned,
        _ => Place::Good,
    }
}

impl Call {
    fn draw(random: &mut Random) -> Call {
        match random.below(100) {
            0..4 => Call::Info,
            4..20 => {
                Call::Attach { target: target(random), flags: flags(random, 0), reserved: reserved(random) }
            }
            20..25 => Call::Detach,
            25..33 => Call::Memslots {
                capacity: random.pick(&[0, 1, 2, 8, 8, 8, 32764, u32::MAX]),
                slots: buffer(random),
                reserved: reserved(random),
            },
            33..58 => Call::Harvest(harvest(random)),
            58..72 => Call::Set(set(random)),
            72..78 => Call::Stats,
            78..90 => Call::Read { bytes: bytes(random) },
            90..96 => Call::Poll,
            _ => Call::Number(number(random)),
        }
    }
}

fn target(random: &mut Random) -> Target {
    match random.below(16) {
        0 => Target::DeadVm,
        1 => Target::NoVm,
        2 => Target::Number(random.pick(&[-1, i32::MIN, i32::MAX, 1 << 19])),
        _ => Target::Vm(random.below(VMS as u64) as usize),
    }
}

/// Flags of which `known` are: near to valid, and seldom far.
fn flags(random: &mut Random, known: u32) -> u32 {
    let valid = random.next() as u32 & known;
    match random.below(12) {
        0 => valid | 1 << random.below(32),
        1 => random.next() as u32,
        _ => valid,
    }
}

fn reserved(random: &mut Random) -> u64 {
    if random.once_in(20) { random.wild() } else { 0 }
}

fn buffer(random: &mut Random) -> Buffer {
    match random.below(24) {
        0 => Buffer::At(random.pick(&Place::ALL)),
        1..10 => Buffer::None,
        _ => Buffer::Good,
    }
}

/// A range within the guest, around its end, or anywhere.
fn range(random: &mut Random) -> (u64, u64) {
    let pages = super::machine::PAGES;
    match random.below(10) {
        0 => (random.wild(), random.below(1 << 16)),
        1 => (random.wild(), random.wild()),
        2 => {
            let count = random.below(1 << 16);
            (u64::MAX - count - random.below(3) + 1, count)
        }
        3 => (pages - random.below(600), random.below(1200)),
        4 | 5 => (0, pages),
        _ => {
            let start = random.below(pages);
            (start, 1 + random.below(pages - start))
        }
    }
}

fn harvest(random: &mut Random) -> HarvestStep {
    let (gfn_start, gfn_count) = range(random);
    let mut buffers: [Buffer; 5] = std::array::from_fn(|_| buffer(random));
    if gfn_count > ROOM_PAGES {
        buffers = buffers.map(|buffer| if buffer.is_wrong() { buffer } else { Buffer::None });
    }
    HarvestStep {
        gfn_start,
        gfn_count,
        flags: flags(random, HARVEST_FLAGS),
        buffers,
        nodes: if random.once_in(8) { buffer(random) } else { Buffer::Good },
        nodes_bits: random.pick(&[0, 1, 2, 63, 64, 65, 128, 1023, 1024, 1024, 1025, u32::MAX]),
        reserved: reserved(random),
    }
}

fn set(random: &mut Random) -> SetStep {
    let mut access = 1 + random.below(7) as u32;
    if random.once_in(12) {
        access = random.pick(&[0, 8, 9, 1 << 31, u32::MAX]);
    }
    let freq_hz = match random.below(10) {
        0..3 => 0,
        3..8 => 1 + random.below(5000) as u32,
        8 => random.pick(&[1, uapi::MAX_FREQ_HZ, 20_000]),
        _ => random.pick(&[uapi::MAX_FREQ_HZ + 1, u32::MAX]),
    };
    let ring_records = match random.below(6) {
        0 => random.pick(&[1, 2, 3, 16, 17, 1024, uapi::MAX_RING_RECORDS]),
        1 => random.pick(&[uapi::MAX_RING_RECORDS + 1, u32::MAX, 16384, 16383]),
        _ => 0,
    };
    SetStep { access, freq_hz, ring_records, flags: flags(random, 0), reserved: reserved(random) }
}

/// Sizes of buffers for records of 24 bytes; all fit the room at a place.
fn bytes(random: &mut Random) -> usize {
    random.pick(&[0, 1, 23, 24, 25, 47, 48, 240, 2400, 12_000])
}

/// Commands that do not exist: with a bit changed, or anything at all. Those of
/// 2019 are numbers without a size.
fn number(random: &mut Random) -> u64 {
    let call = random.pick(&CALLS).number;
    let number = match random.below(3) {
        0 => call ^ 1 << random.below(32),
        1 => call & !0xFF | random.below(256),
        _ => random.next() & 0xFFFF_FFFF,
    };
    let exists = CALLS.iter().any(|call| call.number == number) || number < 0x1_0000;
    if exists { 0xDEAD_0000 } else { number }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_steps() {
        let steps = |seed| {
            let mut random = Random::new(seed, 1);
            (0..2000).map(|_| format!("{:?}", Step::draw(&mut random))).collect::<Vec<_>>()
        };
        assert_eq!(steps(1), steps(1));
        assert_ne!(steps(1), steps(2));
    }

    #[test]
    fn no_number_of_a_call_is_drawn() {
        let mut random = Random::new(3, 0);
        let known = |number| CALLS.iter().any(|call| call.number == number);
        assert!((0..10_000).all(|_| !known(number(&mut random))));
    }
}
