// SPDX-License-Identifier: MIT OR Apache-2.0
//! What a simulation comes to: for people, for spreadsheets, for programs.

use std::collections::BTreeMap;
use std::fmt::Write;

use ept_virt_core::simulate::{self, Basis, Round, Summary};
use ept_virt_core::units::{Bytes, Share};
use serde::Serialize;

use crate::style::{Style, harmless};

use super::Simulated;

/// What the tiers are like, and whether prices are known.
#[derive(Clone, Copy, Debug)]
pub struct Tiers {
    /// Prices are 0 where they are not known.
    pub tiers: simulate::Tiers,
    /// Prices are known.
    pub priced: bool,
}

/// As `--json` prints it.
#[derive(Debug, Serialize)]
pub struct Report {
    /// What was simulated, in words.
    pub guests: String,
    seed: u64,
    /// "counts", "rates" or "bits".
    basis: &'static str,
    memory_bytes: u64,
    /// One for each share of DRAM.
    pub runs: Vec<Run>,
}

/// One run.
#[derive(Debug, Serialize)]
pub struct Run {
    /// As "30%".
    pub dram_share: String,
    /// DRAM that all guests shared; none when each had what its policy grants.
    pub host_dram_bytes: Option<u64>,
    /// The guests at the end.
    pub domains: Vec<Part>,
    /// All of it in numbers.
    pub summary: Total,
    /// Round by round.
    pub rounds: Vec<Entry>,
    #[serde(skip)]
    basis: &'static str,
    #[serde(skip)]
    memory: Bytes,
}

/// A guest's part of the host's DRAM.
#[derive(Debug, Serialize)]
pub struct Part {
    /// Beside the other guests.
    pub weight: u32,
    /// All of its memory.
    pub memory_bytes: u64,
    /// What it is granted.
    pub granted_bytes: u64,
    /// What it has.
    pub fast_bytes: u64,
}

/// A run's summary.
#[derive(Debug, Serialize)]
pub struct Total {
    granted_bytes: u64,
    hit_ratio: Option<f64>,
    oracle_hit_ratio: Option<f64>,
    of_oracle: Option<f64>,
    /// Of the late rounds, as all that begins so.
    pub late_hit_ratio: Option<f64>,
    /// The oracle's.
    pub late_oracle_hit_ratio: Option<f64>,
    late_of_oracle: Option<f64>,
    settled_round: Option<u64>,
    moved_bytes: u64,
    oracle_moved_bytes: u64,
    late_moved_bytes: u64,
    late_oracle_moved_bytes: u64,
    late_moved_per_minute: Option<f64>,
    /// Mean time of an access against DRAM alone.
    pub slowdown: Option<f64>,
    saved: Option<f64>,
}

/// A round.
#[derive(Debug, Serialize)]
pub struct Entry {
    round: u64,
    /// Seconds since the first round began.
    pub end_s: f64,
    interval_s: f64,
    /// By rates where they are known.
    pub hit_ratio: Option<f64>,
    /// The oracle's.
    pub oracle_hit_ratio: Option<f64>,
    of_oracle: Option<f64>,
    counted_hit_ratio: Option<f64>,
    counted_oracle_hit_ratio: Option<f64>,
    /// Both ways together.
    pub moved_bytes: u64,
    demoted_bytes: u64,
    promoted_bytes: u64,
    /// The oracle's.
    pub oracle_moved_bytes: u64,
    fast_bytes: u64,
    granted_bytes: u64,
    accessed_bytes: u64,
    slowdown: Option<f64>,
}

fn bytes(pages: u64) -> u64 {
    Bytes::of_pages(pages).0
}

impl Entry {
    fn new(index: usize, round: &Round, tiers: &Tiers) -> Self {
        let best = round.best_known();
        let counted = &round.served;
        Self {
            round: index as u64 + 1,
            end_s: round.end.as_secs_f64(),
            interval_s: round.interval.as_secs_f64(),
            hit_ratio: best.hit_ratio(),
            oracle_hit_ratio: best.oracle_hit_ratio(),
            of_oracle: best.of_oracle(),
            counted_hit_ratio: counted.hit_ratio(),
            counted_oracle_hit_ratio: counted.oracle_hit_ratio(),
            moved_bytes: bytes(round.moved_pages()),
            demoted_bytes: bytes(round.demoted_pages),
            promoted_bytes: bytes(round.promoted_pages),
            oracle_moved_bytes: bytes(round.oracle_moved_pages),
            fast_bytes: bytes(round.fast_pages),
            granted_bytes: bytes(round.target_pages),
            accessed_bytes: bytes(round.accessed_pages),
            slowdown: best.hit_ratio().map(|ratio| tiers.tiers.slowdown(ratio)),
        }
    }
}

impl Total {
    fn new(summary: &Summary, granted: u64, memory: Bytes, tiers: &Tiers) -> Self {
        let Summary { served, late, .. } = summary;
        let slow = Bytes(memory.0.saturating_sub(bytes(summary.dram_pages)));
        Self {
            granted_bytes: granted,
            hit_ratio: served.hit_ratio(),
            oracle_hit_ratio: served.oracle_hit_ratio(),
            of_oracle: served.of_oracle(),
            late_hit_ratio: late.hit_ratio(),
            late_oracle_hit_ratio: late.oracle_hit_ratio(),
            late_of_oracle: late.of_oracle(),
            settled_round: summary.settled_round,
            moved_bytes: bytes(summary.moved_pages),
            oracle_moved_bytes: bytes(summary.oracle_moved_pages),
            late_moved_bytes: bytes(summary.late_moved_pages),
            late_oracle_moved_bytes: bytes(summary.late_oracle_moved_pages),
            late_moved_per_minute: summary.moved_in_a_minute(memory),
            slowdown: late.hit_ratio().map(|ratio| tiers.tiers.slowdown(ratio)),
            saved: tiers.priced.then(|| tiers.tiers.saved(slow)),
        }
    }
}

impl Run {
    /// Sums up what was simulated.
    pub fn new(share: Share, simulated: Simulated, tiers: Tiers) -> Self {
        let Simulated { rounds, memory, host_dram, parts, .. } = simulated;
        let summary = Summary::of(&rounds);
        let granted = rounds.last().map_or(0, |round| bytes(round.target_pages));
        Self {
            dram_share: share.to_string(),
            host_dram_bytes: host_dram.map(|dram| dram.0),
            domains: parts,
            summary: Total::new(&summary, granted, memory, &tiers),
            basis: match rounds.first().map(|round| round.basis) {
                Some(Basis::Bits) => "bits",
                Some(Basis::Rates) => "rates",
                Some(Basis::Counts) | None => "counts",
            },
            rounds: rounds
                .iter()
                .enumerate()
                .map(|(index, round)| Entry::new(index, round, &tiers))
                .collect(),
            memory,
        }
    }
}

impl Report {
    /// All runs of the same guests.
    pub fn new(guests: String, seed: u64, runs: Vec<Run>) -> Self {
        let (basis, memory) = runs.first().map_or(("counts", Bytes(0)), |run| (run.basis, run.memory));
        Self { guests, seed, basis, memory_bytes: memory.0, runs }
    }

    /// A line for each round of each run, below one with names: those of the JSON.
    pub fn csv(&self) -> String {
        let mut text = String::from(
            "dram_share,round,end_s,interval_s,hit_ratio,oracle_hit_ratio,of_oracle,counted_hit_ratio,counted_oracle_hit_ratio,moved_bytes,demoted_bytes,promoted_bytes,oracle_moved_bytes,fast_bytes,granted_bytes,accessed_bytes,slowdown\n",
        );
        for run in &self.runs {
            for entry in &run.rounds {
                let number = |value: Option<f64>| value.map_or(String::new(), |value| value.to_string());
                let cells = [
                    run.dram_share.clone(),
                    entry.round.to_string(),
                    entry.end_s.to_string(),
                    entry.interval_s.to_string(),
                    number(entry.hit_ratio),
                    number(entry.oracle_hit_ratio),
                    number(entry.of_oracle),
                    number(entry.counted_hit_ratio),
                    number(entry.counted_oracle_hit_ratio),
                    entry.moved_bytes.to_string(),
                    entry.demoted_bytes.to_string(),
                    entry.promoted_bytes.to_string(),
                    entry.oracle_moved_bytes.to_string(),
                    entry.fast_bytes.to_string(),
                    entry.granted_bytes.to_string(),
                    entry.accessed_bytes.to_string(),
                    number(entry.slowdown),
                ];
                text += &cells.join(",");
                text.push('\n');
            }
        }
        text
    }

    /// For people: one run round by round, or all runs, a line each.
    pub fn render(&self, style: &Style) -> String {
        let mut text = format!("{}\n", harmless(&self.guests));
        let what = match self.basis {
            "bits" => "pages accessed, once each, as far as bits tell",
            "rates" => "expected accesses, from each page's rate",
            _ => "expected accesses, from each page's rate; --json and --csv also have those that were drawn",
        };
        let _ = writeln!(text, "hits and the oracle's, in percent of {what}\n");
        match self.runs.as_slice() {
            [run] => {
                text += &table(&run.rows(), style);
                text.push('\n');
                text += &run.render();
            }
            runs => text += &table(&comparison(runs), style),
        }
        text
    }
}

impl Run {
    fn rows(&self) -> Vec<Vec<String>> {
        let head =
            ["Round", "Time", "Hits", "Oracle", "Of it", "Moved", "Oracle's", "DRAM", "Accessed", "Slower"];
        let mut rows = vec![head.map(String::from).to_vec()];
        rows.extend(self.rounds.iter().map(|entry| {
            vec![
                entry.round.to_string(),
                format!("{:.1} s", entry.end_s),
                percent(entry.hit_ratio),
                percent(entry.oracle_hit_ratio),
                percent(entry.of_oracle),
                Bytes(entry.moved_bytes).to_string(),
                Bytes(entry.oracle_moved_bytes).to_string(),
                Bytes(entry.fast_bytes).to_string(),
                Bytes(entry.accessed_bytes).to_string(),
                times(entry.slowdown),
            ]
        }));
        rows
    }

    fn render(&self) -> String {
        let total = &self.summary;
        let mut text = String::new();
        let mut line = |name: &str, value: String| {
            let _ = writeln!(text, "{name:<22}{value}");
        };
        line("DRAM granted", format!("{} of {}", Bytes(total.granted_bytes), self.memory));
        if let Some(dram) = self.host_dram_bytes {
            line("DRAM of the host", Bytes(dram).to_string());
            for (weight, granted, fast) in by_weight(&self.domains) {
                line(
                    &format!("guests of weight {weight}"),
                    format!("{fast} in DRAM at the end, {granted} granted, the mean"),
                );
            }
        }
        line(
            "hits, all rounds",
            format!("{} %, of the oracle's {} %", percent(total.hit_ratio), percent(total.of_oracle)),
        );
        line(
            "hits, second half",
            format!(
                "{} %, of the oracle's {} %",
                percent(total.late_hit_ratio),
                percent(total.late_of_oracle)
            ),
        );
        let settled = total.settled_round.map_or("never".into(), |round| format!("from round {round} on"));
        line("settled at 98 %", settled);
        let moved = |moved, oracle| format!("{}, the oracle {}", Bytes(moved), Bytes(oracle));
        line("moved, all rounds", moved(total.moved_bytes, total.oracle_moved_bytes));
        let late = moved(total.late_moved_bytes, total.late_oracle_moved_bytes);
        let part = total
            .late_moved_per_minute
            .map_or(String::new(), |part| format!(" ({} % of memory in a minute)", percent(Some(part))));
        line("moved, second half", late + &part);
        line("time of an access", format!("{} of DRAM's, second half", times(total.slowdown)));
        if let Some(saved) = total.saved {
            line("saved", format!("{saved:.2} by DRAM that need not be bought"));
        }
        text
    }
}

/// What guests of each weight are granted and have, in the mean.
fn by_weight(parts: &[Part]) -> Vec<(u32, Bytes, Bytes)> {
    let mut sums: BTreeMap<u32, (u64, u64, u64)> = BTreeMap::new();
    for part in parts {
        let (count, granted, fast) = sums.entry(part.weight).or_default();
        (*count, *granted, *fast) = (*count + 1, *granted + part.granted_bytes, *fast + part.fast_bytes);
    }
    let mean = |(weight, (count, granted, fast))| (weight, Bytes(granted / count), Bytes(fast / count));
    sums.into_iter().map(mean).collect()
}

fn comparison(runs: &[Run]) -> Vec<Vec<String>> {
    let head =
        ["DRAM", "Bytes", "Hits", "Oracle", "Of it", "98 % at", "Moved", "Oracle's", "Slower", "Saved"];
    let mut rows = vec![head.map(String::from).to_vec()];
    rows.extend(runs.iter().map(|run| {
        let total = &run.summary;
        vec![
            run.dram_share.clone(),
            Bytes(total.granted_bytes).to_string(),
            percent(total.late_hit_ratio),
            percent(total.late_oracle_hit_ratio),
            percent(total.late_of_oracle),
            total.settled_round.map_or("never".into(), |round| round.to_string()),
            Bytes(total.moved_bytes).to_string(),
            Bytes(total.oracle_moved_bytes).to_string(),
            times(total.slowdown),
            total.saved.map_or("-".into(), |saved| format!("{saved:.2}")),
        ]
    }));
    rows
}

fn percent(part: Option<f64>) -> String {
    part.map_or("-".into(), |part| format!("{:.2}", part * 100.0))
}

fn times(factor: Option<f64>) -> String {
    factor.map_or("-".into(), |factor| format!("{factor:.3}x"))
}

/// Numbers in columns, the first line is their names.
fn table(rows: &[Vec<String>], style: &Style) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for (index, row) in rows.iter().enumerate() {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:>width$}")).collect();
        let line = cells.join("  ");
        text += &if index == 0 { style.paint("1", &line) } else { line };
        text.push('\n');
    }
    text
}
