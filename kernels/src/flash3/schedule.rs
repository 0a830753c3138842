//! Which tiles of queries a persistent block of threads takes, and in which order.
//!
//! Work comes in units that cost the same: a tile, or under a causal mask two of one head, the last and the first, the
//! last but one and the second, and so on. Walker b of n, a block of threads, takes the units b, n + b, 2 n + b ...: all
//! end together, but for a unit. Where units are long, that is much: there the last heads are left to blocks that take one
//! tile each, the longest first, and that the GPU starts as walkers end.
//!
//! What runs at the same time is of few heads, whose K and V stay in the L2 cache.
use crate::attention::{Attention, Sequence, divisor};
use crate::mask::{Blocks, Mask};
use crate::schedule::head_of;
use cuda_std::thread::block_idx_x;

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

/// Tiles of a head: `ceil(seqlen_q / block_m)`.
pub const fn tiles_of_head(seqlen_q: u32, block_m: u32) -> u32 {
    seqlen_q.div_ceil(block_m)
}

/// How many units the tiles of a head make.
pub const fn units_of_head(tiles: u32, causal: bool) -> u32 {
    if causal { tiles.div_ceil(2) } else { tiles }
}

/// Who does what: part of a kernel's parameters.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// Blocks of threads that take units: the first of the grid. Each of the others takes a tile.
    pub walkers: u32,
    /// The heads, counted over all batches, that the walkers do: the first ones.
    pub walked_heads: u32,
}

/// The tiles of a block of threads.
#[derive(Clone, Copy)]
pub struct Tiles<const CAUSAL: bool> {
    schedule: Schedule,
    /// The unit that comes next; of a block that is no walker the number of its tile, until it is done.
    next: u32,
    /// Whether it is a unit's second tile that comes next.
    second: bool,
    block_m: u32,
    block_n: u32,
}

/// No unit and no tile.
const DONE: u32 = u32::MAX;

impl<const CAUSAL: bool> Tiles<CAUSAL> {
    /// Those of this block of threads. A tile has `block_m` rows, a block of keys `block_n`.
    #[inline(always)]
    pub fn new(schedule: Schedule, block_m: u32, block_n: u32) -> Self {
        let block = block_idx_x();
        let next = if block < schedule.walkers { block } else { block - schedule.walkers };
        Tiles { schedule, next, second: false, block_m, block_n }
    }

    /// The next tile that has rows. If they see no key, it has one block nevertheless, which they do not see.
    #[inline(always)]
    #[track_caller]
    pub fn next<T>(&mut self, a: &Attention<T>) -> Option<Tile> {
        let Schedule { walkers, walked_heads } = self.schedule;
        let tiles = tiles_of_head(a.seqlen_q, self.block_m);
        loop {
            let (index, head) = if block_idx_x() < walkers {
                let units = divisor(units_of_head(tiles, CAUSAL));
                let (head, place) = (self.next / units, self.next % units);
                if head >= walked_heads {
                    return None;
                }
                // The last rows first.
                let index = if self.second { place } else { tiles - 1 - place };
                self.second = CAUSAL && !self.second && index != place;
                if !self.second {
                    self.next += walkers;
                }
                (index, head)
            } else {
                if self.next == DONE {
                    return None;
                }
                let heads = divisor(a.nheads * a.batch - walked_heads);
                let (rank, head) = (self.next / heads, self.next % heads);
                self.next = DONE;
                (tiles - 1 - rank, walked_heads + head)
            };
            let (head, batch) = head_of(head, a.nheads);
            let (first_row, sequence) = (index * self.block_m, a.sequence(batch));
            if first_row < sequence.seqlen_q {
                let mask = Mask::of::<T, CAUSAL, false>(a, &sequence);
                let blocks = mask.key_blocks(first_row, self.block_m, self.block_n).or_one();
                return Some(Tile { first_row, head, sequence, blocks });
            }
        }
    }
}
