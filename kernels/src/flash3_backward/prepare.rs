//! What the pass needs of each row: the base of its exponents, D, and sums of dQ that are 0.
use super::{GROUP_ROWS, GROUPS, Params, config_of, ring};
use crate::attention::{Attention, divisor};
use crate::config::Config;
use crate::flash2_backward;
use crate::flash2_backward::fused::{PREPARE_THREADS, prepare_block};
use crate::mask::Mask;
use crate::schedule::{self, QueryBlock};
use cuda_std::element::{bf16, f16};
use cuda_std::fragment::MatrixElement;
use cuda_std::thread::{block_idx_x, thread_idx_x};
use cuda_std::{grid, kernel};

const fn prepare_config<T: MatrixElement, const HEADDIM: usize, const BLOCK_M: u32>() -> Config {
    Config {
        family: "flash3.backward.prepare",
        block_m: BLOCK_M,
        threads: PREPARE_THREADS,
        min_blocks_per_sm: 4,
        ..config_of(T::DTYPE, HEADDIM, None)
    }
}

/// For kernels whose arguments are those of a pass with blocks of so many keys.
const fn prepare_keys_config<T: MatrixElement, const HEADDIM: usize, const BLOCK_M: u32>() -> Config {
    Config { block_n: GROUPS * GROUP_ROWS, ..prepare_config::<T, HEADDIM, BLOCK_M>() }
}

/// [`flash2_backward::fused::prepare`](crate::flash2_backward::fused::prepare()) in blocks of `BLOCK_M` rows, and the counters of
/// [shared](super::Shares) keys. Grid: `ceil(seqlen_q / BLOCK_M) * nheads * batch`.
#[kernel(
    name = "flash3_bwd_prepare_{T}_d{HEADDIM}_m{BLOCK_M}",
    arch = sm_90a,
    for T in [f16, bf16], (HEADDIM, BLOCK_M) in [(64, 128), (128, 64), (128, 80), (256, 64)],
    config = prepare_keys_config,
    table = PREPARE,
)]
pub fn prepare<T: MatrixElement, const HEADDIM: usize, const BLOCK_M: u32>(p: Params) {
    grid::wait_for_prerequisites();
    grid::launch_dependents();
    clear_shares(&p);
    prepare_block::<T, HEADDIM, BLOCK_M>(p.backward, true);
}

/// Nothing is left by those who share keys: said by the first block of threads.
#[inline(always)]
#[track_caller]
fn clear_shares(p: &Params) {
    if block_idx_x() == 0 {
        p.shares.clear(PREPARE_THREADS);
    }
}

/// The same for [`ring`](super::ring()): of the sums it clears those of the heads that begin, and the counters of all. Grid:
/// as for [`prepare()`].
#[kernel(
    name = "flash3_bwd_prepare_ring_{T}_d{HEADDIM}_m{BLOCK_M}",
    arch = sm_90a,
    for T in [f16, bf16], (HEADDIM, BLOCK_M) in [(64, 128), (128, 64)],
    config = prepare_keys_config,
    table = PREPARE_RING,
)]
pub fn prepare_ring<T: MatrixElement, const HEADDIM: usize, const BLOCK_M: u32>(p: Params) {
    grid::wait_for_prerequisites();
    grid::launch_dependents();
    clear_shares(&p);
    prepare_block::<T, HEADDIM, BLOCK_M>(p.backward, false);
    let a: Attention<T> = p.backward.attention.of::<T>();
    let QueryBlock { first_row, head, sequence } = schedule::query_block(&a, BLOCK_M);
    let group = divisor(a.nheads / divisor(a.nheads_k));
    let pair = ring::pair(&a, &sequence, head / group);
    if first_row == 0 && head % group == 0 && thread_idx_x() == 0 {
        p.ring.clear(pair);
    }
    if p.ring.is_first(pair) {
        let place = p.ring.first_place(&a, &sequence, head, BLOCK_M) + first_row;
        let sums = p.backward.d_q_sums.offset(place as usize * HEADDIM + 4 * thread_idx_x() as usize);
        for i in 0..const { BLOCK_M as usize * HEADDIM / (4 * PREPARE_THREADS as usize) } {
            sums.store_vector(4 * i * PREPARE_THREADS as usize, [0.0; 4]);
        }
    }
}

/// The same for [`heads`](super::heads()), which stores the first of the sums: nothing is cleared. dQ of queries that
/// see no key is written here. Grid: as for [`prepare()`].
#[kernel(
    name = "flash3_bwd_prepare_heads_{T}_d{HEADDIM}_m{BLOCK_M}",
    arch = sm_90a,
    for T in [f16, bf16], (HEADDIM, BLOCK_M) in [(64, 128)],
    config = prepare_config,
    table = PREPARE_HEADS,
)]
pub fn prepare_heads<T: MatrixElement, const HEADDIM: usize, const BLOCK_M: u32>(p: flash2_backward::Params) {
    grid::wait_for_prerequisites();
    grid::launch_dependents();
    prepare_block::<T, HEADDIM, BLOCK_M>(p, false);
    clear_unseeing::<T, BLOCK_M>(&p, &p.attention.of());
}

/// Rows of the block of queries of this block of threads, if none of them sees a key: the pass does not meet them. Else 0.
#[inline(always)]
#[track_caller]
pub(super) fn rows_without_keys<T>(a: &Attention<T>, block_m: u32) -> u32 {
    let block = schedule::query_block(a, block_m);
    let rows = block.rows().min(block_m);
    let sees_keys = rows > 0 && Mask::of::<T, false, true>(a, &block.sequence).end(block.first_row + rows - 1) > 0;
    if sees_keys { 0 } else { rows }
}

/// Writes dQ of these.
#[inline(always)]
#[track_caller]
pub(super) fn clear_unseeing<T: MatrixElement, const BLOCK_M: u32>(p: &flash2_backward::Params, a: &Attention<T>) {
    let rows = rows_without_keys(a, BLOCK_M);
    let QueryBlock { first_row, head, sequence } = schedule::query_block(a, BLOCK_M);
    let chunks = divisor(a.headdim.div_ceil(8));
    let mut chunk = thread_idx_x();
    while chunk < rows * chunks {
        let row = sequence.queries(&p.d_q.cast::<T>(), head, first_row + chunk / chunks);
        row.offset((chunk % chunks * 8) as usize).cast::<u32>().store_vector(0, [0; 4]);
        chunk += PREPARE_THREADS;
    }
}
