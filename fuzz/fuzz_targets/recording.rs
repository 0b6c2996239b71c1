// SPDX-License-Identifier: MIT OR Apache-2.0
#![no_main]

#[path = "../invariants/recording.rs"]
mod recording;

libfuzzer_sys::fuzz_target!(|input: &[u8]| recording::check(input));
