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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;
    use crate::mask::UNBOUNDED;

    /// Lengths that end before a tile does, with it and behind it.
    fn lengths(tile: u32) -> [u32; 7] {
        [1, tile - 1, tile, tile + 1, 2 * tile - 7, 2 * tile, 2 * tile + 3]
    }

    /// Every block of queries with every block of keys.
    fn check<const CAUSAL: bool>((block_m, block_n): (u32, u32), (seqlen_q, seqlen_k): (u32, u32)) {
        let mask = Mask { seqlen_q, seqlen_k, left: UNBOUNDED, right: if CAUSAL { 0 } else { UNBOUNDED } };
        // Key j is there, and under a causal mask j ≤ i + seqlen_k - seqlen_q.
        let sees = |row, key| key < seqlen_k && (!CAUSAL || key + seqlen_q <= row + seqlen_k);
        for first_key in (0..seqlen_k).step_by(block_n as usize) {
            let mask_of_block = Mask { seqlen_k: seqlen_k - first_key, ..mask };
            let blocks = mask.query_blocks(first_key, block_n, block_m);
            for first_row in (0..seqlen_q).step_by(block_m as usize) {
                let rows = seqlen_q - first_row;
                let pairs = (0..rows.min(block_m)).flat_map(|row| (0..block_n).map(move |key| (row, key)));
                let (mut hides, mut shows) = (false, false);
                for (row, key) in pairs {
                    let sees = sees(first_row + row, first_key + key);
                    // The mask that is applied, of rows and keys that are counted from these.
                    assert_eq!(Mask { seqlen_q: rows, ..mask_of_block }.sees(row, key), sees);
                    (hides, shows) = (hides || !sees, shows || sees);
                }
                let is_met = (blocks.begin..blocks.end).contains(&(first_row / block_m));
                let place = [block_m, block_n, seqlen_q, seqlen_k, first_row, first_key];
                assert!(is_met || !shows, "causal: {CAUSAL}, {place:?}");
                assert_eq!(is_masked::<CAUSAL>(&mask_of_block, block_n, rows), hides, "causal: {CAUSAL}, {place:?}");
            }
        }
    }

    /// Without a mask that it needs a block would give gradients to keys that nobody sees; with one that it does not need it would
    /// be slower.
    #[test]
    fn blocks_are_masked_where_a_row_does_not_see_a_key() {
        let built = WHOLE.iter().chain(SPLIT).map(|kernel| {
            let Config { block_m, block_n, .. } = kernel.config;
            (block_m, block_n)
        });
        for tile in built.chain([(16, 16), (16, 48), (48, 16)]) {
            for seqlen_q in lengths(tile.0) {
                for seqlen_k in lengths(tile.1) {
                    check::<false>(tile, (seqlen_q, seqlen_k));
                    check::<true>(tile, (seqlen_q, seqlen_k));
                }
            }
        }
    }
}
