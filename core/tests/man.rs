// SPDX-License-Identifier: MIT OR Apache-2.0
//! The man page against the ABI header, which is the manual: the page must name
//! every call and every errno of it, and nothing that it does not know. And against
//! the sources that name what an administrator sees: statistics, tracepoints,
//! parameters.

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

/// The words of `source` that follow `before` at once.
fn named_first<'a>(source: &'a str, before: &str) -> BTreeSet<&'a str> {
    let rest = source.split(before).skip(1);
    rest.filter_map(|rest| rest.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').next())
        .filter(|word| !word.is_empty())
        .collect()
}

/// The part of the page under a title.
fn section<'a>(page: &'a str, title: &str) -> &'a str {
    let head = format!("\n.SH {title}\n");
    let rest = page.split_once(&head).map(|(_, rest)| rest);
    rest.and_then(|rest| rest.split("\n.SH ").next()).unwrap_or_default()
}

#[test]
fn the_man_page_names_what_administrators_see() {
    let page = read("docs/kvm_ept_sample.4");
    let expect = |title: &str, names: &BTreeSet<&str>, some: &[&str]| {
        assert!(some.iter().all(|name| names.contains(name)), "of the sources, {title}: {names:?}");
        let missing: Vec<_> = names.difference(&words(section(&page, title), |_| true)).copied().collect();
        assert!(missing.is_empty(), "{title} lacks {missing:?}");
    };

    // Names are printed, or stand in the table of those that count harvests.
    let source = read("kmod/stats.c");
    let mut names = named_first(&source, "seq_printf(file, \"");
    names.extend(source.lines().filter_map(|line| {
        let (_, name) = line.trim().strip_prefix("[KES_COUNT_")?.split_once("] = \"")?;
        name.strip_suffix("\",")
    }));
    expect("STATISTICS", &names, &["self_check", "harvests", "harvest_errors_other", "samples", "session"]);

    // Histograms: the same lines for each kind of hold, from the narrowest on.
    let source = read("kmod/hold.c");
    let kinds = source.lines().filter_map(|line| line.trim().strip_prefix("[KES_HOLD_")?.split('"').nth(1));
    let lines = |kind: &str| -> Vec<String> {
        let formats = source.split("seq_printf(file, \"%s").skip(1).filter_map(|rest| rest.split(' ').next());
        formats.map(|format| format!("{kind}{}", format.replace("%u", "16"))).collect()
    };
    let names: Vec<_> = kinds.flat_map(lines).collect();
    let names = names.iter().map(String::as_str).collect();
    expect("STATISTICS", &names, &["harvest_holds_below_16_us", "sample_holds_longest_us"]);

    let source = read("kmod/trace.h");
    expect("TRACEPOINTS", &named_first(&source, "TRACE_EVENT("), &["kes_attach", "kes_sample"]);

    let modules = std::fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../kmod")).unwrap();
    let sources: String = modules
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|kind| kind == "c"))
        .map(|path| std::fs::read_to_string(path).unwrap())
        .collect();
    expect("PARAMETERS", &named_first(&sources, "\nmodule_param("), &["nodes_by_page"]);
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

    let tracepoints = read("kmod/trace.h");
    let mut known = words(&header, |_| true);
    known.extend(named_first(&tracepoints, "TRACE_EVENT("));
    let in_page = words(&page, |word| word.starts_with("KES_") || word.starts_with("kes_"));
    let unknown: Vec<_> = in_page.difference(&known).collect();
    assert!(unknown.is_empty(), "names in the page that the header lacks: {unknown:?}");
}

#[test]
fn the_man_page_has_the_errors_of_the_header() {
    let (header, page) = (read("kmod/uapi/kvm_ept_sample.h"), read("docs/kvm_ept_sample.4"));
    assert_eq!(words(section(&page, "ERRORS"), is_errno), words(&header, is_errno));
}
