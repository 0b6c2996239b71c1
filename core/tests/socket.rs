// SPDX-License-Identifier: MIT OR Apache-2.0
//! docs/SOCKET.md says what is so: its examples are read with the real types.

use std::collections::BTreeSet;

use ept_virt_core::wire::{
    Command, ErrorKind, MAX_LINE_BYTES, MAX_REQUEST_BYTES, PROTOCOL_VERSION, Reply, Request, Response,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

const DOCUMENT: &str = include_str!("../../docs/SOCKET.md");

/// Verbs that are not shown as understood.
const UNKNOWN_VERB: &str = "reboot";

/// The lines that begin with `mark`.
fn lines(mark: &str) -> impl Iterator<Item = &'static str> {
    DOCUMENT.lines().filter_map(move |line| line.strip_prefix(mark))
}

/// Whether `whole` has all that `part` has.
fn holds(whole: &Value, part: &Value) -> bool {
    match (whole, part) {
        (Value::Object(whole), Value::Object(part)) => {
            part.iter().all(|(key, value)| whole.get(key).is_some_and(|found| holds(found, value)))
        }
        (Value::Array(whole), Value::Array(part)) => {
            whole.len() == part.len() && whole.iter().zip(part).all(|(whole, part)| holds(whole, part))
        }
        _ => whole == part,
    }
}

/// Reads a line, and checks that nothing in it is passed over.
fn read<T: DeserializeOwned + Serialize>(line: &str) -> T {
    let value: T = serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}"));
    let (written, shown) = (serde_json::to_value(&value).unwrap(), serde_json::from_str(line).unwrap());
    assert!(holds(&written, &shown), "{line}\nis read as\n{written}");
    value
}

#[test]
fn every_request_is_one_and_every_verb_is_shown() {
    let mut verbs = BTreeSet::new();
    for line in lines("C: ").filter(|line| !line.contains(UNKNOWN_VERB)) {
        let request: Request = read(line);
        // Other versions have their example as well.
        if request.v == PROTOCOL_VERSION {
            verbs.insert(match request.command {
                Command::Status { .. } => 0,
                Command::Map { .. } => 1,
                Command::Start { .. } => 2,
                Command::Stop { .. } => 3,
                Command::Pause { .. } => 4,
                Command::Resume { .. } => 5,
                Command::Nudge { .. } => 6,
                Command::Record { .. } => 7,
            });
        }
    }
    assert_eq!(verbs, (0..8).collect());
    assert!(lines("C: ").any(|line| line.contains(UNKNOWN_VERB)));
}

#[test]
fn every_answer_is_one_and_every_kind_is_shown() {
    let (mut replies, mut kinds) = (BTreeSet::new(), BTreeSet::new());
    for line in lines("D: ") {
        let response: Response = read(line);
        assert_eq!(response.v, PROTOCOL_VERSION);
        replies.insert(match &response.reply {
            Reply::Status(_) => 0,
            Reply::Map(_) => 1,
            Reply::Done => 2,
            Reply::Error(_) => 3,
        });
        if let Reply::Error(error) = response.reply {
            kinds.insert(match error.kind {
                ErrorKind::BadRequest => 0,
                ErrorKind::NoDomain => 1,
                ErrorKind::NotObserved => 2,
                ErrorKind::NotPermitted => 3,
                ErrorKind::Internal => 4,
            });
        }
    }
    assert_eq!((replies, kinds), ((0..4).collect(), (0..5).collect()));
}

#[test]
fn the_limits_are_those_that_hold() {
    for limit in [MAX_REQUEST_BYTES, MAX_LINE_BYTES] {
        assert!(DOCUMENT.contains(&format!("| {limit} bytes |")), "{limit}");
    }
    assert!(DOCUMENT.contains(&format!("This is version {PROTOCOL_VERSION}.")));
}
