// SPDX-License-Identifier: MIT OR Apache-2.0
//! Recordings read back as they were written, and whatever else is in a file is
//! told, never believed.

#[path = "../../fuzz/invariants/corpus.rs"]
mod corpus;
#[path = "../../fuzz/invariants/recording.rs"]
mod recording;

use std::io;
use std::time::Duration;

use ept_virt_core::bitmap;
use ept_virt_core::record::{Frame, FrameSlot, Header, MAGIC, MOST_PAGES, Reader, RecordError, Writer};
use ept_virt_core::sampler::Level;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{Index, select};

fn header() -> Header {
    Header { domain: "web-1".into(), uuid: "8f3c".into(), began: 1_795_000_000, program: "test 1".into() }
}

fn write(frames: &[Frame]) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new(), &header()).unwrap();
    for frame in frames {
        writer.append(frame.clone()).unwrap();
    }
    writer.into_inner()
}

/// All whole frames, and how the file ends.
fn read(bytes: &[u8]) -> (Vec<Frame>, Option<RecordError>) {
    let mut reader = match Reader::new(bytes) {
        Ok(reader) => reader,
        Err(error) => return (Vec::new(), Some(error)),
    };
    let mut frames = Vec::new();
    loop {
        match reader.frame() {
            Ok(Some(frame)) => frames.push(frame),
            Ok(None) => return (frames, None),
            Err(error) => {
                assert!(matches!(reader.frame(), Ok(None)), "there is nothing behind an error");
                return (frames, Some(error));
            }
        }
    }
}

fn words(pages: u64) -> impl Strategy<Value = Vec<u64>> {
    let words = bitmap::words_for(pages as usize);
    let word = prop_oneof![Just(0), Just(!0), any::<u64>()];
    vec(word, words).prop_map(move |mut words| {
        if let Some(last) = words.last_mut() {
            *last &= bitmap::tail_mask(pages as usize);
        }
        words
    })
}

fn slot(gfn_start: u64, page_count: u64) -> impl Strategy<Value = FrameSlot> {
    let levels = (gfn_start + page_count).div_ceil(512) - gfn_start / 512;
    let level = select(vec![Level::None, Level::Page4K, Level::Huge2M, Level::Huge1G]);
    (words(page_count), words(page_count), words(page_count), vec(level, levels as usize)).prop_map(
        move |(accessed, mapped, on_slow, levels)| FrameSlot {
            gfn_start,
            page_count,
            accessed,
            mapped,
            on_slow,
            levels,
        },
    )
}

/// A frame of some of three slots.
fn frame() -> impl Strategy<Value = Frame> {
    let slots = (slot(0, 160), slot(256, 1), slot(0x10_0000 + 300, 1000), any::<[bool; 3]>());
    (any::<u32>(), slots).prop_map(|(time, (a, b, c, wanted))| Frame {
        time: Duration::from_micros(time.into()),
        slots: [a, b, c]
            .into_iter()
            .zip(wanted)
            .filter(|(_, wanted)| *wanted)
            .map(|(slot, _)| slot)
            .collect(),
    })
}

proptest! {
    #[test]
    fn frames_read_back(frames in vec(frame(), 0..6)) {
        let bytes = write(&frames);
        let reader = Reader::new(bytes.as_slice()).unwrap();
        prop_assert_eq!(reader.header(), &header());
        let (found, error) = read(&bytes);
        prop_assert!(error.is_none(), "{error:?}");
        prop_assert_eq!(found, frames);
    }

    #[test]
    fn what_was_cut_off_is_good_up_to_there(frames in vec(frame(), 1..5), cut: Index) {
        let bytes = write(&frames);
        let length = cut.index(bytes.len());
        let (found, error) = read(&bytes[..length]);
        prop_assert_eq!(&found, &frames[..found.len()]);
        // Between two frames nothing is missing.
        let whole = write(&frames[..found.len()]).len() == length;
        match error {
            None => prop_assert!(whole),
            Some(RecordError::CutOff(count)) => prop_assert!(!whole && count == found.len() as u64),
            Some(RecordError::NotRecording) => prop_assert!(length < MAGIC.len()),
            Some(other) => prop_assert!(false, "{other}"),
        }
    }

    #[test]
    fn a_changed_byte_is_noticed(frames in vec(frame(), 1..5), at: Index, change in 1u8..) {
        let mut bytes = write(&frames);
        let at = at.index(bytes.len());
        bytes[at] ^= change;
        let (found, error) = read(&bytes);
        prop_assert!(error.is_some() && found.len() < frames.len());
        prop_assert_eq!(&found, &frames[..found.len()]);
        recording::check(&bytes);
    }

    #[test]
    fn any_section_is_read_or_refused(content in vec(any::<u8>(), 0..200), slots in 0u32..3, pages: u64) {
        recording::check(&content);
        recording::check(&recording::sections(&[br#"{"domain":"","uuid":"","began":0,"program":""}"#, &content]));
        // Something that begins well.
        let mut frame = 7u64.to_le_bytes().to_vec();
        frame.extend(slots.to_le_bytes());
        frame.extend(256u64.to_le_bytes());
        frame.extend(pages.to_le_bytes());
        frame.extend(content);
        recording::check(&recording::sections(&[br#"{"domain":"","uuid":"","began":0,"program":""}"#, &frame]));
    }
}

#[test]
fn the_corpus_holds() {
    corpus::replay("recording", recording::check);
}

#[test]
fn what_is_no_recording_is_told() {
    let told = |bytes: &[u8]| Reader::new(bytes).map(|_| ()).unwrap_err().to_string();
    assert_eq!(told(b""), "it is no recording");
    assert_eq!(told(b"EPTHEAT\x01"), "it is no recording");
    assert_eq!(told(b"EPTREC\0\x02"), "it has version 2 of the format, and this program reads version 1");
    assert_eq!(told(&MAGIC), "it was cut off after 0 whole rounds");
}

#[test]
fn a_slot_that_claims_more_than_is_told_of_it_takes_no_memory() {
    let mut frame = 0u64.to_le_bytes().to_vec();
    frame.extend(1u32.to_le_bytes());
    frame.extend(0u64.to_le_bytes());
    frame.extend(MOST_PAGES.to_le_bytes());
    // Four empty maps.
    frame.extend([0; 16]);
    let bytes = recording::sections(&[br#"{"domain":"","uuid":"","began":0,"program":""}"#, &frame]);
    let (_, error) = read(&bytes);
    assert!(error.unwrap().to_string().contains("larger than what is told of it"));
}

#[test]
fn a_steady_guest_takes_little_room() {
    // 1 GiB of which a fifth is accessed in each round, in one piece but for noise.
    let pages = 1 << 18;
    let frame = |round: u64| {
        let mut slot = FrameSlot { gfn_start: 0, page_count: pages, ..FrameSlot::default() };
        slot.accessed = vec![0; pages as usize / 64];
        slot.mapped = vec![!0; pages as usize / 64];
        slot.levels = vec![Level::Page4K; pages as usize / 512];
        bitmap::fill(&mut slot.accessed, 0..pages as usize / 5, true);
        for index in 0..pages / 1000 {
            let page = (index * 7919 + round * 104_729) % pages;
            bitmap::fill(&mut slot.accessed, page as usize..page as usize + 1, true);
        }
        Frame { time: Duration::from_secs(round), slots: vec![slot] }
    };
    let mut writer = Writer::new(io::sink(), &header()).unwrap();
    let sizes: Vec<u64> = (0..5).map(|round| writer.append(frame(round)).unwrap()).collect();
    // A bitmap alone is 32768 bytes.
    assert!(sizes[1..].iter().all(|size| *size < 4096), "{sizes:?}");
}

#[test]
fn accesses_of_a_frame_that_is_left_out_are_in_the_next() {
    let slot = |accessed| FrameSlot { page_count: 64, accessed: vec![accessed], ..FrameSlot::default() };
    let earlier = Frame { slots: vec![slot(1)], ..Frame::default() };
    let mut frame =
        Frame { slots: vec![slot(6), FrameSlot { gfn_start: 64, ..slot(8) }], ..Frame::default() };
    frame.absorb(&earlier);
    assert_eq!((frame.slots[0].accessed[0], frame.slots[1].accessed[0]), (7, 8));
}
