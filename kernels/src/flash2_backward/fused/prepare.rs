//! What the fused pass needs of each row: the base of its exponents, D, and sums of dQ that are 0.
//!
//! HBM traffic: dO and O once; the sums of dQ once.
use super::places::{ROWS, first_place, statistic_at};
use crate::config::Config;
use crate::flash2_backward::probabilities::exponent_base;
use crate::flash2_backward::{Params, config};
use crate::schedule::{self, QueryBlock};
use cuda_std::element::{bf16, f16};
use cuda_std::fragment::MatrixElement;
use cuda_std::kernel;
use cuda_std::math::fma;
use cuda_std::thread::thread_idx_x;
use cuda_std::warp::reduce;

/// Of a block.
pub(crate) const THREADS: u32 = 256;

const fn prepare_config<T: MatrixElement, const HEADDIM: usize>() -> Config {
    Config {
        family: "flash2.fused.prepare",
        causal: None,
        block_m: ROWS,
        threads: THREADS,
        min_blocks_per_sm: 4,
        ..config::<T>(HEADDIM, HEADDIM, false, false)
    }
}

/// Eight elements a lane: one access of 16 bytes. As many lanes as reductions take; of rows of 96 and 192 a quarter is idle.
const fn lanes_a_row(headdim: usize) -> u32 {
    (headdim / 8).next_power_of_two() as u32
}

/// The statistics of all rows, and zeros in their sums of dQ. Grid: `ceil(seqlen_q / ROWS) * nheads * batch`.
#[kernel(
    name = "flash2_bwd_fused_prepare_{T}_d{HEADDIM}",
    for T in [f16, bf16], HEADDIM in [32, 64, 96, 128, 192, 256],
    config = prepare_config,
    table = PREPARE,
)]
pub fn prepare<T: MatrixElement, const HEADDIM: usize>(p: Params) {
    prepare_block::<T, HEADDIM, ROWS>(p, true);
}

/// The statistics of `BLOCK_M` rows, by as many threads as the kernel has, and zeros in their sums of dQ if it `clears` them.
#[inline(always)]
#[track_caller]
pub(crate) fn prepare_block<T: MatrixElement, const HEADDIM: usize, const BLOCK_M: u32>(p: Params, clears: bool) {
    let a = p.attention.of::<T>();
    let block = schedule::query_block(&a, BLOCK_M);
    let QueryBlock { first_row, head, sequence } = block;
    if block.rows() == 0 {
        return;
    }
    let d_o = p.d_o.cast::<T>();
    let lanes = const { lanes_a_row(HEADDIM) };
    let rows_at_once = const { THREADS / lanes_a_row(HEADDIM) };
    const { assert!(BLOCK_M.is_multiple_of(THREADS / lanes_a_row(HEADDIM)), "whole rounds") };
    let column = thread_idx_x() % lanes * 8;
    let first_place = first_place(&a, &sequence, head, BLOCK_M);
    for i in 0..BLOCK_M / rows_at_once {
        let row = first_row + i * rows_at_once + thread_idx_x() / lanes;
        let place = first_place + row;
        let is_row = row < sequence.seqlen_q;
        if clears && column < HEADDIM as u32 {
            let sums = p.d_q_sums.offset(place as usize * HEADDIM + column as usize);
            sums.store_vector(0, [0.0; 4]);
            sums.store_vector(4, [0.0; 4]);
        }
        let mut sum = 0.0;
        if is_row && column < a.headdim_v {
            let o = sequence.queries(&a.o, head, row).load_vector::<8>(column as usize);
            let d_o = sequence.queries(&d_o, head, row).load_vector::<8>(column as usize);
            for i in 0..8 {
                sum = fma(o[i].to_f32(), d_o[i].to_f32(), sum);
            }
        }
        let sum = match lanes {
            4 => reduce::<4, f32>(sum, |x, y| x + y),
            8 => reduce::<8, f32>(sum, |x, y| x + y),
            16 => reduce::<16, f32>(sum, |x, y| x + y),
            _ => reduce::<32, f32>(sum, |x, y| x + y),
        };
        if thread_idx_x().is_multiple_of(lanes) {
            // A row that is not there has P = 0, as one that sees no key.
            let mut statistics = (f32::NEG_INFINITY, 0.0);
            if is_row {
                let at = a.first_row(&sequence, head) + row as usize;
                let d_lse = if p.d_lse.is_null() { 0.0 } else { p.d_lse.load(at) };
                statistics = (a.softmax_lse.load(at), sum - d_lse);
                if !p.row_sums.is_null() {
                    p.row_sums.store(at, statistics.1);
                }
            }
            p.statistics.store(statistic_at(place, 0, BLOCK_M), exponent_base(statistics.0));
            p.statistics.store(statistic_at(place, 1, BLOCK_M), statistics.1);
        }
    }
}
