// SPDX-License-Identifier: MIT OR Apache-2.0
//! `docs/CLI.md` against what `--json` prints: the same fields, no more and no
//! fewer, command by command; and no field is ever left out.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use ept_virt_core::policy::{Config, Effective};
use ept_virt_core::sampler::{Level, MemSlot};
use ept_virt_core::samples::{Access, Sample};
use ept_virt_core::wire::{
    BudgetStatus, DaemonStatus, DomainStatus, MapRun, MemoryMap, ModuleStatus, MoveTotals, Refusal,
    RoundStatus, SamplingStatus, SlowdownStatus, Status, StripCell,
};
use serde::de::value::Error;
use serde::de::{DeserializeOwned, Deserializer, Visitor};
use serde::forward_to_deserialize_any;
use serde_json::{Value, json, to_value};

use crate::doctor::report::{Check, Report};
use crate::golden::read;
use crate::{EXIT_CODES, hook, list, memslots, policy, samples, simulate, version};

const DOCUMENT: &str = include_str!("../../docs/CLI.md");

/// What each command prints, with all its fields.
fn printed() -> Vec<(&'static str, Value)> {
    let status: Status = read("busy.json");
    let map: MemoryMap = read("map.json");
    let slot = MemSlot { gfn_start: 0, page_count: 1, hva: 0, id: 0, read_only: true, dirty_log: true };
    let sample = Sample {
        gfn: 0,
        time: Duration::ZERO,
        vcpu: 0,
        access: Access::Read,
        level: Level::Page4K,
        page_walk: false,
    };
    let effective = Effective::new(&Config::default(), None).unwrap();
    let parts = version::Parts::ask("test:///default", Path::new("/nonexistent/socket"));
    vec![
        ("list", to_value(list::entries(&status)).unwrap()),
        ("status", to_value(&status).unwrap()),
        ("map", to_value(map).unwrap()),
        ("samples", to_value(samples::entry(&sample, Duration::ZERO, &[slot])).unwrap()),
        ("memslots", to_value(memslots::entries(&[slot])).unwrap()),
        ("policy show", to_value(policy::show::entries(&effective)).unwrap()),
        ("doctor", to_value(Report::new(vec![Check::ok("a", "b")])).unwrap()),
        ("hook status", to_value(hook::Hooks::look(Path::new("/nonexistent"))).unwrap()),
        ("version", to_value(parts).unwrap()),
        ("simulate", to_value(simulate::tests::any_report()).unwrap()),
    ]
}

/// Names of all fields, at all depths.
fn fields(value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(object) => {
            for (name, value) in object {
                found.insert(name.clone());
                fields(value, found);
            }
        }
        Value::Array(list) => list.iter().for_each(|value| fields(value, found)),
        _ => {}
    }
}

/// Names in the first columns of the tables below a command's heading.
fn documented(command: &str) -> BTreeSet<String> {
    let (_, section) = DOCUMENT.split_once(&format!("\n### `{command} --json`\n")).unwrap();
    let section = section.split("\n### ").next().unwrap();
    let cells =
        section.lines().filter(|line| line.starts_with("| `")).map(|line| line.split('|').nth(1).unwrap());
    cells.flat_map(|cell| cell.split(',')).map(|name| name.trim().trim_matches('`').to_owned()).collect()
}

#[test]
fn every_field_is_documented_and_no_other() {
    for (command, value) in printed() {
        let mut found = BTreeSet::new();
        fields(&value, &mut found);
        assert_eq!(documented(command), found, "ept-virt {command} --json");
    }
}

/// Finds out which fields a type has, those included that its values may leave out:
/// derived code tells them to the deserializer before it reads anything.
struct Asked<'a>(&'a mut BTreeSet<String>);

impl<'de> Deserializer<'de> for Asked<'_> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Error> {
        Err(serde::de::Error::custom("this is no struct"))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        _: V,
    ) -> Result<V::Value, Error> {
        self.0.extend(fields.iter().map(|field| (*field).to_owned()));
        Err(serde::de::Error::custom("all is told"))
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 u8 u16 u32 u64 f32 f64 char str string bytes byte_buf option unit
        unit_struct newtype_struct seq tuple tuple_struct map enum identifier ignored_any
    }
}

fn fields_of<T: DeserializeOwned>() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    assert!(T::deserialize(Asked(&mut found)).is_err() && !found.is_empty());
    found
}

/// What the fixtures leave out is no way around the document.
#[test]
fn every_field_of_the_daemon_s_types_is_documented() {
    let status = [
        fields_of::<Status>(),
        fields_of::<DaemonStatus>(),
        fields_of::<ModuleStatus>(),
        fields_of::<DomainStatus>(),
        fields_of::<RoundStatus>(),
        fields_of::<BudgetStatus>(),
        fields_of::<MoveTotals>(),
        fields_of::<SamplingStatus>(),
        fields_of::<SlowdownStatus>(),
        fields_of::<Refusal>(),
        fields_of::<StripCell>(),
    ];
    assert_eq!(documented("status"), status.into_iter().flatten().collect());
    let map = [fields_of::<MemoryMap>(), fields_of::<MapRun>()];
    assert_eq!(documented("map"), map.into_iter().flatten().collect());
}

#[test]
fn what_is_not_known_is_null_and_not_left_out() {
    fn keys(value: &impl serde::Serialize) -> BTreeSet<String> {
        to_value(value).unwrap().as_object().unwrap().keys().cloned().collect()
    }
    let (busy, empty): (Status, Status) = (read("busy.json"), read("empty.json"));
    for daemon in [&busy.daemon, &empty.daemon] {
        assert_eq!(keys(daemon), fields_of::<DaemonStatus>());
    }
    // Of one domain next to nothing is known.
    let bare =
        |domain: &DomainStatus| domain.id.is_none() && domain.pid.is_none() && domain.restored_s.is_none();
    assert!(busy.domains.iter().any(bare));
    for domain in &busy.domains {
        assert_eq!(keys(domain), fields_of::<DomainStatus>(), "{}", domain.name);
    }
    assert_eq!(keys(&RoundStatus::default()), fields_of::<RoundStatus>());
}

#[test]
fn every_command_with_json_is_documented() {
    use clap::CommandFactory;
    let documented: Vec<&str> = printed().iter().map(|(command, _)| *command).collect();
    let mut root = crate::Cli::command();
    root.build();
    let mut with_json = Vec::new();
    let has_json =
        |command: &clap::Command| command.get_arguments().any(|argument| argument.get_long() == Some("json"));
    for command in root.get_subcommands() {
        let below = command.get_subcommands().filter(|below| has_json(below));
        with_json.extend(below.map(|below| format!("{} {}", command.get_name(), below.get_name())));
        with_json.extend(has_json(command).then(|| command.get_name().to_owned()));
    }
    with_json.iter().for_each(|name| assert!(documented.contains(&name.as_str()), "{name}"));
    assert_eq!(with_json.len(), documented.len());
}

#[test]
fn exit_codes_are_those_of_the_help() {
    for code in ["0", "1", "2"] {
        assert!(EXIT_CODES.contains(&format!("\n  {code}  ")));
        assert!(DOCUMENT.contains(&format!("\n| {code} | ")));
    }
}

/// Words that a field can hold are part of the schema as well.
#[test]
fn words_are_documented() {
    use crate::doctor::report::Verdict;
    use crate::hook::Found;
    use ept_virt_core::wire::{Class, DomainState, Place};
    let words = json!([
        [DomainState::Observing, DomainState::Placing, DomainState::Off, DomainState::Unobserved],
        [Class::Hot, Class::Warm, Class::Cold],
        [Place::Fast, Place::Slow, Place::Absent],
        [Verdict::Ok, Verdict::Warn, Verdict::Fail],
        [Found::Missing, Found::Installed, Found::NotExecutable, Found::Foreign, Found::Unreadable],
    ]);
    for word in words.as_array().unwrap().iter().flat_map(|list| list.as_array().unwrap()) {
        let word = word.as_str().unwrap();
        assert!(DOCUMENT.contains(&format!("`{word}`")), "{word}");
    }
}
