// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the documents tell people to type and to write, read as the programs read it.

use std::fs;
use std::path::{Path, PathBuf};

use clap::Parser;
use ept_virt_core::policy::{Config, Effective, Layer};

use crate::{Cli, Command};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn document(name: &str) -> String {
    let path = root().join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The fenced blocks of a document or a part of it: language and text.
fn blocks(text: &str) -> Vec<(&str, &str)> {
    let mut parts = text.split("```");
    parts.next();
    let inside: Vec<&str> = parts.step_by(2).collect();
    inside.into_iter().filter_map(|block| block.split_once('\n')).collect()
}

/// The words of each call of our program in shell lines, behind a prompt or none.
fn calls(text: &str) -> impl Iterator<Item = Vec<&str>> {
    let lines = text.lines().map(|line| line.split(" # ").next().unwrap_or_default().trim());
    let lines = lines.map(|line| line.strip_prefix("$ ").unwrap_or(line));
    lines.filter(|line| line.starts_with("ept-virt ")).map(|line| line.split_whitespace().collect())
}

#[test]
fn every_command_in_the_documents_is_one() {
    let mut count = 0;
    for name in ["README.md", "docs/POLICIES.md", "docs/OPERATING.md", "SECURITY.md", "xml-schemas/README.md"]
    {
        let text = document(name);
        for (_, block) in blocks(&text) {
            for words in calls(block) {
                if let Err(error) = Cli::try_parse_from(&words) {
                    panic!("{name}: {words:?}: {error}");
                }
                count += 1;
            }
        }
    }
    assert!(count >= 12, "only {count} found");
}

/// What `policy set` says in this line.
fn set(words: &[&str]) -> Option<Layer> {
    match Cli::try_parse_from(words).unwrap().command {
        Command::Policy(args) => args.said(),
        _ => None,
    }
}

/// Each case of the cookbook: configuration, policies in XML and by command, and what
/// status shows of one of them.
#[test]
fn every_case_of_the_cookbook_holds() {
    let text = document("docs/POLICIES.md");
    let cases: Vec<&str> = text.split("\n## ").skip(1).collect();
    assert_eq!(cases.len(), 5);
    for case in cases {
        let title = case.lines().next().unwrap();
        let blocks = blocks(case);
        let of = |language: &str| {
            let wanted = language.to_owned();
            blocks.iter().filter(move |(found, _)| *found == wanted).map(|(_, text)| *text)
        };
        let config = of("toml").collect::<Vec<_>>().join("\n");
        let config = Config::parse(&config).unwrap_or_else(|problem| panic!("{title}: {problem}"));
        let mut layers: Vec<Layer> = of("xml")
            .map(|xml| Layer::from_element_xml(xml).unwrap_or_else(|error| panic!("{title}: {error}")))
            .collect();
        layers.extend(of("sh").flat_map(calls).filter_map(|words| set(&words)));
        let policies = layers.iter().map(Some).chain([None]).map(|layer| {
            Effective::new(&config, layer).unwrap_or_else(|problem| panic!("{title}: {problem}")).policy
        });
        let shown: Vec<String> = policies.map(|policy| policy.describe()).collect();
        let told: Vec<&str> = of("text").map(str::trim).collect();
        assert!(!told.is_empty(), "{title}: what does status show?");
        for told in told {
            assert!(shown.iter().any(|shown| shown == told), "{title}: {told}\nis not one of {shown:#?}");
        }
        // XML and commands of one case say the same.
        assert!(layers.windows(2).all(|pair| pair[0] == pair[1]), "{title}: {layers:?}");
    }
}

/// Where the texts come from that status shows where something wants attention.
const SOURCES: [&str; 14] = [
    "core/src/sampler.rs",
    "core/src/process.rs",
    "core/src/topology.rs",
    "core/src/migrate.rs",
    "core/src/memory/staying.rs",
    "core/src/policy/serve.rs",
    "core/src/policy/exclude.rs",
    "core/src/budget.rs",
    "cli/src/attach.rs",
    "cli/src/daemon/claim.rs",
    "cli/src/daemon/reconcile.rs",
    "cli/src/daemon/worker.rs",
    "cli/src/daemon/guest.rs",
    "cli/src/status.rs",
];

/// Texts in those files that no one is warned by: names of operations, of what was
/// expected, answers to commands, and what is the same in other words.
const NO_WARNINGS: [&str; 16] = [
    "list the memory slots",
    "attach to the VM",
    "read the start time",
    "its stat file has another form",
    "tell the CPU time of the vCPUs",
    "take the VM descriptor",
    "memory tiers of the kernel",
    "a list of distances",
    "a list of nodes",
    "table walk and KVM's notifier",
    "none: nothing is mapped",
    "does not run",
    "`virsh start` starts it",
    "can not be observed:",
    "the process has exited",
    "where {expected} was expected",
];

/// What status says of every guest, and of itself; docs/CLI.md has the fields behind it.
const PLAIN: [&str; 23] = [
    "pid {}, up {uptime}",
    "KVM is patched for samples",
    "tells accesses by {teller}",
    "DRAM on {}; no NVM",
    "DRAM on {}, NVM on {}",
    ", the last: {nudge}",
    "no domain is running",
    "by the policy: it is not moved",
    "the first has not ended yet",
    "of it {} by huge pages",
    "written since last cleaned",
    "the last round of {}",
    "the last {} of a round of {}",
    "{} on DRAM ({}), {} on NVM",
    "number {}, took {}",
    "; share by weight {}",
    "{number} ({access}, {rate_hz} Hz)",
    "% of its CPU time ({low:.1} to {high:.1}%)",
    "limit {limit_percent}%",
    "for that it may have {} of DRAM more",
    "to NVM {}, to DRAM {}",
    "each mark {each}, low addresses left",
    "{} days {} h",
];

/// The string literals of Rust source up to its tests, but for those of log lines.
fn literals(source: &str) -> Vec<String> {
    let code = source.split("#[cfg(test)]").next().unwrap_or_default();
    let code: String = code.lines().filter(|line| !line.trim_start().starts_with("//")).collect();
    let is_log = |statement: &str| {
        ["about!(", "warn!(", "info!(", "debug!("].iter().any(|call| statement.contains(call))
    };
    let (mut found, mut statement) = (Vec::new(), String::new());
    let mut letters = code.chars();
    while let Some(letter) = letters.next() {
        match letter {
            // A letter of its own may be a quotation mark.
            '"' if !statement.ends_with('\'') => {
                let mut text = String::new();
                while let Some(letter) = letters.next().filter(|letter| *letter != '"') {
                    // Lines are joined, and only marks and line ends are escaped.
                    text.extend(if letter == '\\' { letters.next() } else { Some(letter) });
                }
                found.extend((!is_log(&statement)).then_some(text));
            }
            ';' | '{' | '}' => statement.clear(),
            _ => statement.push(letter),
        }
    }
    found
}

/// The longest part between what is filled in.
fn longest(text: &str) -> &str {
    let parts = text.split('{').map(|part| part.split_once('}').map_or(part, |(_, rest)| rest));
    parts.max_by_key(|part| part.len()).unwrap_or_default().trim()
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn every_text_of_status_is_explained() {
    let document = one_line(&document("docs/OPERATING.md").replace("\\<", "<").replace("\\`", "`"));
    let mut missing = Vec::new();
    let no_warnings: Vec<&str> = NO_WARNINGS.into_iter().chain(PLAIN).collect();
    let mut passed_over = vec![false; no_warnings.len()];
    let mut count = 0;
    for source in SOURCES {
        for text in literals(&self::document(source)) {
            let text = one_line(&text);
            if text.matches(' ').count() < 3 {
                continue;
            }
            if let Some(index) = no_warnings.iter().position(|no| text.contains(no)) {
                passed_over[index] = true;
            } else {
                count += 1;
                let part = longest(&text);
                missing.extend((!document.contains(part)).then(|| format!("{source}: {text}")));
            }
        }
    }
    assert!(missing.is_empty(), "docs/OPERATING.md does not explain: {missing:#?}");
    let idle: Vec<_> = no_warnings.iter().zip(passed_over).filter(|(_, passed)| !passed).collect();
    assert!(idle.is_empty(), "no text has {idle:?}");
    assert!(count >= 70, "only {count} found");
}

/// Each row of a table says all that the table is about.
#[test]
fn no_cell_of_the_operators_tables_is_empty() {
    let document = document("docs/OPERATING.md");
    let rows: Vec<&str> = document.lines().filter(|line| line.starts_with("| ")).collect();
    assert!(rows.len() > 70, "{}", rows.len());
    for row in rows.iter().filter(|row| !row.starts_with("| check |")) {
        let row = row.replace("\\|", "");
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        assert!(cells.len() >= 3 && cells.iter().all(|cell| !cell.is_empty()), "{row}");
    }
}

/// All source files of Rust below a folder.
fn sources(folder: &Path, found: &mut String) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|kind| kind == "rs") {
            *found += &fs::read_to_string(&path).unwrap();
        }
    }
}

#[test]
fn every_test_that_operators_are_shown_is_there() {
    let mut all = String::new();
    for folder in ["core", "cli", "libvirt-hook", "lab/src", "lab/agent/src"] {
        sources(&root().join(folder), &mut all);
    }
    let text = document("docs/OPERATING.md");
    let (_, table) = text.split_once("## When something ends").unwrap();
    let rows = table.lines().filter(|line| line.starts_with("| ")).skip(1);
    let mut count = 0;
    for row in rows {
        let held = row.trim_end_matches(" |").rsplit(" | ").next().unwrap();
        let names: Vec<&str> = held.split('`').skip(1).step_by(2).collect();
        assert!(!names.is_empty(), "{row}");
        for name in names {
            let is_there = all.contains(&format!("fn {name}()")) || all.contains(&format!("\"{name}\""));
            assert!(is_there, "no test {name}");
            count += 1;
        }
    }
    assert!(count > 30, "{count}");
}

/// Times are of CLOCK_MONOTONIC in all that decides. A recording alone says when it
/// began, which nothing reads but people.
#[test]
fn the_wall_clock_decides_nothing() {
    let mut all = String::new();
    sources(&root().join("core/src"), &mut all);
    sources(&root().join("cli/src/daemon"), &mut all);
    let all = all.replace(&document("cli/src/daemon/tap.rs"), "");
    for clock in ["SystemTime", "UNIX_EPOCH", "CLOCK_REALTIME", "CLOCK_TAI"] {
        assert!(!all.contains(clock), "{clock}");
    }
    assert!(all.contains("CLOCK_MONOTONIC"));
}
