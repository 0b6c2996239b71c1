// SPDX-License-Identifier: MIT OR Apache-2.0
//! `ept-virt memslots`: a domain's memory as KVM knows it.

use ept_virt_core::sampler::MemSlot;
use ept_virt_core::units::{Bytes, PAGE_BYTES};
use serde::Serialize;

use crate::style::Style;

/// A slot, as `--json` prints it.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Entry {
    id: u32,
    /// First guest physical address.
    gpa: u64,
    bytes: u64,
    /// Address in the QEMU process.
    hva: u64,
    read_only: bool,
    dirty_log: bool,
}

/// The slots, by address.
pub fn entries(slots: &[MemSlot]) -> Vec<Entry> {
    let entry = |slot: &MemSlot| Entry {
        id: slot.id,
        gpa: slot.gfn_start * PAGE_BYTES,
        bytes: slot.page_count * PAGE_BYTES,
        hva: slot.hva,
        read_only: slot.read_only,
        dirty_log: slot.dirty_log,
    };
    slots.iter().map(entry).collect()
}

/// A line for each slot.
pub fn render(entries: &[Entry], style: &Style) -> String {
    let head = format!("{:>4}  {:>18}  {:>9}  {:>18}  FLAGS", "SLOT", "GPA", "SIZE", "HVA");
    let mut text = style.paint("1", &head) + "\n";
    for entry in entries {
        let flags = [(entry.read_only, "read-only"), (entry.dirty_log, "dirty-log")];
        let flags: Vec<&str> = flags.into_iter().filter(|(set, _)| *set).map(|(_, word)| word).collect();
        let line = format!(
            "{:>4}  {:>#18x}  {:>9}  {:>#18x}  {}",
            entry.id,
            entry.gpa,
            Bytes(entry.bytes).to_string(),
            entry.hva,
            flags.join(",")
        );
        text += line.trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_lines_with_addresses_in_bytes() {
        let slot = MemSlot {
            gfn_start: 0x100,
            page_count: 512,
            hva: 0x7f00_0000_0000,
            id: 3,
            read_only: true,
            dirty_log: false,
        };
        let text = render(&entries(&[slot]), &Style::PLAIN);
        assert_eq!(
            text,
            "SLOT                 GPA       SIZE                 HVA  FLAGS\n   \
             3            0x100000      2 MiB      0x7f0000000000  read-only\n"
        );
    }
}
