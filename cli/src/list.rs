// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ept-virt list`: one line for each running domain.

use ept_virt_core::units::Bytes;
use ept_virt_core::wire::{DomainState, Status};
use serde::Serialize;

use crate::status::state_word;
use crate::style::{Style, harmless};

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

/// Aligned columns: the first two are words, the others numbers.
fn table<const N: usize>(rows: &[[String; N]], style: &Style) -> String {
    const WORDS: usize = 2;
    let width: [usize; N] =
        std::array::from_fn(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0));
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        let cells: Vec<String> = row
            .iter()
            .zip(width)
            .enumerate()
            .map(|(column, (cell, width))| match column < WORDS {
                true => format!("{cell:<width$}"),
                false => format!("{cell:>width$}"),
            })
            .collect();
        let line = cells.join("  ");
        text += &if index == 0 { style.paint("1", &line) } else { line };
        text.push('\n');
    }
    text
}
