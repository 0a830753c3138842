//! A warp that finishes dQ of heads that are done, in a pass whose heads take turns at its sums.
//!
//! All comes and goes by bulk copies: the sums to shared memory, dQ from there, and zeros to where the sums were. What a
//! warp stores itself delays those that multiply beside it, likely in their fences, one a block of queries: the pass took half
//! as long again.
use super::{Params, ring};
use crate::attention::{Attention, divisor};
use crate::schedule::{self, KeyBlock};
use cuda_std::matrix::PackedElement;
use cuda_std::mbarrier::Mbarrier;
use cuda_std::pipeline::Phases;
use cuda_std::tensor::CachePolicy;
use cuda_std::thread::{WARP, lane_id};
use cuda_std::warp::{ALL, sync_warp};
use cuda_std::{Global, Shared, bulk, fence};

/// Warps of a block of threads that finish dQ.
pub(super) const FINISHERS: u32 = 2;

/// Sums that a warp takes at a time: more would not fit beside what the others have, and fewer would not hide how long they
/// take to come.
const AT_ONCE: u32 = 2048;

/// What a warp that finishes keeps in shared memory.
#[derive(Clone, Copy)]
pub(super) struct Finisher<T, const HEADDIM: usize> {
    /// Its rows as they were summed.
    sums: Shared<f32>,
    /// A piece of zeros.
    zeros: Shared<f32>,
    /// Its rows of dQ, each [`PITCH`](Self::PITCH) elements after the one before: pairs of rows lie in banks of their own.
    rows: Shared<T>,
    /// The sums have come.
    loaded: Mbarrier,
}

impl<T: PackedElement, const HEADDIM: usize> Finisher<T, HEADDIM> {
    /// Rows at a time, of whole products: a warp has 16 rows of one, or columns of its transpose.
    const ROWS: u32 = AT_ONCE / HEADDIM as u32;
    /// Sums that lie side by side in any case, and are copied at once: 16 columns of these rows.
    const PIECE: u32 = 16 * Self::ROWS;
    const PIECES: u32 = AT_ONCE / Self::PIECE;
    const PITCH: u32 = HEADDIM as u32 + 8;
    const SUMS_BYTES: u32 = 4 * (AT_ONCE + Self::PIECE);
    const ROWS_BYTES: u32 = 2 * Self::ROWS * Self::PITCH;

    /// What a warp takes of shared memory.
    const BYTES_OF_WARP: u32 = Self::SUMS_BYTES + Self::ROWS_BYTES + 16;

    /// What all take.
    pub const BYTES: u32 = FINISHERS * Self::BYTES_OF_WARP;

    /// That of warp `warp` of them, from `bytes` on, aligned to 16.
    #[inline(always)]
    pub fn at(bytes: Shared<u8>, warp: u32) -> Self {
        let bytes = bytes.offset(warp * Self::BYTES_OF_WARP);
        let (sums, rows) = (bytes.cast::<f32>(), bytes.offset(Self::SUMS_BYTES));
        let loaded = Mbarrier::at(rows.offset(Self::ROWS_BYTES).cast());
        Finisher { sums, zeros: sums.offset(AT_ONCE), rows: rows.cast(), loaded }
    }

    /// Said by one thread, before a fence and a barrier of the block.
    #[inline(always)]
    #[track_caller]
    pub fn init(self) {
        self.loaded.init(1);
    }

    /// Finishes the share of a head of K that is this block of threads' with its `own` keys, if there is one: warp `warp` of
    /// those that do takes each [`FINISHERS`]th part of it, of so many rows as it takes at a time. It scales and rounds them,
    /// and clears their sums for the next head in their place.
    #[inline(always)]
    #[track_caller]
    pub fn finish_share<const BLOCK_M: usize, const BLOCK_N: usize, const TRANSPOSED: bool, const CAUSAL: bool>(
        self,
        p: &Params,
        a: &Attention<T>,
        own: KeyBlock,
        warp: u32,
    ) {
        let blocks = ring::key_blocks(a, BLOCK_N as u32);
        let taken = ring::pair(a, &own.sequence, own.head_k);
        if taken < p.ring.lag {
            return;
        }
        let pair = taken - p.ring.lag;
        let (head_k, batch) = schedule::head_of(pair, a.nheads_k);
        let group = a.nheads / divisor(a.nheads_k);
        let parts_of_tile = const { BLOCK_M as u32 / Self::ROWS };
        let parts_of_head = divisor(a.seqlen_q.div_ceil(BLOCK_M as u32) * parts_of_tile);
        let parts = group * parts_of_head;
        let share = own.first_key / BLOCK_N as u32;
        let (begin, end) = (first_part::<CAUSAL>(parts, blocks, share), first_part::<CAUSAL>(parts, blocks, share + 1));
        let first_place = p.ring.place_of_pair(a, pair, BLOCK_M as u32);
        let is_taken_over = pair + p.ring.heads < a.nheads_k * a.batch;
        let d_q = p.backward.d_q.cast::<T>();
        let lane = lane_id();
        for i in 0..const { Self::PIECE / (4 * WARP) } {
            self.zeros.store_vector(4 * (WARP * i + lane), [0.0; 4]);
        }
        fence::proxy_async();
        let mut loaded = Phases::of(self.loaded);
        p.ring.wait_until_added(pair, blocks);
        // Of the transpose a warp had 16 columns of all rows of the tile.
        let (first, next) = if TRANSPOSED { (Self::PIECE, 16 * BLOCK_M as u32) } else { (AT_ONCE, Self::PIECE) };
        let piece = |part: u32| -> Global<f32> {
            let (tile, of_tile) = (part / parts_of_tile, part % parts_of_tile);
            let sums = p.backward.d_q_sums.offset((first_place + tile * BLOCK_M as u32) as usize * HEADDIM);
            sums.offset((first * of_tile + next * lane) as usize)
        };
        let load = |part| {
            if lane == 0 {
                self.loaded.arrive_expect(4 * AT_ONCE);
            }
            sync_warp(ALL);
            if lane < Self::PIECES {
                let to = self.sums.offset(Self::PIECE * lane);
                bulk::load_cached(to, piece(part), Self::PIECE, self.loaded, CachePolicy::evict_last());
            }
        };
        let mut part = begin + warp;
        if part < end {
            load(part);
        }
        while part < end {
            loaded.wait();
            if lane < Self::PIECES && is_taken_over {
                bulk::store_cached(piece(part), self.zeros, Self::PIECE, CachePolicy::evict_last());
            }
            // Before any of them writes where rows were, all lanes' copies have read them.
            bulk::wait_read::<0>();
            sync_warp(ALL);
            self.round::<TRANSPOSED>(a.softmax_scale);
            fence::proxy_async();
            sync_warp(ALL);
            let (head, row) = (part / parts_of_head, part % parts_of_head * Self::ROWS + lane);
            part += FINISHERS;
            if part < end {
                load(part);
            }
            if lane < Self::ROWS && row < a.seqlen_q {
                let to = d_q.row(batch, head_k * group + head, row as u64);
                bulk::store_cached(to, self.rows.offset(Self::PITCH * lane), a.headdim, CachePolicy::evict_first());
            }
            bulk::commit();
        }
        bulk::wait::<0>();
        sync_warp(ALL);
        if lane == 0 {
            p.ring.finish(pair);
        }
    }

    /// Scales and rounds the sums. They lie in the order of the registers of the warps that added them: of 16 rows and eight
    /// columns of dQ, or of its transpose, those of a lane follow each other. Here a lane takes eight columns of two rows of
    /// dQ at a time.
    #[inline(always)]
    #[track_caller]
    fn round<const TRANSPOSED: bool>(self, scale: f32) {
        for i in 0..const { AT_ONCE / (2 * 8 * WARP) } {
            let item = WARP * i + lane_id();
            let mut x = [[0.0; 8]; 2];
            let (rows, column) = if TRANSPOSED {
                let (half, pair, piece) = (item % 2, item / 2 % const { Self::ROWS / 2 }, item / Self::ROWS);
                let sums = self.sums.offset(Self::PIECE * piece + 128 * (pair / 4) + 4 * (pair % 4) + 2 * half);
                for i in 0..8 {
                    [x[0][i], x[1][i]] = sums.load_vector(16 * i as u32);
                }
                ([2 * pair, 2 * pair + 1], 16 * piece + 8 * half)
            } else {
                let (row, block) = (item % 8, item / 8);
                let (column, first_row) = (8 * block % HEADDIM as u32, 8 * block / HEADDIM as u32 * 16);
                let sums = self.sums.offset(128 * block + 16 * row);
                for i in 0..4 {
                    [x[0][2 * i], x[0][2 * i + 1], x[1][2 * i], x[1][2 * i + 1]] = sums.load_vector(4 * i as u32);
                }
                ([first_row + row, first_row + row + 8], column)
            };
            for i in 0..2 {
                let x = x[i].map(|x| x * scale);
                let words = [T::pack(x[0], x[1]), T::pack(x[2], x[3]), T::pack(x[4], x[5]), T::pack(x[6], x[7])];
                self.rows.offset(Self::PITCH * rows[i] + column).cast::<u32>().store_vector(0, words);
            }
        }
    }
}

/// The first of the parts of a head that fall to a block of keys, of so many: all take the same share; under a causal mask one
/// in proportion to the queries that see its keys, so that none takes longer for it than for its products.
#[inline(always)]
fn first_part<const CAUSAL: bool>(parts: u32, blocks: u32, block: u32) -> u32 {
    if block >= blocks {
        return parts;
    }
    let (block, blocks) = (block as f32, blocks as f32);
    let share = if CAUSAL { block * (2.0 * blocks + 1.0 - block) / (blocks * (blocks + 1.0)) } else { block / blocks };
    (parts as f32 * share) as u32
}
