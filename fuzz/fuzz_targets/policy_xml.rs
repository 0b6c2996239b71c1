// SPDX-License-Identifier: MIT OR Apache-2.0
#![no_main]

#[path = "../invariants/hosts.rs"]
mod hosts;
#[path = "../invariants/message.rs"]
mod message;
#[path = "../invariants/policy_xml.rs"]
mod policy_xml;

libfuzzer_sys::fuzz_target!(|input: &[u8]| policy_xml::check(input));
