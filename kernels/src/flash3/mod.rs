//! FlashAttention-3, forward, for Hopper.
//!
//! Source: Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision", Algorithms 1
//! and 2.
//!
//! Warps are specialised: a producer keeps copies of K and V in flight, and warpgroups of consumers, 64 query rows each,
//! have the tensor cores multiply while they compute the softmax. Within a warpgroup the product S = Q Kᵀ of the next
//! block of keys and the product P V of the present one run under the softmax. The warpgroups take turns at the tensor
//! cores, so that one's exponentials fall under the other's products. O is rescaled lazily: only when a maximum has grown
//! by more than a factor of 2⁸ ([`take_lazily`](crate::RowSoftmax::take_lazily)).
//!
//! Blocks of threads are persistent: each takes one tile of queries after the other ([`schedule`]), and the producer
//! begins with the next tile while the consumers finish the last. Keys are walked from the last to the first: what is
//! masked comes first, where nothing overlaps yet.
//!
//! What is not finite at keys that a row does not see must not reach it: as in [`flash2`](crate::flash2), rows that turn out
//! not to be finite are computed again.
//!
//! HBM traffic: that of [`flash2`](crate::flash2).
use crate::attention::Attention;
use crate::config::Config;
use cuda_std::element::{bf16, f16};
use cuda_std::matrix::PackedElement;
use cuda_std::tensor::TensorMap;
use cuda_std::thread::{sync_threads, thread_idx_x};
use cuda_std::warpgroup::{WARPGROUP, claim_registers, release_registers, warpgroup_id};
use cuda_std::{fence, kernel, wgmma};
use memory::Memory;
use schedule::{Schedule, Tiles};

mod consumer;
mod memory;
mod producer;
pub mod schedule;

/// Query rows of a consumer warpgroup.
pub const GROUP_ROWS: u32 = wgmma::ROWS;

/// Arguments of the forward kernel.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Params {
    /// Q: tiles of [`GROUP_ROWS`] rows and `headdim` columns of the configuration; heads and batches are its outer
    /// dimensions.
    pub q: TensorMap,
    /// K: tiles of `block_n` rows and `headdim` columns.
    pub k: TensorMap,
    /// V: tiles of `block_n` rows and `headdim_v` columns.
    pub v: TensorMap,
    /// The problem.
    pub attention: Attention,
    /// Who does what.
    pub schedule: Schedule,
}

const fn config<
    T: PackedElement,
    const HEADDIM: usize,
    const HEADDIM_V: usize,
    const GROUPS: u32,
    const BLOCK_N: usize,
    const STAGES: u32,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const O_COLUMNS: usize,
    const CAUSAL: bool,
    const FROM_KEYS: u32,
>() -> Config {
    assert!(S_COLUMNS * 8 == BLOCK_N && STEPS * 16 == BLOCK_N && O_COLUMNS * 8 == HEADDIM_V);
    Config {
        family: "flash3",
        dtype: T::DTYPE,
        tf32: false,
        headdim: HEADDIM as u32,
        headdim_v: HEADDIM_V as u32,
        causal: Some(CAUSAL),
        general: false,
        block_m: GROUPS * GROUP_ROWS,
        block_n: BLOCK_N as u32,
        threads: (1 + GROUPS) * WARPGROUP,
        min_blocks_per_sm: 1,
        shared_bytes: Memory::<T, HEADDIM, HEADDIM_V, GROUPS, BLOCK_N, STAGES>::BYTES,
        from_keys: FROM_KEYS,
        // One at the start, and turns: at the first tile and after the last, at the first block of a tile, and at the others,
        // which with a causal mask have two loops.
        barriers: if CAUSAL { 9 } else { 7 },
    }
}

/// O = softmax(softmax_scale · Q Kᵀ) V and its LSE.
///
/// Grid: as many walkers as the GPU runs at once, at most one a unit of work, and those that take a tile each
/// ([`schedule`]). A tile has `GROUPS` times [`GROUP_ROWS`] query rows; S is `S_COLUMNS` and O `O_COLUMNS` blocks of eight
/// columns wide, P `STEPS` of sixteen. Tensors may have fewer columns than `HEADDIM` and `HEADDIM_V`. `FROM_KEYS`:
/// [`Config::from_keys`].
#[kernel(
    name = "flash3_fwd_{T}_d{HEADDIM}{HEADDIM_V!=HEADDIM?_v}_{GROUPS}x{BLOCK_N}{CAUSAL?_causal}",
    arch = sm_90a,
    for T in [f16, bf16],
        (HEADDIM, HEADDIM_V, GROUPS, BLOCK_N, STAGES, STEPS, S_COLUMNS, O_COLUMNS) in [
            // On an H100, TFLOP/s at 512, 2k and 16k tokens: 403, 540, 604; two warpgroups 382, 443, 464.
            (64, 64, 3, 128, 4, 8, 16, 8),
            (96, 96, 2, 128, 3, 8, 16, 12),
            // 541, 689, 737; with two stages 532, 689, 731; with 176 keys a block 525, 671, 727.
            (128, 128, 2, 128, 3, 8, 16, 16),
            (192, 128, 2, 128, 2, 8, 16, 16),
            (192, 192, 2, 96, 2, 6, 12, 24),
            // 566, 780, 843; with 80 keys a block 546, 772, 838.
            (256, 256, 2, 64, 2, 4, 8, 32),
        ],
        (CAUSAL, FROM_KEYS) in [(false, 0)],
    for T in [f16, bf16],
        (HEADDIM, HEADDIM_V, GROUPS, BLOCK_N, STAGES, STEPS, S_COLUMNS, O_COLUMNS, FROM_KEYS) in [
            // 244, 402, 480: short tiles have less to hide.
            (64, 64, 2, 128, 4, 8, 16, 8, 0),
            // 180, 410, 581. Spills seven registers, of what a tile is.
            (64, 64, 3, 128, 4, 8, 16, 8, 2048),
            (96, 96, 2, 128, 3, 8, 16, 12, 0),
            // 320, 588, 732; with 176 keys a block 240, 553, 728.
            (128, 128, 2, 128, 2, 8, 16, 16, 0),
            (192, 128, 2, 128, 2, 8, 16, 16, 0),
            (192, 192, 2, 96, 2, 6, 12, 24, 0),
            // 312, 635, 815.
            (256, 256, 2, 64, 2, 4, 8, 32, 0),
        ],
        CAUSAL in [true],
    config = config,
    table = FORWARD,
)]
pub fn forward<
    T: PackedElement,
    const HEADDIM: usize,
    const HEADDIM_V: usize,
    const GROUPS: u32,
    const BLOCK_N: usize,
    const STAGES: u32,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const O_COLUMNS: usize,
    const CAUSAL: bool,
    const FROM_KEYS: u32,
>(
    p: Params,
) {
    let memory = Memory::<T, HEADDIM, HEADDIM_V, GROUPS, BLOCK_N, STAGES>::of_block();
    if thread_idx_x() == 0 {
        memory.init_barriers();
        fence::mbarrier_init();
    }
    sync_threads();
    let a = p.attention.of::<T>();
    let tiles = Tiles::<CAUSAL>::new(p.schedule, GROUPS * GROUP_ROWS, BLOCK_N as u32);
    match warpgroup_id() {
        0 => {
            if const { GROUPS > 2 } {
                release_registers::<32>()
            } else {
                release_registers::<40>()
            }
            if thread_idx_x() == 0 {
                producer::produce(&p, &a, memory, tiles);
            }
        }
        group => {
            if const { GROUPS > 2 } {
                claim_registers::<160>()
            } else {
                claim_registers::<232>()
            }
            let consumer = consumer::Consumer::<
                T,
                HEADDIM,
                HEADDIM_V,
                GROUPS,
                BLOCK_N,
                STAGES,
                STEPS,
                S_COLUMNS,
                O_COLUMNS,
                CAUSAL,
            >::new(memory, group - 1, a.softmax_scale);
            consumer.run(&a, tiles);
        }
    }
}
