//! The launch of FlashAttention-3: its grid, the order of its tiles, and its tensor maps.
use cuda_std::Kernel;
use cuda_std::tensor::TensorMapDescription;
use kernels::attention::{Attention, Tensor};
use kernels::flash3::{GROUP_ROWS, Params};
use kernels::Config;

use crate::error::{Error, Result};
use crate::launch::Launch;
use crate::problem::Problem;
use crate::target::Resources;

/// As much of K and V as stays in the L2 cache while the heads of a turn read it, in bytes: Hopper has 50 MB, of which
/// each half of the chip sees one half as near.
const BYTES_IN_TURN: u64 = 32 << 20;

/// The launch for a problem with rows and keys.
pub(super) fn launch(
    kernel: &'static Kernel<Params, Config>,
    problem: &Problem,
    attention: Attention,
    machine: &Resources,
) -> Result<Launch> {
    let heads = (problem.batch as u64).saturating_mul(problem.nheads as u64);
    let of_head = problem.seqlen_q.div_ceil(kernel.config.block_m as usize) as u64;
    let tiles = Launch::check_blocks(of_head.saturating_mul(heads))?;
    // Tiles of one length are dealt out evenly; others the hardware balances.
    let blocks = if problem.varlen.is_some() { tiles } else { tiles.min(machine.multiprocessors) };
    let [q, k, v] = maps(problem, &attention, &kernel.config)?;
    let parameters = Params {
        q: (machine.tensor_map)(&q)?,
        k: (machine.tensor_map)(&k)?,
        v: (machine.tensor_map)(&v)?,
        attention,
        tiles,
        heads_in_turn: heads_in_turn(problem),
    };
    Launch::new(kernel, u64::from(blocks.next_multiple_of(kernel.cluster)), parameters)
}

/// How many heads of Q take turns. Without a mask all tiles of a head are alike, and one head after the other reads the
/// least at a time; a causal mask leaves short tiles for the end of each turn, so turns are as long as the cache allows.
fn heads_in_turn(problem: &Problem) -> u32 {
    let Problem { batch, seqlen_k, nheads, nheads_k, headdim, headdim_v, .. } = *problem;
    if !problem.is_causal() {
        return 1;
    }
    let row = (headdim as u64).saturating_add(headdim_v as u64).saturating_mul(problem.dtype.bytes() as u64);
    let heads_k = BYTES_IN_TURN / row.saturating_mul(seqlen_k as u64).max(1);
    let all = (batch as u64).saturating_mul(nheads as u64);
    heads_k.max(1).saturating_mul((nheads / nheads_k) as u64).clamp(1, all) as u32
}

/// The maps of Q, K and V: heads and batches are their outer dimensions.
fn maps(problem: &Problem, attention: &Attention, config: &Config) -> Result<[TensorMapDescription; 3]> {
    let (total_q, total_k, batch) = match &problem.varlen {
        None => (problem.seqlen_q, problem.seqlen_k, problem.batch),
        Some(varlen) => (varlen.total_q, varlen.total_k, 1),
    };
    let map = |argument, tensor: &Tensor<_>, tile, (rows, heads, columns): (usize, usize, usize)| {
        let address = tensor.data.address();
        let outer = [stride_of(heads, tensor.head_stride), stride_of(batch, tensor.batch_stride)];
        let (rows, row_stride) = stride_of(rows, tensor.row_stride);
        TensorMapDescription::of_panels(config.dtype, tile, address, (rows, columns as u64), row_stride, &outer)
            .map_err(|reason| Error::TensorMap { argument, reason })
    };
    let Problem { nheads, nheads_k, headdim, headdim_v, .. } = *problem;
    Ok([
        map("q", &attention.q, (GROUP_ROWS, config.headdim), (total_q, nheads, headdim))?,
        map("k", &attention.k, (config.block_n, config.headdim), (total_k, nheads_k, headdim))?,
        map("v", &attention.v, (config.block_n, config.headdim_v), (total_k, nheads_k, headdim_v))?,
    ])
}

/// A dimension of a map. The stride of a dimension of one element is never taken, and may be anything.
fn stride_of(extent: usize, stride: u64) -> (u64, u64) {
    (extent as u64, if extent == 1 { 0 } else { stride })
}
