// SPDX-License-Identifier: MIT OR Apache-2.0
//! What holds for everything that libvirt may give its hook.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use ept_virt_core::policy::{Layer, Value, refusal};
use ept_virt_core::wire::{Command, MAX_REQUEST_BYTES, Request};
use ept_virt_hook::Action;

use super::{hosts, message};

/// Reads `input` as the domain's name, the operation and the domain's XML, with
/// a NUL between them: no argument holds one.
pub fn check(input: &[u8]) {
    let mut parts = input.splitn(3, |byte| *byte == 0);
    let mut next = || parts.next().unwrap_or_default();
    let (domain, operation, xml) = (next(), next(), next());
    match Action::of(OsStr::from_bytes(domain), OsStr::from_bytes(operation)) {
        Action::Judge => assert_eq!(operation, b"prepare"),
        Action::Nudge(line) => check_nudge(&line, domain, operation),
        Action::Nothing => {}
    }
    check_judgement(&String::from_utf8_lossy(xml));
}

/// One line that the daemon understands, whatever the domain's name.
fn check_nudge(line: &[u8], domain: &[u8], operation: &[u8]) {
    assert!(line.len() <= MAX_REQUEST_BYTES);
    assert_eq!(line.iter().position(|byte| *byte == b'\n'), Some(line.len() - 1));
    let Ok(Command::Nudge { op, domain: told }) = Request::read(line) else {
        panic!("not a nudge: {}", String::from_utf8_lossy(line));
    };
    assert_eq!(op.as_bytes(), operation);
    assert!(String::from_utf8_lossy(domain).starts_with(&told));
}

/// No domain is refused but for a policy that it requires, and that can not be
/// served.
fn check_judgement(xml: &str) {
    let [good, bare, broken] =
        [hosts::good(), hosts::bare(), hosts::broken()].map(|host| refusal(xml, &host));
    for reason in [&good, &bare, &broken].into_iter().flatten() {
        message::check(reason);
        // An attribute's name can not be written in another way, its value can.
        assert!(xml.contains("required") && (xml.contains("yes") || xml.contains('&')));
    }
    if let Ok(said) = Layer::from_domain_xml(xml) {
        let says = |path: &str| said.as_ref().and_then(|layer| layer.get(path)).map(Value::to_string);
        let required = says("required").as_deref() == Some("yes");
        let off = says("mode").as_deref() == Some("off");
        assert!(required || good.is_none());
        assert_eq!(bare.is_some(), required && (!off || says("profile").is_some()));
        assert_eq!(broken.is_some(), required);
    }
}
