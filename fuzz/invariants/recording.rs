// SPDX-License-Identifier: MIT OR Apache-2.0
//! What holds for every file that may be given as a recording.

use ept_virt_core::record::{Frame, MAGIC, MOST_PAGES, Reader, Writer};

/// A recording's bytes with these sections, each with its right checksum: without it
/// nothing that is made up at random would be looked at.
pub fn sections(contents: &[&[u8]]) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    for content in contents {
        let mut section = (content.len() as u32).to_le_bytes().to_vec();
        section.extend_from_slice(content);
        let checksum = crc32(&section);
        bytes.extend_from_slice(&section);
        bytes.extend_from_slice(&checksum.to_le_bytes());
    }
    bytes
}

/// CRC-32 (IEEE), as by its definition: another way than the program's.
fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 })
    })
}

/// Reads `input` as a recording, and as the frames of one, cut in two.
pub fn check(input: &[u8]) {
    check_file(input);
    let header: &[u8] = br#"{"domain":"d","uuid":"u","began":1,"program":"p"}"#;
    check_file(&sections(&[header, input]));
    if let Some((at, rest)) = input.split_first() {
        let (first, second) = rest.split_at(usize::from(*at).min(rest.len()));
        check_file(&sections(&[header, first, second]));
    }
}

fn check_file(bytes: &[u8]) {
    let mut reader = match Reader::new(bytes) {
        Ok(reader) => reader,
        Err(error) => return check_message(&error.to_string()),
    };
    let mut frames = Vec::new();
    loop {
        match reader.frame() {
            Ok(Some(frame)) => {
                check_frame(&frame, bytes.len());
                frames.push(frame);
            }
            Ok(None) => break,
            Err(error) => {
                check_message(&error.to_string());
                break;
            }
        }
    }
    let mut writer = Writer::new(Vec::new(), reader.header()).expect("memory takes all");
    for frame in &frames {
        writer.append(frame.clone()).expect("memory takes all");
    }
    let again = writer.into_inner();
    let mut reader = Reader::new(again.as_slice()).expect("what is written is read again");
    for frame in frames {
        assert_eq!(reader.frame().expect("what is written is read again"), Some(frame));
    }
    assert!(matches!(reader.frame(), Ok(None)));
}

/// Slots in order and apart, maps as long as they should be, and not more memory than
/// the file's length allows.
fn check_frame(frame: &Frame, file_bytes: usize) {
    let mut end = 0;
    let mut memory = 0;
    for slot in &frame.slots {
        assert!(slot.gfn_start >= end && slot.page_count > 0);
        end = slot.gfn_start.checked_add(slot.page_count).expect("a slot ends");
        let words = slot.page_count.div_ceil(64) as usize;
        for map in [&slot.accessed, &slot.mapped, &slot.on_slow] {
            assert_eq!(map.len(), words);
            let used = slot.page_count % 64;
            assert!(used == 0 || map.last().is_some_and(|last| last >> used == 0));
            memory += map.len() * 8;
        }
        assert_eq!(slot.levels.len() as u64, end.div_ceil(512) - slot.gfn_start / 512);
        memory += slot.levels.len();
    }
    assert!(frame.pages() <= MOST_PAGES && memory <= 255 * file_bytes);
}

fn check_message(message: &str) {
    assert!(!message.contains(char::is_control) && message.len() < 300, "{message:?}");
}
