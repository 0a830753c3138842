//! Standard attention: three kernels, with S and P whole in HBM. What FlashAttention is measured against.
//!
//! Source: FlashAttention, Algorithm 0. S = softmax_scale · Q Kᵀ; P = softmax(S) by rows, masked; O = P V.
//!
//! HBM traffic a head: Θ(N d + N²): S is written once and read twice, P written once and read once. Memory: two N x N
//! matrices, in the dtype of the inputs, which is where standard attention in 16 bits loses accuracy.
use crate::attention::{Attention, Sequence, Untyped, divisor};
use crate::config::Config;
use crate::mask::Mask;
use crate::schedule::{self, head_of};
use crate::softmax::{online_state, write_row};
use cuda_std::element::{bf16, f16};
use cuda_std::fragment::{Accumulator, LeftOperand, MatrixElement};
use cuda_std::shared::dynamic_shared;
use cuda_std::thread::{WARP, block_idx_x, lane_id, sync_threads, warp_id};
use cuda_std::warp::{ALL, sync_warp};
use cuda_std::{Element, Global, GlobalMatrix, SmemTile, TileStream, copy, kernel};

/// Rows and columns of the tiles of S and P.
pub const BLOCK: usize = 64;
const THREADS: u32 = 128;
const WARPS: u32 = THREADS / WARP;
/// A warp has 16 rows of a tile, whose columns are eight blocks of eight.
const ROWS_A_WARP: u32 = 16;
const COLUMNS: usize = BLOCK / 8;

/// Arguments of the three kernels.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Params {
    /// The problem.
    pub attention: Attention,
    /// S: (batch, nheads, seqlen_q, [`columns`]) in the dtype of Q.
    pub s: Global<Untyped>,
    /// P: of the same shape and dtype.
    pub p: Global<Untyped>,
}

/// Columns of S and P in memory: `seqlen_k`, up to a whole tile, so that every row is aligned. P is 0 beyond `seqlen_k`.
#[inline(always)]
pub const fn columns(seqlen_k: u32) -> u32 {
    seqlen_k.next_multiple_of(BLOCK as u32)
}

impl Params {
    /// S and P of one head, as matrices (seqlen_q, columns).
    #[inline(always)]
    fn head<T: Element>(&self, a: &Attention<T>, sequence: &Sequence, head: u32) -> (Global<T>, Global<T>) {
        let first = a.first_row(sequence, head) * columns(a.seqlen_k) as usize;
        (self.s.cast::<T>().offset(first), self.p.cast::<T>().offset(first))
    }
}

const fn config<T: MatrixElement>(family: &'static str, headdim: usize, tiles: usize, barriers: u32) -> Config {
    Config {
        family,
        dtype: T::DTYPE,
        tf32: false,
        headdim: headdim as u32,
        headdim_v: headdim as u32,
        causal: None,
        general: false,
        block_m: BLOCK as u32,
        block_n: BLOCK as u32,
        from_keys: 0,
        few: false,
        sequences: 0,
        threads: THREADS,
        min_blocks_per_sm: 2,
        claimed_registers: 0,
        accumulators: 0,
        shared_bytes: (tiles * size_of::<T>()) as u32,
        barriers,
    }
}

const fn scores_config<T: MatrixElement, const HEADDIM: usize>() -> Config {
    let accumulators = Accumulator::<1, COLUMNS>::REGISTERS as u32;
    Config { accumulators, ..config::<T>("standard.scores", HEADDIM, 2 * BLOCK * HEADDIM + BLOCK * BLOCK, 1) }
}

/// S = softmax_scale · Q Kᵀ, a tile a block. Grid: `ceil(seqlen_k / 64) * ceil(seqlen_q / 64) * nheads * batch`.
#[kernel(
    name = "standard_scores_{T}_d{HEADDIM}",
    for T in [f32, f16, bf16], HEADDIM in [32, 64, 128],
    config = scores_config,
    table = SCORES,
)]
pub fn scores<T: MatrixElement, const HEADDIM: usize>(p: Params) {
    let a = p.attention.of::<T>();
    let key_blocks = divisor(a.seqlen_k.div_ceil(BLOCK as u32));
    let query_blocks = divisor(a.seqlen_q.div_ceil(BLOCK as u32));
    let (first_key, index) = (block_idx_x() % key_blocks * BLOCK as u32, block_idx_x() / key_blocks);
    let (first_row, sequence) = (index % query_blocks * BLOCK as u32, index / query_blocks);
    let (head, batch) = head_of(sequence, a.nheads);
    let sequence = a.sequence(batch);

    let q = SmemTile::<T, BLOCK, HEADDIM>::at(dynamic_shared());
    let k = SmemTile::<T, BLOCK, HEADDIM>::at(q.end());
    let s_tile = SmemTile::<T, BLOCK, BLOCK>::at(k.end());
    let q_rows = sequence.query_matrix(&a.q, head, first_row, HEADDIM as u32, true);
    let k_rows = sequence.key_matrix(&a.k, a.head_k(head), first_key, HEADDIM as u32, true);
    TileStream::new(THREADS, q_rows).copy_async(q);
    TileStream::new(THREADS, k_rows).copy_async(k);
    copy::commit();
    copy::wait::<0>();
    sync_threads();

    let own_row = warp_id() * ROWS_A_WARP;
    let mut s = Accumulator::<1, COLUMNS>::zero();
    for step in 0..HEADDIM / T::DEPTH {
        s.add_product_transposed(&LeftOperand::<T, 1>::load(q, own_row, step), k, 0, step);
    }
    s.map(|_, _, s| s * a.softmax_scale);

    // Through shared memory, so that rows are written in whole lines.
    s.store(s_tile, own_row);
    sync_warp(ALL);
    let row_stride = columns(a.seqlen_k) as u64;
    let data = p.head(&a, &sequence, head).0.offset((first_row as u64 * row_stride) as usize + first_key as usize);
    let rows = a.seqlen_q - first_row;
    let s_rows = GlobalMatrix { data, row_stride, rows, columns: BLOCK as u32, aligned: true };
    s_tile.store_rows(own_row, ROWS_A_WARP, s_rows);
}

const fn probabilities_config<T: MatrixElement>() -> Config {
    Config { block_m: WARPS, min_blocks_per_sm: 8, ..config::<T>("standard.probabilities", 0, 0, 0) }
}

/// P = softmax(S) over the keys that each query sees, 0 for the others; and LSE. A row a warp.
/// Grid: `ceil(seqlen_q * nheads * batch / 4)`.
#[kernel(
    name = "standard_probabilities_{T}",
    for T in [f32, f16, bf16],
    config = probabilities_config,
    table = PROBABILITIES,
)]
pub fn probabilities<T: MatrixElement>(p: Params) {
    let a = p.attention.of::<T>();
    let row = block_idx_x() as u64 * WARPS as u64 + warp_id() as u64;
    if row >= a.seqlen_q as u64 * a.nheads as u64 * a.batch as u64 {
        return;
    }
    let columns = columns(a.seqlen_k);
    let first = (row * columns as u64) as usize;
    let (s, p) = (p.s.cast::<T>().offset(first), p.p.cast::<T>().offset(first));
    let mask = Mask::of::<T, false, true>(&a, &a.sequence(0));
    let visible = mask.end((row % divisor(a.seqlen_q) as u64) as u32);

    let state = online_state(s, visible);
    write_row(s, p, visible, state, lane_id(), WARP);
    let mut masked = visible + lane_id();
    while masked < columns {
        p.store(masked as usize, T::from_f32(0.0));
        masked += WARP;
    }
    if lane_id() == 0 {
        a.softmax_lse.store(row as usize, state.lse());
    }
}

const fn output_config<T: MatrixElement, const HEADDIM: usize, const O_COLUMNS: usize>() -> Config {
    assert!(O_COLUMNS * 8 == HEADDIM);
    let accumulators = Accumulator::<1, O_COLUMNS>::REGISTERS as u32;
    Config { accumulators, ..config::<T>("standard.output", HEADDIM, BLOCK * BLOCK + 2 * BLOCK * HEADDIM, 2) }
}

/// O = P V, a tile of rows a block. Grid: `ceil(seqlen_q / 64) * nheads * batch`.
#[kernel(
    name = "standard_output_{T}_d{HEADDIM}",
    for T in [f32, f16, bf16], (HEADDIM, O_COLUMNS) in [(32, 4), (64, 8), (128, 16)],
    config = output_config,
    table = OUTPUT,
)]
pub fn output<T: MatrixElement, const HEADDIM: usize, const O_COLUMNS: usize>(p: Params) {
    let a = p.attention.of::<T>();
    let block = schedule::query_block(&a, BLOCK as u32);
    let (sequence, rows) = (block.sequence, block.rows());
    let row_stride = columns(a.seqlen_k) as u64;
    let p_rows = p.head(&a, &sequence, block.head).1.offset((block.first_row as u64 * row_stride) as usize);
    let v_rows = sequence.key_matrix(&a.v, a.head_k(block.head), 0, HEADDIM as u32, true);

    let p = SmemTile::<T, BLOCK, BLOCK>::at(dynamic_shared());
    let v = SmemTile::<T, BLOCK, HEADDIM>::at(p.end());
    let o_tile = SmemTile::<T, BLOCK, HEADDIM>::at(v.end());
    let own_row = warp_id() * ROWS_A_WARP;
    let mut o = Accumulator::<1, O_COLUMNS>::zero();
    let mut values = TileStream::new(THREADS, v_rows);
    for j in 0..a.seqlen_k.div_ceil(BLOCK as u32) {
        let data = p_rows.offset((j * BLOCK as u32) as usize);
        let p_block = GlobalMatrix { data, row_stride, rows, columns: BLOCK as u32, aligned: true };
        TileStream::new(THREADS, p_block).copy_async(p);
        values.copy_async(v);
        copy::commit();
        copy::wait::<0>();
        sync_threads();
        for step in 0..BLOCK / T::DEPTH {
            o.add_product(&LeftOperand::<T, 1>::load(p, own_row, step), v, step, 0);
        }
        // The next tiles come where these are.
        sync_threads();
    }

    o.store(o_tile, own_row);
    sync_warp(ALL);
    let o_rows = sequence.query_matrix(&a.o, block.head, block.first_row, HEADDIM as u32, true);
    o_tile.store_rows(own_row, ROWS_A_WARP, o_rows);
}
