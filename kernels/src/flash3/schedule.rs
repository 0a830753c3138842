//! Which tiles of queries a persistent block of threads takes, and in which order.
//!
//! Work comes in units that cost the same: a tile, or under a causal mask two of one head, the last and the first, the
//! last but one and the second, and so on. So block b of n takes the units b, n + b, 2 n + b ..., and all end together.
//! Units that run at the same time are of few heads, whose K and V stay in the L2 cache.
use crate::attention::{Attention, Sequence, divisor};
use crate::mask::{Blocks, Mask};
use crate::schedule::head_of;
use cuda_std::thread::{block_idx_x, grid_dim_x};

/// A tile of queries, rows of one head of one sequence, and the blocks of keys that they see.
#[derive(Clone, Copy)]
pub struct Tile {
    /// Its first row.
    pub first_row: u32,
    /// The head of Q and O.
    pub head: u32,
    /// The sequence.
    pub sequence: Sequence,
    /// The blocks of keys.
    pub blocks: Blocks,
}

/// The tiles of a block of threads.
#[derive(Clone, Copy)]
pub struct Tiles<const CAUSAL: bool> {
    /// The unit that comes next.
    unit: u32,
    /// Whether it is its second tile that comes next.
    second: bool,
    /// How many units there are.
    units: u32,
    block_m: u32,
    block_n: u32,
}

/// Tiles of a head: `ceil(seqlen_q / block_m)`.
const fn tiles_of_head(seqlen_q: u32, block_m: u32) -> u32 {
    seqlen_q.div_ceil(block_m)
}

/// How many units a head has.
pub const fn units_of_head(seqlen_q: u32, block_m: u32, causal: bool) -> u32 {
    let tiles = tiles_of_head(seqlen_q, block_m);
    if causal { tiles.div_ceil(2) } else { tiles }
}

impl<const CAUSAL: bool> Tiles<CAUSAL> {
    /// Those of this block of threads, of `units` in all; a tile has `block_m` rows, a block of keys `block_n`.
    #[inline(always)]
    pub fn new(units: u32, block_m: u32, block_n: u32) -> Self {
        Tiles { unit: block_idx_x(), second: false, units, block_m, block_n }
    }

    /// The next tile that has rows. It may have no keys.
    #[inline(always)]
    #[track_caller]
    pub fn next<T>(&mut self, a: &Attention<T>) -> Option<Tile> {
        while self.unit < self.units {
            let tiles = tiles_of_head(a.seqlen_q, self.block_m);
            let units = divisor(units_of_head(a.seqlen_q, self.block_m, CAUSAL));
            let (place, (head, batch)) = (self.unit % units, head_of(self.unit / units, a.nheads));
            // The last rows first.
            let index = if self.second { place } else { tiles - 1 - place };
            if !CAUSAL || self.second || index == place {
                self.second = false;
                self.unit += grid_dim_x();
            } else {
                self.second = true;
            }
            let (first_row, sequence) = (index * self.block_m, a.sequence(batch));
            if first_row < sequence.seqlen_q {
                let mask = Mask::of::<T, CAUSAL, false>(a, &sequence);
                let blocks = mask.key_blocks(first_row, self.block_m, self.block_n);
                return Some(Tile { first_row, head, sequence, blocks });
            }
        }
        None
    }
}
