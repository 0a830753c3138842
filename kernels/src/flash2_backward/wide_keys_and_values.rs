//! dK and dV where a head is too wide for the registers of a warp to hold both.
//!
//! Half of the warps sum dV, the others dK, each for the same keys. Those of dV compute S, those of dK dP: as many products
//! for either, and none twice. What dP - D is multiplied with goes from the first to the second through shared memory.
use super::probabilities::Probabilities;
use super::query_walk::QueryWalk;
use super::{Params, config};
use crate::config::{Config, SHARED_BYTES_OF_EVERY_GPU};
use crate::flash2::threads;
use crate::mask::Mask;
use crate::schedule::{self, KeyBlock};
use cuda_std::element::{bf16, f16, tf32};
use cuda_std::fragment::{Accumulator, ColumnVector, LeftOperand, MatrixElement};
use cuda_std::kernel;
use cuda_std::math::unknown_before;
use cuda_std::shared::{Shared, dynamic_shared};
use cuda_std::thread::{WARP, lane_id, sync_threads, warp_id};
use cuda_std::warp::{ALL, sync_warp};

/// Keys of a warp.
const KEYS: usize = 16;

const fn wide_keys_and_values_config<
    T: MatrixElement,
    const HEADDIM: usize,
    const HEADDIM_V: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const V_COLUMNS: usize,
    const CAUSAL: bool,
    const GENERAL: bool,
    const LEAN: bool,
>() -> Config {
    assert!(S_COLUMNS * 8 == BLOCK_M && D_COLUMNS * 8 == HEADDIM && V_COLUMNS * 8 == HEADDIM_V);
    // Eight threads copy a row of a slab: all of them together no more than a tile.
    assert!(BLOCK_M.is_multiple_of(2 * threads(BLOCK_N, 1) as usize / 8));
    let weights = BLOCK_N * BLOCK_M * size_of::<f32>();
    let bytes = weights as u32 + QueryWalk::<T, HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, CAUSAL, GENERAL>::BYTES as u32;
    assert!(!LEAN || bytes <= SHARED_BYTES_OF_EVERY_GPU);
    let scores = 2 * Accumulator::<1, S_COLUMNS>::REGISTERS;
    Config {
        family: "flash2.keys_and_values",
        block_m: BLOCK_M as u32,
        block_n: BLOCK_N as u32,
        from_keys: 0,
        threads: 2 * threads(BLOCK_N, 1),
        accumulators: (scores + Accumulator::<1, D_COLUMNS>::REGISTERS) as u32,
        shared_bytes: bytes,
        barriers: 2 * QueryWalk::<T, HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, CAUSAL, GENERAL>::BARRIERS + 2,
        ..config::<T>(HEADDIM, HEADDIM_V, CAUSAL, GENERAL)
    }
}

/// dK and dV of `BLOCK_N` keys of one head of K and V: [`keys_and_values`](super::keys_and_values()) for wide heads.
///
/// Grid: `ceil(seqlen_k / BLOCK_N) * nheads_k * batch`. Two warps have the same 16 keys. `LEAN`: every GPU has the shared
/// memory; the others are faster where it is there.
#[kernel(
    name = "flash2_bwd_dkdv_{T}_d{HEADDIM}{HEADDIM_V!=HEADDIM?_v}{CAUSAL?_causal}{GENERAL?_general}{LEAN?_lean}",
    for T in [f16, bf16],
        (HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, S_COLUMNS, D_COLUMNS, V_COLUMNS) in [
            // On an H100, TFLOP/s of this kernel alone (four products) at 4k tokens, not causal: 292; with 32 queries 252.
            (192, 192, 64, 64, 8, 24, 24),
            // 277; with 32 queries 234.
            (192, 128, 64, 64, 8, 24, 16),
            // 262.
            (256, 256, 32, 64, 4, 32, 32),
        ],
        (CAUSAL, GENERAL, LEAN) in [(false, false, false), (true, false, false)],
    for T in [f16, bf16],
        (HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, S_COLUMNS, D_COLUMNS, V_COLUMNS) in [
            // The same with ALiBi: 217; with 64 keys a block 127 where this was at 133.
            (192, 192, 32, 32, 4, 24, 24),
            // 180.
            (192, 128, 32, 32, 4, 24, 16),
            // 212.
            (256, 256, 32, 64, 4, 32, 32),
        ],
        (CAUSAL, GENERAL, LEAN) in [(false, true, false)],
    for T in [f16, bf16],
        (HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, S_COLUMNS, D_COLUMNS, V_COLUMNS) in [
            // 162.
            (256, 256, 16, 32, 2, 32, 32),
        ],
        (CAUSAL, GENERAL, LEAN) in [(false, true, true)],
    for T in [f32, tf32],
        (HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, S_COLUMNS, D_COLUMNS, V_COLUMNS) in [
            // In f32 and tf32: 12.1 and 32.
            (256, 256, 16, 16, 2, 32, 32),
        ],
        (CAUSAL, GENERAL, LEAN) in [(false, true, false)],
    config = wide_keys_and_values_config,
    table = WIDE_KEYS_AND_VALUES,
)]
pub fn wide_keys_and_values<
    T: MatrixElement,
    const HEADDIM: usize,
    const HEADDIM_V: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const V_COLUMNS: usize,
    const CAUSAL: bool,
    const GENERAL: bool,
    const LEAN: bool,
>(
    p: Params,
) {
    let a = p.attention.of::<T>();
    let threads = const { 2 * threads(BLOCK_N, 1) };
    let block = schedule::key_block(&a, BLOCK_N as u32);
    let KeyBlock { first_key, sequence, .. } = block;
    if block.rows() == 0 {
        return;
    }
    let mask = Mask::of::<T, CAUSAL, GENERAL>(&a, &sequence);
    let blocks = mask.query_blocks(first_key, BLOCK_N as u32, BLOCK_M as u32);

    let weights = dynamic_shared();
    let at = weights.offset((BLOCK_N * BLOCK_M) as u32).cast();
    let mut walk =
        QueryWalk::<T, HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, CAUSAL, GENERAL>::new(&p, &a, block, blocks, threads, at);
    let (k, v) = (walk.k, walk.v);

    let pairs = const { (BLOCK_N / KEYS) as u32 };
    let pair = warp_id() % pairs;
    let own_row = pair * KEYS as u32;
    // Without tensor cores addresses take more registers than finding them anew in each step.
    let own_row_anew = |x| if T::TENSOR_CORES { own_row } else { unknown_before(own_row, x) };
    let weights = weights.offset(pair * (KEYS * BLOCK_M) as u32);
    if warp_id() < pairs {
        let mut d_v = Accumulator::<1, V_COLUMNS>::zero();
        while walk.wait() {
            let step = walk.step();
            let own_row = own_row_anew(step.first_row);
            let probabilities = Probabilities::new::<GENERAL>(&a, &sequence, step.head, mask);
            let place = (first_key + own_row, step.first_row);

            // Pᵀ = 2^(scale · K Qᵀ - LSE)
            let mut s = Accumulator::<1, S_COLUMNS>::zero();
            for depth in 0..T::steps(HEADDIM) {
                s.add_product_transposed(&LeftOperand::<T, 1>::load(k, own_row, depth), step.q, 0, depth);
            }
            let bases = ColumnVector::load(step.bases);
            give(weights, probabilities.of_scores_transposed(&mut s, &bases, place, step.partial));
            let mut p = s;
            sync_threads();

            // dV += Pᵀ dO
            probabilities.drop_transposed(&mut p, place);
            if step.poisonous {
                d_v.add_kept_product(&p, probabilities.sees_from(place), step.d_o, 0);
            } else {
                for depth in 0..BLOCK_M / T::DEPTH {
                    d_v.add_product(&p.operand::<T>(depth), step.d_o, depth, 0);
                }
            }
        }
        // K and V are read by nobody any more, and their tiles become dK's and dV's, each warp's rows its own.
        let last = d_v.element_mut(0, 0, 0, 0).to_bits();
        d_v.store(v, own_row);
        sync_warp(ALL);
        v.store_rows(own_row, KEYS as u32, walk.keys_anew(&p.d_v.cast(), a.headdim_v, last));
    } else {
        let mut d_k = Accumulator::<1, D_COLUMNS>::zero();
        while walk.wait() {
            let step = walk.step();
            let own_row = own_row_anew(step.first_row);
            let probabilities = Probabilities::new::<GENERAL>(&a, &sequence, step.head, mask);
            let place = (first_key + own_row, step.first_row);

            // dSᵀ = Pᵀ ∘ (V dOᵀ - D)
            let mut d_s = Accumulator::<1, S_COLUMNS>::zero();
            for depth in 0..T::steps(HEADDIM_V) {
                d_s.add_product_transposed(&LeftOperand::<T, 1>::load(v, own_row, depth), step.d_o, 0, depth);
            }
            probabilities.drop_transposed(&mut d_s, place);
            d_s.zip_columns(&ColumnVector::load(step.sums), |d_p, sum| d_p - sum);
            sync_threads();
            d_s.zip(&take(weights), |d_p, weight| d_p * weight);

            // dK += dSᵀ Q
            if step.poisonous {
                d_k.add_kept_product(&d_s, probabilities.sees_from(place), step.q, 0);
            } else {
                for depth in 0..BLOCK_M / T::DEPTH {
                    d_k.add_product(&d_s.operand::<T>(depth), step.q, depth, 0);
                }
            }
        }
        let last = d_k.element_mut(0, 0, 0, 0).to_bits();
        d_k.map(|_, _, d_k| d_k * a.softmax_scale);
        d_k.store(k, own_row);
        sync_warp(ALL);
        k.store_rows(own_row, KEYS as u32, walk.keys_anew(&p.d_k.cast(), a.headdim, last));
    }
}

/// Writes a matrix as the lanes hold it, 16 bytes of a lane after those of the lane before, for another warp to
/// [`take`](take()).
#[inline(always)]
#[track_caller]
fn give<const N: usize>(to: Shared<f32>, mut x: Accumulator<1, N>) {
    for n in 0..N {
        let mut element = |half, i| *x.element_mut(0, n, half, i);
        let elements = [element(0, 0), element(0, 1), element(1, 0), element(1, 1)];
        to.store_vector((n as u32 * WARP + lane_id()) * 4, elements);
    }
}

/// The matrix that another warp has given.
#[inline(always)]
#[track_caller]
fn take<const N: usize>(from: Shared<f32>) -> Accumulator<1, N> {
    let mut x = Accumulator::zero();
    for n in 0..N {
        let elements = from.load_vector::<4>((n as u32 * WARP + lane_id()) * 4);
        for half in 0..2 {
            for i in 0..2 {
                *x.element_mut(0, n, half, i) = elements[2 * half + i];
            }
        }
    }
    x
}
