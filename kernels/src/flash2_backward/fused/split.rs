//! The fused pass for wide heads: half of the warps sum dV, the others dK.
use super::query_stream::Place;
use super::{QueryStream, add_d_q, first_anew, is_masked, key_block, key_block_anew, mask_anew};
use crate::attention::{Tensor, divisor};
use crate::config::Config;
use crate::flash2_backward::{Params, STAGES, config};
use crate::mask::Mask;
use crate::schedule::KeyBlock;
use cuda_std::barrier::NamedBarrier;
use cuda_std::element::{bf16, f16};
use cuda_std::fragment::{Accumulator, ColumnVector, LeftOperand, PackedMatrixElement};
use cuda_std::math::{LOG2_E, ex2, fma};
use cuda_std::shared::dynamic_shared;
use cuda_std::thread::{sync_threads, warp_id};
use cuda_std::{SmemTile, TileStream, copy, kernel};

const fn split_config<
    T: PackedMatrixElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const M: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const Q_ROWS: usize,
    const Q_COLUMNS: usize,
    const CAUSAL: bool,
>() -> Config {
    assert!(BLOCK_M.is_multiple_of(8 * S_COLUMNS) && BLOCK_N.is_multiple_of(16 * M));
    assert!(BLOCK_N * HEADDIM == 4 * 16 * M * 8 * D_COLUMNS && BLOCK_M * HEADDIM == 8 * 16 * Q_ROWS * 8 * Q_COLUMNS);
    // Beside the four for all, an arrival and a wait for each part of a step, and two for the warps that share keys.
    let is_shared = D_COLUMNS * 8 < HEADDIM;
    let parts = BLOCK_M * D_COLUMNS / (S_COLUMNS * HEADDIM);
    let barriers = 4 + 2 * parts + if is_shared { 2 } else { 0 };
    let scores = if is_shared { 3 } else { 2 };
    let tiles = BLOCK_N * (2 * HEADDIM + scores * BLOCK_M) * size_of::<T>();
    let of_scores = 2 * Accumulator::<M, S_COLUMNS>::REGISTERS;
    Config {
        family: "flash2.fused",
        block_m: BLOCK_M as u32,
        block_n: BLOCK_N as u32,
        from_keys: 0,
        threads: SPLIT_THREADS,
        accumulators: (of_scores + Accumulator::<M, D_COLUMNS>::REGISTERS) as u32,
        shared_bytes: (tiles + QueryStream::<T, BLOCK_M, HEADDIM>::BYTES) as u32,
        barriers: barriers as u32,
        ..config::<T>(HEADDIM, HEADDIM, CAUSAL, false)
    }
}

/// Two groups of four warps.
const SPLIT_THREADS: u32 = 256;

/// dK and dV of `BLOCK_N` keys of one head of K and V, and their part of dQ: for heads so wide that a warp's registers
/// hold the sums of one of the two alone. Grid: `ceil(seqlen_k / BLOCK_N) * nheads_k * batch`.
///
/// The first four warps compute Pᵀ and sum dV, the other four compute dSᵀ and sum dK; both do the same products, with
/// K, Q and dO on one side, V, dO and Q on the other. A warp has 16 `M` keys and `8 D_COLUMNS` columns of its sum. P is
/// handed over in shared memory, in the place of the dS that it becomes, and in f16, which is exacter than bf16 for
/// what is at most 1.
///
/// dQ of a step is added in the next, by the first group after its own products, by the second before them. So the
/// first runs ahead, the second finds P there when it needs it, and one multiplies while the other takes exponents.
#[kernel(
    name = "flash2_bwd_fused_{T}_d{HEADDIM}_m{BLOCK_M}{CAUSAL?_causal}",
    for T in [f16, bf16],
        (HEADDIM, BLOCK_M, BLOCK_N, M, S_COLUMNS, D_COLUMNS, Q_ROWS, Q_COLUMNS) in [
            // On an H100, bf16, 512 to 16384 tokens, beside PyTorch's FlashAttention-2: 1.06, causal 1.18.
            (96, 64, 128, 2, 4, 12, 1, 6),
            // 1.15, causal 1.14.
            (128, 64, 128, 2, 4, 16, 2, 4),
            // 1.18, causal 1.16.
            (192, 64, 64, 2, 4, 12, 2, 6),
            // 1.29, causal 1.22.
            (256, 64, 64, 2, 4, 16, 2, 8),
            // For where there is no more than 163 KB of shared memory: on the same GPU 1.03, causal 1.00.
            (192, 32, 64, 2, 2, 12, 1, 6),
            // 1.06, causal 1.10.
            (256, 32, 64, 2, 2, 16, 2, 4),
        ],
        CAUSAL in [false, true],
    config = split_config,
    table = SPLIT,
)]
pub fn split<
    T: PackedMatrixElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
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

    // How many warps share the keys of a sum, a part of its columns each. One alone has the Pᵀ or dSᵀ of all queries, in so
    // many parts, one after the other, each a left operand as it comes out. Several have a part of the queries each, and
    // find the others' in shared memory.
    let across = const { (HEADDIM / (8 * D_COLUMNS)) as u32 };
    let parts = const { BLOCK_M * D_COLUMNS / (S_COLUMNS * HEADDIM) };

    let k = SmemTile::<T, BLOCK_N, HEADDIM>::at(dynamic_shared());
    let v = SmemTile::<T, BLOCK_N, HEADDIM>::at(k.end());
    let q_tile = SmemTile::<T, BLOCK_M, HEADDIM>::at(v.end());
    let d_o_tile = SmemTile::<T, BLOCK_M, HEADDIM>::at(q_tile.stage(STAGES - 1).end());
    let d_s_tiles = SmemTile::<T, BLOCK_N, BLOCK_M>::at(d_o_tile.stage(STAGES - 1).end());
    let p_tile = d_s_tiles.stage(2);
    let statistics = if across == 1 { p_tile.start() } else { p_tile.end() };
    let heads = (sequence, head_k * group);
    let mut queries = QueryStream::new(&p, SPLIT_THREADS, heads, &blocks, q_tile, d_o_tile, statistics);

    let rows_of = |tensor: &Tensor<T>, columns| sequence.key_matrix(tensor, head_k, first_key, columns, true);
    TileStream::new(SPLIT_THREADS, rows_of(&a.k, a.headdim)).copy_async(k);
    TileStream::new(SPLIT_THREADS, rows_of(&a.v, a.headdim_v)).copy_async(v);
    copy::commit();
    if steps > 0 {
        queries.copy_async(&p, steps % STAGES);
    }
    copy::wait::<0>();
    sync_threads();

    let scale = a.softmax_scale * LOG2_E;
    let is_values = warp_id() < 4;
    let warp = warp_id() % 4;
    let own_row = warp / across * 16 * M as u32;
    let own_query = warp % across * 8 * S_COLUMNS as u32;
    let own_column = warp % across * 8 * D_COLUMNS as u32;
    let left = if is_values { k } else { v };
    let (right, other) = if is_values { (q_tile, d_o_tile) } else { (d_o_tile, q_tile) };
    let statistics = if is_values { queries.bases(0) } else { queries.sums(0) };
    let mut sum = Accumulator::<M, D_COLUMNS>::zero();
    let mut before = Place::NOWHERE.place;
    // Counted down to 0, the steps take one register, and tell the stages too.
    let mut steps_left = steps;
    while steps_left > 0 {
        let stage = steps_left % STAGES;
        let (right, other) = (right.stage(stage), other.stage(stage));
        let d_s_tile = d_s_tiles.stage(steps_left % 2);
        let handed = SmemTile::<f16, BLOCK_N, BLOCK_M>::at(d_s_tile.start());
        let Place { rows, place } = queries.place;
        let is_masked = is_masked::<CAUSAL>(&mask_of_block, BLOCK_N as u32, rows);

        let add_before = || {
            let d_s_tile = d_s_tiles.stage((steps_left + 1) % 2);
            add_d_q::<T, HEADDIM, BLOCK_M, BLOCK_N, Q_ROWS, Q_COLUMNS>(d_s_tile, k, &p, before);
        };
        if !is_values && before != Place::NOWHERE.place {
            add_before();
        }
        let first_anew = |x| first_anew::<T, CAUSAL>(&a, &mask_of_block, BLOCK_N as u32, BLOCK_M as u32, x);
        if steps_left > 1 {
            queries.place = queries.copy_next_async(&p, (steps_left - 1) % STAGES, first_anew);
        }
        for part in 0..parts {
            let query = own_query + (part * 8 * S_COLUMNS) as u32;

            // K Qᵀ or V dOᵀ
            let mut x = Accumulator::<M, S_COLUMNS>::zero();
            for depth in 0..HEADDIM / T::DEPTH {
                x.add_product_transposed(&LeftOperand::<T, M>::load(left, own_row, depth), right, query, depth);
            }
            let columns = ColumnVector::load(statistics.offset(stage * 2 * BLOCK_M as u32 + query));
            if is_values {
                // Pᵀ = 2^(scale · K Qᵀ - LSE)
                if is_masked {
                    let mask = mask_anew::<T, CAUSAL>(&a, &mask_of_block, BLOCK_N as u32, rows);
                    mask.apply_transposed(&mut x, own_row, query);
                }
                x.zip_columns(&columns, |s, base| ex2(fma(s, scale, -base)));
                x.store_at(handed, own_row, query);
                if across > 1 {
                    x.store_at(p_tile, own_row, query);
                }
                if part == 0 {
                    NamedBarrier::<1, SPLIT_THREADS>.arrive();
                } else {
                    NamedBarrier::<2, SPLIT_THREADS>.arrive();
                }
            } else {
                // dSᵀ = Pᵀ ∘ (V dOᵀ - D)
                x.zip_columns(&columns, |d_p, sum| d_p - sum);
                if part == 0 {
                    NamedBarrier::<1, SPLIT_THREADS>.sync();
                } else {
                    NamedBarrier::<2, SPLIT_THREADS>.sync();
                }
                x.zip_tile(handed, own_row, query, |d_p, p| d_p * p);
                x.store_at(d_s_tile, own_row, query);
            }

            // dV += Pᵀ dO or dK += dSᵀ Q
            if across == 1 {
                for depth in 0..8 * S_COLUMNS / T::DEPTH {
                    let row = part * 8 * S_COLUMNS / T::DEPTH + depth;
                    sum.add_product(&x.operand::<T>(depth), other, row, 0);
                }
            } else {
                if is_values {
                    NamedBarrier::<3, { SPLIT_THREADS / 2 }>.sync();
                } else {
                    NamedBarrier::<4, { SPLIT_THREADS / 2 }>.sync();
                }
                let scores = if is_values { p_tile } else { d_s_tile };
                for depth in 0..BLOCK_M / T::DEPTH {
                    let operand = LeftOperand::<T, M>::load(scores, own_row, depth);
                    sum.add_product(&operand, other, depth, own_column);
                }
            }
        }
        if is_values && before != Place::NOWHERE.place {
            add_before();
        }
        before = place;

        // dS is whole, the next block is here, and nobody reads this one any more, nor the dS before.
        copy::wait::<0>();
        sync_threads();
        steps_left -= 1;
    }
    // Asked of the last step: a number of all steps would be kept through the loop.
    if before != Place::NOWHERE.place {
        let d_s_tile = d_s_tiles.stage(1);
        add_d_q::<T, HEADDIM, BLOCK_M, BLOCK_N, Q_ROWS, Q_COLUMNS>(d_s_tile, k, &p, before);
    }

    // Nobody reads K any more: it and V become dK and dV.
    sync_threads();
    let last = sum.element_mut(0, 0, 0, 0).to_bits();
    let KeyBlock { first_key, head_k, sequence } = key_block_anew::<T, CAUSAL>(&a, BLOCK_N as u32, last);
    let rows_of = |tensor: &Tensor<T>, columns| sequence.key_matrix(tensor, head_k, first_key, columns, true);
    let factor = if is_values { 1.0 } else { a.softmax_scale };
    sum.map(|_, _, x| x * factor);
    let tile = if is_values { v } else { k };
    let gradient = if is_values { rows_of(&p.d_v.cast(), a.headdim_v) } else { rows_of(&p.d_k.cast(), a.headdim) };
    sum.store_at(tile, own_row, own_column);
    sync_threads();
    let count = const { BLOCK_N as u32 / 4 };
    tile.store_rows(warp * count, count, gradient);
}
