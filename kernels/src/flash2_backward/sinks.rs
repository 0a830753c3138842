//! The gradient of the sinks: logits that take part in the softmax of all rows of their head, and that no value belongs to.
use super::{Params, Rows, config};
use crate::attention::divisor;
use crate::config::Config;
use cuda_std::math::{LOG2_E, ex2};
use cuda_std::thread::{WARP, block_idx_x, lane_id, sync_threads, thread_idx_x, warp_id};
use cuda_std::warp::reduce;
use cuda_std::{kernel, shared_array};

const THREADS: u32 = 1024;
const WARPS: usize = (THREADS / WARP) as usize;

const fn sinks_config() -> Config {
    Config {
        family: "flash2.sinks",
        block_m: THREADS,
        threads: THREADS,
        barriers: 1,
        ..config::<f32>(0, 0, false, true)
    }
}

/// dSink = -Σ 2^(sink - LSE) · D over all rows of a head. Grid: `nheads`.
///
/// Rows are added in an order that does not depend on the run: each thread's own with compensation (Kahan), since they may
/// be thousands, and then those of the threads as a tree.
#[kernel(name = "flash2_bwd_sinks", config = sinks_config, table = SINKS)]
pub fn sinks(p: Params) {
    let a = p.attention;
    let head = block_idx_x();
    let sink = a.sink(head);
    let Rows { batches, tokens } = Rows::of(&a);
    let rows = batches * tokens;
    let tokens = divisor(tokens);
    let of_warps = shared_array![f32; WARPS];

    let (mut sum, mut excess) = (0.0, 0.0);
    let mut index = thread_idx_x();
    while index < rows {
        let (batch, token) = (index / tokens, index % tokens);
        let at = (batch as u64 * a.lse_batch_stride + head as u64 * a.lse_head_stride + token as u64) as usize;
        let lse = a.softmax_lse.load(at);
        // A row of neither keys nor sink has no softmax.
        let of_row = if lse == f32::NEG_INFINITY { 0.0 } else { ex2(sink - lse * LOG2_E) * p.row_sums.load(at) };
        let x = of_row - excess;
        let raised = sum + x;
        excess = (raised - sum) - x;
        sum = raised;
        index += THREADS;
    }

    let of_warp = reduce::<32, f32>(sum, |x, y| x + y);
    if lane_id() == 0 {
        of_warps.store(warp_id(), of_warp);
    }
    sync_threads();
    let sum = reduce::<32, f32>(of_warps.load(lane_id()), |x, y| x + y);
    if thread_idx_x() == 0 {
        p.d_sinks.store(head as usize, -sum);
    }
}
