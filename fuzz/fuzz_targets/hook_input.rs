// SPDX-License-Identifier: MIT OR Apache-2.0
#![no_main]

#[path = "../invariants/hook_input.rs"]
mod hook_input;
#[path = "../invariants/hosts.rs"]
mod hosts;
#[path = "../invariants/message.rs"]
mod message;

libfuzzer_sys::fuzz_target!(|input: &[u8]| hook_input::check(input));
