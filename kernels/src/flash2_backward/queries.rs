//! dQ.
use super::probabilities::{Probabilities, exponent_base};
use super::{Params, STAGES, config};
use crate::config::{Config, SHARED_BYTES_OF_EVERY_GPU};
use crate::flash2::threads;
use crate::mask::Mask;
use crate::schedule::{self, QueryBlock};
use cuda_std::element::{bf16, f16, tf32};
use cuda_std::fragment::{Accumulator, LeftOperand, MatrixElement, RowVector};
use cuda_std::math::unknown_before;
use cuda_std::shared::dynamic_shared;
use cuda_std::thread::{sync_threads, sync_threads_or, warp_id};
use cuda_std::warp::{ALL, sync_warp};
use cuda_std::{Global, SmemTile, TileStream, copy, kernel};

const fn queries_config<
    T: MatrixElement,
    const HEADDIM: usize,
    const HEADDIM_V: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const M: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const CAUSAL: bool,
    const GENERAL: bool,
>() -> Config {
    assert!(S_COLUMNS * 8 == BLOCK_N && D_COLUMNS * 8 == HEADDIM && BLOCK_M.is_multiple_of(16 * M));
    let rows = BLOCK_M + STAGES as usize * BLOCK_N;
    let bytes = (rows * (HEADDIM + HEADDIM_V) * size_of::<T>()) as u32;
    assert!(!GENERAL || bytes <= SHARED_BYTES_OF_EVERY_GPU);
    let scores = 2 * Accumulator::<M, S_COLUMNS>::REGISTERS;
    Config {
        family: "flash2.queries",
        block_m: BLOCK_M as u32,
        block_n: BLOCK_N as u32,
        from_keys: 0,
        threads: threads(BLOCK_M, M),
        accumulators: (scores + Accumulator::<M, D_COLUMNS>::REGISTERS) as u32,
        shared_bytes: bytes,
        barriers: if CAUSAL || GENERAL { 3 } else { 2 },
        ..config::<T>(HEADDIM, HEADDIM_V, CAUSAL, GENERAL)
    }
}

/// dQ of `BLOCK_M` queries of one head.
///
/// Grid: `ceil(seqlen_q / BLOCK_M) * nheads * batch`. A warp has 16 `M` queries.
#[kernel(
    name = "flash2_bwd_dq_{T}_d{HEADDIM}{HEADDIM_V!=HEADDIM?_v}{CAUSAL?_causal}{GENERAL?_general}",
    for T in [f16, bf16],
        (HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, M, S_COLUMNS, D_COLUMNS) in [
            // On an H100, TFLOP/s of this kernel alone (three products) at 4k tokens, not causal: 339.
            (32, 32, 128, 64, 2, 8, 4),
            // 422; with 32 keys a block 394, with 64 queries and one row block a warp 326.
            (64, 64, 128, 64, 2, 8, 8),
            // 400; with 64 queries and keys and one row block a warp 335.
            (96, 96, 128, 32, 2, 4, 12),
            // 392; with 64 keys a block and one row block a warp 335, with 64 queries so 312.
            (128, 128, 128, 32, 2, 4, 16),
            // 317; with 128 queries and 32 keys 306.
            (192, 192, 64, 64, 1, 8, 24),
            // 309; with 128 queries and 32 keys 308.
            (192, 128, 64, 64, 1, 8, 24),
            // 282.
            (256, 256, 64, 32, 1, 4, 32),
        ],
        (CAUSAL, GENERAL) in [(false, false), (true, false)],
    for T in [f16, bf16],
        (HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, M, S_COLUMNS, D_COLUMNS) in [
            // The same with ALiBi: 136.
            (32, 32, 64, 32, 1, 4, 4),
            // 198.
            (64, 64, 64, 32, 1, 4, 8),
            // 218.
            (96, 96, 64, 32, 1, 4, 12),
            // 247.
            (128, 128, 64, 32, 1, 4, 16),
            // 305.
            (192, 192, 64, 32, 1, 4, 24),
            // 295.
            (192, 128, 64, 32, 1, 4, 24),
            // 251; with 32 keys a block 203 where this was at 239.
            (256, 256, 64, 16, 1, 2, 32),
        ],
        (CAUSAL, GENERAL) in [(false, true)],
    for T in [f32, tf32],
        (HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, M, S_COLUMNS, D_COLUMNS) in [
            // In f32 and tf32: 24 and 55.
            (32, 32, 64, 32, 1, 4, 4),
            // 25 and 67.
            (64, 64, 64, 32, 1, 4, 8),
            // 24 and 66; with 32 keys a block, which not every GPU has the shared memory for, 20 and 60.
            (128, 128, 64, 16, 1, 2, 16),
            // 9 and 32: one warp a block, as shared memory has room for no more rows.
            (256, 256, 16, 16, 1, 2, 32),
        ],
        (CAUSAL, GENERAL) in [(false, true)],
    config = queries_config,
    table = QUERIES,
)]
pub fn queries<
    T: MatrixElement,
    const HEADDIM: usize,
    const HEADDIM_V: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const M: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const CAUSAL: bool,
    const GENERAL: bool,
>(
    p: Params,
) {
    let a = p.attention.of::<T>();
    let (d_o, d_q) = (p.d_o.cast::<T>(), p.d_q.cast::<T>());
    let threads = const { threads(BLOCK_M, M) };
    let block = schedule::query_block(&a, BLOCK_M as u32);
    let QueryBlock { sequence, head, first_row } = block;
    let rows = block.rows();
    if rows == 0 {
        return;
    }
    let mask = Mask::of::<T, CAUSAL, GENERAL>(&a, &sequence);
    let key_blocks = mask.key_blocks(first_row, BLOCK_M as u32, BLOCK_N as u32);

    let q = SmemTile::<T, BLOCK_M, HEADDIM>::at(dynamic_shared());
    let d_o_tile = SmemTile::<T, BLOCK_M, HEADDIM_V>::at(q.end());
    let k = SmemTile::<T, BLOCK_N, HEADDIM>::at(d_o_tile.end());
    let v = SmemTile::<T, BLOCK_N, HEADDIM_V>::at(k.stage(STAGES - 1).end());

    let (head_k, first_key) = (a.head_k(head), key_blocks.begin * BLOCK_N as u32);
    let aligned = a.is_aligned::<GENERAL>();
    let keys_of = |tensor, columns| sequence.key_matrix(tensor, head_k, first_key, columns, aligned);
    let mut keys = TileStream::new(threads, keys_of(&a.k, a.headdim));
    let mut values = TileStream::new(threads, keys_of(&a.v, a.headdim_v));
    let rows_of = |tensor, columns| sequence.query_matrix(tensor, head, first_row, columns, aligned);
    let (mut q_rows, mut d_o_rows) =
        (TileStream::new(threads, rows_of(&a.q, a.headdim)), TileStream::new(threads, rows_of(&d_o, a.headdim_v)));
    q_rows.copy_async(q);
    d_o_rows.copy_async(d_o_tile);
    if key_blocks.count() > 0 {
        keys.copy_async(k.stage(key_blocks.begin % STAGES));
        values.copy_async(v.stage(key_blocks.begin % STAGES));
    }
    copy::commit();

    let own_row = warp_id() * 16 * M as u32;
    let first = a.first_row(&sequence, head) + first_row as usize;
    let statistic = |of: Global<f32>, absent: f32| {
        RowVector::<M>::new(|row| if own_row + row < rows { of.load(first + (own_row + row) as usize) } else { absent })
    };
    let bases = statistic(a.softmax_lse, f32::NEG_INFINITY).map(exponent_base);
    let sums = statistic(p.row_sums, 0.0);

    let probabilities = Probabilities::new::<GENERAL>(&a, &sequence, head, mask);
    let mut d_q_sum = Accumulator::<M, D_COLUMNS>::zero();
    // Whether what this thread copied of Q and dO is not finite; not known yet at first.
    let mut rows_nonfinite = None;
    for j in key_blocks.begin..key_blocks.end {
        // Block j is here, and no warp reads block j - 1 any more, whose stage block j + 1 takes.
        copy::wait::<0>();
        let partial = key_blocks.is_partial(j);
        // Whether a part of the block is hidden, and something is not finite: then the product must leave out what is hidden.
        let poisonous = if (CAUSAL || GENERAL) && (partial || a.may_hide::<GENERAL>()) {
            let of_rows = match rows_nonfinite {
                Some(nonfinite) => nonfinite,
                None => q_rows.copied_nonfinite(q) | d_o_rows.copied_nonfinite(d_o_tile),
            };
            rows_nonfinite = Some(of_rows);
            let (k, v) = (k.stage(j % STAGES), v.stage(j % STAGES));
            sync_threads_or(of_rows | keys.copied_nonfinite(k) | values.copied_nonfinite(v))
        } else {
            sync_threads();
            false
        };
        if j + 1 < key_blocks.end {
            keys.copy_async(k.stage((j + 1) % STAGES));
            values.copy_async(v.stage((j + 1) % STAGES));
            copy::commit();
        }
        let (k, v) = (k.stage(j % STAGES), v.stage(j % STAGES));
        // Without tensor cores addresses take more registers than finding them anew for each block.
        let own_row = if T::TENSOR_CORES { own_row } else { unknown_before(own_row, j) };
        let place = (first_row + own_row, j * BLOCK_N as u32);

        // P = 2^(scale · Q Kᵀ - LSE)
        let mut s = Accumulator::<M, S_COLUMNS>::zero();
        for depth in 0..T::steps(HEADDIM) {
            s.add_product_transposed(&LeftOperand::<T, M>::load(q, own_row, depth), k, 0, depth);
        }
        let weights = probabilities.of_scores(&mut s, &bases, place, partial);

        // dS = P ∘ (dO Vᵀ - D)
        let mut d_s = Accumulator::<M, S_COLUMNS>::zero();
        for depth in 0..T::steps(HEADDIM_V) {
            d_s.add_product_transposed(&LeftOperand::<T, M>::load(d_o_tile, own_row, depth), v, 0, depth);
        }
        probabilities.drop(&mut d_s, place);
        d_s.zip_rows(&sums, |d_p, sum| d_p - sum);
        d_s.zip(&weights, |d_p, weight| d_p * weight);

        // dQ += dS K
        if poisonous {
            let sees = |row, key| probabilities.sees(place.0 + row, place.1 + key);
            d_q_sum.add_kept_product(&d_s, sees, k, 0);
        } else {
            for depth in 0..BLOCK_N / T::DEPTH {
                d_q_sum.add_product(&d_s.operand::<T>(depth), k, depth, 0);
            }
        }
    }

    // Q's tile becomes dQ's, each warp's rows its own. If there was no block of keys, Q is only now sure to be in.
    copy::wait::<0>();
    sync_threads();
    d_q_sum.map(|_, _, d_q| d_q * a.softmax_scale);
    d_q_sum.store(q, own_row);
    sync_warp(ALL);
    q.store_rows(own_row, 16 * M as u32, rows_of(&d_q, a.headdim));
}
