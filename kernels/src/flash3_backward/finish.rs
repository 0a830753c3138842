//! dQ from its sums.
//!
//! HBM traffic: the sums and dQ once.
use super::{GROUP_ROWS, GROUPS, Params, config_of};
use crate::attention::Attention;
use crate::config::Config;
use crate::flash2_backward;
use crate::flash2_backward::fused::first_place;
use crate::schedule::{self, QueryBlock};
use cuda_std::element::{bf16, f16};
use cuda_std::fragment::Accumulator;
use cuda_std::matrix::PackedElement;
use cuda_std::shared::dynamic_shared;
use cuda_std::thread::{block_idx_x, grid_dim_x, sync_threads, warp_id};
use cuda_std::wgmma::{Registers, TransposedRows};
use cuda_std::{SmemTile, grid, kernel};

/// Warps of a block: those of the warpgroups that summed.
const WARPS: u32 = 8;

const fn finish_config<
    T: PackedElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const COLUMNS: usize,
    const STEPS: usize,
    const TRANSPOSED: bool,
    const FROM_REGISTERS: bool,
>() -> Config {
    assert!(WARPS as usize * 16 * 8 * COLUMNS == BLOCK_M * HEADDIM && COLUMNS == 2 * STEPS);
    Config {
        family: "flash3.backward.finish",
        block_m: BLOCK_M as u32,
        threads: 32 * WARPS,
        accumulators: Accumulator::<1, COLUMNS>::REGISTERS as u32,
        shared_bytes: SmemTile::<T, BLOCK_M, HEADDIM>::BYTES,
        barriers: 1,
        ..config_of(T::DTYPE, HEADDIM, None)
    }
}

/// For kernels whose arguments are those of a pass with blocks of so many keys.
const fn finish_ring_config<
    T: PackedElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const COLUMNS: usize,
    const STEPS: usize,
    const TRANSPOSED: bool,
    const FROM_REGISTERS: bool,
>() -> Config {
    let config = finish_config::<T, HEADDIM, BLOCK_M, COLUMNS, STEPS, TRANSPOSED, FROM_REGISTERS>();
    Config { block_n: GROUPS * GROUP_ROWS, ..config }
}

/// dQ = softmax_scale times its sums. Grid: `ceil(seqlen_q / BLOCK_M) * nheads * batch`.
///
/// A warp has 16 rows and `COLUMNS` blocks of eight columns of dQ, or of its transpose: as the warp of
/// [`whole`](super::whole()) or [`split`](super::split()) that summed them; the latter adds them `FROM_REGISTERS`.
#[kernel(
    name = "flash3_bwd_finish_{T}_d{HEADDIM}_m{BLOCK_M}",
    arch = sm_90a,
    for T in [f16, bf16],
        (HEADDIM, BLOCK_M, COLUMNS, STEPS, TRANSPOSED, FROM_REGISTERS) in [
            (64, 128, 8, 4, false, false),
            (128, 64, 8, 4, true, false),
            (128, 80, 10, 5, true, false),
            (256, 64, 16, 8, false, true),
        ],
    config = finish_config,
    table = FINISH,
)]
pub fn finish<
    T: PackedElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const COLUMNS: usize,
    const STEPS: usize,
    const TRANSPOSED: bool,
    const FROM_REGISTERS: bool,
>(
    p: flash2_backward::Params,
) {
    grid::wait_for_prerequisites();
    grid::launch_dependents();
    let a = p.attention.of::<T>();
    let block = schedule::query_block(&a, BLOCK_M as u32);
    if block.rows() == 0 {
        return;
    }
    let place = first_place(&a, &block.sequence, block.head, BLOCK_M as u32) + block.first_row;
    finish_block::<T, HEADDIM, BLOCK_M, COLUMNS, STEPS, TRANSPOSED, FROM_REGISTERS>(&p, &a, block, place);
}

/// The same for the last heads of K of [`ring`](super::ring()), as many as its lag, which it leaves. Grid:
/// `ceil(seqlen_q / BLOCK_M)` for each of their heads of Q.
#[kernel(
    name = "flash3_bwd_finish_ring_{T}_d{HEADDIM}_m{BLOCK_M}",
    arch = sm_90a,
    for T in [f16, bf16],
        (HEADDIM, BLOCK_M, COLUMNS, STEPS, TRANSPOSED, FROM_REGISTERS) in [
            (64, 128, 8, 4, false, false),
            (128, 64, 8, 4, true, false),
        ],
    config = finish_ring_config,
    table = FINISH_RING,
)]
pub fn finish_ring<
    T: PackedElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const COLUMNS: usize,
    const STEPS: usize,
    const TRANSPOSED: bool,
    const FROM_REGISTERS: bool,
>(
    p: Params,
) {
    grid::wait_for_prerequisites();
    grid::launch_dependents();
    let a = p.backward.attention.of::<T>();
    let blocks = a.nheads * a.batch * a.seqlen_q.div_ceil(BLOCK_M as u32);
    let block = schedule::query_block_at(&a, BLOCK_M as u32, blocks - grid_dim_x() + block_idx_x());
    let place = p.ring.first_place(&a, &block.sequence, block.head, BLOCK_M as u32) + block.first_row;
    finish_block::<T, HEADDIM, BLOCK_M, COLUMNS, STEPS, TRANSPOSED, FROM_REGISTERS>(&p.backward, &a, block, place);
}

/// dQ of a block of queries, whose sums begin in `place`.
#[inline(always)]
#[track_caller]
fn finish_block<
    T: PackedElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const COLUMNS: usize,
    const STEPS: usize,
    const TRANSPOSED: bool,
    const FROM_REGISTERS: bool,
>(
    p: &flash2_backward::Params,
    a: &Attention<T>,
    QueryBlock { first_row, head, sequence }: QueryBlock,
    place: u32,
) {
    let tile = SmemTile::<T, BLOCK_M, HEADDIM>::at(dynamic_shared());
    let own = warp_id() as usize * Accumulator::<1, COLUMNS>::ELEMENTS;
    let sums = p.d_q_sums.offset(place as usize * HEADDIM + own);
    let mut d_q: Accumulator<1, COLUMNS> =
        if FROM_REGISTERS { Accumulator::load(sums) } else { Accumulator::load_registers(sums) };
    d_q.map(|_, _, d_q| d_q * a.softmax_scale);
    if TRANSPOSED {
        Registers::<T, STEPS>::of(&d_q).store_transposed(TransposedRows::of(tile, 16 * warp_id()));
    } else {
        let (row, columns) = (16 * warp_id() % BLOCK_M as u32, 16 * warp_id() / BLOCK_M as u32);
        d_q.store_at(tile, row, 8 * COLUMNS as u32 * columns);
    }
    sync_threads();
    let count = const { BLOCK_M as u32 / WARPS };
    tile.store_rows(warp_id() * count, count, sequence.query_matrix(&p.d_q.cast(), head, first_row, a.headdim, true));
}
