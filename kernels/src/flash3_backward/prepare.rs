//! What the pass needs of each row: the base of its exponents, D, and sums of dQ that are 0.
use super::config_of;
use crate::config::Config;
use crate::flash2_backward::Params;
use crate::flash2_backward::fused::{PREPARE_THREADS, prepare_block};
use cuda_std::element::{bf16, f16};
use cuda_std::fragment::MatrixElement;
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

/// [`flash2_backward::fused::prepare`](crate::flash2_backward::fused::prepare()) in blocks of `BLOCK_M` rows. Grid:
/// `ceil(seqlen_q / BLOCK_M) * nheads * batch`.
#[kernel(
    name = "flash3_bwd_prepare_{T}_d{HEADDIM}_m{BLOCK_M}",
    arch = sm_90a,
    for T in [f16, bf16], (HEADDIM, BLOCK_M) in [(64, 128), (128, 64), (128, 80), (256, 64)],
    config = prepare_config,
    table = PREPARE,
)]
pub fn prepare<T: MatrixElement, const HEADDIM: usize, const BLOCK_M: u32>(p: Params) {
    grid::wait_for_prerequisites();
    grid::launch_dependents();
    prepare_block::<T, HEADDIM, BLOCK_M>(p);
}
