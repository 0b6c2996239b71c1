// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the cells say, for people: tables, goals, pictures.

use std::path::Path;

use anyhow::Result;

use super::cell::Cell;
use super::figures::Reached;
use super::{goals, plot};

const PRODUCT: &str = "ept-virt";

/// Prints all, and draws a picture for each workload in each kind of memory into
/// `folder`.
pub fn show(folder: &Path, cells: &[Cell]) -> Result<()> {
    if cells.is_empty() {
        println!("Nothing was measured yet.");
        return Ok(());
    }
    settings(cells);
    let mut rest = cells;
    while let Some(first) = rest.first() {
        let same = |cell: &Cell| cell.workload == first.workload && cell.memory == first.memory;
        let count = rest.iter().take_while(|cell| same(cell)).count();
        let (group, others) = rest.split_at(count);
        rest = others;
        show_group(folder, group)?;
    }
    println!("\nAll on one emulated CPU: shares and counts are true, times only beside each other.");
    println!("Every figure of every period: {}/*.json", folder.display());
    Ok(())
}

/// How each contestant was set up, once.
fn settings(cells: &[Cell]) {
    let mut shown: Vec<&str> = Vec::new();
    for cell in cells {
        if !shown.contains(&cell.contestant.as_str()) && !cell.settings.is_empty() {
            println!("\n{} ({} in {}):", cell.contestant, cell.workload, cell.memory);
            cell.settings.iter().for_each(|line| println!("  {line}"));
            shown.push(&cell.contestant);
        }
    }
}

fn show_group(folder: &Path, cells: &[Cell]) -> Result<()> {
    let Some(first) = cells.first() else { return Ok(()) };
    let part = goals::part(&first.workload);
    let title = format!("{} in {}", first.workload, first.memory);
    println!(
        "\n{title}: block {} MiB, units of {} KiB, DRAM for the guest {} MiB; hot elsewhere {} MiB\n",
        mib_of(first.block_pages),
        first.unit_pages * 4,
        mib_of(first.budget_pages),
        mib_of(first.elsewhere_pages)
    );
    println!(
        "{:<15} {:>7} {:>9} {:>14} {:>9} {:>10} {:>7} {:>7} {:>8} {:>9} {:>9}",
        "",
        "DRAM %",
        "of best %",
        "periods (rnds)",
        "moved MiB",
        "at end/min",
        "CPU %",
        "QEMU %",
        "exits/s",
        "DRAM MiB",
        "access/s"
    );
    for cell in cells {
        println!(
            "{:<15} {:>7.1} {:>9.1} {:>14} {:>9} {:>10.1} {:>7.1} {:>7.1} {:>8.0} {:>9} {:>9.0}",
            cell.contestant,
            cell.converged() * 100.0,
            cell.converged() / cell.best().max(1e-9) * 100.0,
            when(cell.reached(part)),
            cell.moved_bytes() >> 20,
            cell.moved_at_end() / f64::from(1 << 20),
            cell.own_cpu() * 100.0,
            cell.qemu_cpu() * 100.0,
            cell.exits as f64 / cell.seconds().max(1e-9),
            format!("{}-{}", cell.dram_bytes_at_end() >> 20, cell.dram_bytes() >> 20),
            cell.accesses_per_second()
        );
    }
    let longest = cells.iter().max_by_key(|cell| cell.periods.len()).unwrap_or(first);
    println!(
        "{:<15} {:>7.1} {:>9} {:>14} {:>9}",
        "oracle, phase",
        longest.best() * 100.0,
        100,
        "",
        mib_of(2 * longest.misplaced_pages)
    );
    println!(
        "{:<15} {:>7.1} {:>9.1} {:>14} {:>9} {:>10.1}",
        "oracle, period",
        longest.best_now() * 100.0,
        longest.best_now() / longest.best().max(1e-9) * 100.0,
        "",
        "",
        longest.best_now_moves() / f64::from(1 << 20)
    );
    if first.workload == "hot-block" {
        for cell in cells {
            println!("{:<15} found the block after {}", cell.contestant, when(cell.found()));
        }
    }
    if let Some(cell) = cells.iter().find(|cell| cell.contestant == "numa-balancing" && !cell.was_scanned()) {
        println!(
            "{:<15} scanned no page: Linux leaves out shared memory that has no NUMA policy of its own \
             (mm/mempolicy.c, vma_policy_mof)",
            cell.contestant
        );
    }
    judge(cells);
    let path = folder.join(format!("{}-{}.svg", first.workload, first.memory));
    plot::draw(&path, &title, &cells.iter().collect::<Vec<&Cell>>())?;
    println!("  picture: {}", path.display());
    Ok(())
}

fn judge(cells: &[Cell]) {
    let Some(own) = cells.iter().find(|cell| cell.contestant == PRODUCT) else { return };
    let peers: Vec<&Cell> = cells.iter().filter(|cell| cell.contestant != PRODUCT).collect();
    println!();
    for goal in goals::judge(own, &peers) {
        let verdict = if goal.held { "held  " } else { "MISSED" };
        println!("  {verdict} {}: {}", goal.asked, goal.seen);
    }
}

fn when(reached: Option<Reached>) -> String {
    match reached {
        None => "never".into(),
        Some(Reached { periods, rounds: Some(rounds) }) => format!("{periods} ({rounds})"),
        Some(Reached { periods, rounds: None }) => periods.to_string(),
    }
}

fn mib_of(pages: u64) -> String {
    format!("{:.1}", pages as f64 / 256.0)
}
