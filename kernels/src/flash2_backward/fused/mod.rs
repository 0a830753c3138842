//! The backward pass with S and dP computed once: five products instead of seven.
//!
//! A block of keys sums dK and dV in registers, and adds its part of each block of dQ to sums in f32 in global memory. The
//! additions are atomic, so the last bits of dQ differ from run to run; those of dK and dV do not.
//!
//! [`prepare()`] finds what the exponents subtract and D, and clears the sums. [`whole()`] or [`split()`] is the pass itself,
//! for narrow and for wide heads. [`finish()`] scales and rounds dQ.
//!
//! A weight of 0 hides nothing from a product, as 0 · NaN is NaN: under a causal mask what is not finite reaches the gradients
//! of its block's other keys and queries too, those that do not see it. The kernels beside these keep it from them.
mod finish;
mod places;
mod prepare;
mod query_stream;
mod split;
mod whole;

pub use finish::{FINISH, finish};
pub(crate) use places::first_place;
pub use places::{ROWS, places, places_in_blocks};
pub use prepare::{PREPARE, prepare};
pub(crate) use prepare::{THREADS as PREPARE_THREADS, prepare_block};
pub use split::{SPLIT, split};
pub use whole::{WHOLE, whole};

use super::Params;
use crate::attention::Attention;
use crate::mask::Mask;
use crate::schedule::{self, KeyBlock};
use cuda_std::SmemTile;
use cuda_std::fragment::{Accumulator, LeftOperand, PackedMatrixElement};
use places::d_q_sums;
use query_stream::QueryStream;

/// Heads of K whose blocks take turns under a causal mask.
const HEADS_IN_TURN: u32 = 8;

/// The block of keys of this block of threads.
#[inline(always)]
#[track_caller]
fn key_block<T, const CAUSAL: bool>(a: &Attention<T>, block_n: u32) -> KeyBlock {
    if CAUSAL { schedule::key_block_in_turn(a, block_n, HEADS_IN_TURN) } else { schedule::key_block(a, block_n) }
}

/// [`key_block()`] once more, to be said after a loop: it is found anew once `x` is known, and takes no registers in the loop.
#[inline(always)]
#[track_caller]
fn key_block_anew<T, const CAUSAL: bool>(a: &Attention<T>, block_n: u32, x: u32) -> KeyBlock {
    if CAUSAL {
        schedule::key_block_in_turn_anew(a, block_n, HEADS_IN_TURN, x)
    } else {
        schedule::key_block_anew(a, block_n, x)
    }
}

/// Tokens of Q of this block of threads, and the first block of `block_m` queries that it needs of each head, found anew once
/// `x` is known. `mask`: for keys that are counted from the first of the block of keys.
#[inline(always)]
#[track_caller]
fn first_anew<T, const CAUSAL: bool>(a: &Attention<T>, mask: &Mask, block_n: u32, block_m: u32, x: u32) -> (u32, u32) {
    let seqlen_q = key_block_anew::<T, CAUSAL>(a, block_n, x).sequence.seqlen_q;
    // Asked after a first block, so that there is one.
    (seqlen_q, if CAUSAL { Mask { seqlen_q, ..*mask }.first_query(0) / block_m } else { 0 })
}

/// Whether the mask hides something of a block of `block_n` keys from the block of queries from which on their head has
/// `rows`; it counts from the first key. Where keys are missing, it does: what their P would be is not bounded, and 0 times
/// infinity is no part of dQ.
#[inline(always)]
fn is_masked<const CAUSAL: bool>(mask: &Mask, block_n: u32, rows: u32) -> bool {
    // The last row sees all keys, the first `rows - 1` fewer. That is asked of what the mask has: a number of rows to compare
    // with would take a register in the loop.
    if CAUSAL { rows + (block_n - 1) > mask.seqlen_k } else { mask.seqlen_k < block_n }
}

/// The mask of a block of keys and of the `rows` of a head from a block of queries on, both counted from their first. Without a
/// causal mask one is needed seldom: it is found anew once `rows` is known, and takes no register in the loop.
#[inline(always)]
#[track_caller]
fn mask_anew<T, const CAUSAL: bool>(a: &Attention<T>, mask: &Mask, block_n: u32, rows: u32) -> Mask {
    let seqlen_k = if CAUSAL { mask.seqlen_k } else { key_block_anew::<T, CAUSAL>(a, block_n, rows).rows() };
    Mask { seqlen_q: rows, seqlen_k, ..*mask }
}

/// Row and column of this warp's part of a block of dQ.
#[inline(always)]
fn part<const HEADDIM: usize, const Q_ROWS: usize, const Q_COLUMNS: usize>() -> (u32, u32) {
    let across = const { (HEADDIM / (8 * Q_COLUMNS)) as u32 };
    let warp = cuda_std::thread::warp_id();
    (warp / across * 16 * Q_ROWS as u32, warp % across * 8 * Q_COLUMNS as u32)
}

/// Adds dS K, this warp's part of it, to the sums of dQ of the block of queries whose first row is in `place`.
#[inline(always)]
#[track_caller]
fn add_d_q<
    T: PackedMatrixElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const Q_ROWS: usize,
    const Q_COLUMNS: usize,
>(
    d_s: SmemTile<T, BLOCK_N, BLOCK_M>,
    k: SmemTile<T, BLOCK_N, HEADDIM>,
    p: &Params,
    place: u32,
) {
    let (row, column) = part::<HEADDIM, Q_ROWS, Q_COLUMNS>();
    let mut d_q = Accumulator::<Q_ROWS, Q_COLUMNS>::zero();
    for depth in 0..BLOCK_N / T::DEPTH {
        d_q.add_product(&LeftOperand::<T, Q_ROWS>::load_transposed(d_s, row, depth), k, depth, column);
    }
    d_q.add_to(d_q_sums::<HEADDIM, Q_ROWS, Q_COLUMNS>(p, place));
}
