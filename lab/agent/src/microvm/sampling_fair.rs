// SPDX-License-Identifier: MIT OR Apache-2.0
//! Whether each mapped page has the same chance to be sampled: in several slots,
//! dense and sparse, and in mappings of 2 MiB.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, ensure};
use ept_virt_core::samples::{AccessSet, Sample, Sampling};

use super::Outcome;
use super::machine::{CODE_GFN, Machine, Memory, PAGE, Pages};
use super::sampling_rate::collect;
use super::spin::{Crew, tour_program};

const HUGE: usize = 2 << 20;
/// A quarter of the first slot.
const SOME: Pages = Pages { base: 0x20_0000, stride: 0x1000, count: 256 };
/// All of the second.
const DENSE: Pages = Pages { base: 0x400_0000, stride: 0x1000, count: 512 };
/// One in 64 of the third.
const SPARSE: Pages = Pages { base: 0x800_0000, stride: 0x4_0000, count: 200 };
/// A page in each huge one of the fourth.
const TWO_HUGE: Pages = Pages { base: 0x1000_3000, stride: HUGE as u32, count: 2 };
const SMALL_SLOTS: [(Pages, u64); 2] = [(DENSE, 512), (SPARSE, 200 * 64)];

pub fn each_page_alike() -> Result<Outcome> {
    // Dropped after the machine, which maps them.
    let mut slots = Vec::new();
    let mut crew = Crew::new(Machine::new(Memory::small_pages(1024)?)?, 1)?;
    for (slot, (pages, count)) in (1..).zip(SMALL_SLOTS) {
        let memory = Memory::small_pages(count)?;
        crew.machine.set_slot(slot, u64::from(pages.base), &memory, memory.bytes())?;
        slots.push(memory);
    }
    let (pages, small) = by_page(&mut crew)?;

    let memory = Memory::map(2 * HUGE, HUGE, 0)?;
    memory.advise(0, memory.bytes(), libc::MADV_HUGEPAGE)?;
    memory.populate();
    crew.machine.set_slot(3, u64::from(TWO_HUGE.base) & !(HUGE as u64 - 1), &memory, memory.bytes())?;
    slots.push(memory);
    let huge = by_mapping(&mut crew)?;
    Ok(Outcome::Pass(format!("{pages} pages of three slots: {small}; with two mappings of 2 MiB: {huge}")))
}

/// Runs the guest over `tour` and returns the samples of `how_long`.
fn sample(crew: &mut Crew, tour: &[Pages], freq_hz: u32, how_long: Duration) -> Result<Vec<Sample>> {
    crew.load(0, &tour_program(tour))?;
    let session = crew.machine.observe()?;
    crew.while_spinning(|_| {
        // All pages are mapped by now.
        std::thread::sleep(Duration::from_millis(200));
        let mut sampling = Sampling::start(session, AccessSet::ALL, freq_hz, 0)?;
        let mut samples = Vec::new();
        collect(&mut sampling, how_long, &mut samples)?;
        ensure!(sampling.stats()?.dropped == 0, "{:?}", sampling.stats()?);
        Ok(samples)
    })
}

/// Each page of 4 KiB by itself.
fn by_page(crew: &mut Crew) -> Result<(usize, String)> {
    let tour = [SOME, DENSE, SPARSE];
    let mut counts: BTreeMap<u64, (u64, f64)> = BTreeMap::from([(CODE_GFN, (0, 1.0))]);
    counts.extend(tour.iter().flat_map(|pages| pages.gfns()).map(|gfn| (gfn, (0, 1.0))));
    for sample in sample(crew, &tour, 2000, Duration::from_secs(5))? {
        let count = counts.get_mut(&sample.gfn);
        let Some((count, _)) = count else { anyhow::bail!("a page that nobody touched: {sample:?}") };
        *count += 1;
    }
    let pages = counts.len();
    Ok((pages, chi_square(counts.into_values().collect())?))
}

/// Small pages by slot, huge ones by themselves: 512 times the chance each. At a
/// rate at which hardly ever two are armed at once: a mapping can be only once.
fn by_mapping(crew: &mut Crew) -> Result<String> {
    let tour = [SOME, DENSE, SPARSE, TWO_HUGE];
    let group = |gfn: u64| match gfn * PAGE as u64 {
        0..0x400_0000 => 0,
        0x400_0000..0x800_0000 => 1,
        0x800_0000..0x1000_0000 => 2,
        address => 3 + (address - 0x1000_0000) as usize / HUGE,
    };
    let mut counts = [257.0, 512.0, 200.0, 512.0, 512.0].map(|pages| (0, pages));
    for sample in sample(crew, &tour, 50, Duration::from_secs(16))? {
        counts[group(sample.gfn)].0 += 1;
    }
    chi_square(counts.to_vec())
}

/// Fails if counts differ from what their weights let expect by more than once
/// in a million times: Wilson and Hilferty's approximation at 4.75 deviations.
fn chi_square(counts: Vec<(u64, f64)>) -> Result<String> {
    let total: u64 = counts.iter().map(|(count, _)| count).sum();
    let weights: f64 = counts.iter().map(|(_, weight)| weight).sum();
    let sum: f64 = counts
        .iter()
        .map(|(count, weight)| {
            let expected = total as f64 * weight / weights;
            (*count as f64 - expected).powi(2) / expected
        })
        .sum();
    let free = counts.len() as f64 - 1.0;
    let spread = 2.0 / (9.0 * free);
    let most = free * (1.0 - spread + 4.75 * spread.sqrt()).powi(3);
    let text =
        format!("{total} samples, chi-square {sum:.1} with {free} degrees of freedom (at most {most:.1})");
    ensure!(total as f64 >= 5.0 * counts.len() as f64, "too few: {text}");
    ensure!(sum <= most, "not alike: {text}: {:?}", &counts[..counts.len().min(8)]);
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_a_bias_from_chance() {
        let counts = |tenth| (0..100).map(|i| (if i % 10 == 0 { tenth } else { 100 }, 1.0)).collect();
        assert!(chi_square(counts(104)).is_ok());
        // A tenth of the pages drawn half as often again.
        assert!(chi_square(counts(150)).is_err());
        // Huge mappings drawn like single pages.
        assert!(chi_square(vec![(250, 257.0), (250, 512.0)]).is_err());
        assert!(chi_square(vec![(2, 1.0), (2, 1.0)]).is_err(), "too few");
    }
}
