//! FlashAttention, forward.
//!
//! Source: Dao, Fu, Ermon, Rudra and Ré, "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness",
//! Algorithm 1, whose steps the comments number.
//!
//! A block of threads owns one head. The outer loop runs over blocks of K and V, the inner over blocks of Q; O, l and m
//! stay in HBM and are read, updated and written in every step of the inner loop. O is kept there in f32: rounding it to 16
//! bits in each step would cost more accuracy than S and P in 16 bits cost standard attention.
//!
//! HBM traffic a head: Θ(N² d² / M) for an SRAM of size M: K and V once, and Q, O, l and m once for every block of K and V.
use crate::attention::Attention;
use crate::config::Config;
use crate::mask::Mask;
use crate::online_softmax::OnlineSoftmax;
use crate::row_softmax::RowSoftmax;
use crate::schedule::head_of;
use cuda_std::element::{bf16, f16};
use cuda_std::fragment::{Accumulator, LeftOperand, MatrixElement};
use cuda_std::math::{LOG2_E, fma};
use cuda_std::shared::dynamic_shared;
use cuda_std::thread::{block_idx_x, lane_id, sync_threads, warp_id};
use cuda_std::warp::{ALL, sync_warp};
use cuda_std::{Global, SmemTile, TileStream, copy, kernel};

/// Rows of Q a block (Br in the paper), and of K and V (Bc).
pub const BLOCK: usize = 64;
const THREADS: u32 = 128;
const ROWS_A_WARP: u32 = 16;
const COLUMNS: usize = BLOCK / 8;

/// Arguments of the forward kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Params {
    /// The problem. `seqlen_k` is at least 1.
    pub attention: Attention,
    /// O so far, in f32: (batch, nheads, seqlen_q, headdim), contiguous.
    pub o: Global<f32>,
    /// l so far: (batch, nheads, seqlen_q).
    pub l: Global<f32>,
    /// m so far, in log2 units: (batch, nheads, seqlen_q).
    pub m: Global<f32>,
}

const fn config<T: MatrixElement, const HEADDIM: usize, const O_COLUMNS: usize>() -> Config {
    assert!(O_COLUMNS * 8 == HEADDIM);
    Config {
        family: "flash1",
        dtype: T::DTYPE,
        tf32: false,
        headdim: HEADDIM as u32,
        headdim_v: HEADDIM as u32,
        causal: None,
        general: false,
        block_m: BLOCK as u32,
        block_n: BLOCK as u32,
        from_keys: 0,
        few: false,
        sequences: 0,
        threads: THREADS,
        min_blocks_per_sm: 1,
        claimed_registers: 0,
        accumulators: (Accumulator::<1, COLUMNS>::REGISTERS + Accumulator::<1, O_COLUMNS>::REGISTERS) as u32,
        shared_bytes: (3 * BLOCK * HEADDIM * size_of::<T>()) as u32,
        barriers: 2,
    }
}

/// O = softmax(softmax_scale · Q Kᵀ) V and its LSE, for one head. Grid: `nheads * batch`.
#[kernel(
    name = "flash1_fwd_{T}_d{HEADDIM}",
    for T in [f32, f16, bf16], (HEADDIM, O_COLUMNS) in [(32, 4), (64, 8), (128, 16)],
    config = config,
    table = FORWARD,
)]
pub fn forward<T: MatrixElement, const HEADDIM: usize, const O_COLUMNS: usize>(p: Params) {
    let a = p.attention.of::<T>();
    let (head, batch) = head_of(block_idx_x(), a.nheads);
    let (head_k, sequence) = (a.head_k(head), a.sequence(batch));
    let mask = Mask::of::<T, false, true>(&a, &sequence);
    let o_rows = sequence.queries(&a.o, head, 0);
    let k_rows = sequence.key_matrix(&a.k, head_k, 0, HEADDIM as u32, true);
    let v_rows = sequence.key_matrix(&a.v, head_k, 0, HEADDIM as u32, true);
    let first = a.first_row(&sequence, head);

    let q = SmemTile::<T, BLOCK, HEADDIM>::at(dynamic_shared());
    let k = SmemTile::<T, BLOCK, HEADDIM>::at(q.end());
    let v = SmemTile::<T, BLOCK, HEADDIM>::at(k.end());
    let scale = a.softmax_scale * LOG2_E;

    let mut keys = TileStream::new(THREADS, k_rows);
    let mut values = TileStream::new(THREADS, v_rows);
    // 5: for each block j of K and V
    for j in 0..a.seqlen_k.div_ceil(BLOCK as u32) {
        let first_key = j * BLOCK as u32;
        // 6: load K_j and V_j; they come in with the first Q_i.
        keys.copy_async(k);
        values.copy_async(v);
        copy::commit();

        // 7: for each block i of Q
        for i in 0..a.seqlen_q.div_ceil(BLOCK as u32) {
            let first_row = i * BLOCK as u32;
            // Blocks of keys that this block of queries needs. The first is always taken: it is where O, l and m begin.
            let needed = mask.key_blocks(first_row, BLOCK as u32, BLOCK as u32).end;
            let last = if needed == 0 { 0 } else { needed - 1 };
            if j > last {
                continue;
            }

            // 8: load Q_i; O_i, l_i and m_i below, where they are needed.
            let q_block = sequence.query_matrix(&a.q, head, first_row, HEADDIM as u32, true);
            TileStream::new(THREADS, q_block).copy_async(q);
            copy::commit();
            copy::wait::<0>();
            sync_threads();

            // 9: S_ij = Q_i K_jᵀ
            let own_row = warp_id() * ROWS_A_WARP;
            let mut s = Accumulator::<1, COLUMNS>::zero();
            for step in 0..HEADDIM / T::DEPTH {
                s.add_product_transposed(&LeftOperand::<T, 1>::load(q, own_row, step), k, 0, step);
            }
            mask.apply(&mut s, first_row + own_row, first_key);

            // 10: P_ij, and the state (m_ij, l_ij) of this block alone.
            let mut block = RowSoftmax::<1>::EMPTY;
            block.take(&mut s, scale);
            let mut o = Accumulator::<1, O_COLUMNS>::zero();
            for step in 0..BLOCK / T::DEPTH {
                o.add_product(&s.operand::<T>(step), v, step, 0);
            }

            // 8: the state of the blocks before. The lanes of a quad read what its first lane is to overwrite.
            let row = [0, 1].map(|half| first_row + own_row + Accumulator::<1, O_COLUMNS>::row(0, half));
            let before = row.map(|row| {
                if j == 0 || row >= a.seqlen_q {
                    return OnlineSoftmax::EMPTY;
                }
                OnlineSoftmax { m: p.m.load(first + row as usize), l: p.l.load(first + row as usize) }
            });
            sync_warp(ALL);

            for half in 0..2 {
                // 11: the state of all blocks so far.
                let (before, block) = (before[half], block.sum(0, half));
                let merged = before.merge(block);
                let (row, at) = (row[half], first + row[half] as usize);
                if row < a.seqlen_q {
                    // 12: O_i = (l_i 2^(m_i - m_new) O_i + 2^(m_ij - m_new) P_ij V_j) / l_new
                    let keep = merged.weight(before.m) * before.l * merged.inverse();
                    let add = merged.weight(block.m) * merged.inverse();
                    let accumulated = p.o.offset(at * HEADDIM);
                    let output = o_rows.offset((row as u64 * a.o.row_stride) as usize);
                    o.map_pairs(0, half, |column, pair| {
                        let old = if j > 0 { accumulated.load_vector::<2>(column as usize) } else { [0.0; 2] };
                        let after = [fma(old[0], keep, pair[0] * add), fma(old[1], keep, pair[1] * add)];
                        if j < last {
                            accumulated.store_vector(column as usize, after);
                        } else {
                            output.store_vector(column as usize, T::from_f32_pair(after));
                        }
                        after
                    });
                    // 13: l_i = l_new, m_i = m_new
                    if lane_id().is_multiple_of(4) {
                        if j < last {
                            p.m.store(at, merged.m);
                            p.l.store(at, merged.l);
                        } else {
                            a.softmax_lse.store(at, merged.lse());
                        }
                    }
                }
            }
            // The next Q_i, or K_j and V_j, come where these are.
            sync_threads();
        }
    }
}
