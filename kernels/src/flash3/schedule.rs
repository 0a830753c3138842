//! Which tiles of queries a persistent block of threads takes, and in which order.
//!
//! Tiles are numbered so that those that run at the same time read the same K and V, which stay in the L2 cache: the
//! tiles of a few heads take turns, those with the most keys first. Block b of n takes the tiles b, n + b, 2 n + b ...;
//! under a causal mask, where tiles grow shorter with their number, every other round goes backwards, so that who got
//! the longest tile of one round gets the shortest of the next.
use crate::attention::{Attention, Sequence, divisor};
use crate::schedule::head_of;
use cuda_std::thread::{block_idx_x, grid_dim_x};

/// A tile of queries: rows of one head of one sequence.
#[derive(Clone, Copy)]
pub struct Tile {
    /// Its first row. In a sequence that is shorter than others it may lie beyond the last.
    pub first_row: u32,
    /// The head of Q and O.
    pub head: u32,
    /// The sequence.
    pub sequence: Sequence,
}

impl Tile {
    /// Rows from the first on; 0 if there is nothing to do.
    #[inline(always)]
    pub fn rows(&self) -> u32 {
        self.sequence.seqlen_q.saturating_sub(self.first_row)
    }
}

/// The tiles of this block of threads.
#[derive(Clone, Copy)]
pub struct Tiles<const CAUSAL: bool> {
    /// Where the round begins.
    first: u32,
    /// Whether this round goes backwards.
    backwards: bool,
    /// How many tiles there are.
    count: u32,
    block_m: u32,
    /// Tiles of a head.
    blocks: u32,
    heads_in_turn: u32,
}

impl<const CAUSAL: bool> Tiles<CAUSAL> {
    /// `count` tiles of `block_m` rows.
    #[inline(always)]
    pub fn new<T>(a: &Attention<T>, block_m: u32, count: u32, heads_in_turn: u32) -> Self {
        let blocks = divisor(a.seqlen_q.div_ceil(block_m));
        Tiles { first: 0, backwards: false, count, block_m, blocks, heads_in_turn }
    }

    /// The next one.
    #[inline(always)]
    #[track_caller]
    pub fn next<T>(&mut self, a: &Attention<T>) -> Option<Tile> {
        let place = if self.backwards { grid_dim_x() - 1 - block_idx_x() } else { block_idx_x() };
        let number = self.first + place;
        if number >= self.count {
            return None;
        }
        self.first += grid_dim_x();
        self.backwards ^= CAUSAL;
        Some(self.tile(a, number))
    }

    #[inline(always)]
    #[track_caller]
    fn tile<T>(&self, a: &Attention<T>, number: u32) -> Tile {
        let turn = divisor(self.heads_in_turn * self.blocks);
        let first_pair = number / turn * self.heads_in_turn;
        let pairs = divisor((a.nheads * a.batch - first_pair).min(self.heads_in_turn));
        let (index, pair) = (number % turn / pairs, first_pair + number % turn % pairs);
        let (head, batch) = head_of(pair, a.nheads);
        Tile { first_row: (self.blocks - 1 - index) * self.block_m, head, sequence: a.sequence(batch) }
    }
}
