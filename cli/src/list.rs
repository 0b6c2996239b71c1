// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ept-virt list`: one line for each running domain.

use ept_virt_core::units::Bytes;
use ept_virt_core::wire::{DomainState, Status};
use serde::Serialize;

use crate::status::state_word;
use crate::style::{Style, harmless};

/// Letters of a name that are shown whatever the width.
const SHORTEST_NAME: usize = 8;

/// One domain of `list --json`: a part of what `status --json` tells, under the
/// same names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Entry<'a> {
    name: &'a str,
    uuid: &'a str,
    id: Option<u32>,
    pid: Option<i32>,
    state: DomainState,
    memory_bytes: u64,
    /// None before the first round.
    round: Option<Figures>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Figures {
    hot_bytes: u64,
    warm_bytes: u64,
    cold_bytes: u64,
    fast_bytes: u64,
    slow_bytes: u64,
}

/// The domains of `status`.
pub fn entries(status: &Status) -> Vec<Entry<'_>> {
    status
        .domains
        .iter()
        .map(|domain| Entry {
            name: &domain.name,
            uuid: &domain.uuid,
            id: domain.id,
            pid: domain.pid,
            state: domain.state,
            memory_bytes: domain.memory_bytes,
            round: domain.round.as_ref().map(|round| Figures {
                hot_bytes: round.hot_bytes,
                warm_bytes: round.warm_bytes,
                cold_bytes: round.cold_bytes,
                fast_bytes: round.fast_bytes,
                slow_bytes: round.slow_bytes,
            }),
        })
        .collect()
}

/// The table for people.
pub fn render(status: &Status, style: &Style) -> String {
    if status.domains.is_empty() {
        return "no domain is running\n".into();
    }
    let mut rows = vec![
        ["Name", "State", "Id", "Pid", "Memory", "Hot", "Warm", "Cold", "DRAM", "NVM"].map(String::from),
    ];
    for domain in &status.domains {
        let round = domain.round.as_ref();
        let size = |bytes: Option<u64>| bytes.map_or("-".into(), |bytes| Bytes(bytes).to_string());
        rows.push([
            harmless(&domain.name),
            state_word(domain.state).into(),
            domain.id.map_or("-".into(), |id| id.to_string()),
            domain.pid.map_or("-".into(), |pid| pid.to_string()),
            size(Some(domain.memory_bytes).filter(|bytes| *bytes > 0)),
            size(round.map(|round| round.hot_bytes)),
            size(round.map(|round| round.warm_bytes)),
            size(round.map(|round| round.cold_bytes)),
            size(round.map(|round| round.fast_bytes)),
            size(round.map(|round| round.slow_bytes)),
        ]);
    }
    table(&rows, style)
}

/// Aligned columns: the first two are words, the others numbers. On a terminal
/// that is too narrow the first is cut.
fn table<const N: usize>(rows: &[[String; N]], style: &Style) -> String {
    const WORDS: usize = 2;
    const BETWEEN: usize = 2;
    let mut width: [usize; N] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0));
    if style.wrap {
        let others: usize = width[1..].iter().map(|width| BETWEEN + width).sum();
        width[0] = width[0].min(style.width.saturating_sub(others).max(SHORTEST_NAME));
    }
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        let cells: Vec<String> = row
            .iter()
            .zip(width)
            .enumerate()
            .map(|(column, (cell, width))| match column < WORDS {
                true => format!("{:<width$}", cut(cell, width)),
                false => format!("{cell:>width$}"),
            })
            .collect();
        let line = cells.join(&" ".repeat(BETWEEN));
        text += &if index == 0 { style.paint("1", &line) } else { line };
        text.push('\n');
    }
    text
}

/// `text` in at most `width` letters; a tilde stands for what was cut.
fn cut(text: &str, width: usize) -> String {
    match text.chars().count() > width {
        true => text.chars().take(width.saturating_sub(1)).chain(['~']).collect(),
        false => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_give_way_where_a_terminal_is_narrow() {
        let rows =
            [["Name", "State", "Pid"], ["a-rather-long-name", "off", "12"]].map(|row| row.map(String::from));
        let style = |width| Style { width, wrap: true, ..Style::PLAIN };
        assert_eq!(table(&rows, &style(24)), "Name          State  Pid\na-rather-lo~  off     12\n");
        // Less is not readable: the terminal breaks the lines then.
        assert!(table(&rows, &style(1)).contains("a-rathe~  off"));
        // Programs get all of it.
        assert!(table(&rows, &Style::PLAIN).contains("a-rather-long-name  off"));
    }
}
