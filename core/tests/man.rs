// SPDX-License-Identifier: MIT OR Apache-2.0
//! The man page against the ABI header, which is the manual: the page must name
//! every call and every errno of it, and nothing that it does not know.

use std::collections::BTreeSet;
use std::path::Path;

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The words of `text` that `is_wanted`.
fn words(text: &str, is_wanted: impl Fn(&str) -> bool) -> BTreeSet<&str> {
    text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').filter(|word| is_wanted(word)).collect()
}

/// Whether `word` looks like the name of an errno.
fn is_errno(word: &str) -> bool {
    const OTHERS: [&str; 4] = ["EPT", "EXEC", "ERRORS", "ENTRY"];
    word.len() > 2
        && word.starts_with('E')
        && word.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit())
        && !OTHERS.contains(&word)
}

/// Names that `header` gives to calls: numbers made by _IO and its kin, and 2019's.
fn calls(header: &str) -> BTreeSet<&str> {
    let defines = header.lines().filter_map(|line| line.strip_prefix("#define "));
    defines
        .filter_map(|define| define.split_once(char::is_whitespace))
        .filter(|(_, value)| {
            value.contains("_IO") || value.trim().parse().is_ok_and(|n: u32| (1200..1300).contains(&n))
        })
        .map(|(name, _)| name)
        .collect()
}

#[test]
fn the_man_page_names_what_the_header_does() {
    let (header, page) = (read("kmod/uapi/kvm_ept_sample.h"), read("docs/kvm_ept_sample.4"));
    let in_page = words(&page, |_| true);
    let calls = calls(&header);
    assert!(
        calls.contains("KES_HARVEST") && calls.contains("KES_2019_INIT"),
        "calls of the header: {calls:?}"
    );
    let missing: Vec<_> = calls.difference(&in_page).collect();
    assert!(missing.is_empty(), "calls of the header that the page lacks: {missing:?}");

    let unknown: Vec<_> = words(&page, |word| word.starts_with("KES_") || word.starts_with("kes_"))
        .difference(&words(&header, |_| true))
        .copied()
        .collect();
    assert!(unknown.is_empty(), "names in the page that the header lacks: {unknown:?}");
}

#[test]
fn the_man_page_has_the_errors_of_the_header() {
    let (header, page) = (read("kmod/uapi/kvm_ept_sample.h"), read("docs/kvm_ept_sample.4"));
    let errors =
        page.split(".SH ERRORS").nth(1).and_then(|rest| rest.split(".SH ").next()).unwrap_or_default();
    assert_eq!(words(errors, is_errno), words(&header, is_errno));
}
