//! The fused pass for narrow heads: every warp sums dK and dV.
use super::query_stream::Place;
use super::{QueryStream, add_d_q, first_anew, is_masked, key_block, key_block_anew, mask_anew};
use crate::attention::{Tensor, divisor};
use crate::config::Config;
use crate::flash2_backward::{Params, STAGES, config};
use crate::mask::Mask;
use crate::schedule::KeyBlock;
use cuda_std::element::{bf16, f16};
use cuda_std::fragment::{Accumulator, ColumnVector, LeftOperand, PackedMatrixElement};
use cuda_std::math::{LOG2_E, ex2, fma, unknown_before};
use cuda_std::shared::dynamic_shared;
use cuda_std::thread::{sync_threads, warp_id};
use cuda_std::warp::{ALL, sync_warp};
use cuda_std::{SmemTile, TileStream, copy, kernel};

const fn whole_config<
    T: PackedMatrixElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const BLOCKS: u32,
    const M: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_ROWS: usize,
    const Q_COLUMNS: usize,
    const CAUSAL: bool,
>() -> Config {
    assert!(D_COLUMNS * 8 == HEADDIM && BLOCK_M.is_multiple_of(8 * S_COLUMNS) && BLOCK_N.is_multiple_of(16 * M));
    assert!(Q_ROWS * 16 * Q_COLUMNS * 8 * BLOCK_N == BLOCK_M * HEADDIM * 16 * M);
    let tiles = BLOCK_N * (2 * HEADDIM + BLOCK_M) * size_of::<T>();
    let scores = 2 * Accumulator::<M, S_COLUMNS>::REGISTERS;
    Config {
        family: "flash2.fused",
        block_m: BLOCK_M as u32,
        block_n: BLOCK_N as u32,
        from_keys: 0,
        threads: (BLOCK_N / (16 * M) * 32) as u32,
        min_blocks_per_sm: BLOCKS,
        accumulators: (scores + 2 * Accumulator::<M, D_COLUMNS>::REGISTERS) as u32,
        shared_bytes: (tiles + QueryStream::<T, BLOCK_M, HEADDIM>::BYTES) as u32,
        barriers: 3,
        ..config::<T>(HEADDIM, HEADDIM, CAUSAL, false)
    }
}

/// dK and dV of `BLOCK_N` keys of one head of K and V, and their part of dQ: for heads so narrow that a warp can have
/// the sums of both for all its 16 `M` keys. Grid: `ceil(seqlen_k / BLOCK_N) * nheads_k * batch`.
///
/// As in [`keys_and_values`](crate::flash2_backward::keys_and_values()), S and dP are transposed, so that Pᵀ and dSᵀ come out
/// as left operands of the products that dV and dK are the sums of; dSᵀ also goes to shared memory, where all warps find dS
/// for dQ. A warp takes `8 S_COLUMNS` queries at a time, of which S and dP leave room for the sums.
#[kernel(
    name = "flash2_bwd_fused_{T}_d{HEADDIM}{CAUSAL?_causal}",
    for T in [f16, bf16],
        (HEADDIM, BLOCK_M, BLOCK_N, BLOCKS, M, S_COLUMNS, D_COLUMNS, Q_ROWS, Q_COLUMNS) in [
            // On an H100, bf16, 512 to 16384 tokens, beside PyTorch's FlashAttention-2: 1.31, causal 1.40.
            (32, 64, 128, 2, 2, 4, 4, 1, 4),
            // 1.22, causal 1.31.
            (64, 64, 128, 2, 2, 4, 8, 2, 4),
        ],
        CAUSAL in [false, true],
    config = whole_config,
    table = WHOLE,
)]
pub fn whole<
    T: PackedMatrixElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const BLOCKS: u32,
    const M: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_ROWS: usize,
    const Q_COLUMNS: usize,
    const CAUSAL: bool,
>(
    p: Params,
) {
    let a = p.attention.of::<T>();
    let threads = const { (BLOCK_N / (16 * M) * 32) as u32 };
    let block = key_block::<T, CAUSAL>(&a, BLOCK_N as u32);
    let KeyBlock { first_key, head_k, sequence } = block;
    if block.rows() == 0 {
        return;
    }
    let mask = Mask::of::<T, CAUSAL, false>(&a, &sequence);
    let blocks = mask.query_blocks(first_key, BLOCK_N as u32, BLOCK_M as u32);
    // For keys that are counted from the first of the block.
    let mask_of_block = Mask { seqlen_k: block.rows(), ..mask };
    let group = a.nheads / divisor(a.nheads_k);
    let steps = blocks.count() * group;

    let k = SmemTile::<T, BLOCK_N, HEADDIM>::at(dynamic_shared());
    let v = SmemTile::<T, BLOCK_N, HEADDIM>::at(k.end());
    let q_tile = SmemTile::<T, BLOCK_M, HEADDIM>::at(v.end());
    let d_o_tile = SmemTile::<T, BLOCK_M, HEADDIM>::at(q_tile.stage(STAGES - 1).end());
    let d_s_tile = SmemTile::<T, BLOCK_N, BLOCK_M>::at(d_o_tile.stage(STAGES - 1).end());
    let heads = (sequence, head_k * group);
    let mut queries = QueryStream::new(&p, threads, heads, &blocks, q_tile, d_o_tile, d_s_tile.end());

    let rows_of = |tensor: &Tensor<T>, columns| sequence.key_matrix(tensor, head_k, first_key, columns, true);
    TileStream::new(threads, rows_of(&a.k, a.headdim)).copy_async(k);
    TileStream::new(threads, rows_of(&a.v, a.headdim_v)).copy_async(v);
    copy::commit();
    if steps > 0 {
        queries.copy_async(&p, steps % STAGES);
    }
    copy::wait::<0>();
    sync_threads();

    let own_row = warp_id() * 16 * M as u32;
    let mut d_k = Accumulator::<M, D_COLUMNS>::zero();
    let mut d_v = Accumulator::<M, D_COLUMNS>::zero();
    // Counted down to 0, the steps take one register, and tell the stages too.
    let mut steps_left = steps;
    while steps_left > 0 {
        let stage = steps_left % STAGES;
        let (q, d_o) = (q_tile.stage(stage), d_o_tile.stage(stage));
        let Place { rows, place } = queries.place;
        let is_masked = is_masked::<CAUSAL>(&mask_of_block, BLOCK_N as u32, rows);
        let scale = f32::from_bits(unknown_before(a.softmax_scale.to_bits(), place)) * LOG2_E;
        let first_anew = |x| first_anew::<T, CAUSAL>(&a, &mask_of_block, BLOCK_N as u32, BLOCK_M as u32, x);
        if steps_left > 1 {
            queries.copy_next_async(&p, (steps_left - 1) % STAGES, first_anew);
        }
        for part in 0..BLOCK_M / (8 * S_COLUMNS) {
            let query = (part * 8 * S_COLUMNS) as u32;

            // Pᵀ = 2^(scale · K Qᵀ - LSE)
            let mut s = Accumulator::<M, S_COLUMNS>::zero();
            for depth in 0..HEADDIM / T::DEPTH {
                s.add_product_transposed(&LeftOperand::<T, M>::load(k, own_row, depth), q, query, depth);
            }
            if is_masked {
                let mask = mask_anew::<T, CAUSAL>(&a, &mask_of_block, BLOCK_N as u32, rows);
                mask.apply_transposed(&mut s, own_row, query);
            }
            let bases = ColumnVector::load(queries.bases(stage).offset(query));
            s.zip_columns(&bases, |s, base| ex2(fma(s, scale, -base)));
            let p = s;

            // dV += Pᵀ dO
            let first = part * 8 * S_COLUMNS / T::DEPTH;
            for depth in 0..8 * S_COLUMNS / T::DEPTH {
                d_v.add_product(&p.operand::<T>(depth), d_o, first + depth, 0);
            }

            // dSᵀ = Pᵀ ∘ (V dOᵀ - D)
            let mut d_s = Accumulator::<M, S_COLUMNS>::zero();
            for depth in 0..HEADDIM / T::DEPTH {
                d_s.add_product_transposed(&LeftOperand::<T, M>::load(v, own_row, depth), d_o, query, depth);
            }
            d_s.zip_columns(&ColumnVector::load(queries.sums(stage).offset(query)), |d_p, sum| d_p - sum);
            d_s.zip(&p, |d_p, p| d_p * p);
            d_s.store_at(d_s_tile, own_row, query);

            // dK += dSᵀ Q
            for depth in 0..8 * S_COLUMNS / T::DEPTH {
                d_k.add_product(&d_s.operand::<T>(depth), q, first + depth, 0);
            }
        }

        // dS is whole, the next block is here, and nobody reads this one any more.
        copy::wait::<0>();
        sync_threads();
        add_d_q::<T, HEADDIM, BLOCK_M, BLOCK_N, Q_ROWS, Q_COLUMNS>(d_s_tile, k, &p, place);
        steps_left -= 1;
        if steps_left > 0 {
            queries.advance(&p, first_anew);
        }
        // Nobody reads dS any more, nor, after the last step, K, whose tile becomes dK's.
        sync_threads();
    }

    let last = d_v.element_mut(0, 0, 0, 0).to_bits();
    let KeyBlock { first_key, head_k, sequence } = key_block_anew::<T, CAUSAL>(&a, BLOCK_N as u32, last);
    let rows_of = |tensor: &Tensor<T>, columns| sequence.key_matrix(tensor, head_k, first_key, columns, true);
    d_k.map(|_, _, d_k| d_k * a.softmax_scale);
    d_k.store(k, own_row);
    d_v.store(v, own_row);
    sync_warp(ALL);
    k.store_rows(own_row, 16 * M as u32, rows_of(&p.d_k.cast(), a.headdim));
    v.store_rows(own_row, 16 * M as u32, rows_of(&p.d_v.cast(), a.headdim_v));
}
