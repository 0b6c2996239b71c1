// SPDX-License-Identifier: MIT OR Apache-2.0
#![no_main]

use ept_virt_core::wire::{Reply, Request, Response};

#[path = "../invariants/message.rs"]
mod message;
#[path = "../invariants/socket_message.rs"]
mod socket_message;

/// As the daemon answers, of which only the reading is here: what it then does
/// is tested where it is.
fn answer(line: &[u8]) -> Vec<u8> {
    Response::line(match Request::read(line) {
        Ok(_) => Reply::Done,
        Err(error) => Reply::Error(error),
    })
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| socket_message::check(input, answer));
