// SPDX-License-Identifier: MIT OR Apache-2.0
//! The settings of a policy: where each stands in the XML, what it may say, and
//! what holds when nobody says anything. XML, configuration file and command
//! line all read this one table.

use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

use crate::samples::AccessSet;
use crate::text::word;
use crate::topology::NodeSet;
use crate::units::{self, Bytes, BytesPerSecond, Share, UnitError};

use super::words::suggestion;

/// What a setting says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// ept-virt chooses.
    Auto,
    /// One of some words, or a name.
    Word(String),
    /// yes or no.
    Flag(bool),
    /// A time, to the millisecond.
    Time(Duration),
    /// A percentage.
    Share(Share),
    /// An amount of memory.
    Size(Bytes),
    /// An amount for each second.
    Rate(BytesPerSecond),
    /// A frequency in Hz.
    Hertz(u32),
    /// A bare number.
    Number(u32),
    /// NUMA nodes.
    Nodes(NodeSet),
    /// Kinds of access.
    Access(AccessSet),
}

impl Value {
    /// The value as the XML has it: the text, and the unit beside it.
    pub fn xml(&self) -> (String, Option<&'static str>) {
        match self {
            Value::Time(time) => in_units(time.as_millis() as u64, &TIME_STEPS),
            Value::Size(bytes) => in_units(bytes.0, &SIZE_STEPS),
            Value::Rate(rate) => in_units(rate.0, &RATE_STEPS),
            Value::Hertz(hertz) => (hertz.to_string(), Some("Hz")),
            Value::Auto => ("auto".into(), None),
            Value::Word(word) => (word.clone(), None),
            Value::Flag(flag) => (if *flag { "yes" } else { "no" }.into(), None),
            Value::Share(share) => (share.to_string(), None),
            Value::Number(number) => (number.to_string(), None),
            Value::Nodes(nodes) => (nodes.to_string(), None),
            Value::Access(access) => (access.to_string(), None),
        }
    }
}

/// As the command line and the configuration file write it; loses nothing.
impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.xml() {
            (text, Some(unit)) => f.pad(&format!("{text} {unit}")),
            (text, None) => f.pad(&text),
        }
    }
}

type Step = (u64, &'static str);

const TIME_STEPS: [Step; 4] = [(3_600_000, "h"), (60_000, "min"), (1000, "s"), (1, "ms")];
const SIZE_STEPS: [Step; 5] =
    [(1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"), (1, "bytes")];
const RATE_STEPS: [Step; 4] = [(1 << 30, "GiB/s"), (1 << 20, "MiB/s"), (1 << 10, "KiB/s"), (1, "bytes/s")];

/// `amount` in the largest unit that loses nothing.
fn in_units(amount: u64, steps: &[Step]) -> (String, Option<&'static str>) {
    let fits = steps.iter().find(|(size, _)| amount > 0 && amount % *size == 0);
    let (size, unit) = fits.or(steps.last()).copied().unwrap_or((1, ""));
    ((amount / size).to_string(), Some(unit))
}

/// What a setting may say.
#[derive(Clone, Debug)]
pub enum Kind {
    /// One of these words.
    Choice(&'static [&'static str]),
    /// The name of a profile.
    Name,
    /// yes or no.
    YesNo,
    /// A time in this range of milliseconds.
    Time(RangeInclusive<u64>),
    /// A percentage.
    Percent,
    /// An amount of memory.
    Size,
    /// An amount for each second, not below this many bytes.
    Rate(u64),
    /// A frequency in Hz, in this range.
    Hertz(RangeInclusive<u32>),
    /// A number in this range.
    Number(RangeInclusive<u32>),
    /// NUMA nodes.
    Nodes,
    /// Letters of `rwx`.
    Access,
}

impl Kind {
    /// The unit that is meant when none is given, as libvirt has it.
    fn default_unit(&self) -> &'static str {
        match self {
            Kind::Time(_) => "s",
            Kind::Size => "KiB",
            Kind::Rate(_) => "MiB/s",
            Kind::Hertz(_) => "Hz",
            _ => "",
        }
    }

    /// Whether a unit can stand beside it.
    pub fn has_unit(&self) -> bool {
        !self.default_unit().is_empty()
    }
}

/// What it may say, in words, with its range and the unit that is meant when none is
/// given.
impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = |ms: &u64| units::format_duration(Duration::from_millis(*ms));
        let text = match self {
            Kind::Choice(words) => words.join(", "),
            Kind::Name => "a name".into(),
            Kind::YesNo => "yes, no".into(),
            Kind::Time(range) => format!("time from {} to {}", time(range.start()), time(range.end())),
            Kind::Percent => "part from 0% to 100%".into(),
            Kind::Size => "size".into(),
            Kind::Rate(least) => format!("rate of {} or more", BytesPerSecond(*least)),
            Kind::Hertz(range) => format!("rate from {} to {} Hz", range.start(), range.end()),
            Kind::Number(range) => format!("number from {} to {}", range.start(), range.end()),
            Kind::Nodes => "NUMA nodes, as 0,2-3".into(),
            Kind::Access => "some of the letters r, w, x".into(),
        };
        match self.default_unit() {
            "" => f.pad(&text),
            unit => f.pad(&format!("{text}, in {unit} where no unit is given")),
        }
    }
}

/// A setting of the policy.
#[derive(Debug)]
pub struct Setting {
    /// The element that it stands in; empty: the policy's own.
    pub element: &'static str,
    /// The name of the attribute, or of the child element.
    pub name: &'static str,
    /// A child element with text in place of an attribute.
    pub is_element: bool,
    /// What it may say.
    pub kind: Kind,
    /// `auto` is allowed too.
    pub auto: bool,
    /// What holds when nobody says anything, as the command line writes it;
    /// empty: there is no limit.
    pub default: &'static str,
    /// What it means, in a few words.
    pub help: &'static str,
}

impl Setting {
    /// The name on the command line, as `dram.share`.
    pub fn path(&self) -> String {
        match self.element {
            "" => self.name.into(),
            element => format!("{element}.{}", self.name),
        }
    }

    /// Reads a value with its unit beside it, as the XML has them.
    pub fn parse(&self, text: &str, unit: Option<&str>) -> Result<Value, String> {
        if self.auto && unit.is_none() && text == "auto" {
            return Ok(Value::Auto);
        }
        let unit = unit.unwrap_or_else(|| self.kind.default_unit());
        let say = |error: UnitError| error.to_string();
        match &self.kind {
            Kind::Choice(words) => match words.contains(&text) {
                true => Ok(Value::Word(text.into())),
                false => Err(unknown(text, words)),
            },
            Kind::YesNo => match text {
                "yes" => Ok(Value::Flag(true)),
                "no" => Ok(Value::Flag(false)),
                _ => Err(unknown(text, &["yes", "no"])),
            },
            Kind::Name => name(text),
            Kind::Time(range) => time(text, unit, range),
            Kind::Percent => Share::parse(text).map(Value::Share).map_err(say),
            Kind::Size => Bytes::parse(text, unit).map(Value::Size).map_err(say),
            Kind::Rate(least) => rate(text, unit, *least),
            Kind::Hertz(range) if unit == "Hz" => number(text, range, " Hz").map(Value::Hertz),
            Kind::Hertz(_) => Err(format!("unknown unit \"{}\": use Hz", word(unit))),
            Kind::Number(range) => number(text, range, "").map(Value::Number),
            Kind::Nodes => nodes(text),
            Kind::Access => AccessSet::from_letters(text).map(Value::Access).ok_or_else(|| {
                format!("\"{}\" is not some of the letters r, w and x, each once at most", word(text))
            }),
        }
    }

    /// Reads a value as the command line and the configuration file write it:
    /// the unit stands behind the number.
    pub fn parse_plain(&self, text: &str) -> Result<Value, String> {
        let text = text.trim();
        if !self.kind.has_unit() {
            return self.parse(text, None);
        }
        let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        match text.split_at(end) {
            ("", _) | (_, "") => self.parse(text, None),
            (number, unit) => self.parse(number, Some(unit.trim_start())),
        }
    }
}

fn unknown(text: &str, words: &[&str]) -> String {
    format!("\"{}\" is unknown{}", word(text), suggestion(text, words))
}

fn name(text: &str) -> Result<Value, String> {
    let fits = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    match !text.is_empty() && text.len() <= 64 && text.chars().all(fits) {
        true => Ok(Value::Word(text.into())),
        false => Err(format!(
            "\"{}\" is not a profile's name: letters, digits, - _ and . only, 64 at most",
            word(text)
        )),
    }
}

fn time(text: &str, unit: &str, range: &RangeInclusive<u64>) -> Result<Value, String> {
    let time = units::parse_duration(text, unit).map_err(|error| error.to_string())?;
    if range.contains(&(time.as_millis() as u64)) {
        return Ok(Value::Time(time));
    }
    let [given, low, high] =
        [time, Duration::from_millis(*range.start()), Duration::from_millis(*range.end())]
            .map(units::format_duration);
    Err(format!("{given} is out of range: give {low} to {high}"))
}

fn rate(text: &str, unit: &str, least: u64) -> Result<Value, String> {
    let rate = BytesPerSecond::parse(text, unit).map_err(|error| error.to_string())?;
    match rate.0 >= least {
        true => Ok(Value::Rate(rate)),
        false => Err(format!(
            "{rate} is too slow to move huge pages: give {} or more, or mode=\"observe\" to move nothing",
            BytesPerSecond(least)
        )),
    }
}

fn number(text: &str, range: &RangeInclusive<u32>, unit: &str) -> Result<u32, String> {
    let (low, high) = (range.start(), range.end());
    let out = || format!("\"{}\" is not a number from {low} to {high}{unit}", word(text));
    units::digits(text).filter(|number| range.contains(number)).ok_or_else(out)
}

fn nodes(text: &str) -> Result<Value, String> {
    let set: NodeSet = text.parse().map_err(|error: crate::topology::NodeSetError| error.to_string())?;
    match set.is_empty() {
        true => Err("name at least one NUMA node, or leave the attribute out".into()),
        false => Ok(Value::Nodes(set)),
    }
}

const SECOND_MS: u64 = 1000;
const HOUR_MS: u64 = 3600 * SECOND_MS;

/// Shorthand for the table: `@name` is an attribute, `name` a child element.
pub(super) const fn setting(
    element: &'static str,
    name: &'static str,
    is_element: bool,
    kind: Kind,
    default: &'static str,
    help: &'static str,
) -> Setting {
    Setting { element, name, is_element, kind, auto: false, default, help }
}

const fn or_auto(setting: Setting) -> Setting {
    Setting { auto: true, ..setting }
}

/// All settings, in the order in which they are shown and written. The grammar
/// `xml-schemas/placement.rng` says the same; a test compares them.
#[rustfmt::skip]
pub const SETTINGS: &[Setting] = &[
    setting("", "mode", false, Kind::Choice(&["off", "observe", "place"]), "observe",
        "off: leave alone; observe: move nothing; place: move memory between the tiers"),
    setting("", "required", false, Kind::YesNo, "no",
        "refuse the domain's start when the policy is invalid or can not be served"),
    setting("", "profile", false, Kind::Name, "",
        "profile of the host's configuration that holds where the policy says nothing"),
    setting("sampling", "flush", false, Kind::YesNo, "yes",
        "flush the guest's TLBs at each harvest, so that no access is hidden"),
    setting("sampling", "access", false, Kind::Access, "rwx",
        "kinds of access that sampling records"),
    or_auto(setting("sampling", "interval", true, Kind::Time(100..=HOUR_MS), "auto",
        "time between two harvests of the accessed bits; auto: as the guest's activity asks for")),
    setting("sampling", "rate", true, Kind::Hertz(0..=50_000), "0 Hz",
        "accesses sampled in a second; 0: none"),
    setting("temperature", "read", false, Kind::Number(0..=100), "1", "weight of a sampled read"),
    setting("temperature", "write", false, Kind::Number(0..=100), "1", "weight of a sampled write"),
    setting("temperature", "execute", false, Kind::Number(0..=100), "1", "weight of a sampled fetch"),
    setting("temperature", "half-life", true, Kind::Time(100..=24 * HOUR_MS), "30 s",
        "time after which an access counts half"),
    or_auto(setting("tiers", "fast", false, Kind::Nodes, "auto", "NUMA nodes of the fast tier")),
    or_auto(setting("tiers", "slow", false, Kind::Nodes, "auto", "NUMA nodes of the slow tier")),
    setting("dram", "share", false, Kind::Percent, "100%",
        "part of the guest's current memory that may lie in DRAM"),
    setting("dram", "weight", false, Kind::Number(1..=1000), "100",
        "part in the host's DRAM beside other domains, when there is too little for all"),
    setting("dram", "max-slowdown", false, Kind::Percent, "",
        "more DRAM than the share, up to max, while slower memory costs more of the guest's CPU time than this"),
    setting("dram", "min", true, Kind::Size, "0 bytes", "never less DRAM than this"),
    setting("dram", "max", true, Kind::Size, "", "never more DRAM than this"),
    setting("migration", "tolerance", false, Kind::Percent, "10%",
        "how much hotter a page must be than the one that it drives out of DRAM"),
    setting("migration", "delay", true, Kind::Time(0..=24 * HOUR_MS), "0 ms",
        "a page leaves DRAM only after it was not accessed for this long; 0: temperature alone decides"),
    or_auto(setting("migration", "interval", true, Kind::Time(100..=HOUR_MS), "auto",
        "time between two plans of what to move; auto: after each harvest")),
    setting("migration", "bandwidth", true, Kind::Rate(1 << 20), "64 MiB/s",
        "most that is moved, both directions together"),
];

/// The setting at `path`, as `dram.share`.
pub fn find(path: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.path() == path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_default_is_valid_and_written_as_it_is_read() {
        for setting in SETTINGS.iter().filter(|setting| !setting.default.is_empty()) {
            let value = setting.parse_plain(setting.default).unwrap();
            assert_eq!(value.to_string(), setting.default, "{}", setting.path());
            let (text, unit) = value.xml();
            assert_eq!(setting.parse(&text, unit), Ok(value));
        }
    }

    #[test]
    fn values_are_read_with_and_without_units() {
        let read = |path: &str, text: &str| find(path).unwrap().parse_plain(text).map(|v| v.to_string());
        assert_eq!(read("dram.min", "512MiB"), Ok("512 MiB".into()));
        assert_eq!(read("dram.min", "1024"), Ok("1 MiB".into()));
        assert_eq!(read("sampling.interval", "90 s"), Ok("90 s".into()));
        assert_eq!(read("sampling.interval", "auto"), Ok("auto".into()));
        assert_eq!(read("migration.delay", "0"), Ok("0 ms".into()));
        assert!(read("migration.delay", "auto").unwrap_err().contains("not a whole number"));
        assert!(read("sampling.rate", "50001 Hz").unwrap_err().contains("from 0 to 50000 Hz"));
        assert!(read("sampling.rate", "3 kHz").unwrap_err().contains("use Hz"));
        assert!(read("sampling.access", "rr").unwrap_err().contains("each once"));
        assert!(read("profile", "../x").unwrap_err().contains("not a profile's name"));
        assert_eq!(read("tiers.fast", "0,2-3"), Ok("0,2-3".into()));
    }
}
