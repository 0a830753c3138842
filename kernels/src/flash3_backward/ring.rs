//! Sums of dQ that never leave the L2 cache: a ring of places for those of a few heads of K, which take them one after
//! the other.
//!
//! Blocks of threads start in their order. So by the number of one it is known which heads are far enough behind for
//! all their keys to be done. Each finishes a share of dQ of such a head, by warps that have nothing to multiply: it
//! scales and rounds the sums, stores them, and clears them for the next head in their place. Two counters a head say
//! how far it is: the one is waited for before its dQ is finished, the other before the next head in its place adds to its
//! sums. Blocks wait for blocks before them alone; and where heads are finished a wave of blocks after their last keys,
//! and taken over another wave later, they find what they wait for.
//!
//! HBM traffic: dQ once. The last heads, which nobody comes after, are left to [`finish_ring`](super::finish_ring()).
use super::{Params, is_tight};
use crate::attention::{Attention, Sequence, divisor};
use crate::schedule;
use cuda_std::Global;
use cuda_std::arrivals::Arrivals;
use cuda_std::math::{unknown, unknown_before};
use cuda_std::matrix::PackedElement;
use cuda_std::thread::{WARP, block_idx_x, thread_idx_x};
use cuda_std::warp::{ALL, sync_warp};

/// Where the sums of dQ are, and who finishes them.
///
/// All sequences are equally long, so some query sees each key: every block of keys has something to add, and counts.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Ring {
    /// Two for each head of K of each sequence; [`prepare_ring`](super::prepare_ring()) clears them. Null: there is no ring.
    pub counters: Global<u32>,
    /// Heads of K that have sums at a time: `lag` and one more, or under a causal mask as many more as take turns.
    pub heads: u32,
    /// How many heads of K lie between that whose keys a block of threads takes and that which it finishes: one, or under a
    /// causal mask as many as take turns, and better those of a wave of blocks more.
    pub lag: u32,
}

/// Warps of a block of threads that finish dQ.
pub(super) const FINISHERS: u32 = 2;

impl Ring {
    /// For kernels that have the sums of all heads.
    pub const NONE: Ring = Ring { counters: Global::NULL, heads: 0, lag: 0 };

    /// Counts the blocks of keys of a head of K that have added all they have to its sums.
    #[inline(always)]
    fn added(&self, pair: u32) -> Arrivals {
        Arrivals::at(self.counters.offset(2 * pair as usize))
    }

    /// Counts the warps that have finished their share of a head of K, and cleared its sums.
    #[inline(always)]
    fn finished(&self, pair: u32) -> Arrivals {
        Arrivals::at(self.counters.offset(2 * pair as usize + 1))
    }

    /// The place of the first row of a head of Q among those of the sums.
    #[inline(always)]
    pub fn first_place<T>(&self, a: &Attention<T>, sequence: &Sequence, head: u32, block_m: u32) -> u32 {
        let group = divisor(a.nheads / divisor(a.nheads_k));
        let pair = pair(a, sequence, head / group);
        (pair % divisor(self.heads) * group + head % group) * places_of_head(a, block_m)
    }

    /// Waits until the sums of a head of K are those of the head before in its place no more.
    #[inline(always)]
    #[track_caller]
    pub fn take_over<T>(&self, a: &Attention<T>, pair: u32, block_n: u32) {
        if pair >= self.heads {
            self.finished(pair - self.heads).wait(FINISHERS * key_blocks(a, block_n));
        }
    }

    /// A block of keys of a head of K has added all it has. Said by the thread that did, when its additions have ended.
    #[inline(always)]
    #[track_caller]
    pub fn add(&self, pair: u32) {
        self.added(pair).arrive();
    }

    /// Before the launch: no head is further than this.
    #[inline(always)]
    #[track_caller]
    pub fn clear(&self, pair: u32) {
        self.added(pair).clear();
        self.finished(pair).clear();
    }

    /// The first heads find their sums cleared.
    #[inline(always)]
    pub fn is_first(&self, pair: u32) -> bool {
        pair < self.heads
    }
}

/// The number of a head of K of a sequence.
#[inline(always)]
pub(super) fn pair<T>(a: &Attention<T>, sequence: &Sequence, head_k: u32) -> u32 {
    sequence.batch * a.nheads_k + head_k
}

/// Places that the sums of a head of Q take: whole blocks of queries.
#[inline(always)]
pub(super) fn places_of_head<T>(a: &Attention<T>, block_m: u32) -> u32 {
    a.seqlen_q.div_ceil(block_m) * block_m
}

#[inline(always)]
fn key_blocks<T>(a: &Attention<T>, block_n: u32) -> u32 {
    divisor(a.seqlen_k.div_ceil(block_n))
}

/// Finishes this block of threads' share of the head of K that it is to finish, if it is to: warp `warp` of the two does
/// half of it.
///
/// The sums lie in the order of the registers of the warps that added them: of 16 rows and eight columns of dQ, or of its
/// transpose, those of a lane follow each other. Here a lane takes eight columns of two rows of dQ at a time, or of one
/// where there are few registers. A loop in the loop, or more registers, would cost the warps that multiply instructions.
#[inline(always)]
#[track_caller]
pub(super) fn finish_share<
    T: PackedElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const Q_COLUMNS: usize,
    const TRANSPOSED: bool,
>(
    p: &Params,
    a: &Attention<T>,
    warp: u32,
) {
    let blocks = key_blocks(a, BLOCK_N as u32);
    let (taken, share) = (block_idx_x() / blocks, block_idx_x() % blocks);
    if taken < p.ring.lag {
        return;
    }
    let pair = taken - p.ring.lag;
    let two = const { !is_tight(HEADDIM, BLOCK_M) };
    // Blocks of 16 x 8 that a warp takes at a time, side by side in what was multiplied, and what two warps had that
    // multiplied. A piece is 32 columns of so many rows, for both warps; so far it is to those below, and beside.
    let at_once = if two { 4 } else { 2 };
    let of_two_warps = const { 2 * 16 * 8 * Q_COLUMNS as u32 };
    let (rows, below, beside) =
        if TRANSPOSED { (8 * at_once, 128 * at_once, of_two_warps) } else { (32, of_two_warps, 128 * at_once) };
    let (pieces_of_tile, pieces_of_rows) =
        (const { (BLOCK_M * HEADDIM) as u32 / 32 } / rows, const { HEADDIM as u32 / 32 });
    let tiles = a.nheads / divisor(a.nheads_k) * a.seqlen_q.div_ceil(BLOCK_M as u32);
    let of_share = tiles.div_ceil(blocks);
    let first_of = |share: u32| pieces_of_tile * (share * of_share).min(tiles);
    let (mut piece, end) = (first_of(share), first_of(share + 1));
    p.ring.added(pair).wait(blocks);
    while piece < end {
        // What is the same in all pieces, or follows from the lane, is found anew for each: it would take the registers of
        // the sums.
        let anew = |x| unknown_before(x, piece);
        let (tile, of_tile) = (piece / pieces_of_tile, piece % pieces_of_tile);
        let (of_rows, of_columns) = (of_tile / pieces_of_rows, of_tile % pieces_of_rows);
        let pair = anew(pair);
        let (head_k, batch) = schedule::head_of(pair, a.nheads_k);
        let group = a.nheads / divisor(a.nheads_k);
        let tiles_of_head = divisor(anew(a.seqlen_q).div_ceil(BLOCK_M as u32));
        let (head, first_row) = (head_k * group + tile / tiles_of_head, tile % tiles_of_head * BLOCK_M as u32);
        let thread = anew(thread_idx_x());
        let (warp, block, lane) = (anew(warp), thread % WARP / (32 / at_once), thread % (32 / at_once));
        // The lane's row, how far from it the other is, its first column, and where these are among the sums.
        let (row, other, column, own) = match (TRANSPOSED, two) {
            (true, true) => (8 * block + lane / 2 * 2, 1, 16 * warp + 8 * (lane % 2), 2 * lane),
            (true, false) => (8 * block + lane / 4 * 2 + lane % 2, 0, 16 * warp + 8 * (lane / 2 % 2), lane),
            (false, _) => (16 * warp + lane, 8, 8 * block, 16 * lane),
        };
        let own = of_rows * below + of_columns * beside + of_two_warps / 2 * warp + 128 * block + own;
        let place = pair % divisor(p.ring.heads) * group * tiles_of_head + tile;
        let sums = p.backward.d_q_sums.offset(place as usize * const { BLOCK_M * HEADDIM } + own as usize);
        let (row, column) = (first_row + of_rows * rows + row, of_columns * 32 + column);
        let d_q = p.backward.d_q.cast::<T>();
        let to = d_q.row(batch, head, row as u64).offset(column as usize);
        let rows_left = a.seqlen_q.saturating_sub(row);
        let is_taken_over = pair + p.ring.heads < a.nheads_k * a.batch;
        let x = take::<TRANSPOSED>(sums, two, is_taken_over);
        for i in 0..if two { 2 } else { 1 } {
            if rows_left > i * other && column < a.headdim {
                let x = x[i as usize].map(|x| x * a.softmax_scale);
                let words = [T::pack(x[0], x[1]), T::pack(x[2], x[3]), T::pack(x[4], x[5]), T::pack(x[6], x[7])];
                to.offset((i * other) as usize * d_q.row_stride as usize).cast::<u32>().store_vector(0, words);
            }
        }
        piece = unknown(piece + 1);
    }
    sync_warp(ALL);
    if unknown(thread_idx_x()).is_multiple_of(WARP) {
        p.ring.finished(unknown_before(pair, end)).arrive();
    }
}

/// Eight sums of each of `two` rows, or of one, which it clears if they are taken over: `[0.0; 8]` is there for the other.
#[inline(always)]
#[track_caller]
fn take<const TRANSPOSED: bool>(sums: Global<f32>, two: bool, is_taken_over: bool) -> [[f32; 8]; 2] {
    let mut x = [[0.0; 8]; 2];
    if TRANSPOSED {
        for i in 0..8 {
            if two {
                [x[0][i], x[1][i]] = sums.load_vector(16 * i);
            } else {
                x[0][i] = sums.load(16 * i);
            }
        }
    } else {
        for i in 0..4 {
            [x[0][2 * i], x[0][2 * i + 1], x[1][2 * i], x[1][2 * i + 1]] = sums.load_vector(4 * i);
        }
    }
    if !is_taken_over {
        return x;
    }
    if TRANSPOSED {
        for i in 0..8 {
            if two { sums.store_vector(16 * i, [0.0; 2]) } else { sums.store(16 * i, 0.0) }
        }
    } else {
        for i in 0..4 {
            sums.store_vector(4 * i, [0.0; 4]);
        }
    }
    x
}
