// SPDX-License-Identifier: MIT OR Apache-2.0
//! Figures of a cell. Pure.

use super::cell::{Cell, Period};

const PAGE_BYTES: u64 = 4096;

/// Of a phase, so many periods at its end are taken for converged.
const LAST: usize = 10;

/// Found: so much of the hot block lies in DRAM.
const FOUND: f64 = 0.9;

/// How soon something was reached, from the contestant's start or the jump on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reached {
    /// Periods until then, that one included.
    pub periods: usize,
    /// Rounds of ept-virt until then.
    pub rounds: Option<u64>,
}

/// What is asked of a cell.
impl Cell {
    /// Periods of the last phase: that of the goals.
    pub fn last_phase(&self) -> &[Period] {
        let last = self.periods.last().map_or(0, |period| period.phase);
        let start = self.periods.iter().position(|period| period.phase == last).unwrap_or(0);
        self.periods.get(start..).unwrap_or_default()
    }

    fn converged_periods(&self) -> &[Period] {
        let phase = self.last_phase();
        // The first of a phase holds accesses of the one before.
        phase.get(phase.len().saturating_sub(LAST).max(1)..).unwrap_or_default()
    }

    /// Share of all accesses at the end, by what is counted.
    fn share(&self, what: impl Fn(&Period) -> f64) -> f64 {
        let periods = self.converged_periods();
        let all: f64 = periods.iter().map(|period| period.accesses as f64).sum();
        periods.iter().map(what).sum::<f64>() / all.max(1.0)
    }

    /// Share of accesses that DRAM served at the end.
    pub fn converged(&self) -> f64 {
        self.share(|period| period.dram)
    }

    /// The same of the best pages for the phase.
    pub fn best(&self) -> f64 {
        self.share(|period| period.best)
    }

    /// The same of the best pages for each period.
    pub fn best_now(&self) -> f64 {
        self.share(|period| period.best_now)
    }

    /// When, in the last phase, DRAM first served such a part of what it would with
    /// the best pages for the phase.
    pub fn reached(&self, part: f64) -> Option<Reached> {
        self.first(|period| period.accesses > 0 && period.dram >= part * period.best)
    }

    /// When the hot block was found.
    pub fn found(&self) -> Option<Reached> {
        self.first(|period| period.block_found.is_some_and(|share| share >= FOUND))
    }

    fn first(&self, good: impl Fn(&Period) -> bool) -> Option<Reached> {
        let phase = self.last_phase();
        let at = phase.iter().position(good)?;
        let before = self.periods.len() - phase.len();
        let rounds_before = match before {
            0 => Some(0),
            _ => self.periods[before - 1].round,
        };
        let rounds = phase[at].round.zip(rounds_before).map(|(now, then)| now.saturating_sub(then));
        Some(Reached { periods: at + 1, rounds })
    }

    /// Bytes that the kernel migrated in all periods.
    pub fn moved_bytes(&self) -> u64 {
        self.periods.iter().map(|period| period.migrated_pages).sum::<u64>() * PAGE_BYTES
    }

    /// The same in a minute, at the end.
    pub fn moved_at_end(&self) -> f64 {
        self.per_minute(|period| period.migrated_pages)
    }

    /// Bytes that who always keeps the best pages for each period has to move in a
    /// minute at the end: as many pages come as go.
    pub fn best_now_moves(&self) -> f64 {
        self.per_minute(|period| 2 * period.best_now_changed)
    }

    fn per_minute(&self, pages: impl Fn(&Period) -> u64) -> f64 {
        let periods = self.converged_periods();
        let bytes = periods.iter().map(pages).sum::<u64>() * PAGE_BYTES;
        bytes as f64 / (periods.len() as f64 * self.period_ms as f64 / 60_000.0).max(1e-9)
    }

    /// Seconds from before the contestant's start to the end.
    pub fn seconds(&self) -> f64 {
        self.periods.last().map_or(0.0, |period| period.end_ms as f64 / 1e3)
    }

    /// Accesses in a second, over all periods.
    pub fn accesses_per_second(&self) -> f64 {
        self.periods.iter().map(|period| period.accesses as f64).sum::<f64>() / self.seconds().max(1e-9)
    }

    /// Share of the emulated CPU that the contestant's own threads took.
    pub fn own_cpu(&self) -> f64 {
        let own = self.cpu_ms.iter().filter(|(name, _)| !["guest", QEMU].contains(&name.as_str()));
        own.map(|(_, ms)| ms).sum::<f64>() / 1e3 / self.seconds().max(1e-9)
    }

    /// Share of it that QEMU's threads spent in the kernel: faults, and what some
    /// contestants have the guest's own thread do.
    pub fn qemu_cpu(&self) -> f64 {
        self.cpu_ms.get(QEMU).copied().unwrap_or(0.0) / 1e3 / self.seconds().max(1e-9)
    }

    /// The most DRAM that the guest had, in bytes.
    pub fn dram_bytes(&self) -> u64 {
        self.periods.iter().map(|period| period.guest_dram_pages).max().unwrap_or(0) * PAGE_BYTES
    }

    /// The same at the end.
    pub fn dram_bytes_at_end(&self) -> u64 {
        self.periods.last().map_or(0, |period| period.guest_dram_pages) * PAGE_BYTES
    }

    /// Whether NUMA balancing looked at any page, of any process.
    pub fn was_scanned(&self) -> bool {
        let count = |name| self.counters.get(name).copied().unwrap_or(0);
        count("numa_pte_updates") + count("numa_huge_pte_updates") > 0
    }
}

/// The agent's name for time of QEMU in the kernel.
const QEMU: &str = "QEMU in the kernel";

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A cell of twenty periods in two phases: half of what is best in the first; in
    /// the second nothing at first and 96 % from its fourth period on.
    pub fn cell(workload: &str, contestant: &str) -> Cell {
        let period = |number: u64| {
            let phase = number / 10;
            let dram = match number {
                0..10 => 40.0,
                10..13 => 0.0,
                _ => 76.8,
            };
            Period {
                end_ms: 1000 * (number + 1),
                phase,
                accesses: 100,
                dram,
                best: 80.0,
                best_now: 90.0,
                best_now_changed: 3,
                migrated_pages: if number < 13 { 100 } else { 1 },
                guest_dram_pages: 256,
                block_found: Some(if number < 12 { 0.5 } else { 1.0 }),
                round: Some(number + 5),
                ..Period::default()
            }
        };
        Cell {
            workload: workload.into(),
            memory: "memfd".into(),
            contestant: contestant.into(),
            guest_pages: 1000,
            period_ms: 1000,
            periods: (0..20).map(period).collect(),
            cpu_ms: [("guest", 9000.0), (QEMU, 1000.0), ("ept-virt", 500.0), ("kswapd", 500.0)]
                .map(|(name, ms)| (name.to_owned(), ms))
                .into(),
            ..Cell::default()
        }
    }

    #[test]
    fn the_end_is_judged_by_the_last_phase() {
        let cell = cell("phase", "ept-virt");
        assert_eq!(cell.last_phase().len(), 10);
        // The last phase but its first period: 7 of 9 periods serve 76.8 %.
        assert!((cell.converged() - 76.8 * 7.0 / 9.0 / 100.0).abs() < 1e-9);
        assert!((cell.best() - 0.8).abs() < 1e-9 && (cell.best_now() - 0.9).abs() < 1e-9);
    }

    #[test]
    fn rounds_are_counted_from_the_jump() {
        let cell = cell("phase", "ept-virt");
        assert_eq!(cell.reached(0.95), Some(Reached { periods: 4, rounds: Some(4) }));
        assert_eq!(cell.reached(0.98), None);
        assert_eq!(cell.found(), Some(Reached { periods: 3, rounds: Some(3) }));
    }

    #[test]
    fn rounds_are_counted_from_the_start() {
        let mut cell = cell("static", "ept-virt");
        cell.periods.truncate(10);
        assert_eq!(cell.reached(0.5), Some(Reached { periods: 1, rounds: Some(5) }));
        cell.periods.iter_mut().for_each(|period| period.round = None);
        assert_eq!(cell.reached(0.5), Some(Reached { periods: 1, rounds: None }));
    }

    #[test]
    fn moves_and_time_are_per_minute_and_second() {
        let cell = cell("phase", "ept-virt");
        assert_eq!(cell.moved_bytes(), (13 * 100 + 7) * PAGE_BYTES);
        let at_end = (2 * 100 + 7) as f64 * 4096.0 / 9.0 * 60.0;
        assert!((cell.moved_at_end() - at_end).abs() < 1.0);
        assert!((cell.best_now_moves() - 6.0 * 4096.0 * 60.0).abs() < 1.0);
        assert!((cell.own_cpu() - 0.05).abs() < 1e-9 && (cell.qemu_cpu() - 0.05).abs() < 1e-9);
        assert_eq!(cell.dram_bytes(), 1 << 20);
    }

    #[test]
    fn nothing_is_made_of_nothing() {
        let cell = Cell::default();
        assert_eq!((cell.converged(), cell.reached(0.0), cell.moved_bytes()), (0.0, None, 0));
        assert_eq!((cell.moved_at_end(), cell.own_cpu()), (0.0, 0.0));
    }
}
