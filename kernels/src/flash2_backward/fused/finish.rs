//! dQ from its sums.
//!
//! HBM traffic: the sums and dQ once.
use super::part;
use super::places::{ROWS, d_q_sums, first_place};
use crate::config::Config;
use crate::flash2_backward::{Params, config};
use crate::schedule::{self, QueryBlock};
use cuda_std::element::{bf16, f16};
use cuda_std::fragment::{Accumulator, MatrixElement};
use cuda_std::shared::dynamic_shared;
use cuda_std::thread::{sync_threads, warp_id};
use cuda_std::{SmemTile, kernel};

const fn finish_config<
    T: MatrixElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const Q_ROWS: usize,
    const Q_COLUMNS: usize,
>() -> Config {
    Config {
        family: "flash2.fused.finish",
        causal: None,
        block_m: BLOCK_M as u32,
        threads: (BLOCK_M * HEADDIM / (16 * Q_ROWS * 8 * Q_COLUMNS) * 32) as u32,
        accumulators: Accumulator::<Q_ROWS, Q_COLUMNS>::REGISTERS as u32,
        shared_bytes: (BLOCK_M * HEADDIM * size_of::<T>()) as u32,
        barriers: 1,
        ..config::<T>(HEADDIM, HEADDIM, false, false)
    }
}

/// dQ = softmax_scale times its sums. Grid: `ceil(seqlen_q / BLOCK_M) * nheads * batch`.
///
/// `BLOCK_M`, `Q_ROWS` and `Q_COLUMNS` are those of the kernel that summed, in the order of whose registers the sums are.
#[kernel(
    name = "flash2_bwd_fused_finish_{T}_d{HEADDIM}_m{BLOCK_M}",
    for T in [f16, bf16],
        (HEADDIM, BLOCK_M, Q_ROWS, Q_COLUMNS) in [
            (32, 64, 1, 4),
            (64, 64, 2, 4),
            (96, 64, 1, 6),
            (128, 64, 2, 4),
            (192, 64, 2, 6),
            (192, 32, 1, 6),
            (256, 64, 2, 8),
            (256, 32, 2, 4),
        ],
    config = finish_config,
    table = FINISH,
)]
pub fn finish<
    T: MatrixElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const Q_ROWS: usize,
    const Q_COLUMNS: usize,
>(
    p: Params,
) {
    let a = p.attention.of::<T>();
    let block = schedule::query_block(&a, BLOCK_M as u32);
    let QueryBlock { first_row, head, sequence } = block;
    if block.rows() == 0 {
        return;
    }
    let tile = SmemTile::<T, BLOCK_M, HEADDIM>::at(dynamic_shared());
    let place = first_place(&a, &sequence, head, ROWS) + first_row;
    let mut d_q = Accumulator::<Q_ROWS, Q_COLUMNS>::load(d_q_sums::<HEADDIM, Q_ROWS, Q_COLUMNS>(&p, place));
    d_q.map(|_, _, d_q| d_q * a.softmax_scale);
    let (row, column) = part::<HEADDIM, Q_ROWS, Q_COLUMNS>();
    d_q.store_at(tile, row, column);
    sync_threads();
    let count = const { (128 * Q_ROWS * Q_COLUMNS / HEADDIM) as u32 };
    tile.store_rows(warp_id() * count, count, sequence.query_matrix(&p.d_q.cast(), head, first_row, a.headdim, true));
}
