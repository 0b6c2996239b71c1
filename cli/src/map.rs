// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ept-virt map`: temperature and tier of all memory of a domain, as a list of
//! runs and as a picture.

use ept_virt_core::units::{Bytes, PAGE_BYTES};
use ept_virt_core::wire::{Class, MapRun, MemoryMap, Place, StripCell};

use crate::strip;
use crate::style::{Style, harmless};

/// Width of an address in front of a row of the picture.
const ADDRESS: usize = 14;

/// Rows of the picture at most.
const ROWS: usize = 16;

/// A mark of the picture stands for this much at least.
const SMALLEST_MARK_PAGES: u64 = 64;

/// The runs, the sums and the picture.
pub fn render(map: &MemoryMap, style: &Style) -> String {
    let mut text = style.paint("1", &format!("{}, round {}", harmless(&map.name), map.round)) + "\n";
    if map.runs.is_empty() {
        return text + "no memory is known yet\n";
    }
    text += &format!(
        "{:>ADDRESS$}  {:>ADDRESS$}  {:>10}  {:<4}  {}\n",
        "guest address", "QEMU address", "size", "heat", "tier"
    );
    for run in &map.runs {
        text += &format!(
            "{:>#ADDRESS$x}  {:>#ADDRESS$x}  {:>10}  {:<4}  {}\n",
            run.gfn.saturating_mul(PAGE_BYTES),
            run.hva,
            size(run),
            class_word(run.class),
            place_word(run.place)
        );
    }
    text += &picture(&map.runs, style);
    text
}

fn picture(runs: &[MapRun], style: &Style) -> String {
    let total: u64 = runs.iter().map(|run| run.pages).sum();
    let columns = style.width.saturating_sub(ADDRESS + 2).max(1);
    let marks = total.div_ceil(SMALLEST_MARK_PAGES).clamp(1, (columns * ROWS) as u64) as usize;
    let (cells, starts) = cells(runs, total, marks);
    let mut text = String::from("\n");
    for (cells, starts) in cells.chunks(columns).zip(starts.chunks(columns)) {
        let (heat, tier) = strip::rows(cells, style);
        let start = starts.first().copied().unwrap_or(0).saturating_mul(PAGE_BYTES);
        for line in [format!("{start:>#ADDRESS$x}  {heat}"), format!("{:ADDRESS$}  {tier}", "")] {
            text += line.trim_end();
            text.push('\n');
        }
    }
    let each = Bytes::of_pages(total / cells.len().max(1) as u64);
    text + &format!("each mark {each}; {}\n", strip::legend(style))
}

/// Equal parts of the memory, and the first GFN of each. A part is as hot as
/// the classes in it say: hot counts whole, warm a third.
fn cells(runs: &[MapRun], total: u64, count: usize) -> (Vec<StripCell>, Vec<u64>) {
    let mut cells = Vec::with_capacity(count);
    let mut starts = Vec::with_capacity(count);
    let mut rest = runs.iter().copied();
    let mut run = rest.next();
    for index in 0..count as u128 {
        let boundary = |index: u128| (index * u128::from(total) / count as u128) as u64;
        let mut wanted = boundary(index + 1) - boundary(index);
        let length = wanted.max(1);
        let (mut heat, mut slow, mut resident) = (0, 0, 0);
        starts.push(run.map_or(0, |run| run.gfn));
        while let Some(open) = run.as_mut().filter(|_| wanted > 0) {
            let taken = wanted.min(open.pages);
            heat += taken * u64::from(class_heat(open.class));
            slow += if open.place == Place::Slow { taken } else { 0 };
            resident += if open.place == Place::Absent { 0 } else { taken };
            wanted -= taken;
            open.gfn += taken;
            open.pages -= taken;
            if open.pages == 0 {
                run = rest.next();
            }
        }
        let share = |part: u64, whole: u64| (part * 255).div_ceil(whole.max(1)).min(255) as u8;
        cells.push(StripCell {
            heat: heat.div_ceil(length).min(255) as u8,
            slow: share(slow, resident),
            resident: share(resident, length),
        });
    }
    (cells, starts)
}

fn size(run: &MapRun) -> String {
    Bytes::of_pages(run.pages).to_string()
}

fn class_heat(class: Class) -> u8 {
    match class {
        Class::Hot => 255,
        Class::Warm => 85,
        Class::Cold => 0,
    }
}

fn class_word(class: Class) -> &'static str {
    match class {
        Class::Hot => "hot",
        Class::Warm => "warm",
        Class::Cold => "cold",
    }
}

fn place_word(place: Place) -> &'static str {
    match place {
        Place::Fast => "DRAM",
        Place::Slow => "NVM",
        Place::Absent => "not resident",
    }
}
