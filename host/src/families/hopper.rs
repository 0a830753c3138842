//! The launch of FlashAttention-3: its grid and its tensor maps.
use cuda_std::Kernel;
use cuda_std::tensor::TensorMapDescription;
use kernels::Config;
use kernels::attention::{Attention, Tensor};
use kernels::flash3::schedule::{Schedule, tiles_of_head, units_of_head};
use kernels::flash3::{GROUP_ROWS, Params};

use crate::error::{Error, Result};
use crate::launch::Launch;
use crate::parameters::ALIGNMENT;
use crate::problem::Problem;
use crate::target::Resources;

/// The launch for a problem with rows and keys.
pub(super) fn launch(
    kernel: &'static Kernel<Params, Config>,
    problem: &Problem,
    attention: Attention,
    machine: &Resources,
) -> Result<Launch> {
    let (schedule, blocks) = schedule(problem, &kernel.config, machine.multiprocessors)?;
    let [q, k, v] = maps(problem, [&attention.q, &attention.k, &attention.v], &kernel.config)?;
    let parameters = Params {
        q: (machine.tensor_map)(&q)?,
        k: (machine.tensor_map)(&k)?,
        v: (machine.tensor_map)(&v)?,
        attention,
        schedule,
    };
    Launch::new(kernel, blocks, parameters)
}

/// From so many keys on the last heads of a causal problem are left to blocks of one tile: on an H100 that gains 1 % to 5 %,
/// and loses as much where sequences are shorter, unless the units of a head differ.
const LONG: usize = 4096;

/// Who does what, and how many blocks of threads that takes. There are no more than there are tiles.
fn schedule(problem: &Problem, config: &Config, multiprocessors: u32) -> Result<(Schedule, u64)> {
    let tiles = tiles_of_head(problem.seqlen_q as u32, config.block_m);
    let heads = (problem.batch as u64).saturating_mul(problem.nheads as u64);
    Launch::check_blocks(heads.saturating_mul(u64::from(tiles)))?;
    let heads = heads as u32;
    let units = units_of_head(tiles, problem.is_causal());
    let is_long = problem.seqlen_k >= LONG || !tiles.is_multiple_of(2);
    let walked_heads = if problem.varlen.is_some() {
        // Tiles of sequences of different lengths cost what they cost: the GPU balances them.
        0
    } else if problem.is_causal() && is_long {
        // The units that are left over when all walkers end, and as many as half of them do meanwhile.
        let unwalked = (u64::from(multiprocessors) * 3).div_ceil(2 * u64::from(units));
        u64::from(heads).saturating_sub(unwalked) as u32
    } else {
        heads
    };
    let walkers = u64::from(multiprocessors).min(u64::from(walked_heads) * u64::from(units)) as u32;
    let blocks = u64::from(heads - walked_heads) * u64::from(tiles) + u64::from(walkers);
    Ok((Schedule { walkers, walked_heads }, blocks))
}

/// The maps of Q, K and V: heads and batches are their outer dimensions.
fn maps<T>(problem: &Problem, tensors: [&Tensor<T>; 3], config: &Config) -> Result<[TensorMapDescription; 3]> {
    let [q, k, v] = tensors;
    let (total_q, total_k, batch) = match &problem.varlen {
        None => (problem.seqlen_q, problem.seqlen_k, problem.batch),
        Some(varlen) => (varlen.total_q, varlen.total_k, 1),
    };
    let map = |argument, tensor: &Tensor<T>, tile, (rows, heads, columns): (usize, usize, usize)| {
        let address = tensor.data.address();
        let outer = [stride_of(heads, tensor.head_stride), stride_of(batch, tensor.batch_stride)];
        let (rows, row_stride) = stride_of(rows, tensor.row_stride);
        TensorMapDescription::of_panels(config.dtype, tile, address, (rows, columns as u64), row_stride, &outer)
            .map_err(|reason| Error::TensorMap { argument, reason })
    };
    let Problem { nheads, nheads_k, headdim, headdim_v, .. } = *problem;
    Ok([
        map("q", q, (GROUP_ROWS, config.headdim), (total_q, nheads, headdim))?,
        map("k", k, (config.block_n, config.headdim), (total_k, nheads_k, headdim))?,
        map("v", v, (config.block_n, config.headdim_v), (total_k, nheads_k, headdim_v))?,
    ])
}

/// A dimension of a map. The stride of a dimension of one element is never taken, and may be anything: here what every
/// dtype of Hopper's products can have.
fn stride_of(extent: usize, stride: u64) -> (u64, u64) {
    (extent as u64, if extent == 1 { ALIGNMENT as u64 } else { stride })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layout;
    use crate::options::AttentionOptions;
    use cuda_std::element::bf16;
    use cuda_std::{DType, Global};
    use kernels::flash3::FORWARD;

    /// (batch, seqlen, nheads, headdim), in bf16.
    fn problem(shape: [usize; 4], causal: bool) -> Problem {
        let x = Layout::contiguous(DType::BF16, &shape).expect("small");
        Problem::new(&x, &x, &x, &AttentionOptions::new().causal(causal)).expect("valid")
    }

    /// Walkers, the heads that they do, and all blocks of threads, on a GPU of 132 multiprocessors.
    fn scheduled(shape: [usize; 4], causal: bool) -> (u32, u32, u64) {
        let config = Config { block_m: 128, block_n: 128, ..FORWARD[0].config };
        let (schedule, blocks) = schedule(&problem(shape, causal), &config, 132).expect("small");
        (schedule.walkers, schedule.walked_heads, blocks)
    }

    #[test]
    fn walkers_do_all_heads_but_the_last_of_long_causal_problems() {
        assert_eq!(scheduled([1, 16384, 16, 128], false), (132, 16, 132));
        assert_eq!(scheduled([1, 1024, 4, 128], false), (32, 4, 32));
        assert_eq!(scheduled([1, 1024, 4, 128], true), (16, 4, 16));
        // Of five tiles the one in the middle is a unit of its own.
        assert_eq!(scheduled([64, 640, 4, 128], true), (132, 190, 132 + 66 * 5));
        // 64 units a head: 198 units are four heads, of 128 tiles each.
        assert_eq!(scheduled([1, 16384, 16, 128], true), (132, 12, 132 + 4 * 128));
        assert_eq!(scheduled([1, 16384, 2, 128], true), (0, 0, 2 * 128));
    }

    #[test]
    fn too_many_tiles_are_refused() {
        let shape = [1 << 16, 1 << 16, 64, 8];
        let config = Config { block_m: 64, ..FORWARD[0].config };
        let refused = schedule(&problem(shape, false), &config, 132).expect_err("2^32 tiles").to_string();
        assert_eq!(refused, "blocks of a kernel: 4294967296; allowed: at most 2147483647");
    }

    #[test]
    fn maps_hold_heads_and_batches_and_no_stride_that_is_never_taken() {
        let problem = problem([1, 300, 4, 40], false);
        let tensor = Tensor::<bf16> { data: Global::NULL, batch_stride: 7, row_stride: 192, head_stride: 48 };
        let config = Config { headdim: 64, headdim_v: 64, block_n: 192, dtype: DType::BF16, ..FORWARD[0].config };
        let [q, k, _] = maps(&problem, [&tensor; 3], &config).expect("valid");
        assert_eq!((q.dimensions, q.strides), ([40, 300, 4, 1, 1], [384, 96, 32, 0]));
        assert_eq!((q.tile, k.tile), ([64, 64, 1, 1, 1], [64, 192, 1, 1, 1]));
        let odd = Tensor { row_stride: 191, ..tensor };
        let refused = maps(&problem, [&tensor, &odd, &tensor], &config).expect_err("odd").to_string();
        assert_eq!(refused, "k: no tensor map: stride 0 is no multiple of 16 bytes, or 2^40 or more");
    }
}
