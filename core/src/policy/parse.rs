// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reads the policy element. Everything unknown is an error: a misspelt limit
//! that is silently ignored would look like a limit that does not work.

use std::fmt;

use roxmltree::Node;

use crate::xml::{XmlError, read};
use crate::{text, units};

use super::layer::{Exclusion, Layer};
use super::settings::{Kind, SETTINGS, Setting, Value};
use super::words::{nearest, suggestion};

/// Namespace of the policy element, with the grammar's version.
pub const NAMESPACE: &str = "https://ept-virt.org/xmlns/placement/1.0";

/// What the namespaces of all versions begin with.
const NAMESPACE_FAMILY: &str = "https://ept-virt.org/xmlns/placement/";

/// The element's name.
pub(super) const ROOT: &str = "placement";

/// The elements in it.
const GROUPS: [&str; 6] = ["sampling", "temperature", "tiers", "dram", "migration", EXCLUDE];

/// The one that is a list.
pub(super) const EXCLUDE: &str = "exclude";

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

impl From<XmlError> for PolicyError {
    fn from(error: XmlError) -> Self {
        Self { line: error.line, element: None, problem: error.problem }
    }
}

type Result<T> = std::result::Result<T, PolicyError>;

/// See [`Layer::from_domain_xml`].
pub(super) fn domain(xml: &str) -> Result<Option<Layer>> {
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

/// Whether the domain's policy, right or wrong in all else, is required.
pub(super) fn says_required(xml: &str) -> bool {
    let Ok(document) = read(xml) else { return false };
    let metadata = document.root_element().children().filter(|child| child.has_tag_name("metadata"));
    metadata.flat_map(|metadata| metadata.children()).any(|element| {
        let namespace = element.tag_name().namespace().unwrap_or_default();
        namespace.starts_with(NAMESPACE_FAMILY) && element.attribute("required") == Some("yes")
    })
}

/// See [`Layer::from_element_xml`].
pub(super) fn element(xml: &str) -> Result<Layer> {
    placement(read(xml)?.root_element())
}

fn placement(node: Node) -> Result<Layer> {
    let namespace = node.tag_name().namespace().unwrap_or_default();
    if namespace != NAMESPACE {
        return Err(error(
            node,
            format!("the namespace is \"{}\"; this version reads \"{NAMESPACE}\"", text::word(namespace)),
        ));
    }
    if node.tag_name().name() != ROOT {
        return Err(error(
            node,
            format!("unknown element; the policy's element is <{}>", beside(node, ROOT)),
        ));
    }
    let mut layer = Layer::default();
    settings_of(node, "", &mut layer)?;
    for group in node.children().filter(Node::is_element) {
        match group.tag_name().name() {
            EXCLUDE => layer.exclude = Some(exclusions(group)?),
            name => settings_of(group, name, &mut layer)?,
        }
    }
    match layer.contradiction() {
        Some((element, problem)) => Err(error(child(node, element).unwrap_or(node), problem)),
        None => Ok(layer),
    }
}

/// Reads the settings that stand in `node`, the element `element` of the policy.
fn settings_of(node: Node, element: &str, layer: &mut Layer) -> Result<()> {
    let known = || SETTINGS.iter().filter(|setting| setting.element == element);
    let names = |is_element| -> Vec<&str> {
        known().filter(|setting| setting.is_element == is_element).map(|setting| setting.name).collect()
    };
    let mut children = names(true);
    if element.is_empty() {
        children = GROUPS.to_vec();
    }
    check(node, &names(false), &children)?;
    for setting in known() {
        let value = match setting.is_element {
            true => child(node, setting.name).map(|node| quantity(node, setting)).transpose()?,
            false => node.attribute(setting.name).map(|text| attribute(node, text, setting)).transpose()?,
        };
        if let Some(value) = value {
            layer.set(setting, value);
        }
    }
    Ok(())
}

fn attribute(node: Node, text: &str, setting: &Setting) -> Result<Value> {
    setting.parse(text, None).map_err(|problem| {
        // One of a few words reads best as it stands there.
        let problem = match setting.kind {
            Kind::Choice(_) | Kind::YesNo => format!("{}={problem}", setting.name),
            _ => format!("{}: {problem}", setting.name),
        };
        error(node, problem)
    })
}

/// The text of a child element, with its unit.
fn quantity(node: Node, setting: &Setting) -> Result<Value> {
    check_attributes(node, &["unit"], &[])?;
    if let Some(inner) = node.children().find(Node::is_element) {
        return Err(error(inner, format!("no element can stand in <{}>, only a number", name_of(node))));
    }
    // A comment splits the text.
    let text: String = node.children().filter(Node::is_text).filter_map(|text| text.text()).collect();
    setting.parse(text.trim(), node.attribute("unit")).map_err(|problem| error(node, problem))
}

fn exclusions(node: Node) -> Result<Vec<Exclusion>> {
    const NAMES: [&str; 2] = ["range", "memory"];
    check_attributes(node, &[], &[])?;
    check_children(node, &[], &NAMES, Repeat::Allowed)?;
    node.children().filter(Node::is_element).map(exclusion).collect()
}

fn exclusion(node: Node) -> Result<Exclusion> {
    let needed = |name: &str| {
        let missing = || error(node, format!("the attribute {name}= is missing"));
        node.attribute(name).map(str::to_owned).ok_or_else(missing)
    };
    let address = |name: &str| {
        let text = needed(name)?;
        hexadecimal(&text).ok_or_else(|| {
            let text = text::word(&text);
            error(node, format!("{name}: \"{text}\" is not a guest physical address, as 0x100000000"))
        })
    };
    if node.tag_name().name() == "memory" {
        check(node, &["alias"], &[])?;
        let alias = needed("alias")?;
        return match alias.is_empty() {
            true => Err(error(node, "alias: name the memory device, as dimm0".into())),
            false => Ok(Exclusion::Device(alias)),
        };
    }
    check(node, &["start", "end"], &[])?;
    let (start, end) = (address("start")?, address("end")?);
    match start < end {
        true => Ok(Exclusion::Range { start, end }),
        false => Err(error(
            node,
            format!("end {end:#x} is not above start {start:#x}: end is the first address behind the range"),
        )),
    }
}

fn hexadecimal(text: &str) -> Option<u64> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    let is_hex = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    match text.starts_with("0x") {
        true if is_hex => u64::from_str_radix(digits, 16).ok(),
        true => None,
        false => units::digits(text),
    }
}

/// Checks that `node` has only these attributes, these child elements, each
/// once at most, and no text.
fn check(node: Node, attributes: &[&str], children: &[&str]) -> Result<()> {
    check_attributes(node, attributes, children)?;
    check_children(node, attributes, children, Repeat::Refused)
}

/// Whether a child element may stand more than once.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Repeat {
    Refused,
    Allowed,
}

fn check_children(node: Node, attributes: &[&str], children: &[&str], repeat: Repeat) -> Result<()> {
    let mut seen: Vec<&str> = Vec::new();
    for inner in node.children() {
        if inner.text().is_some_and(|text| inner.is_text() && !text.trim().is_empty()) {
            let text = inner.text().unwrap_or_default().trim();
            return Err(error(node, format!("text \"{}\" has no meaning here", text::word(text))));
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
        if repeat == Repeat::Refused && seen.contains(&name) {
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
            let problem = format!("unknown attribute \"{}\"{meant}", text::word(name));
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
        Some(prefix) if !prefix.is_empty() => format!("{}:{}", text::word(prefix), text::word(name)),
        _ => text::word(name),
    }
}
