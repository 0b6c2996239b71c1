// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ept-virt samples`: single accesses of a domain, as they happen.

use std::io::{self, Write};
use std::time::{Duration, Instant};

use clap::Args;
use ept_virt_core::sampler::{Level, MemSlot, Sampler};
use ept_virt_core::samples::{Access, AccessSet, Sample, Sampling};
use ept_virt_core::units::PAGE_BYTES;
use serde::Serialize;

use crate::attach::{Attached, attach_named};
use crate::complete;
use crate::failure::Failure;
use crate::output::{json_line, write_or_end};

/// Between two looks at the domain's memory slots, which addresses come from.
const SLOTS_AGE: Duration = Duration::from_secs(1);

/// What to sample.
#[derive(Clone, Debug, Args)]
pub struct SamplesArgs {
    /// Name, id or UUID.
    #[arg(add = complete::running())]
    domain: String,
    /// Kinds of access: some of the letters r (read), w (write), x (execute).
    #[arg(long, value_name = "RWX", default_value = "rwx", value_parser = access)]
    access: AccessSet,
    /// Samples in a second; the guest pays a page fault for each.
    #[arg(long, value_name = "HZ", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=50_000))]
    rate: u32,
    /// End after so many samples.
    #[arg(long, value_name = "N")]
    count: Option<u64>,
    /// One JSON object for each sample and line.
    #[arg(long)]
    json: bool,
}

fn access(text: &str) -> Result<AccessSet, String> {
    AccessSet::from_letters(text).ok_or_else(|| "give some of the letters r, w and x".into())
}

/// A sample, as `--json` prints it.
#[derive(Debug, Serialize)]
pub struct Entry {
    /// Seconds since the first sample.
    seconds: f64,
    vcpu: u32,
    /// Guest physical address of the page.
    gpa: u64,
    /// The page's address in the QEMU process; null when its slot went away.
    hva: Option<u64>,
    /// "read", "write" or "execute".
    access: &'static str,
    /// Bytes that one entry of the page tables maps; null when not known.
    mapping_bytes: Option<u64>,
    /// The CPU did it by itself, walking the guest's page tables.
    page_walk: bool,
}

/// Prints samples until there were enough, the domain ends, or the reader goes.
pub fn run(args: &SamplesArgs, uri: &str) -> Result<(), Failure> {
    let refused = |error: ept_virt_core::sampler::SamplerError| Failure::refused(error.to_string());
    let Attached { process, sampler } = attach_named(uri, &args.domain)?;
    // A second session: the one that samples is busy.
    let Attached { sampler: mut slots, .. } = attach_named(uri, &args.domain)?;
    let mut sampling = Sampling::start(sampler, args.access, args.rate, 0).map_err(refused)?;
    let mut printer = Printer { json: args.json, first: None, left: args.count.unwrap_or(u64::MAX) };
    let mut known = (Instant::now(), slots.memslots().map_err(refused)?.1);
    let mut samples = Vec::new();
    printer.head()?;
    while printer.left > 0 && process.is_alive() {
        samples.clear();
        if !sampling.read(&mut samples, Duration::from_millis(200)).map_err(refused)? {
            break;
        }
        if known.0.elapsed() > SLOTS_AGE {
            known = (Instant::now(), slots.memslots().map_err(refused)?.1);
        }
        if !printer.print(&samples, &known.1)? {
            break;
        }
    }
    let stats = sampling.stats().map_err(refused)?;
    // For people who read along; the samples themselves may go into a pipe.
    let _ = writeln!(
        io::stderr(),
        "{} samples, {} lost because they were not read in time, {} other accesses faulted as well",
        stats.samples,
        stats.dropped,
        stats.unwanted
    );
    Ok(())
}

struct Printer {
    json: bool,
    first: Option<Duration>,
    left: u64,
}

impl Printer {
    fn head(&self) -> Result<bool, Failure> {
        let head = format!("{:>10}  {:>4}  {:>18}  {:>18}  ACCESS   MAPPING\n", "TIME", "VCPU", "GPA", "HVA");
        if self.json { Ok(true) } else { write_or_end(&head) }
    }

    /// Whether the reader is still there.
    fn print(&mut self, samples: &[Sample], slots: &[MemSlot]) -> Result<bool, Failure> {
        let mut text = String::new();
        for sample in samples.iter().take(usize::try_from(self.left).unwrap_or(usize::MAX)) {
            self.left -= 1;
            let first = *self.first.get_or_insert(sample.time);
            let entry = entry(sample, first, slots);
            text += &match self.json {
                true => json_line(&entry)?,
                false => line(&entry) + "\n",
            };
        }
        write_or_end(&text)
    }
}

/// The sample, with what the slots tell about its address.
pub fn entry(sample: &Sample, first: Duration, slots: &[MemSlot]) -> Entry {
    let slot = slots.iter().find(|slot| slot.frames().contains(&sample.gfn));
    Entry {
        seconds: sample.time.saturating_sub(first).as_secs_f64(),
        vcpu: sample.vcpu,
        gpa: sample.gfn * PAGE_BYTES,
        hva: slot.map(|slot| slot.hva + (sample.gfn - slot.gfn_start) * PAGE_BYTES),
        access: match sample.access {
            Access::Read => "read",
            Access::Write => "write",
            Access::Exec => "execute",
        },
        mapping_bytes: match sample.level {
            Level::None => None,
            Level::Page4K => Some(PAGE_BYTES),
            Level::Huge2M => Some(2 << 20),
            Level::Huge1G => Some(1 << 30),
        },
        page_walk: sample.page_walk,
    }
}

fn line(entry: &Entry) -> String {
    let hva = entry.hva.map_or_else(|| "-".into(), |hva| format!("{hva:#x}"));
    let mapping = match entry.mapping_bytes {
        Some(PAGE_BYTES) => "4 KiB",
        Some(bytes) if bytes == 2 << 20 => "2 MiB",
        Some(_) => "1 GiB",
        None => "-",
    };
    let walk = if entry.page_walk { "  page walk" } else { "" };
    let Entry { seconds, vcpu, gpa, access, .. } = entry;
    format!("{seconds:>10.6}  {vcpu:>4}  {gpa:>#18x}  {hva:>18}  {access:<7}  {mapping}{walk}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_has_both_addresses() {
        let slot = MemSlot {
            gfn_start: 0x100,
            page_count: 2,
            hva: 0x7f00_0000_0000,
            id: 0,
            read_only: false,
            dirty_log: false,
        };
        let sample = |gfn| Sample {
            gfn,
            time: Duration::from_micros(2_500_001),
            vcpu: 1,
            access: Access::Write,
            level: Level::Huge2M,
            page_walk: true,
        };
        let line = |gfn| line(&entry(&sample(gfn), Duration::from_secs(1), &[slot]));
        assert_eq!(
            line(0x101),
            "  1.500001     1            0x101000      0x7f0000001000  write    2 MiB  page walk"
        );
        assert!(line(0x102).contains("            0x102000                   -  write"));
    }

    #[test]
    fn accesses_are_letters() {
        assert_eq!(access("wx").unwrap().to_string(), "wx");
        for wrong in ["", "rr", "rwz", "RW"] {
            assert!(access(wrong).is_err(), "{wrong}");
        }
    }
}
