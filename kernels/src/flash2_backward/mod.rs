//! FlashAttention-2, backward.
//!
//! Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", Algorithm 2.
//!
//! P is not kept from the forward pass: it is recomputed from Q, K and the LSE, P = 2^(score - LSE), tile by tile. With
//! dP = dO Vᵀ and D = rowsum(dO ∘ O) - dLSE,
//!
//! ```text
//! dV = Pᵀ dO,   dS = P ∘ (dP - D),   dK = softmax_scale · dSᵀ Q,   dQ = softmax_scale · dS K.
//! ```
//!
//! Dropout drops and scales the same elements of P, for dV, and of dP; a cap multiplies dS by its own gradient; dS before the
//! cap is the gradient of the bias, and -2^(sink - LSE) · D, summed over a head's rows, that of its sink.
//!
//! Kernels, each with a file: [`row_sums()`] finds D. [`keys_and_values()`] owns a block of K and V, walks over the blocks of
//! Q and dO, and sums dK and dV in registers, over all heads of Q that share the head of K and V; [`wide_keys_and_values()`]
//! does so where a head is too wide for that, by two kinds of warps. [`queries()`] owns a block of Q and dO, walks over the
//! blocks of K and V, and sums dQ. [`bias()`] owns a tile of the bias, and [`sinks()`] a sink. S and dP are so computed twice,
//! thrice with a bias; in return there is no atomic addition and no accumulator in HBM: the gradients are the same bits in
//! every run and in every batch, and the extra memory is D. [`fused`] is the other way.
//!
//! What a query does not see must not reach its gradient, nor it theirs, even if it is NaN: 0 · NaN is NaN. So blocks of
//! which a part is hidden are searched for what is not finite, and if something is found, their products leave out what is
//! hidden.
mod bias;
pub mod fused;
mod keys_and_values;
mod probabilities;
mod queries;
mod query_walk;
mod row_sums;
mod sinks;
mod wide_keys_and_values;

pub use bias::{BIAS, bias};
pub use keys_and_values::{KEYS_AND_VALUES, keys_and_values};
pub use queries::{QUERIES, queries};
pub use row_sums::{ROW_SUMS, row_sums};
pub use sinks::{SINKS, sinks};
pub use wide_keys_and_values::{WIDE_KEYS_AND_VALUES, wide_keys_and_values};

use crate::attention::{Attention, Tensor, Untyped};
use crate::config::Config;
use cuda_std::Global;
use cuda_std::fragment::MatrixElement;

/// Stages of what a block of threads walks over: one is computed on while the next comes in.
const STAGES: u32 = 2;

/// Arguments of all these kernels. Gradients have the shapes of what they are the gradients of.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Params {
    /// The problem, with the O and LSE of its forward pass.
    pub attention: Attention,
    /// The gradient of O.
    pub d_o: Tensor<Untyped>,
    /// The gradient of Q.
    pub d_q: Tensor<Untyped>,
    /// The gradient of K.
    pub d_k: Tensor<Untyped>,
    /// The gradient of V.
    pub d_v: Tensor<Untyped>,
    /// The gradient of the LSE, in its order. Null: 0.
    pub d_lse: Global<f32>,
    /// D = rowsum(dO ∘ O) - dLSE, in the order of the LSE. Null: [`fused`] does not write it.
    pub row_sums: Global<f32>,
    /// The gradient of the bias. Null: not wanted. What the bias is broadcast over has a stride of 0 and an extent of 1.
    pub d_bias: Tensor<Untyped>,
    /// Batches of the bias: all, or 1.
    pub bias_batch: u32,
    /// Heads of the bias: all, or 1.
    pub bias_heads: u32,
    /// Rows of the bias: `seqlen_q`, or 1.
    pub bias_rows: u32,
    /// The gradient of the sinks: (nheads). Null: not wanted.
    pub d_sinks: Global<f32>,
    /// For [`fused`] alone, in the order of its places: of each [`ROWS`](fused::ROWS) places what their exponents subtract,
    /// then their D.
    pub statistics: Global<f32>,
    /// For [`fused`] alone, in the order of its places: dQ / softmax_scale, `HEADDIM` numbers each.
    pub d_q_sums: Global<f32>,
}

/// What the configurations of kernels that compute S and dP have in common. Tiles, threads and shared memory are each
/// kernel's own.
const fn config<T: MatrixElement>(headdim: usize, headdim_v: usize, causal: bool, general: bool) -> Config {
    Config {
        family: "flash2",
        dtype: T::DTYPE,
        tf32: T::TF32,
        headdim: headdim as u32,
        headdim_v: headdim_v as u32,
        causal: if general { None } else { Some(causal) },
        general,
        block_m: 0,
        block_n: 0,
        from_keys: 0,
        few: false,
        sequences: 0,
        threads: 0,
        min_blocks_per_sm: 1,
        claimed_registers: 0,
        accumulators: 0,
        shared_bytes: 0,
        barriers: 0,
    }
}

/// The rows that the LSE, and D, have numbers for.
struct Rows {
    /// 1 where sequences follow each other.
    batches: u32,
    /// Of one head.
    tokens: u32,
}

impl Rows {
    #[inline(always)]
    fn of<T>(a: &Attention<T>) -> Self {
        if a.cu_seqlens_q.is_null() {
            Rows { batches: a.batch, tokens: a.seqlen_q }
        } else {
            Rows { batches: 1, tokens: a.lse_head_stride as u32 }
        }
    }
}
