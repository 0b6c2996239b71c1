// SPDX-License-Identifier: MIT OR Apache-2.0
//! The record of a cell, period by period: how often the guest accessed each page, and
//! on which node the page lay.

use std::time::Instant;

use anyhow::Result;
use ept_virt_core::wire::RoundStatus;

use super::cell::{Cell, Period};
use super::guest_memory::{Counts, GuestMemory};
use super::meters;
use super::oracle::Units;
use crate::guest::hot_block;

/// What was seen, period by period.
pub struct Record {
    begun: Instant,
    counts: Counts,
    nodes: Vec<u8>,
    migrated: u64,
    /// Places of the block's pages when the contestant began.
    first_fast: Vec<bool>,
    /// Accesses of each page in each period.
    accesses: Vec<Vec<u32>>,
    periods: Vec<Period>,
}

impl Record {
    /// Begins with where pages lie now.
    pub fn begin(memory: &GuestMemory) -> Result<Self> {
        let nodes = memory.nodes()?;
        let first_fast = memory.block().iter().map(|gfn| nodes[*gfn as usize] == 0).collect();
        Ok(Self {
            begun: Instant::now(),
            counts: memory.counts()?,
            nodes,
            migrated: meters::migrated_pages()?,
            first_fast,
            accesses: Vec::new(),
            periods: Vec::new(),
        })
    }

    /// Takes in a period that ends now; `round` is ept-virt's, if it is at work.
    pub fn take(&mut self, memory: &GuestMemory, round: Option<&RoundStatus>) -> Result<()> {
        let counts = memory.counts()?;
        let nodes = memory.nodes()?;
        let migrated = meters::migrated_pages()?;
        let pages = counts.pages.iter().zip(&self.counts.pages);
        let accesses: Vec<u32> = pages.map(|(now, then)| now.wrapping_sub(*then)).collect();
        let on_fast = |nodes: &[u8], gfn: u64| f64::from(u8::from(nodes[gfn as usize] == 0));
        let served = memory.block().iter().zip(&accesses).map(|(gfn, count)| {
            f64::from(*count) * (on_fast(&nodes, *gfn) + on_fast(&self.nodes, *gfn)) / 2.0
        });
        let (start, length) = hot_block(memory.block_pages() as u64);
        let block = &memory.block()[start as usize..(start + length) as usize];
        let found = block.iter().map(|gfn| on_fast(&nodes, *gfn)).sum::<f64>() / length as f64;
        self.periods.push(Period {
            end_ms: self.begun.elapsed().as_millis() as u64,
            phase: counts.phase,
            accesses: accesses.iter().map(|count| u64::from(*count)).sum(),
            dram: served.sum(),
            guest_dram_pages: nodes.iter().filter(|node| **node == 0).count() as u64,
            changed_pages: nodes.iter().zip(&self.nodes).filter(|(now, then)| now != then).count() as u64,
            migrated_pages: migrated - self.migrated,
            block_found: Some(found),
            round: round.map(|round| round.number),
            watched_us: round.map(|round| round.watched_us),
            young_bytes: round.map(|round| round.accessed_bytes),
            ..Period::default()
        });
        self.accesses.push(accesses);
        (self.counts, self.nodes, self.migrated) = (counts, nodes, migrated);
        Ok(())
    }

    /// Puts the periods into `cell`, with what could have been had.
    pub fn finish(mut self, memory: &GuestMemory, cell: &mut Cell) {
        let units = Units::new(memory.block(), cell.unit_pages);
        let room = (cell.oracle_pages / cell.unit_pages) as usize;
        let mut last: Option<Vec<bool>> = None;
        let mut phase: Option<(u64, Vec<bool>)> = None;
        for number in 0..self.periods.len() {
            let current = self.periods[number].phase;
            if phase.as_ref().is_none_or(|(known, _)| *known != current) {
                let best = units.best(&self.sums(current), room);
                if phase.is_none() {
                    let there = units.mostly(&self.first_fast);
                    cell.misplaced_pages = Units::entered(&there, &best) * cell.unit_pages;
                }
                phase = Some((current, best));
            }
            let accesses = &self.accesses[number];
            let best_now = units.best(accesses, room);
            let period = &mut self.periods[number];
            if let Some((_, best)) = &phase {
                period.best = units.served(accesses, best);
            }
            period.best_now = units.served(accesses, &best_now);
            let entered = last.as_ref().map_or(0, |last| Units::entered(last, &best_now));
            period.best_now_changed = entered * cell.unit_pages;
            if cell.workload != "hot-block" {
                period.block_found = None;
            }
            last = Some(best_now);
        }
        cell.periods = self.periods;
    }

    /// Accesses of each page in all periods of a phase.
    fn sums(&self, phase: u64) -> Vec<u32> {
        let mut sums = vec![0_u32; self.counts.pages.len()];
        for (accesses, _) in
            self.accesses.iter().zip(&self.periods).filter(|(_, period)| period.phase == phase)
        {
            sums.iter_mut().zip(accesses).for_each(|(sum, count)| *sum = sum.saturating_add(*count));
        }
        sums
    }
}
