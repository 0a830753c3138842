//! Threads, blocks and the grid. PTX ISA: special registers `%tid`, `%ctaid`, `%ntid`, `%nctaid`, `%laneid`.
use crate::machine;

/// Threads a warp.
pub const WARP: u32 = 32;

macro_rules! index_words {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub fn $name() -> u32 {
            machine::$name()
        }
    )*};
}

index_words! {
    /// The thread's index in its block, first dimension.
    thread_idx_x;
    /// The thread's index in its block, second dimension.
    thread_idx_y;
    /// The thread's index in its block, third dimension.
    thread_idx_z;
    /// The block's index in the grid, first dimension.
    block_idx_x;
    /// The block's index in the grid, second dimension.
    block_idx_y;
    /// The block's index in the grid, third dimension.
    block_idx_z;
    /// Threads a block, first dimension.
    block_dim_x;
    /// Threads a block, second dimension.
    block_dim_y;
    /// Threads a block, third dimension.
    block_dim_z;
    /// Blocks in the grid, first dimension.
    grid_dim_x;
    /// Blocks in the grid, second dimension.
    grid_dim_y;
    /// Blocks in the grid, third dimension.
    grid_dim_z;
    /// The thread's index in its warp.
    lane_id;
}

/// The warp's index in its block, for blocks of one dimension.
#[inline(always)]
pub fn warp_id() -> u32 {
    machine::thread_idx_x() / WARP
}

/// Lets about so many clock cycles pass. What is to run at the same time need not begin at the same time: two groups of
/// warps of which one computes while the other multiplies find to that order late, if at all, by themselves.
/// PTX ISA: `%clock`.
#[inline(always)]
pub fn pause(cycles: u32) {
    machine::pause(cycles);
}

/// Waits until all threads of the block are here, and orders their accesses to memory. PTX ISA: `bar.sync 0`.
#[inline(always)]
#[track_caller]
pub fn sync_threads() {
    machine::sync_threads();
}

/// As [`sync_threads`]; and whether `predicate` holds for any thread of the block. PTX ISA: `bar.red.or.pred`.
#[inline(always)]
#[track_caller]
pub fn sync_threads_or(predicate: bool) -> bool {
    machine::sync_threads_or(predicate)
}
