//! Where a thread is.
use super::super::WARP;
use super::super::block::with;

macro_rules! index_words {
    ($($name:ident: |$block:ident| $index:expr;)*) => {$(
        #[inline(always)]
        pub(crate) fn $name() -> u32 {
            with(|$block| $index)
        }
    )*};
}

index_words! {
    thread_idx_x: |block| block.threads[block.current].index[0];
    thread_idx_y: |block| block.threads[block.current].index[1];
    thread_idx_z: |block| block.threads[block.current].index[2];
    block_idx_x: |block| block.index[0];
    block_idx_y: |block| block.index[1];
    block_idx_z: |block| block.index[2];
    block_dim_x: |block| block.context.block[0];
    block_dim_y: |block| block.context.block[1];
    block_dim_z: |block| block.context.block[2];
    grid_dim_x: |block| block.context.grid[0];
    grid_dim_y: |block| block.context.grid[1];
    grid_dim_z: |block| block.context.grid[2];
    lane_id: |block| (block.current % WARP) as u32;
}

/// The order of threads is the scheduler's.
#[inline(always)]
pub(crate) fn pause(_cycles: u32) {}
