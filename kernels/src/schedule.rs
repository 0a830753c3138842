//! Which part of the problem a block of threads takes.
use crate::attention::{Attention, Sequence, divisor};
use cuda_std::math::unknown_before;
use cuda_std::thread::block_idx_x;

/// A block of query rows of one head of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct QueryBlock {
    /// Its first row. In a sequence that is shorter than others it may lie beyond the last.
    pub first_row: u32,
    /// The head of Q and O.
    pub head: u32,
    /// The sequence.
    pub sequence: Sequence,
}

impl QueryBlock {
    /// Rows from the first on, of which the block takes as many as it has; 0 if there is nothing to do.
    #[inline(always)]
    pub fn rows(&self) -> u32 {
        self.sequence.seqlen_q.saturating_sub(self.first_row)
    }

    /// The same, to be said after a loop: what follows from its head is found anew once `x` is known, and takes no registers
    /// in the loop.
    #[inline(always)]
    pub fn anew(self, x: u32) -> Self {
        QueryBlock { head: unknown_before(self.head, x), ..self }
    }
}

/// The query block of this block of threads, in a grid of one dimension with `ceil(seqlen_q / block_m) * nheads * batch`
/// blocks. The blocks of one head follow each other, so that its K and V stay in the L2 cache; the last rows, which see
/// the most keys under a causal mask, come first, so that the longest blocks of a head do not run last.
#[inline(always)]
#[track_caller]
pub fn query_block<T>(a: &Attention<T>, block_m: u32) -> QueryBlock {
    query_block_at(a, block_m, block_idx_x())
}

/// [`query_block`] once more, to be said after a loop: it is found anew once `x` is known, and takes no registers in the loop.
#[inline(always)]
#[track_caller]
pub fn query_block_anew<T>(a: &Attention<T>, block_m: u32, x: u32) -> QueryBlock {
    let anew = |n| unknown_before(n, x);
    let a = Attention { seqlen_q: anew(a.seqlen_q), nheads: anew(a.nheads), ..*a };
    query_block_at(&a, block_m, anew(block_idx_x()))
}

/// Query block `number` of these, where it is not that of the block of threads.
#[inline(always)]
#[track_caller]
pub fn query_block_at<T>(a: &Attention<T>, block_m: u32, number: u32) -> QueryBlock {
    let blocks = divisor(a.seqlen_q.div_ceil(block_m));
    let (index, pair) = (number % blocks, number / blocks);
    let (head, batch) = head_of(pair, a.nheads);
    QueryBlock { first_row: (blocks - 1 - index) * block_m, head, sequence: a.sequence(batch) }
}

/// K and V that stay in the L2 cache beside what else passes through it: 50 MB on an H100, 40 MB on an A100.
const BYTES_IN_TURN: u32 = 32 << 20;

/// As [`query_block`], for a causal mask: the last rows of as many heads as the L2 cache holds K and V of come before the
/// rows above them of any of these, so that blocks that run side by side are equally long, and the last ones are short.
#[inline(always)]
#[track_caller]
pub fn query_block_in_turn<T>(a: &Attention<T>, block_m: u32) -> QueryBlock {
    let blocks = divisor(a.seqlen_q.div_ceil(block_m));
    let heads = a.nheads * a.batch;
    let token = divisor((a.headdim + a.headdim_v) * size_of::<T>() as u32);
    let turn = divisor((BYTES_IN_TURN / token / divisor(a.seqlen_k)).min(heads));
    let group = divisor(turn * blocks);
    let first = block_idx_x() / group * turn;
    let pairs = divisor((heads - first).min(turn));
    let (index, pair) = (block_idx_x() % group / pairs, first + block_idx_x() % group % pairs);
    let (head, batch) = head_of(pair, a.nheads);
    QueryBlock { first_row: (blocks - 1 - index) * block_m, head, sequence: a.sequence(batch) }
}

/// A block of keys of one head of K and V of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct KeyBlock {
    /// Its first key. In a sequence that is shorter than others it may lie beyond the last.
    pub first_key: u32,
    /// The head of K and V.
    pub head_k: u32,
    /// The sequence.
    pub sequence: Sequence,
}

impl KeyBlock {
    /// Keys from the first on, of which the block takes as many as it has; 0 if there is nothing to do.
    #[inline(always)]
    pub fn rows(&self) -> u32 {
        self.sequence.seqlen_k.saturating_sub(self.first_key)
    }

    /// The same, to be said after a loop: what follows from it is found anew once `x` is known, and takes no registers in the
    /// loop.
    #[inline(always)]
    pub fn anew(self, x: u32) -> Self {
        let anew = |n| unknown_before(n, x);
        let Sequence { batch, first_k, .. } = self.sequence;
        let sequence = Sequence { batch: anew(batch), first_k: anew(first_k), ..self.sequence };
        KeyBlock { first_key: anew(self.first_key), head_k: anew(self.head_k), sequence }
    }

    /// Goes on to the next `block_n` keys of the head; whether there are any.
    #[inline(always)]
    pub fn advance(&mut self, block_n: u32) -> bool {
        self.first_key += block_n;
        self.rows() > 0
    }
}

/// The keys from `first_key` on of the head of this block of threads, which takes all of them: in a grid of
/// `nheads_k * batch` blocks. Said for each block of keys it is found anew, and takes no registers in between.
#[inline(always)]
#[track_caller]
pub fn keys_of_head<T>(a: &Attention<T>, first_key: u32) -> KeyBlock {
    let anew = |x| unknown_before(x, first_key);
    let (head_k, batch) = head_of(anew(block_idx_x()), anew(a.nheads_k));
    KeyBlock { first_key, head_k, sequence: a.sequence(batch) }
}

/// The last `block_n` keys of that head, or fewer where they are not so many.
#[inline(always)]
#[track_caller]
pub fn last_keys_of_head<T>(a: &Attention<T>, block_n: u32) -> KeyBlock {
    let block = keys_of_head(a, 0);
    KeyBlock { first_key: block.rows().saturating_sub(1) / block_n * block_n, ..block }
}

/// The key block of this block of threads, in a grid of one dimension with `ceil(seqlen_k / block_n) * nheads_k * batch`
/// blocks. Under a causal mask the first keys are seen by the most queries: they come first.
#[inline(always)]
#[track_caller]
pub fn key_block<T>(a: &Attention<T>, block_n: u32) -> KeyBlock {
    key_block_at(a, block_n, block_idx_x())
}

/// [`key_block`] once more, to be said after a loop: it is found anew once `x` is known, and takes no registers in the loop.
#[inline(always)]
#[track_caller]
pub fn key_block_anew<T>(a: &Attention<T>, block_n: u32, x: u32) -> KeyBlock {
    let anew = |n| unknown_before(n, x);
    let a = Attention { seqlen_k: anew(a.seqlen_k), nheads_k: anew(a.nheads_k), ..*a };
    key_block_at(&a, block_n, anew(block_idx_x()))
}

/// Key block `number` of these, where it is not that of the block of threads.
#[inline(always)]
pub fn key_block_at<T>(a: &Attention<T>, block_n: u32, number: u32) -> KeyBlock {
    let blocks = divisor(a.seqlen_k.div_ceil(block_n));
    let (index, pair) = (number % blocks, number / blocks);
    let (head_k, batch) = head_of(pair, a.nheads_k);
    KeyBlock { first_key: index * block_n, head_k, sequence: a.sequence(batch) }
}

/// As [`key_block`], for a causal mask: the first keys of a few heads come before the next keys of any of them, so that
/// the last blocks to run are short ones. `heads_in_turn` of K: so few that what they read stays in the L2 cache.
#[inline(always)]
#[track_caller]
pub fn key_block_in_turn<T>(a: &Attention<T>, block_n: u32, heads_in_turn: u32) -> KeyBlock {
    key_block_in_turn_at(a, block_n, heads_in_turn, block_idx_x())
}

/// [`key_block_in_turn`] once more, as [`key_block_anew`].
#[inline(always)]
#[track_caller]
pub fn key_block_in_turn_anew<T>(a: &Attention<T>, block_n: u32, heads_in_turn: u32, x: u32) -> KeyBlock {
    let anew = |n| unknown_before(n, x);
    let a = Attention { seqlen_k: anew(a.seqlen_k), nheads_k: anew(a.nheads_k), ..*a };
    key_block_in_turn_at(&a, block_n, heads_in_turn, anew(block_idx_x()))
}

/// As [`key_block_at`].
#[inline(always)]
pub fn key_block_in_turn_at<T>(a: &Attention<T>, block_n: u32, heads_in_turn: u32, number: u32) -> KeyBlock {
    let group = divisor(heads_in_turn * a.seqlen_k.div_ceil(block_n));
    let first = number / group * heads_in_turn;
    let pairs = divisor((a.nheads_k * a.batch - first).min(heads_in_turn));
    let (index, pair) = (number % group / pairs, first + number % group % pairs);
    let (head_k, batch) = head_of(pair, a.nheads_k);
    KeyBlock { first_key: index * block_n, head_k, sequence: a.sequence(batch) }
}

/// The head and the batch of pair `index`, heads running fastest.
#[inline(always)]
pub fn head_of(index: u32, nheads: u32) -> (u32, u32) {
    let nheads = divisor(nheads);
    (index % nheads, index / nheads)
}
