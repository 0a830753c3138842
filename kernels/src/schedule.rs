//! Which part of the problem a block of threads takes.
use crate::attention::{Attention, divisor};
use cuda_std::thread::block_idx_x;

/// A block of query rows of one head of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct QueryBlock {
    /// Its first row.
    pub first_row: u32,
    /// The head of Q and O.
    pub head: u32,
    /// The sequence.
    pub batch: u32,
}

/// The query block of this block of threads, in a grid of one dimension with `ceil(seqlen_q / block_m) * nheads * batch`
/// blocks. The blocks of one head follow each other, so that its K and V stay in the L2 cache; the last rows, which see
/// the most keys under a causal mask, come first, so that the longest blocks of a head do not run last.
#[inline(always)]
pub fn query_block<T>(a: &Attention<T>, block_m: u32) -> QueryBlock {
    let blocks = divisor(a.seqlen_q.div_ceil(block_m));
    let (index, sequence) = (block_idx_x() % blocks, block_idx_x() / blocks);
    let (head, batch) = head_of(a, sequence);
    QueryBlock { first_row: (blocks - 1 - index) * block_m, head, batch }
}

/// The head and the batch of pair `index`, heads running fastest.
#[inline(always)]
pub fn head_of<T>(a: &Attention<T>, index: u32) -> (u32, u32) {
    let nheads = divisor(a.nheads);
    (index % nheads, index / nheads)
}
