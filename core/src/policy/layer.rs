// SPDX-License-Identifier: MIT OR Apache-2.0
//! What one place says about a domain: the domain's XML, a profile, the host's
//! defaults, the command line. Layers lie upon each other, and the uppermost
//! that says something holds.

use std::fmt::Write;
use std::time::Duration;

use crate::text::word;
use crate::topology::NodeSet;
use crate::units::{Bytes, Share};

use super::parse::{self, EXCLUDE, NAMESPACE, PolicyError, ROOT};
use super::settings::{SETTINGS, Setting, Value, find};
use super::words::suggestion;

/// Memory that is never moved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exclusion {
    /// Guest physical addresses, in bytes; `end` is the first one behind.
    Range {
        /// First address.
        start: u64,
        /// First address behind.
        end: u64,
    },
    /// A memory device of the domain, by the alias that its XML gives it.
    Device(String),
}

/// Some of the settings.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layer {
    /// In the order of [`SETTINGS`].
    values: Vec<(&'static Setting, Value)>,
    /// Set as a whole: a list upon a list replaces it.
    pub exclude: Option<Vec<Exclusion>>,
}

impl PartialEq for Setting {
    fn eq(&self, other: &Self) -> bool {
        (self.element, self.name) == (other.element, other.name)
    }
}

impl Eq for Setting {}

impl Layer {
    /// Reads the policy in the `<metadata>` of a domain's XML; `None` when there
    /// is none.
    pub fn from_domain_xml(xml: &str) -> Result<Option<Self>, PolicyError> {
        parse::domain(xml)
    }

    /// Reads a `<placement>` element that stands alone, as `virsh metadata`
    /// prints it.
    pub fn from_element_xml(xml: &str) -> Result<Self, PolicyError> {
        parse::element(xml)
    }

    /// What holds when nobody says anything.
    pub fn built_in() -> Self {
        let mut layer = Layer::default();
        for setting in SETTINGS.iter().filter(|setting| !setting.default.is_empty()) {
            // A unit test reads them all.
            if let Ok(value) = setting.parse_plain(setting.default) {
                layer.set(setting, value);
            }
        }
        layer
    }

    /// Sets the setting at `path`, as `dram.share`, to what `text` says.
    pub fn assign(&mut self, path: &str, text: &str) -> Result<(), String> {
        let setting = known(path)?;
        let value = setting.parse_plain(text).map_err(|problem| format!("{path}: {problem}"))?;
        self.set(setting, value);
        Ok(())
    }

    /// Says nothing at `path` any more.
    pub fn unset(&mut self, path: &str) -> Result<(), String> {
        if path == EXCLUDE {
            self.exclude = None;
            return Ok(());
        }
        let setting = known(path)?;
        self.values.retain(|(other, _)| *other != setting);
        Ok(())
    }

    pub(super) fn set(&mut self, setting: &'static Setting, value: Value) {
        let place = |setting: &Setting| SETTINGS.iter().position(|other| other == setting);
        match self.values.binary_search_by_key(&place(setting), |(other, _)| place(other)) {
            Ok(index) => self.values[index].1 = value,
            Err(index) => self.values.insert(index, (setting, value)),
        }
    }

    /// What is set, in the order of [`SETTINGS`].
    pub fn values(&self) -> impl Iterator<Item = (&'static Setting, &Value)> {
        self.values.iter().map(|(setting, value)| (*setting, value))
    }

    /// What is said at `path`.
    pub fn get(&self, path: &str) -> Option<&Value> {
        self.values().find(|(setting, _)| setting.path() == path).map(|(_, value)| value)
    }

    pub(super) fn flag(&self, path: &str) -> bool {
        matches!(self.get(path), Some(Value::Flag(true)))
    }

    pub(super) fn number(&self, path: &str) -> u32 {
        match self.get(path) {
            Some(Value::Number(number) | Value::Hertz(number)) => *number,
            _ => 0,
        }
    }

    pub(super) fn time(&self, path: &str) -> Option<Duration> {
        match self.get(path) {
            Some(Value::Time(time)) => Some(*time),
            _ => None,
        }
    }

    pub(super) fn share(&self, path: &str) -> Share {
        match self.get(path) {
            Some(Value::Share(share)) => *share,
            _ => Share::default(),
        }
    }

    pub(super) fn size(&self, path: &str) -> Option<Bytes> {
        match self.get(path) {
            Some(Value::Size(bytes)) => Some(*bytes),
            _ => None,
        }
    }

    pub(super) fn nodes(&self, path: &str) -> Option<NodeSet> {
        match self.get(path) {
            Some(Value::Nodes(nodes)) => Some(nodes.clone()),
            _ => None,
        }
    }

    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty() && self.exclude.is_none()
    }

    /// Puts `upper` upon this one.
    pub fn overlay(&mut self, upper: &Layer) {
        for (setting, value) in upper.values() {
            self.set(setting, value.clone());
        }
        if upper.exclude.is_some() {
            self.exclude.clone_from(&upper.exclude);
        }
    }

    /// Settings that can not hold together: the element they stand in, and why.
    pub fn contradiction(&self) -> Option<(&'static str, String)> {
        match (self.get("dram.min"), self.get("dram.max")) {
            (Some(Value::Size(min)), Some(Value::Size(max))) if min > max => {
                return Some(("dram", format!("min is {min}, which is more than max, {max}")));
            }
            _ => {}
        }
        if let (Some(Value::Nodes(fast)), Some(Value::Nodes(slow))) =
            (self.get("tiers.fast"), self.get("tiers.slow"))
        {
            let both = fast.intersection(slow);
            if !both.is_empty() {
                let both = word(&both.to_string());
                return Some(("tiers", format!("NUMA nodes {both} can not be both fast and slow")));
            }
        }
        None
    }

    /// The policy's element, one line for each element in it, ready to stand in a
    /// domain's metadata. Reading it gives this layer again.
    pub fn to_xml(&self) -> String {
        self.write(&format!("<{ROOT} xmlns=\"{NAMESPACE}\""))
    }

    /// The element without its namespace, which libvirt adds.
    pub fn to_metadata(&self) -> String {
        self.write(&format!("<{ROOT}"))
    }

    fn write(&self, begin: &str) -> String {
        let mut xml = begin.to_owned();
        self.write_attributes(&mut xml, "");
        let mut body = String::new();
        let mut last = "";
        for (setting, _) in self.values() {
            if !setting.element.is_empty() && setting.element != last {
                last = setting.element;
                self.write_group(&mut body, last);
            }
        }
        if let Some(exclude) = &self.exclude {
            write_exclusions(&mut body, exclude);
        }
        match body.is_empty() {
            true => xml + "/>\n",
            false => xml + ">\n" + &body + "</" + ROOT + ">\n",
        }
    }

    fn write_attributes(&self, xml: &mut String, element: &str) {
        for (setting, value) in self.values().filter(|(s, _)| s.element == element && !s.is_element) {
            *xml += &format!(" {}=\"{}\"", setting.name, value.xml().0);
        }
    }

    fn write_group(&self, xml: &mut String, element: &str) {
        *xml += &format!("  <{element}");
        self.write_attributes(xml, element);
        let mut children = String::new();
        for (setting, value) in self.values().filter(|(s, _)| s.element == element && s.is_element) {
            let (text, unit) = value.xml();
            let unit = unit.map(|unit| format!(" unit=\"{unit}\"")).unwrap_or_default();
            children += &format!("    <{0}{unit}>{text}</{0}>\n", setting.name);
        }
        *xml += &match children.is_empty() {
            true => "/>\n".to_owned(),
            false => format!(">\n{children}  </{element}>\n"),
        };
    }
}

fn known(path: &str) -> Result<&'static Setting, String> {
    find(path).ok_or_else(|| {
        let paths: Vec<String> = SETTINGS.iter().map(Setting::path).collect();
        let known: Vec<&str> = paths.iter().map(String::as_str).collect();
        format!("there is no setting \"{}\"{}", word(path), suggestion(path, &known))
    })
}

fn write_exclusions(xml: &mut String, exclude: &[Exclusion]) {
    *xml += &format!("  <{EXCLUDE}>\n");
    for exclusion in exclude {
        // Writing to a String does not fail.
        let _ = match exclusion {
            Exclusion::Range { start, end } => {
                writeln!(xml, "    <range start=\"{start:#x}\" end=\"{end:#x}\"/>")
            }
            Exclusion::Device(alias) => writeln!(xml, "    <memory alias=\"{}\"/>", escaped(alias)),
        };
    }
    *xml += &format!("  </{EXCLUDE}>\n");
}

/// `text` as an attribute's value.
fn escaped(text: &str) -> String {
    // Bare white space would be read as blanks.
    let references =
        [('&', "&amp;"), ('<', "&lt;"), ('"', "&quot;"), ('\t', "&#9;"), ('\n', "&#10;"), ('\r', "&#13;")];
    references.iter().fold(text.to_owned(), |text, (char, reference)| text.replace(*char, reference))
}
