// SPDX-License-Identifier: MIT OR Apache-2.0
//! A cell of the bench of placement: one contestant on one workload in one kind of
//! memory. The lab's agent measures it and writes a line of JSON, xtask reads that
//! and keeps it; both include this file.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Begins the line with a cell.
pub const MARK: &str = "EPT-CELL ";

/// What was measured. Pages have 4 KiB.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Cell {
    /// static, zipf...
    pub workload: String,
    /// memfd or thp.
    pub memory: String,
    /// first-touch, ept-virt...
    pub contestant: String,
    /// How the contestant was set up, one setting to a line.
    pub settings: Vec<String>,
    /// Pages of the block that is accessed.
    pub block_pages: u64,
    /// All of the guest's memory.
    pub guest_pages: u64,
    /// Pages that are placed together: 1 or 512.
    pub unit_pages: u64,
    /// DRAM that was left for the guest.
    pub budget_pages: u64,
    /// Pages outside of the block, in whole units, that were accessed in two seconds
    /// before the contestant began.
    pub elsewhere_pages: u64,
    /// What the oracle has for the block: the budget less what is hot elsewhere.
    pub oracle_pages: u64,
    /// Units of the best set that were not in DRAM when the contestant began: what
    /// any placement has to bring.
    pub misplaced_pages: u64,
    /// Length of a period.
    pub period_ms: u64,
    /// From the contestant's start on.
    pub periods: Vec<Period>,
    /// Changes of the kernel's counters (/proc/vmstat), from before the contestant
    /// began to the end.
    pub counters: BTreeMap<String, u64>,
    /// Time on the emulated CPU in the same time, in milliseconds: threads by name.
    pub cpu_ms: BTreeMap<String, f64>,
    /// VM exits in the same time.
    pub exits: u64,
    /// Bytes that ept-virt says it moved, in both directions.
    pub own_moved_bytes: Option<u64>,
    /// Of pages that both were asked for, those where move_pages(2) and the page
    /// tables told the same node.
    pub places_agree: u64,
    /// How many were asked for.
    pub places_asked: u64,
}

/// A period.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Period {
    /// When it ended, from before the contestant was started.
    pub end_ms: u64,
    /// The workload's phase at its end.
    pub phase: u64,
    /// Accesses to the block, by the guest's count.
    pub accesses: u64,
    /// Of these, to pages that lay in DRAM: the mean of before and after.
    pub dram: f64,
    /// Of these, to the best set for the whole phase.
    pub best: f64,
    /// Of these, to the best set for this very period, which nobody could know.
    pub best_now: f64,
    /// Pages that entered that set since the period before.
    pub best_now_changed: u64,
    /// Pages of the guest in DRAM at its end.
    pub guest_dram_pages: u64,
    /// Pages of the guest that lie on another node than at the end of the period
    /// before.
    pub changed_pages: u64,
    /// Pages that the kernel migrated, whosever (pgmigrate_success).
    pub migrated_pages: u64,
    /// Of the pages that become hot in `hot-block`, the share in DRAM.
    pub block_found: Option<f64>,
    /// ept-virt's rounds so far.
    pub round: Option<u64>,
    /// For how long its last round was watched.
    #[serde(default)]
    pub watched_us: Option<u64>,
    /// What was accessed meanwhile.
    #[serde(default)]
    pub young_bytes: Option<u64>,
}
