//! D: what dS subtracts from dP, a number for each row of S.
//!
//! HBM traffic: dO and O once.
use super::{Params, Rows, config};
use crate::attention::divisor;
use crate::config::Config;
use crate::schedule::head_of;
use cuda_std::element::{bf16, f16, tf32};
use cuda_std::fragment::MatrixElement;
use cuda_std::math::{fma, round_to_tf32};
use cuda_std::thread::{block_idx_x, thread_idx_x};
use cuda_std::warp::reduce;
use cuda_std::{Element, Global, kernel};

const THREADS: u32 = 128;
/// Lanes that share a row: with four elements each they take a row of 32 at once, and wider ones in turns.
const LANES: u32 = 8;
const ELEMENTS: u32 = 4;

const fn row_sums_config<T: MatrixElement>() -> Config {
    Config {
        family: "flash2.row_sums",
        block_m: THREADS / LANES,
        threads: THREADS,
        min_blocks_per_sm: 8,
        ..config::<T>(0, 0, false, true)
    }
}

/// D = rowsum(dO ∘ O) - dLSE, of dO as the product dP = dO Vᵀ takes it: dS = P ∘ (dP - D) is a small difference. Grid: `ceil(tokens * nheads * batches / block_m)`, with `seqlen_q` tokens in each batch, or all
/// tokens and 1 batch where sequences follow each other.
#[kernel(
    name = "flash2_bwd_row_sums_{T}",
    for T in [f16, bf16, f32, tf32],
    config = row_sums_config,
    table = ROW_SUMS,
)]
pub fn row_sums<T: MatrixElement>(p: Params) {
    let a = p.attention.of::<T>();
    let d_o = p.d_o.cast::<T>();
    let Rows { batches, tokens } = Rows::of(&a);
    let index = block_idx_x() as u64 * (THREADS / LANES) as u64 + (thread_idx_x() / LANES) as u64;
    let exists = index < tokens as u64 * a.nheads as u64 * batches as u64;
    let tokens = divisor(tokens) as u64;
    let (token, (head, batch)) = (index % tokens, head_of((index / tokens) as u32, a.nheads));

    let mut sum = 0.0;
    if exists {
        let (o, d_o) = (a.o.row(batch, head, token), d_o.row(batch, head, token));
        let mut column = thread_idx_x() % LANES * ELEMENTS;
        while column < a.headdim_v {
            let whole = a.aligned != 0 && column + ELEMENTS <= a.headdim_v;
            let (x, y) = (elements(o, column, a.headdim_v, whole), elements(d_o, column, a.headdim_v, whole));
            for i in 0..ELEMENTS as usize {
                let y = if T::TF32 { round_to_tf32(y[i]) } else { y[i] };
                sum = fma(x[i], y, sum);
            }
            column += LANES * ELEMENTS;
        }
    }
    let sum = reduce::<LANES, f32>(sum, |x, y| x + y);
    if exists && thread_idx_x().is_multiple_of(LANES) {
        let at = (batch as u64 * a.lse_batch_stride + head as u64 * a.lse_head_stride + token) as usize;
        let d_lse = if p.d_lse.is_null() { 0.0 } else { p.d_lse.load(at) };
        p.row_sums.store(at, sum - d_lse);
    }
}

/// Elements `column` and on of a row, in one access if they are `whole`; 0 for those beyond the last.
#[inline(always)]
#[track_caller]
fn elements<T: Element>(row: Global<T>, column: u32, columns: u32, whole: bool) -> [f32; ELEMENTS as usize] {
    let mut found = [0.0; ELEMENTS as usize];
    if whole {
        let vector = row.load_vector::<{ ELEMENTS as usize }>(column as usize);
        for i in 0..ELEMENTS as usize {
            found[i] = vector[i].to_f32();
        }
    } else {
        for i in 0..ELEMENTS {
            if column + i < columns {
                found[i as usize] = row.load((column + i) as usize).to_f32();
            }
        }
    }
    found
}
