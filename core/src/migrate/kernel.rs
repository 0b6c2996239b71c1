// SPDX-License-Identifier: MIT OR Apache-2.0
//! The system call.

use std::cell::RefCell;
use std::ffi::c_void;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::ptr;
use std::sync::Arc;

use super::Pages;
use super::mappings::Mappings;
use crate::process::Process;
use crate::topology::{NodeMemory, TopologyError, node_memory};

/// MPOL_MF_MOVE, include/uapi/linux/mempolicy.h: only pages that no other
/// process maps.
const MOVE_OWN: i32 = 1 << 1;

/// The pages of one process.
///
/// move_pages(2) takes a pid. Should the process exit, and its pid be given to
/// another between the look at the pidfd and the call, then pages of that other
/// process are moved at worst, which changes no data.
pub(super) struct LinuxPages {
    process: Arc<Process>,
    sys: PathBuf,
    mappings: RefCell<Mappings>,
}

impl LinuxPages {
    pub(super) fn new(process: Arc<Process>, sys: PathBuf) -> Self {
        let mappings = RefCell::new(Mappings::new(process.pid()));
        Self { process, sys, mappings }
    }

    fn call(&self, addresses: &[u64], nodes: Option<&[i32]>, statuses: &mut [i32]) -> io::Result<u64> {
        if statuses.len() != addresses.len() || nodes.is_some_and(|nodes| nodes.len() != addresses.len()) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let addresses_of_target = addresses.as_ptr().cast::<*const c_void>();
        // SAFETY: the kernel reads `addresses.len()` words from `addresses`
        // (u64 and pointers have one size on the 64-bit hosts that KVM's tables
        // are read on) and as many ints from `nodes` when it is not null, and
        // writes as many ints to `statuses`; the lengths were compared above.
        // The addresses mean memory of the other process; they are not
        // followed in ours.
        let result = unsafe {
            libc::syscall(
                libc::SYS_move_pages,
                self.process.pid(),
                addresses.len(),
                addresses_of_target,
                nodes.map_or(ptr::null(), <[i32]>::as_ptr),
                statuses.as_mut_ptr(),
                MOVE_OWN,
            )
        };
        u64::try_from(result).map_err(|_| io::Error::last_os_error())
    }
}

impl Pages for LinuxPages {
    fn is_alive(&self) -> bool {
        self.process.is_alive()
    }

    fn places(&self, addresses: &[u64], statuses: &mut [i32]) -> io::Result<()> {
        self.call(addresses, None, statuses).map(|_| ())
    }

    fn migrate(&self, addresses: &[u64], node: u32, statuses: &mut [i32]) -> io::Result<u64> {
        let node = i32::try_from(node).map_err(|_| io::ErrorKind::InvalidInput)?;
        self.call(addresses, Some(&vec![node; addresses.len()]), statuses)
    }

    fn node_memory(&self, node: u32) -> Result<NodeMemory, TopologyError> {
        node_memory(&self.sys, node)
    }

    fn renew(&self) {
        self.mappings.borrow_mut().renew();
    }

    fn hugetlb_page(&self, address: u64) -> Option<u64> {
        self.mappings.borrow_mut().hugetlb_page(address)
    }

    fn hugetlb_free(&self, node: u32, page_bytes: u64) -> u64 {
        let pool = format!("devices/system/node/node{node}/hugepages/hugepages-{}kB", page_bytes >> 10);
        let text = fs::read_to_string(self.sys.join(pool).join("free_hugepages")).unwrap_or_default();
        text.trim().parse::<u64>().unwrap_or(0).saturating_mul(page_bytes)
    }
}
