// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which memory of a process is of hugetlbfs.

use std::fs;
use std::ops::Range;
use std::time::{Duration, Instant};

use log::warn;
use nix::sys::statfs::{HUGETLBFS_MAGIC, statfs};

/// Between two looks. QEMU maps memory seldom.
const SHORTEST_PAUSE: Duration = Duration::from_secs(1);

/// The mappings of a process, as far as they were needed.
pub(super) struct Mappings {
    pid: i32,
    /// In order, with the size of their pages where that is hugetlbfs.
    known: Vec<(Range<u64>, Option<u64>)>,
    read_at: Option<Instant>,
}

impl Mappings {
    pub(super) fn new(pid: i32) -> Self {
        Self { pid, known: Vec::new(), read_at: None }
    }

    /// Forgets what may have changed: memory that is unplugged leaves its addresses to
    /// what is plugged in next.
    pub(super) fn renew(&mut self) {
        if self.is_old() {
            self.known.clear();
        }
    }

    fn is_old(&self) -> bool {
        self.read_at.is_none_or(|at| at.elapsed() >= SHORTEST_PAUSE)
    }

    /// Size of the pages of hugetlbfs at `address`; `None` for memory of any other kind,
    /// and where that can not be told.
    pub(super) fn hugetlb_page(&mut self, address: u64) -> Option<u64> {
        if let Some((_, page)) = self.find(address) {
            return *page;
        }
        if self.is_old() {
            self.read_at = Some(Instant::now());
            self.read();
        }
        self.find(address).and_then(|(_, page)| *page)
    }

    fn find(&self, address: u64) -> Option<&(Range<u64>, Option<u64>)> {
        let after = self.known.partition_point(|(range, _)| range.start <= address);
        self.known.get(after.checked_sub(1)?).filter(|(range, _)| range.contains(&address))
    }

    fn read(&mut self) {
        let path = format!("/proc/{}/maps", self.pid);
        match fs::read_to_string(&path) {
            Ok(text) => {
                let mappings = text.lines().filter_map(mapping);
                self.known = mappings
                    .map(|(range, has_file)| {
                        let page = if has_file { self.page_of_file(&range) } else { None };
                        (range, page)
                    })
                    .collect();
            }
            // Then it is gone, which others find out, or moves fail and tell why.
            Err(error) => warn!("cannot tell which memory is of hugetlbfs: {path}: {error}"),
        }
    }

    /// The name of a file tells nothing, and a memfd has none; its file system has one
    /// page size.
    fn page_of_file(&self, range: &Range<u64>) -> Option<u64> {
        let Range { start, end } = range;
        let found = statfs(format!("/proc/{}/map_files/{start:x}-{end:x}", self.pid).as_str()).ok()?;
        let is_hugetlbfs = found.filesystem_type() == HUGETLBFS_MAGIC;
        is_hugetlbfs.then(|| u64::try_from(found.block_size()).ok()).flatten()
    }
}

/// Range and whether there is a file, of a line of /proc/PID/maps (proc_pid_maps(5)).
fn mapping(line: &str) -> Option<(Range<u64>, bool)> {
    // "7f0000000000-7f0040000000 rw-s 00000000 00:0f 12345   /dev/hugepages/x"
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let inode = words.nth(3)?;
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some((number(start)?..number(end)?, inode != "0"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read() {
        let line = "7f0000000000-7f0040000000 rw-s 00000000 00:0f 12345   /dev/hugepages/x (deleted)";
        assert_eq!(mapping(line), Some((0x7f00_0000_0000..0x7f00_4000_0000, true)));
        assert_eq!(mapping("1000-2000 rw-p 00000000 00:00 0 "), Some((0x1000..0x2000, false)));
        for broken in ["", "1000", "1000-2000", "1000-2000 rw-p 0 0", "x-y rw-p 0 0 0"] {
            assert_eq!(mapping(broken), None, "{broken}");
        }
    }

    #[test]
    fn what_was_at_an_address_before_is_forgotten() {
        let here = Box::new(7_u8);
        let address = std::ptr::from_ref(here.as_ref()) as u64;
        let earlier = (address..address + 1, Some(1 << 30));
        let mut mappings = Mappings::new(std::process::id() as i32);
        (mappings.known, mappings.read_at) = (vec![earlier], Some(Instant::now()));
        mappings.renew();
        assert_eq!(mappings.hugetlb_page(address), Some(1 << 30), "not read again in the same second");
        mappings.read_at = Instant::now().checked_sub(SHORTEST_PAUSE);
        mappings.renew();
        assert_eq!(mappings.hugetlb_page(address), None);
    }

    #[test]
    fn own_memory_is_found_and_is_not_of_hugetlbfs() {
        let mut mappings = Mappings::new(std::process::id() as i32);
        let here = Box::new(7_u8);
        let address = std::ptr::from_ref(here.as_ref()) as u64;
        assert_eq!(mappings.hugetlb_page(address), None);
        assert!(mappings.find(address).is_some());
        assert!(mappings.find(0).is_none());
        assert_eq!(mappings.hugetlb_page(0), None);
    }
}
