// SPDX-License-Identifier: MIT OR Apache-2.0
//! Reads XML that anybody may have written, without taking time out of
//! proportion to its length. Nothing else in this crate parses XML.

use roxmltree::{Document, ParsingOptions};

use crate::text;

/// Bounds on what takes the reader time by the square. Domains stay far below.
///
/// It compares each attribute of an element with all before it, and hands on to
/// each element that declares a namespace those declared around it, one by one.
const MOST_ATTRIBUTES: usize = 1000;
const MOST_NAMESPACES: usize = 256;

/// Elements, texts and comments, each of which takes about 100 bytes.
const MOST_NODES: u32 = 1 << 20;

/// More bytes than this are not a domain's XML.
pub const LONGEST_XML: usize = 16 << 20;

/// Why a document was not read.
#[derive(Debug)]
pub(crate) struct XmlError {
    /// Line, from 1 on.
    pub(crate) line: u32,
    /// What is wrong.
    pub(crate) problem: String,
}

/// Reads a document. DTDs are refused, so that there are no entities to unfold.
pub(crate) fn read(xml: &str) -> Result<Document<'_>, XmlError> {
    if let Some(excess) = excess(xml) {
        return Err(XmlError { line: 1, problem: format!("the XML has {excess}") });
    }
    let options = ParsingOptions { nodes_limit: MOST_NODES, ..ParsingOptions::default() };
    Document::parse_with_options(xml, options).map_err(|cause| XmlError {
        line: cause.pos().row,
        // It tells names and characters as they are.
        problem: format!("the XML is not well-formed: {}", text::shown(&cause.to_string(), 200)),
    })
}

/// What there is too much of. Counts at least what there is, and maybe more: the
/// words may also stand in texts.
fn excess(xml: &str) -> Option<String> {
    let of = |limit: usize, what: &str| Some(format!("more than {limit} {what}"));
    // No attribute holds a "<".
    let crowded = |part: &str| part.matches('=').nth(MOST_ATTRIBUTES).is_some();
    if xml.len() > LONGEST_XML {
        of(LONGEST_XML, "bytes")
    } else if xml.matches("xmlns").nth(MOST_NAMESPACES).is_some() {
        of(MOST_NAMESPACES, "namespaces")
    } else if xml.split('<').any(crowded) {
        of(MOST_ATTRIBUTES, "attributes in an element")
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(xml: &str) -> String {
        read(xml).unwrap_err().problem
    }

    /// The first two would keep the reader busy for more than a minute.
    #[test]
    fn what_costs_too_much_is_not_begun() {
        let attributes: String = (0..1_000_000).map(|n| format!(" a{n}=''")).collect();
        assert!(problem(&format!("<a{attributes}/>")).ends_with("1000 attributes in an element"));
        let namespaces: String = (0..60_000).map(|n| format!(" xmlns:a{n}='b{n}'")).collect();
        let inner = "<a xmlns='c'/>".repeat(500_000);
        assert!(problem(&format!("<a{namespaces}>{inner}</a>")).ends_with("256 namespaces"));
        assert!(problem(&" ".repeat(LONGEST_XML + 1)).ends_with("bytes"));
        assert!(problem(&format!("<a>{}</a>", "<a/>".repeat(2_000_000))).contains("nodes limit"));
        assert!(problem(&"<a>".repeat(1_000_000)).contains("never closed"));
    }

    #[test]
    fn what_domains_have_is_read() {
        let disks = "<disk type='file'><target dev='vda' bus='virtio'/></disk>".repeat(1000);
        let notes = "<n:note xmlns:n='a'><![CDATA[x]]></n:note>".repeat(200);
        assert!(read(&format!("<domain>{disks}<metadata>{notes}</metadata></domain>")).is_ok());
    }
}
