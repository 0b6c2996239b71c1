// SPDX-License-Identifier: MIT OR Apache-2.0
//! What holds for files of heat, whatever is in them and whatever happened to
//! them.

use std::time::Duration;

use ept_virt_core::heat::store::{BLOCK_CELLS, Decoder, Encoder, Header, MAGIC, SlotRange, StoreError};
use ept_virt_core::heat::{HeatMap, HeatParams};
use ept_virt_core::process::ProcessIdentity;
use proptest::prelude::*;

type Slots = Vec<(SlotRange, Vec<u16>)>;

fn header(slots: &Slots) -> Header {
    Header {
        uuid: "6695eb01-f6a4-8304-79aa-97f2502e193f".into(),
        process: ProcessIdentity {
            boot_id: "d7d2e4f0-8f0c-4a83-b0cd-2f3a8f3dbb1e".into(),
            pid: 4711,
            started_ticks: 123_456,
        },
        harvested_at: Duration::new(77, 123),
        slots: slots.iter().map(|(slot, _)| *slot).collect(),
    }
}

fn encode(slots: &Slots) -> Vec<u8> {
    let mut encoder = Encoder::new(Vec::new(), &header(slots)).unwrap();
    for (_, cells) in slots {
        for block in cells.chunks(BLOCK_CELLS) {
            encoder.block(block).unwrap();
        }
    }
    let (file, length) = encoder.finish().unwrap();
    assert_eq!(file.len() as u64, length);
    file
}

fn decode(file: &[u8]) -> Result<(Header, Slots), StoreError> {
    let decoder = Decoder::new(file)?;
    let header = decoder.header().clone();
    Ok((header, decoder.cells(|_| true)?))
}

fn with_ranges(cells: Vec<Vec<u16>>) -> Slots {
    let mut gfn_start = 0;
    let range = |cells: Vec<u16>| {
        let slot = SlotRange { gfn_start, page_count: cells.len() as u64 };
        gfn_start += slot.page_count + 512;
        (slot, cells)
    };
    cells.into_iter().map(range).collect()
}

/// Some of all one temperature, some of any.
fn slots() -> impl Strategy<Value = Slots> {
    let cold = (any::<u16>(), 0usize..600).prop_map(|(cell, pages)| vec![cell; pages]);
    let mixed = proptest::collection::vec(any::<u16>(), 0..300);
    proptest::collection::vec(prop_oneof![cold, mixed], 0..4).prop_map(with_ranges)
}

proptest! {
    #[test]
    fn what_is_read_is_what_was_written(slots in slots()) {
        let (read_header, read) = decode(&encode(&slots)).unwrap();
        prop_assert_eq!(read_header, header(&slots));
        prop_assert_eq!(read, slots);
    }

    #[test]
    fn one_changed_byte_is_noticed(slots in slots(), at in any::<prop::sample::Index>(), change in 1u8..) {
        let mut file = encode(&slots);
        let at = at.index(file.len());
        file[at] ^= change;
        prop_assert!(decode(&file).is_err(), "byte {} of {}", at, file.len());
    }

    #[test]
    fn a_missing_or_surplus_end_is_noticed(slots in slots(), at in any::<prop::sample::Index>(), more: u8) {
        let mut file = encode(&slots);
        prop_assert!(decode(&file[..at.index(file.len())]).is_err());
        file.push(more);
        prop_assert!(decode(&file).is_err());
    }

    #[test]
    fn any_bytes_are_refused_in_good_order(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(decode(&bytes).is_err());
        let beginning = [&MAGIC[..], &bytes].concat();
        prop_assert!(decode(&beginning).is_err());
    }

    /// A file with right checksums that nobody of ours wrote.
    #[test]
    fn a_header_of_other_slots_is_refused_in_good_order(slots in slots(), page_count: u64) {
        let mut lie = header(&slots);
        lie.slots.push(SlotRange { gfn_start: 0, page_count: page_count.max(1) });
        let (file, _) = Encoder::new(Vec::new(), &lie).unwrap().finish().unwrap();
        prop_assert!(decode(&file).is_err());
    }

    #[test]
    fn heat_goes_on_as_if_nothing_had_happened(
        history in proptest::collection::vec((any::<u64>(), 50u64..5000), 0..20),
        after in proptest::collection::vec((any::<u64>(), 500u64..5000), 1..5),
        pages in 1usize..64,
    ) {
        let params = HeatParams { half_life: Duration::from_secs(10), delay: Duration::ZERO };
        let mut heat = HeatMap::new(pages, params);
        // Long enough that the half-life alone decides.
        heat.step(&[0], Duration::from_secs(100));
        for (accessed, ms) in history {
            heat.step(&[accessed], Duration::from_millis(ms));
        }
        heat.settle();
        let file = encode(&with_ranges(vec![heat.cells().to_vec()]));
        let cells = decode(&file).unwrap().1.remove(0).1;
        let mut restored = HeatMap::from_cells(pages, params, cells);
        for (accessed, ms) in after {
            let dt = Duration::from_millis(ms);
            heat.step(&[accessed], dt);
            restored.step(&[accessed], dt);
            for page in 0..pages + 1 {
                prop_assert_eq!(heat.temperature(page), restored.temperature(page));
                prop_assert_eq!(heat.is_idle(page), restored.is_idle(page));
            }
            prop_assert_eq!(heat.class_counts(), restored.class_counts());
        }
    }
}

#[test]
fn slots_larger_than_a_block_are_whole() {
    let large = |pages: usize| (0..pages).map(|page| (page * 7) as u16).collect();
    let slots = with_ranges(vec![large(BLOCK_CELLS), large(3 * BLOCK_CELLS + 1), large(5)]);
    let file = encode(&slots);
    assert_eq!(decode(&file).unwrap().1, slots);
    // What is not wanted is passed over, and checked all the same.
    let only = |wanted: usize| {
        let wanted = slots[wanted].0;
        Decoder::new(file.as_slice()).unwrap().cells(|slot| *slot == wanted).unwrap()
    };
    assert_eq!(only(2), slots[2..]);
    assert_eq!(only(1), slots[1..2]);
}

#[test]
fn what_is_wrong_is_said() {
    let mut file = encode(&with_ranges(vec![vec![1, 2, 3]]));
    let message = |file: &[u8]| decode(file).unwrap_err().to_string();
    assert_eq!(message(b"#!/bin/sh\nexit"), "it is no file of heat");
    assert_eq!(message(&file[..file.len() - 1]), "it is damaged: its end is missing");
    file[7] = 9;
    assert_eq!(message(&file), "it has version 9 of the format, and this program writes version 1");
}

/// The most that a file can take, and what it takes of a guest at rest.
#[test]
fn a_file_is_never_much_larger_than_its_cells() {
    let mut random = 1u64;
    let mut noise = || {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 48) as u16
    };
    let gib = 1 << 18;
    let of_noise = encode(&with_ranges(vec![(0..gib).map(|_| noise()).collect()])).len();
    assert!(of_noise < 2 * gib * 101 / 100 + 1000, "{of_noise}");
    let cold = encode(&with_ranges(vec![vec![0; gib]])).len();
    assert!(cold < 2 * gib / 200 + 1000, "{cold}");
}
