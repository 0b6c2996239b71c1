// SPDX-License-Identifier: MIT OR Apache-2.0
//! The examples of `xml-schemas/`, read by the parser and checked by the grammar.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use ept_virt_core::policy::{Config, Effective, Exclusion, Layer, Mode, NAMESPACE, Policy, SETTINGS};
use ept_virt_core::units::{Bytes, BytesPerSecond, Share};
use proptest::prelude::*;

fn schemas() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../xml-schemas")
}

/// The XML files of `examples/NAME`, with the expected message where one stands beside.
fn examples(name: &str) -> Vec<(PathBuf, String, Option<String>)> {
    let dir = schemas().join("examples").join(name);
    let mut paths: Vec<PathBuf> = fs::read_dir(&dir)
        .unwrap_or_else(|error| panic!("{}: {error}", dir.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "xml"))
        .collect();
    paths.sort();
    assert!(!paths.is_empty(), "no example in {}", dir.display());
    paths
        .into_iter()
        .map(|path| {
            let xml = fs::read_to_string(&path).unwrap();
            let message = fs::read_to_string(path.with_extension("message")).ok();
            (path, xml, message.map(|message| message.trim_end().to_owned()))
        })
        .collect()
}

#[test]
fn good_examples_are_read() {
    for (path, xml, _) in examples("good") {
        if let Err(error) = Policy::from_element_xml(&xml) {
            panic!("{}: {error}", path.display());
        }
    }
}

#[test]
fn bad_examples_get_the_message_beside_them() {
    for (path, xml, message) in examples("bad").into_iter().chain(examples("bad-meaning")) {
        let error = Policy::from_element_xml(&xml).expect_err(&path.display().to_string());
        assert_eq!(Some(error.to_string()), message, "{}", path.display());
    }
}

#[test]
fn the_policy_is_found_beside_other_programs_metadata() {
    for (path, xml, message) in examples("domain") {
        let name = path.file_stem().unwrap().to_str().unwrap();
        match (Layer::from_domain_xml(&xml).map(|found| found.map(|layer| Policy::of(&layer))), message) {
            (Ok(None), None) => assert_eq!(name, "none"),
            (Ok(Some(policy)), None) => {
                let mut expected = Policy { mode: Mode::Place, ..Policy::default() };
                expected.dram.share = Share::from_percent(40);
                assert_eq!(policy, expected, "{name}");
            }
            (Err(error), Some(message)) => assert_eq!(error.to_string(), message, "{name}"),
            (found, message) => panic!("{name}: {found:?}, not {message:?}"),
        }
    }
}

#[test]
fn the_grammar_agrees_with_the_parser() {
    let grammar = schemas().join("placement.rng");
    let valid = |path: &Path| {
        let output = Command::new("xmllint").args(["--noout", "--relaxng"]).arg(&grammar).arg(path).output();
        output.map(|output| (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned()))
    };
    if valid(&grammar).is_err() {
        println!("SKIP the_grammar_agrees_with_the_parser: no xmllint; install libxml2-utils");
        return;
    }
    // What the grammar can not express is good for it.
    for (kind, expected) in [("good", true), ("bad-meaning", true), ("bad", false)] {
        for (path, ..) in examples(kind) {
            let (is_valid, log) = valid(&path).unwrap();
            assert!(!log.contains("failed to compile"), "{log}");
            assert_eq!(is_valid, expected, "{}: {log}", path.display());
        }
    }
}

#[test]
fn every_value_arrives() {
    let path = schemas().join("examples/good/everything.xml");
    let policy = Policy::from_element_xml(&fs::read_to_string(path).unwrap()).unwrap();
    assert_eq!((policy.mode, policy.required), (Mode::Place, true));
    assert_eq!((policy.sampling.interval, policy.sampling.flush), (Some(Duration::from_millis(500)), false));
    assert_eq!(policy.half_life, Duration::from_secs(300));
    assert_eq!(policy.fast_nodes.unwrap().to_string(), "0");
    assert_eq!(policy.slow_nodes.unwrap().to_string(), "1,4-5");
    assert_eq!(policy.dram.share.to_string(), "12.5%");
    assert_eq!((policy.dram.min, policy.dram.max), (Bytes(64 << 20), Some(Bytes(4 << 30))));
    assert_eq!(policy.migration.tolerance, Share::from_percent(5));
    assert_eq!(policy.migration.delay, Duration::from_secs(2));
    assert_eq!(policy.migration.bandwidth, BytesPerSecond(256 << 20));
}

#[test]
fn every_value_of_version_0_2_arrives() {
    let path = schemas().join("examples/good/sampling-and-exclusions.xml");
    let policy = Policy::from_element_xml(&fs::read_to_string(path).unwrap()).unwrap();
    assert_eq!((policy.sampling.interval, policy.migration.interval), (None, Some(Duration::from_secs(10))));
    assert_eq!((policy.sampling.access.to_string().as_str(), policy.sampling.rate_hz), ("wx", 500));
    assert_eq!((policy.weights.read, policy.weights.write, policy.weights.execute), (0, 4, 2));
    assert_eq!((policy.fast_nodes, policy.dram.weight), (None, 250));
    let range = Exclusion::Range { start: 0x1_0000_0000, end: 0x1_4000_0000 };
    assert_eq!(policy.exclude, [range, Exclusion::Device("dimm0".into())]);
}

#[test]
fn what_is_written_is_read_again() {
    let read = |xml: &str| Layer::from_element_xml(xml).unwrap_or_else(|error| panic!("{error}\n{xml}"));
    for (path, xml, _) in examples("good") {
        let layer = read(&xml);
        assert_eq!(read(&layer.to_xml()), layer, "{}", path.display());
    }
    // Everything at once, as the defaults have it.
    let all = Layer::built_in();
    assert_eq!(read(&all.to_xml()), all);
    assert_eq!(Policy::of(&Layer::default()), Policy::default());
}

#[test]
fn layers_lie_upon_each_other() {
    let config = Config::parse(
        "[defaults]\nmode = \"place\"\nmigration.delay = \"9 s\"\n\
         [profiles.gold.dram]\nshare = \"60%\"\nmin = \"1 GiB\"",
    )
    .unwrap();
    let domain = |settings: &[(&str, &str)]| {
        let mut layer = Layer::default();
        settings.iter().for_each(|(path, text)| layer.assign(path, text).unwrap());
        layer
    };
    let gold = Effective::new(&config, Some(&domain(&[("profile", "gold"), ("dram.share", "50%")]))).unwrap();
    let says = |path: &str| (gold.layer.get(path).unwrap().to_string(), gold.origin(path).to_string());
    assert_eq!(says("dram.share"), ("50%".into(), "domain XML".into()));
    assert_eq!(says("dram.min"), ("1 GiB".into(), "profile gold".into()));
    assert_eq!(says("migration.delay"), ("9 s".into(), "host defaults".into()));
    assert_eq!(says("migration.tolerance"), ("10%".into(), "built in".into()));
    assert_eq!((gold.policy.mode, gold.policy.dram.min), (Mode::Place, Bytes(1 << 30)));
    // Nobody but the host says anything.
    assert_eq!(Effective::new(&config, None).unwrap().policy.mode, Mode::Place);
    assert_eq!(
        Effective::new(&config, Some(&domain(&[("profile", "gold"), ("dram.max", "512 MiB")]))).unwrap_err(),
        "<dram>: min is 1 GiB, which is more than max, 512 MiB, as share 60% (profile gold), \
         min 1 GiB (profile gold), max 512 MiB (domain XML)"
    );
    assert_eq!(
        Effective::new(&config, Some(&domain(&[("profile", "silver")]))).unwrap_err(),
        "there is no profile \"silver\"; known here: gold"
    );
}

/// An attribute reads its white space as blanks, unless it is written otherwise.
#[test]
fn an_alias_is_written_so_that_it_is_read_again() {
    let mut layer = Layer::default();
    layer.exclude = Some(vec![Exclusion::Device("a\tb\nc\rd\"<&'> e".into())]);
    assert_eq!(Layer::from_element_xml(&layer.to_xml()).unwrap(), layer);
}

/// What stands in the XML may be long, and drive a terminal.
#[test]
fn messages_are_short_and_printable() {
    let long = "é".repeat(100_000);
    let placement = |inside: &str| format!("<placement xmlns='{NAMESPACE}'{inside}</placement>");
    for xml in [
        placement(&format!(" mode='{long}'>")),
        placement(" mode='&#10;&#x9b;31m'>"),
        placement(&format!(" {long}='x'>")),
        placement(&format!("><{long}/>")),
        placement(&format!("><dram share='{long}'/>")),
        placement(&format!("><dram><min unit='{long}'>1</min></dram>")),
        placement(&format!("><dram><min>{long}</min></dram>")),
        placement(&format!("><dram>a\u{9b}b\n{long}</dram>")),
        placement(&format!("><exclude><range start='{long}' end='0'/></exclude>")),
        placement(&format!("><tiers fast='{long}'/>")),
        placement("><tiers fast='0-1023' slow='0,2,4,6,8,10,12,14,16,18,20,22,24,26,28,30,32,34,36,38,40'/>"),
        placement(&format!(" profile='{long}'>")),
        format!("<x:placement xmlns:x='{long}'/>"),
        format!("<{long}:placement xmlns:{long}='{NAMESPACE}' modee='x'/>"),
        format!("<{long}:placement/>"),
        "<placement\u{7f}/>".into(),
        "<placement mode\n\u{9b}/>".into(),
        "<placement>\n</\n>".into(),
    ] {
        let message = Layer::from_element_xml(&xml).unwrap_err().to_string();
        assert!(message.chars().count() < 500 && !message.contains(char::is_control), "{message:?}");
    }
}

/// Each setting, with its default in words, is documented in the grammar.
#[test]
fn the_grammar_knows_every_setting() {
    let grammar = fs::read_to_string(schemas().join("placement.rng")).unwrap();
    let grammar = roxmltree::Document::parse(&grammar).unwrap();
    let elements: Vec<_> = grammar.descendants().filter(|node| node.has_attribute("name")).collect();
    for setting in SETTINGS {
        let kind = if setting.is_element { "element" } else { "attribute" };
        let inside = if setting.element.is_empty() { "placement" } else { setting.element };
        let defined = elements.iter().any(|node| {
            let owner = node.ancestors().skip(1).find(|node| node.has_tag_name_local("element"));
            node.has_tag_name_local(kind)
                && node.attribute("name") == Some(setting.name)
                && owner.and_then(|owner| owner.attribute("name")) == Some(inside)
        });
        assert!(defined, "{}", setting.path());
    }
}

trait LocalName {
    fn has_tag_name_local(&self, name: &str) -> bool;
}

impl LocalName for roxmltree::Node<'_, '_> {
    fn has_tag_name_local(&self, name: &str) -> bool {
        self.is_element() && self.tag_name().name() == name
    }
}

#[test]
fn a_policy_describes_itself_in_one_line() {
    let describe = |name: &str| {
        let path = schemas().join("examples/good").join(name);
        Policy::from_element_xml(&fs::read_to_string(path).unwrap()).unwrap().describe()
    };
    assert_eq!(describe("minimal.xml"), "observe: harvest at its own pace, half-life 30 s; nothing is moved");
    assert_eq!(describe("off.xml"), "off: neither observed nor moved");
    assert_eq!(
        describe("place-40-percent.xml"),
        "place: harvest at its own pace, half-life 30 s; DRAM 40% of guest memory; \
         exchange pages 10% of the heat scale apart, move at most 64 MiB/s"
    );
    assert_eq!(
        describe("everything.xml"),
        "place: harvest every 500 ms without TLB flush, half-life 5 min; DRAM 12.5% of guest memory, \
         at least 64 MiB, at most 4 GiB on NUMA nodes 0, the rest on 1,4-5; \
         demote after 2 s without access, exchange pages 5% of the heat scale apart, move at most 256 MiB/s"
    );
}

#[test]
fn a_policy_says_what_it_weighs_and_how_often_it_plans() {
    let policy = fs::read_to_string(schemas().join("examples/good/sampling-and-exclusions.xml")).unwrap();
    let text = Policy::from_element_xml(&policy).unwrap().describe();
    assert!(text.contains(", with weight 250 beside other domains; plan every 10 s, "), "{text}");
    assert!(!Policy::default().describe().contains("weight"));
}

#[test]
fn the_dram_target_keeps_share_floor_and_ceiling() {
    let target = |dram: &str, memory: u64| {
        let xml = format!("<placement xmlns='{NAMESPACE}'>{dram}</placement>");
        Policy::from_element_xml(&xml).unwrap().dram_target(Bytes(memory)).map(|bytes| bytes.0)
    };
    assert_eq!(target("", 1000), None);
    assert_eq!(target("<dram share='100%'/>", 1000), None);
    assert_eq!(target("<dram share='40%'/>", 1000), Some(400));
    assert_eq!(target("<dram share='0%'/>", 1000), Some(0));
    assert_eq!(target("<dram share='40%'><min unit='b'>600</min></dram>", 1000), Some(600));
    assert_eq!(target("<dram share='40%'><min unit='b'>5000</min></dram>", 1000), None);
    assert_eq!(target("<dram><max unit='b'>300</max></dram>", 1000), Some(300));
    assert_eq!(target("<dram><max unit='b'>300</max></dram>", 200), None);
}

#[test]
fn what_is_no_domain_is_an_error_with_a_line() {
    for (xml, message) in [
        ("", "line 1: the XML is not well-formed: the document does not have a root node"),
        ("<network/>", "line 1, <network>: a domain's XML begins with <domain>"),
    ] {
        assert_eq!(Layer::from_domain_xml(xml).unwrap_err().to_string(), message);
    }
    // An entity bomb is refused before it unfolds.
    let bomb = "<!DOCTYPE d [<!ENTITY a \"aaaa\"><!ENTITY b \"&a;&a;\">]><domain>&b;</domain>";
    assert!(Layer::from_domain_xml(bomb).unwrap_err().to_string().contains("DTD"));
}

proptest! {
    #[test]
    fn any_text_is_read_without_panic(xml in ".{0,200}") {
        let _ = Layer::from_domain_xml(&xml);
    }

    #[test]
    fn any_attribute_is_read_without_panic(
        element in "(sampling|dram|tiers|migration|dam|.{0,5})",
        name in "[a-zé]{1,12}", value in "[^<&\"]{0,60}", text in "[^<&]{0,20}",
    ) {
        let xml = format!("<placement xmlns='{NAMESPACE}'><{element} {name}=\"{value}\"><min {name}=\"{value}\">{text}</min></{element}></placement>");
        if let Err(error) = Policy::from_element_xml(&xml) {
            prop_assert!(error.line >= 1);
            prop_assert!(!error.problem.is_empty());
        }
    }
}
