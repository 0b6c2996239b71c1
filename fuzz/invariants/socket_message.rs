// SPDX-License-Identifier: MIT OR Apache-2.0
//! What holds for everything that a client may send to the daemon.

use ept_virt_core::wire::{
    ErrorKind, MAX_LINE_BYTES, MAX_REQUEST_BYTES, PROTOCOL_VERSION, Reply, Request, Response, WireError,
};

use super::message;

/// Sends `input` to `answer`, line by line.
pub fn check(input: &[u8], answer: impl Fn(&[u8]) -> Vec<u8>) {
    for line in input.split_inclusive(|byte| *byte == b'\n') {
        check_answer(line, &answer(line));
        check_client(line);
    }
}

/// One line that a client understands; to what is no request, that it is none.
fn check_answer(line: &[u8], answer: &[u8]) {
    assert!(answer.len() <= MAX_LINE_BYTES);
    assert_eq!(answer.iter().position(|byte| *byte == b'\n'), Some(answer.len() - 1));
    let Ok(Response { v: PROTOCOL_VERSION, reply }) = serde_json::from_slice(answer) else {
        panic!("not an answer: {}", String::from_utf8_lossy(answer));
    };
    match (Request::read(line), reply) {
        (Err(error), reply) => {
            assert_eq!(error.kind, ErrorKind::BadRequest);
            message::check(&error.message);
            assert_eq!(reply, Reply::Error(error));
        }
        (Ok(command), reply) => {
            assert!(line.len() <= MAX_REQUEST_BYTES);
            assert!(serde_json::from_slice::<serde_json::Value>(line).is_ok_and(|value| value.is_object()));
            assert_eq!(Request::read(&Request::line(command.clone())), Ok(command));
            if let Reply::Error(WireError { message, .. }) = reply {
                assert!(!message.contains(char::is_control), "{message:?}");
            }
        }
    }
}

/// A client reads what it may get without panic, and nothing is lost.
fn check_client(line: &[u8]) {
    if let Ok(response) = serde_json::from_slice::<Response>(line) {
        let again: Response = serde_json::from_slice(&Response::line(response.reply.clone()))
            .expect("what is written is read again");
        assert_eq!(again.reply, response.reply);
    }
}
