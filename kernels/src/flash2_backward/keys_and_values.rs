//! dK and dV where both fit the registers of a warp.
use super::probabilities::Probabilities;
use super::query_walk::QueryWalk;
use super::{Params, config};
use crate::config::Config;
use crate::flash2::threads;
use crate::mask::Mask;
use crate::schedule::{self, KeyBlock};
use cuda_std::element::{bf16, f16, tf32};
use cuda_std::fragment::{Accumulator, ColumnVector, LeftOperand, MatrixElement};
use cuda_std::kernel;
use cuda_std::shared::dynamic_shared;
use cuda_std::thread::warp_id;
use cuda_std::warp::{ALL, sync_warp};

const fn keys_and_values_config<
    T: MatrixElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const M: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const CAUSAL: bool,
    const GENERAL: bool,
>() -> Config {
    assert!(S_COLUMNS * 8 == BLOCK_M && D_COLUMNS * 8 == HEADDIM && BLOCK_N.is_multiple_of(16 * M));
    let scores = 2 * Accumulator::<M, S_COLUMNS>::REGISTERS;
    Config {
        family: "flash2.keys_and_values",
        block_m: BLOCK_M as u32,
        block_n: BLOCK_N as u32,
        from_keys: 0,
        threads: threads(BLOCK_N, M),
        accumulators: (scores + 2 * Accumulator::<M, D_COLUMNS>::REGISTERS) as u32,
        shared_bytes: (QueryWalk::<T, HEADDIM, HEADDIM, BLOCK_M, BLOCK_N, CAUSAL, GENERAL>::BYTES) as u32,
        barriers: QueryWalk::<T, HEADDIM, HEADDIM, BLOCK_M, BLOCK_N, CAUSAL, GENERAL>::BARRIERS,
        ..config::<T>(HEADDIM, HEADDIM, CAUSAL, GENERAL)
    }
}

/// dK and dV of `BLOCK_N` keys of one head of K and V.
///
/// Grid: `ceil(seqlen_k / BLOCK_N) * nheads_k * batch`. A warp has 16 `M` keys. S and dP are computed transposed, with keys
/// as rows, so that Pᵀ and dSᵀ come out as left operands of the products that dV and dK are the sums of.
#[kernel(
    name = "flash2_bwd_dkdv_{T}_d{HEADDIM}{CAUSAL?_causal}{GENERAL?_general}",
    for T in [f16, bf16],
        (HEADDIM, BLOCK_M, BLOCK_N, M, S_COLUMNS, D_COLUMNS) in [
            // On an H100, TFLOP/s of this kernel alone (four products) at 4k tokens, not causal: 309.
            (32, 64, 128, 2, 8, 4),
            // 350; with 64 queries a block and one row block a warp 291, with 64 keys a block 249.
            (64, 32, 128, 2, 4, 8),
            // 309.
            (96, 64, 128, 1, 8, 12),
            // 315; with 32 queries a block 277, with 64 keys a block 285.
            (128, 64, 128, 1, 8, 16),
        ],
        (CAUSAL, GENERAL) in [(false, false), (true, false)],
    for T in [f16, bf16],
        (HEADDIM, BLOCK_M, BLOCK_N, M, S_COLUMNS, D_COLUMNS) in [
            // The same with ALiBi: 113.
            (32, 32, 64, 1, 4, 4),
            // 174.
            (64, 32, 64, 1, 4, 8),
            // 202.
            (96, 32, 64, 1, 4, 12),
            // 241.
            (128, 32, 64, 1, 4, 16),
        ],
        (CAUSAL, GENERAL) in [(false, true)],
    for T in [f32, tf32],
        (HEADDIM, BLOCK_M, BLOCK_N, M, S_COLUMNS, D_COLUMNS) in [
            // In f32 and tf32: 23 and 64.
            (32, 32, 64, 1, 4, 4),
            // 25 and 85.
            (64, 32, 64, 1, 4, 8),
            // 23 and 86.
            (128, 16, 64, 1, 2, 16),
        ],
        (CAUSAL, GENERAL) in [(false, true)],
    config = keys_and_values_config,
    table = KEYS_AND_VALUES,
)]
pub fn keys_and_values<
    T: MatrixElement,
    const HEADDIM: usize,
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
    let threads = const { threads(BLOCK_N, M) };
    let block = schedule::key_block(&a, BLOCK_N as u32);
    let KeyBlock { first_key, sequence, .. } = block;
    if block.rows() == 0 {
        return;
    }
    let mask = Mask::of::<T, CAUSAL, GENERAL>(&a, &sequence);
    let blocks = mask.query_blocks(first_key, BLOCK_N as u32, BLOCK_M as u32);

    let mut walk = QueryWalk::<T, HEADDIM, HEADDIM, BLOCK_M, BLOCK_N, CAUSAL, GENERAL>::new(
        &p,
        &a,
        block,
        blocks,
        threads,
        dynamic_shared(),
    );
    let (k, v) = (walk.k, walk.v);

    let own_row = warp_id() * 16 * M as u32;
    let mut d_k = Accumulator::<M, D_COLUMNS>::zero();
    let mut d_v = Accumulator::<M, D_COLUMNS>::zero();
    while walk.wait() {
        let step = walk.step();
        let probabilities = Probabilities::new::<GENERAL>(&a, &sequence, step.head, mask);
        let place = (first_key + own_row, step.first_row);

        // Pᵀ = 2^(scale · K Qᵀ - LSE)
        let mut s = Accumulator::<M, S_COLUMNS>::zero();
        for depth in 0..T::steps(HEADDIM) {
            s.add_product_transposed(&LeftOperand::<T, M>::load(k, own_row, depth), step.q, 0, depth);
        }
        let bases = ColumnVector::load(step.bases);
        let weights = probabilities.of_scores_transposed(&mut s, &bases, place, step.partial);
        let mut p = s;

        // dV += Pᵀ dO
        probabilities.drop_transposed(&mut p, place);
        if step.poisonous {
            d_v.add_kept_product(&p, probabilities.sees_from(place), step.d_o, 0);
        } else {
            for depth in 0..BLOCK_M / T::DEPTH {
                d_v.add_product(&p.operand::<T>(depth), step.d_o, depth, 0);
            }
        }

        // Nothing is read ahead for the next product before this one: there are no registers for it.
        sync_warp(ALL);

        // dSᵀ = Pᵀ ∘ (V dOᵀ - D)
        let mut d_s = Accumulator::<M, S_COLUMNS>::zero();
        for depth in 0..T::steps(HEADDIM) {
            d_s.add_product_transposed(&LeftOperand::<T, M>::load(v, own_row, depth), step.d_o, 0, depth);
        }
        probabilities.drop_transposed(&mut d_s, place);
        d_s.zip_columns(&ColumnVector::load(step.sums), |d_p, sum| d_p - sum);
        d_s.zip(&weights, |d_p, weight| d_p * weight);

        // dK += dSᵀ Q
        if step.poisonous {
            d_k.add_kept_product(&d_s, probabilities.sees_from(place), step.q, 0);
        } else {
            for depth in 0..BLOCK_M / T::DEPTH {
                d_k.add_product(&d_s.operand::<T>(depth), step.q, depth, 0);
            }
        }
    }

    let last = d_v.element_mut(0, 0, 0, 0).to_bits();
    // K and V are read by nobody any more, and their tiles become dK's and dV's, each warp's rows its own.
    d_k.map(|_, _, d_k| d_k * a.softmax_scale);
    d_k.store(k, own_row);
    d_v.store(v, own_row);
    sync_warp(ALL);
    k.store_rows(own_row, 16 * M as u32, walk.keys_anew(&p.d_k.cast(), a.headdim, last));
    v.store_rows(own_row, 16 * M as u32, walk.keys_anew(&p.d_v.cast(), a.headdim_v, last));
}
