// SPDX-License-Identifier: MIT OR Apache-2.0
//! Policies and messages that anybody may have written: what `fuzz/` checks for
//! hours is checked here for moments.

#[path = "../../fuzz/invariants/corpus.rs"]
mod corpus;
#[path = "../../fuzz/invariants/hosts.rs"]
mod hosts;
#[path = "../../fuzz/invariants/message.rs"]
mod message;
#[path = "../../fuzz/invariants/policy_xml.rs"]
mod policy_xml;
#[path = "../../fuzz/invariants/socket_message.rs"]
mod socket_message;

use ept_virt_core::policy::{NAMESPACE, SETTINGS};
use ept_virt_core::wire::{Reply, Request, Response};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::select;

/// As the daemon answers before it does anything.
fn answer(line: &[u8]) -> Vec<u8> {
    Response::line(match Request::read(line) {
        Ok(_) => Reply::Done,
        Err(error) => Reply::Error(error),
    })
}

#[test]
fn the_corpus_of_policies_holds() {
    corpus::replay("policy_xml", policy_xml::check);
}

#[test]
fn the_corpus_of_messages_holds() {
    corpus::replay("socket_message", |input| socket_message::check(input, answer));
}

/// A value, right for some setting or for none.
fn value() -> impl Strategy<Value = String> {
    prop_oneof![
        4 => "[0-9]{1,5}",
        2 => "[0-9]{1,3}(\\.[0-9]{1,2})?%",
        2 => "(yes|no|auto|place|observe|off|gold)",
        2 => "[0-9](,[0-9]|-9)?",
        1 => "[rwx]{1,3}",
        1 => any::<String>().prop_map(|text| escaped(&text)),
    ]
}

/// Each letter as a reference where it needs one, and white space too.
fn escaped(text: &str) -> String {
    let needs = |char: char| "&<\"".contains(char) || char.is_whitespace();
    let reference = |char: char| format!("&#{};", char as u32);
    text.chars().map(|char| if needs(char) { reference(char) } else { char.into() }).collect()
}

fn unit() -> impl Strategy<Value = String> {
    const UNITS: &[&str] = &["", "", "ms", "s", "h", "KiB", "GiB", "bytes", "MiB/s", "Hz", "lightyears"];
    select(UNITS).prop_map(|unit| match unit {
        "" => String::new(),
        unit => format!(" unit=\"{unit}\""),
    })
}

/// A policy whose elements and attributes are right for the most part.
fn policy() -> impl Strategy<Value = String> {
    let said = vec(((0..SETTINGS.len()).prop_map(|index| &SETTINGS[index]), value(), unit()), 0..8);
    let excluded = prop_oneof![
        4 => Just(String::new()),
        2 => (any::<u64>(), any::<u64>(), "[a-z \t\n\r<>&\"']{0,6}").prop_map(|(start, end, alias)| format!(
            "<exclude><range start=\"{start:#x}\" end=\"{end}\"/><memory alias=\"{}\"/></exclude>",
            escaped(&alias)
        )),
    ];
    (said, excluded).prop_map(|(mut said, excluded)| {
        said.sort_by_key(|(setting, ..)| setting.path());
        said.dedup_by_key(|(setting, ..)| setting.path());
        let attributes = |element: &str| -> String {
            let here = said.iter().filter(|(s, ..)| s.element == element && !s.is_element);
            here.map(|(s, value, _)| format!(" {}=\"{value}\"", s.name)).collect()
        };
        let mut elements: Vec<&str> =
            said.iter().map(|(s, ..)| s.element).filter(|e| !e.is_empty()).collect();
        elements.dedup();
        let mut xml = format!("<placement xmlns='{NAMESPACE}'{}>", attributes(""));
        for element in elements {
            xml += &format!("<{element}{}>", attributes(element));
            for (s, value, unit) in said.iter().filter(|(s, ..)| s.element == element && s.is_element) {
                xml += &format!("<{0}{unit}>{value}</{0}>", s.name);
            }
            xml += &format!("</{element}>");
        }
        xml + &excluded + "</placement>"
    })
}

proptest! {
    #[test]
    fn any_policy_is_read_or_refused_well(policy in policy()) {
        policy_xml::check(policy.as_bytes());
        policy_xml::check(format!("<domain><metadata>{policy}</metadata></domain>").as_bytes());
    }

    #[test]
    fn a_policy_that_broke_is_read_or_refused_well(
        policy in policy(), at: prop::sample::Index, cut in 0usize..20, put in vec(any::<u8>(), 0..8),
    ) {
        let mut xml = format!("<domain><metadata>{policy}</metadata></domain>").into_bytes();
        let start = at.index(xml.len());
        xml.splice(start..(start + cut).min(xml.len()), put);
        policy_xml::check(&xml);
    }

    #[test]
    fn any_bytes_get_one_line(input in vec(any::<u8>(), 0..300)) {
        policy_xml::check(&input);
        socket_message::check(&input, answer);
    }

    #[test]
    fn any_request_gets_one_line(
        v in prop_oneof![4 => Just("1".to_owned()), 1 => any::<i64>().prop_map(|v| v.to_string())],
        cmd in "(status|map|start|stop|pause|resume|nudge|reboot|.{0,3})",
        domain: Option<String>, op: Option<String>,
    ) {
        let mut line = format!("{{\"v\":{v},\"cmd\":{}", serde_json::to_string(&cmd).unwrap());
        for (name, value) in [("domain", domain), ("op", op)] {
            line += &value.map_or(String::new(), |value| format!(",\"{name}\":{}", serde_json::to_string(&value).unwrap()));
        }
        line += "}\n";
        socket_message::check(line.as_bytes(), answer);
    }
}
