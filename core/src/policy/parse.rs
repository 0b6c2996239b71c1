// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reads the policy element. Everything unknown is an error: a misspelt limit
//! that is silently ignored would look like a limit that does not work.

use std::fmt;
use std::time::Duration;

use roxmltree::{Document, Node};

use crate::topology::NodeSet;
use crate::units::{self, Bytes, BytesPerSecond, Share, UnitError};

use super::{Dram, Migration, Mode, Policy, Sampling};

/// Namespace of the policy element, with the grammar's version.
pub const NAMESPACE: &str = "https://ept-virt.org/xmlns/placement/1.0";

/// What the namespaces of all versions begin with.
const NAMESPACE_FAMILY: &str = "https://ept-virt.org/xmlns/placement/";

/// The element's name.
const ROOT: &str = "placement";

/// What is wrong with a policy, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicyError {
    /// Line in the XML that was read, from 1 on.
    pub line: u32,
    /// The element, or none when the XML could not be read at all.
    pub element: Option<String>,
    /// What is wrong, with what would be right where that is known.
    pub problem: String,
}

impl std::error::Error for PolicyError {}

impl fmt::Display for PolicyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.element {
            Some(element) => write!(f, "line {}, <{element}>: {}", self.line, self.problem),
            None => write!(f, "line {}: {}", self.line, self.problem),
        }
    }
}

type Result<T> = std::result::Result<T, PolicyError>;

/// See [`Policy::from_domain_xml`].
pub(super) fn domain(xml: &str) -> Result<Option<Policy>> {
    let document = read(xml)?;
    let root = document.root_element();
    if root.tag_name().name() != "domain" {
        return Err(error(root, "a domain's XML begins with <domain>".into()));
    }
    let mut found: Option<Node> = None;
    let metadata = root.children().filter(|child| child.has_tag_name("metadata"));
    for element in metadata.flat_map(|metadata| metadata.children()).filter(Node::is_element) {
        let namespace = element.tag_name().namespace().unwrap_or_default();
        if !namespace.starts_with(NAMESPACE_FAMILY) {
            continue;
        }
        if let Some(first) = found {
            let line = line_of(first);
            return Err(error(
                element,
                format!("there is a placement policy in line {line} already; keep one"),
            ));
        }
        found = Some(element);
    }
    found.map(placement).transpose()
}

/// See [`Policy::from_element_xml`].
pub(super) fn element(xml: &str) -> Result<Policy> {
    placement(read(xml)?.root_element())
}

fn read(xml: &str) -> Result<Document<'_>> {
    Document::parse(xml).map_err(|cause| PolicyError {
        line: cause.pos().row,
        element: None,
        problem: format!("the XML is not well-formed: {cause}"),
    })
}

fn placement(node: Node) -> Result<Policy> {
    let namespace = node.tag_name().namespace().unwrap_or_default();
    if namespace != NAMESPACE {
        return Err(error(
            node,
            format!("the namespace is \"{namespace}\"; this version reads \"{NAMESPACE}\""),
        ));
    }
    if node.tag_name().name() != ROOT {
        return Err(error(
            node,
            format!("unknown element; the policy's element is <{}>", beside(node, ROOT)),
        ));
    }
    check(node, &["mode", "required"], &["sampling", "temperature", "tiers", "dram", "migration"])?;
    let default = Policy::default();
    let mode = [("off", Mode::Off), ("observe", Mode::Observe), ("place", Mode::Place)];
    let (fast_nodes, slow_nodes) = child(node, "tiers").map(tiers).transpose()?.unwrap_or_default();
    Ok(Policy {
        mode: choice(node, "mode", &mode)?.unwrap_or(default.mode),
        required: yes_no(node, "required")?.unwrap_or(default.required),
        sampling: child(node, "sampling").map_or(Ok(default.sampling), sampling)?,
        half_life: child(node, "temperature").map_or(Ok(default.half_life), half_life)?,
        fast_nodes,
        slow_nodes,
        dram: child(node, "dram").map_or(Ok(default.dram), dram)?,
        migration: child(node, "migration").map_or(Ok(default.migration), migration)?,
    })
}

fn sampling(node: Node) -> Result<Sampling> {
    check(node, &["flush"], &["interval"])?;
    let default = Policy::default().sampling;
    let range = Duration::from_millis(100)..=Duration::from_secs(3600);
    Ok(Sampling {
        interval: time(node, "interval", range)?.unwrap_or(default.interval),
        flush: yes_no(node, "flush")?.unwrap_or(default.flush),
    })
}

fn half_life(node: Node) -> Result<Duration> {
    check(node, &[], &["half-life"])?;
    let range = Duration::from_millis(100)..=Duration::from_secs(24 * 3600);
    Ok(time(node, "half-life", range)?.unwrap_or(Policy::default().half_life))
}

fn tiers(node: Node) -> Result<(Option<NodeSet>, Option<NodeSet>)> {
    check(node, &["fast", "slow"], &[])?;
    let set = |name| {
        let Some(text) = node.attribute(name) else { return Ok(None) };
        let set: NodeSet = text.parse().map_err(|cause| error(node, format!("{name}: {cause}")))?;
        match set.is_empty() {
            true => {
                Err(error(node, format!("{name}: name at least one NUMA node, or leave the attribute out")))
            }
            false => Ok(Some(set)),
        }
    };
    let (fast, slow) = (set("fast")?, set("slow")?);
    if let (Some(fast), Some(slow)) = (&fast, &slow) {
        let both = fast.intersection(slow);
        if !both.is_empty() {
            return Err(error(node, format!("NUMA nodes {both} can not be both fast and slow")));
        }
    }
    Ok((fast, slow))
}

fn dram(node: Node) -> Result<Dram> {
    check(node, &["share"], &["min", "max"])?;
    let size = |name| quantity(node, name, "KiB", Bytes::parse);
    let dram = Dram { share: share(node, "share")?, min: size("min")?, max: size("max")? };
    match (dram.min, dram.max) {
        (Some(min), Some(max)) if min > max => {
            Err(error(node, format!("min is {min}, which is more than max, {max}")))
        }
        _ => Ok(dram),
    }
}

fn migration(node: Node) -> Result<Migration> {
    check(node, &["tolerance"], &["delay", "bandwidth"])?;
    let default = Policy::default().migration;
    let bandwidth = quantity(node, "bandwidth", "MiB/s", BytesPerSecond::parse)?;
    if let Some(too_slow) = bandwidth.filter(|rate| rate.0 < 1 << 20) {
        let problem = format!(
            "{too_slow} is too slow to move huge pages: give 1 MiB/s or more, or mode=\"observe\" to move nothing"
        );
        return Err(error(child(node, "bandwidth").unwrap_or(node), problem));
    }
    Ok(Migration {
        tolerance: share(node, "tolerance")?.unwrap_or(default.tolerance),
        delay: time(node, "delay", Duration::ZERO..=Duration::from_secs(24 * 3600))?.unwrap_or(default.delay),
        bandwidth: bandwidth.unwrap_or(default.bandwidth),
    })
}

/// The text of the child `name` as a quantity; `default_unit` is what libvirt
/// takes when there is no unit.
fn quantity<T>(
    node: Node,
    name: &str,
    default_unit: &str,
    parse: impl Fn(&str, &str) -> std::result::Result<T, UnitError>,
) -> Result<Option<T>> {
    let Some(node) = child(node, name) else { return Ok(None) };
    check_attributes(node, &["unit"], &[])?;
    if let Some(inner) = node.children().find(Node::is_element) {
        return Err(error(inner, format!("no element can stand in <{}>, only a number", name_of(node))));
    }
    let unit = node.attribute("unit").unwrap_or(default_unit);
    // A comment splits the text.
    let text: String = node.children().filter(Node::is_text).filter_map(|text| text.text()).collect();
    parse(text.trim(), unit).map(Some).map_err(|cause| error(node, cause.to_string()))
}

fn time(node: Node, name: &str, range: std::ops::RangeInclusive<Duration>) -> Result<Option<Duration>> {
    let Some(time) = quantity(node, name, "s", units::parse_duration)? else { return Ok(None) };
    if range.contains(&time) {
        return Ok(Some(time));
    }
    let [given, low, high] = [time, *range.start(), *range.end()].map(units::format_duration);
    let problem = format!("{given} is out of range: give {low} to {high}");
    Err(error(child(node, name).unwrap_or(node), problem))
}

fn share(node: Node, name: &str) -> Result<Option<Share>> {
    let Some(text) = node.attribute(name) else { return Ok(None) };
    Share::parse(text).map(Some).map_err(|cause| error(node, format!("{name}: {cause}")))
}

fn yes_no(node: Node, name: &str) -> Result<Option<bool>> {
    choice(node, name, &[("yes", true), ("no", false)])
}

fn choice<T: Copy>(node: Node, name: &str, choices: &[(&str, T)]) -> Result<Option<T>> {
    let Some(text) = node.attribute(name) else { return Ok(None) };
    match choices.iter().find(|(word, _)| *word == text) {
        Some((_, value)) => Ok(Some(*value)),
        None => {
            let words: Vec<&str> = choices.iter().map(|(word, _)| *word).collect();
            Err(error(node, format!("{name}=\"{text}\" is unknown{}", suggestion(text, &words))))
        }
    }
}

/// Checks that `node` has only these attributes, these child elements, each
/// once at most, and no text.
fn check(node: Node, attributes: &[&str], children: &[&str]) -> Result<()> {
    check_attributes(node, attributes, children)?;
    let mut seen: Vec<&str> = Vec::new();
    for inner in node.children() {
        if inner.text().is_some_and(|text| inner.is_text() && !text.trim().is_empty()) {
            let text = inner.text().unwrap_or_default().trim();
            return Err(error(node, format!("text \"{}\" has no meaning here", shortened(text))));
        }
        if !inner.is_element() {
            continue;
        }
        let name = inner.tag_name().name();
        if inner.tag_name().namespace() != Some(NAMESPACE) {
            let right = if children.contains(&name) { name } else { nearest(name, children).unwrap_or(name) };
            return Err(error(
                inner,
                format!("not in the policy's namespace: write <{}>", beside(node, right)),
            ));
        }
        if !children.contains(&name) {
            let inside = name_of(node);
            let meant = match (nearest(name, children), nearest(name, attributes)) {
                (None, Some(attribute)) => format!("; did you mean the attribute {attribute}=?"),
                _ => suggestion(name, children),
            };
            return Err(error(inner, format!("unknown element in <{inside}>{meant}")));
        }
        if seen.contains(&name) {
            return Err(error(inner, format!("stands twice in <{}>; keep one", name_of(node))));
        }
        seen.push(name);
    }
    Ok(())
}

fn check_attributes(node: Node, known: &[&str], children: &[&str]) -> Result<()> {
    for attribute in node.attributes() {
        let name = attribute.name();
        if attribute.namespace().is_some() || !known.contains(&name) {
            let line = node.document().text_pos_at(attribute.range().start).row;
            let meant = match (nearest(name, known), nearest(name, children)) {
                (None, Some(child)) => format!("; did you mean the element <{}>?", beside(node, child)),
                _ => suggestion(name, known),
            };
            let problem = format!("unknown attribute \"{name}\"{meant}");
            return Err(PolicyError { line, ..error(node, problem) });
        }
    }
    Ok(())
}

fn child<'a, 'input>(node: Node<'a, 'input>, name: &str) -> Option<Node<'a, 'input>> {
    node.children().find(|child| child.has_tag_name((NAMESPACE, name)))
}

fn error(node: Node, problem: String) -> PolicyError {
    PolicyError { line: line_of(node), element: Some(name_of(node)), problem }
}

fn line_of(node: Node) -> u32 {
    node.document().text_pos_at(node.range().start).row
}

/// The element's name as it is written, with its prefix.
fn name_of(node: Node) -> String {
    let name = node.tag_name();
    let prefix = name.namespace().and_then(|namespace| node.lookup_prefix(namespace));
    prefixed(prefix, name.name())
}

/// `name` with the prefix that `node` has.
fn beside(node: Node, name: &str) -> String {
    prefixed(node.lookup_prefix(NAMESPACE), name)
}

fn prefixed(prefix: Option<&str>, name: &str) -> String {
    match prefix {
        Some(prefix) if !prefix.is_empty() => format!("{prefix}:{name}"),
        _ => name.into(),
    }
}

/// The end of a message about `word`: what was meant, or else what there is.
fn suggestion(word: &str, known: &[&str]) -> String {
    match (nearest(word, known), known) {
        (Some(right), _) => format!("; did you mean \"{right}\"?"),
        (None, []) => "; there is none here".into(),
        (None, _) => format!("; known here: {}", known.join(", ")),
    }
}

/// The word of `known` that differs from `word` by a third of its letters at
/// most.
fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let (distance, right) = known.iter().map(|right| (edit_distance(word, right), *right)).min()?;
    (distance <= right.chars().count().div_ceil(3)).then_some(right)
}

/// Letters to insert, delete or replace to make `b` of `a`; case does not count.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.to_lowercase().chars().collect();
    // row[j]: distance of the part of `a` read so far to the first j letters of `b`.
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, from) in shortened(a).to_lowercase().chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in b.iter().enumerate() {
            let replace = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

/// At most 40 letters: what a stranger wrote should not fill a log.
fn shortened(text: &str) -> String {
    match text.char_indices().nth(40) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.into(),
    }
}
