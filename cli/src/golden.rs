// SPDX-License-Identifier: MIT OR Apache-2.0
//! What people see, byte by byte. `UPDATE_GOLDEN=1 cargo test` writes the files
//! anew; read the difference before you commit it.

use std::fs;
use std::path::{Path, PathBuf};

use ept_virt_core::wire::{MemoryMap, Status};
use serde::de::DeserializeOwned;

use crate::style::Style;
use crate::{list, map, status};

const WIDE: Style = Style { color: false, unicode: true, width: 100, wrap: true };
const COLOR: Style = Style { color: true, unicode: true, width: 60, wrap: true };

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name)
}

pub fn read<T: DeserializeOwned>(name: &str) -> T {
    serde_json::from_str(&fs::read_to_string(fixture(name)).unwrap()).unwrap()
}

pub fn check(name: &str, text: &str) {
    let path = fixture(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        fs::write(&path, text).unwrap();
    }
    let expected = fs::read_to_string(&path).unwrap_or_default();
    assert!(text == expected, "{name} differs; it is now:\n{text}");
}

#[test]
fn status_in_words() {
    let busy: Status = read("busy.json");
    check("busy-status.txt", &status::render(&busy, &Style::PLAIN));
    check("busy-status-terminal.txt", &status::render(&busy, &WIDE));
    check("busy-status-color.txt", &status::render_domains(&busy, &COLOR));
    check("empty-status.txt", &status::render(&read("empty.json"), &Style::PLAIN));
}

#[test]
fn list_as_a_table() {
    let busy: Status = read("busy.json");
    check("busy-list.txt", &list::render(&busy, &Style::PLAIN));
    check("busy-list.json", &serde_json::to_string_pretty(&list::entries(&busy)).unwrap());
    check("empty-list.txt", &list::render(&read("empty.json"), &Style::PLAIN));
}

#[test]
fn map_as_runs_and_picture() {
    let shown: MemoryMap = read("map.json");
    check("map.txt", &map::render(&shown, &Style::PLAIN));
    check("map-color.txt", &map::render(&shown, &COLOR));
    let empty = MemoryMap { runs: Vec::new(), ..shown };
    check("map-empty.txt", &map::render(&empty, &Style::PLAIN));
}

#[test]
fn no_control_character_of_a_stranger_reaches_the_terminal() {
    let busy: Status = read("busy.json");
    for text in [status::render(&busy, &Style::PLAIN), list::render(&busy, &Style::PLAIN)] {
        assert!(text.chars().all(|letter| letter == '\n' || !letter.is_control()), "{text}");
    }
}

/// A round that was watched in part says so, and no age that it can not know.
#[test]
fn a_window_is_told() {
    let mut busy: Status = read("busy.json");
    let round = busy.domains.iter_mut().find_map(|domain| domain.round.as_mut()).unwrap();
    (round.watched_us, round.warm_age_ms, round.cold_age_ms) = (8000, 0, 0);
    let text = status::render(&busy, &Style::PLAIN);
    assert!(text.contains("33.6 MiB (21% of mapped) in the last 8 ms of a round of 502 ms"), "{text}");
    assert!(text.contains("1 MiB warm (under 1%), 223 MiB cold (87%) of memory"), "{text}");
}
