// SPDX-License-Identifier: MIT OR Apache-2.0
//! Where the counts of a placement workload stand in its block `tables`: words of
//! 64 bits. The guest writes them and the host reads them.

/// One huge page: it holds the counters of a million pages.
pub const TABLES_BYTES: usize = 2 << 20;

/// In [`Header::Magic`] once all is there.
pub const MAGIC: u64 = 0x4550_5463_6f75_6e74;

/// The first word with counters: one of 32 bits for each page, the even page's in
/// the lower half.
pub const COUNTERS_WORD: usize = 512;

/// Words of the header.
#[derive(Clone, Copy, Debug)]
pub enum Header {
    /// [`MAGIC`].
    Magic = 0,
    /// Pages of the block.
    Pages = 1,
    /// The phase that the workload is in.
    Phase = 2,
    /// Lines that did not hold what was written.
    Wrong = 3,
}
