//! FlashAttention-3, forward, for Hopper.
//!
//! Source: Shah et al., "FlashAttention-3: Fast and Accurate Attention with Asynchrony and Low-precision", Algorithms 1
//! and 2.
//!
//! Warps are specialised: a producer keeps copies of K and V in flight, and two to four warpgroups of consumers, 64 query
//! rows each, have the tensor cores multiply while they compute the softmax. Of a warpgroup the product S = Q Kᵀ of the next
//! block of keys and the product P V of the present one are in flight together; the warpgroups take turns at the tensor
//! cores, so that one's exponentials fall under the others' products. O is rescaled lazily: only when a maximum has grown
//! by more than a factor of 2⁸ ([`raise_lazily`](crate::RowSoftmax::raise_lazily)).
//!
//! Blocks of threads are persistent: each takes one tile of queries after the other ([`schedule`]). The producer begins with
//! the next tile while the consumers finish the last, and these have its first S computed while they store O. Keys are walked
//! from the last to the first: what is masked comes first, and each warpgroup leaves out what none of its rows sees.
//!
//! Kernels without a mask, with a causal mask, and general ones, which ask their arguments for a window, a cap, ALiBi and sinks;
//! biases, other masks and dropout they do not know.
//!
//! What is not finite at keys that a row does not see must not reach it: as in [`flash2`](crate::flash2), rows that turn out
//! not to be finite are computed again.
//!
//! HBM traffic: that of [`flash2`](crate::flash2).
use crate::attention::Attention;
use crate::config::Config;
pub use combine::COMBINE;
use cuda_std::element::{bf16, f16};
use cuda_std::fragment::{Accumulator, LeftOperand, PackedMatrixElement};
use cuda_std::matrix::PackedElement;
use cuda_std::tensor::TensorMap;
use cuda_std::thread::{sync_threads, thread_idx_x};
use cuda_std::warpgroup::{WARPGROUP, claim_registers, release_registers, warpgroup_id};
use cuda_std::{fence, grid, kernel, wgmma};
use memory::Memory;
use schedule::{Schedule, Tiles};
use splits::Parts;

pub mod combine;
mod consumer;
mod memory;
pub mod order;
pub mod packing;
mod producer;
pub mod schedule;
pub mod splits;
pub mod units;

/// Query rows of a consumer warpgroup.
pub const GROUP_ROWS: u32 = wgmma::ROWS;

/// Arguments of the forward kernel.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Params {
    /// Q: tiles of [`GROUP_ROWS`] rows and `headdim` columns of the configuration. Its dimensions are columns, heads, queries
    /// and batches, and a tile has the heads of a pack, and so many queries.
    pub q: TensorMap,
    /// K: tiles of `block_n` rows and `headdim` columns.
    pub k: TensorMap,
    /// V: tiles of `block_n` rows and `headdim_v` columns.
    pub v: TensorMap,
    /// The problem.
    pub attention: Attention,
    /// Who does what.
    pub schedule: Schedule,
    /// Where parts of keys leave their O and LSE, which are then [combined](combine).
    pub parts: Parts,
}

/// Registers that a thread of two, three and four warpgroups of consumers claims.
const CLAIMED: [u32; 3] = [232, 160, 112];

/// Registers that a thread of a consumer claims where there are so many warpgroups of them: two to four.
pub const fn claimed_registers(groups: u32) -> u32 {
    CLAIMED[groups as usize - 2]
}

const fn config<
    T: PackedMatrixElement,
    const HEADDIM: usize,
    const HEADDIM_V: usize,
    const GROUPS: u32,
    const QUERIES: u32,
    const BLOCK_N: usize,
    const STAGES: u32,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const O_COLUMNS: usize,
    const CAUSAL: bool,
    const FROM_KEYS: u32,
    const FEW: bool,
    const GENERAL: bool,
>() -> Config {
    assert!(S_COLUMNS * 8 == BLOCK_N && STEPS * 16 == BLOCK_N && O_COLUMNS * 8 == HEADDIM_V);
    // S of the next block of keys, P of this one, which is packed, and O.
    let products = Accumulator::<1, S_COLUMNS>::REGISTERS + STEPS * LeftOperand::<T, 1>::REGISTERS;
    Config {
        family: "flash3",
        dtype: T::DTYPE,
        tf32: false,
        headdim: HEADDIM as u32,
        headdim_v: HEADDIM_V as u32,
        causal: if GENERAL { None } else { Some(CAUSAL) },
        general: GENERAL,
        block_m: GROUPS * GROUP_ROWS,
        block_n: BLOCK_N as u32,
        threads: (1 + GROUPS) * WARPGROUP,
        min_blocks_per_sm: 1,
        claimed_registers: claimed_registers(GROUPS),
        accumulators: (products + Accumulator::<1, O_COLUMNS>::REGISTERS) as u32,
        shared_bytes: Memory::<T, HEADDIM, HEADDIM_V, QUERIES, BLOCK_N, STAGES>::BYTES,
        from_keys: FROM_KEYS,
        few: FEW,
        sequences: Memory::<T, HEADDIM, HEADDIM_V, QUERIES, BLOCK_N, STAGES>::SEQUENCES,
        // Two at the start, one before the first turn, one after the last, and two a turn: at the first block of the first tile,
        // of the others, at blocks that are skipped before either, and at other blocks, which with a causal mask have two loops;
        // in a general kernel also at blocks that are skipped behind the last, of which one for few queries has none.
        barriers: if CAUSAL || GENERAL && !FEW { 16 } else { 14 },
    }
}

/// O = softmax(softmax_scale · Q Kᵀ) V and its LSE.
///
/// Grid: as many walkers as the GPU runs at once, at most one a unit of work, and those that take a tile each
/// ([`schedule`]). A tile has `GROUPS` times [`GROUP_ROWS`] query rows; Q has `QUERIES` stages of [`GROUP_ROWS`] rows, for a
/// tile, for one and a half or for two, K and V have `STAGES` each. S is `S_COLUMNS` and O `O_COLUMNS` blocks of eight
/// columns wide, P `STEPS` of sixteen. Tensors may have fewer columns than `HEADDIM` and `HEADDIM_V`. `FROM_KEYS`:
/// [`Config::from_keys`]; `FEW`: [`Config::few`]; `GENERAL`: [`Config::general`].
#[kernel(
    name = "flash3_fwd_{T}_d{HEADDIM}{HEADDIM_V!=HEADDIM?_v}_{GROUPS}x{BLOCK_N}{CAUSAL?_causal}{FEW?_few}{GENERAL?_general}",
    arch = sm_90a,
    // TFLOP/s on an H100, in bf16, at 16384 tokens and a hidden dimension of 2048. More warpgroups hide more of each other, but
    // larger tiles are filled worse by short sequences.
    for T in [f16, bf16],
        (HEADDIM, HEADDIM_V, GROUPS, QUERIES, BLOCK_N, STAGES, STEPS, S_COLUMNS, O_COLUMNS, FROM_KEYS) in [
            // At 1k, 4k and 16k tokens 523, 578, 595; three warpgroups and 128 keys: 475, 574, 617.
            (64, 64, 4, 8, 64, 6, 4, 8, 8, 0),
            (64, 64, 3, 6, 128, 4, 8, 16, 8, 8192),
            (96, 96, 2, 4, 128, 3, 8, 16, 12, 0),
            (96, 96, 3, 3, 96, 3, 6, 12, 12, 2048),
            // 639, 715, 734; three warpgroups and 80 keys: 614, 758, 793; and 64 keys: 623, 762, 783.
            (128, 128, 2, 4, 128, 2, 8, 16, 16, 0),
            (128, 128, 3, 3, 80, 3, 5, 10, 16, 2048),
            (192, 128, 2, 2, 128, 2, 8, 16, 16, 0),
            (192, 128, 3, 3, 64, 3, 4, 8, 16, 2048),
            (192, 192, 2, 3, 96, 2, 6, 12, 24, 0),
            (256, 256, 2, 3, 64, 2, 4, 8, 32, 0),
        ],
        CAUSAL in [false], FEW in [false], GENERAL in [false],
    for T in [f16, bf16],
        (HEADDIM, HEADDIM_V, GROUPS, QUERIES, BLOCK_N, STAGES, STEPS, S_COLUMNS, O_COLUMNS, FROM_KEYS) in [
            // 399, 543, 596; three warpgroups and 128 keys: 325, 521, 598.
            (64, 64, 4, 8, 64, 6, 4, 8, 8, 0),
            // At 512 and 4k 287, 577; three warpgroups and 96 keys: 221, 600.
            (96, 96, 2, 4, 128, 3, 8, 16, 12, 0),
            (96, 96, 3, 3, 96, 3, 6, 12, 12, 2048),
            // 477, 656, 727; three warpgroups and 64 keys: 427, 668, 770.
            (128, 128, 2, 4, 128, 2, 8, 16, 16, 0),
            (128, 128, 3, 3, 64, 5, 4, 8, 16, 2048),
            // At 512 and 4k 316, 697; three warpgroups and 64 keys: 253, 675.
            (192, 128, 2, 2, 128, 2, 8, 16, 16, 0),
            (192, 192, 2, 3, 96, 2, 6, 12, 24, 0),
            (256, 256, 2, 3, 64, 2, 4, 8, 32, 0),
        ],
        CAUSAL in [true], FEW in [false], GENERAL in [false],
    // Of these the ones for few keys, again for few queries.
    for T in [f16, bf16],
        (HEADDIM, HEADDIM_V, GROUPS, QUERIES, BLOCK_N, STAGES, STEPS, S_COLUMNS, O_COLUMNS, FROM_KEYS) in [
            (64, 64, 4, 8, 64, 6, 4, 8, 8, 0),
            (96, 96, 2, 4, 128, 3, 8, 16, 12, 0),
            (128, 128, 2, 4, 128, 2, 8, 16, 16, 0),
            (192, 192, 2, 2, 96, 2, 6, 12, 24, 0),
            (256, 256, 2, 2, 64, 2, 4, 8, 32, 0),
        ],
        CAUSAL in [false, true], FEW in [true], GENERAL in [false],
    // These ask their arguments for windows and for what becomes of scores. Small blocks of keys fit small windows. At 64 four
    // warpgroups, or three and 96 keys, would spill; so would 96 keys at 96, and two warpgroups and 128 keys at 192 with 128.
    for T in [f16, bf16],
        (HEADDIM, HEADDIM_V, GROUPS, QUERIES, BLOCK_N, STAGES, STEPS, S_COLUMNS, O_COLUMNS, FROM_KEYS) in [
            (64, 64, 3, 6, 64, 8, 4, 8, 8, 0),
            (96, 96, 3, 6, 64, 5, 4, 8, 12, 0),
            (128, 128, 3, 3, 64, 5, 4, 8, 16, 0),
            (192, 128, 3, 3, 64, 3, 4, 8, 16, 0),
            (192, 192, 2, 2, 96, 2, 6, 12, 24, 0),
            (256, 256, 2, 2, 64, 2, 4, 8, 32, 0),
        ],
        CAUSAL in [false], FEW in [false], GENERAL in [true],
    // For few queries too, with tiles of fewer rows: most of them are empty. Here 128 keys at 96 would spill.
    for T in [f16, bf16],
        (HEADDIM, HEADDIM_V, GROUPS, QUERIES, BLOCK_N, STAGES, STEPS, S_COLUMNS, O_COLUMNS, FROM_KEYS) in [
            (64, 64, 2, 4, 128, 4, 8, 16, 8, 0),
            (96, 96, 2, 4, 96, 4, 6, 12, 12, 0),
            (128, 128, 2, 4, 128, 2, 8, 16, 16, 0),
            (192, 192, 2, 2, 96, 2, 6, 12, 24, 0),
            (256, 256, 2, 2, 64, 2, 4, 8, 32, 0),
        ],
        CAUSAL in [false], FEW in [true], GENERAL in [true],
    config = config,
    table = FORWARD,
)]
pub fn forward<
    T: PackedElement,
    const HEADDIM: usize,
    const HEADDIM_V: usize,
    const GROUPS: u32,
    const QUERIES: u32,
    const BLOCK_N: usize,
    const STAGES: u32,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const O_COLUMNS: usize,
    const CAUSAL: bool,
    const FROM_KEYS: u32,
    const FEW: bool,
    const GENERAL: bool,
>(
    p: Params,
) {
    let memory = Memory::<T, HEADDIM, HEADDIM_V, QUERIES, BLOCK_N, STAGES>::of_block();
    if thread_idx_x() == 0 {
        memory.init_barriers(GROUPS);
        fence::mbarrier_init();
    }
    let (a, schedule) = (p.attention.of::<T>(), p.schedule.known::<FEW>());
    let block_m = GROUPS * GROUP_ROWS;
    if !a.cu_seqlens_q.is_null() && schedule.walkers > 0 {
        memory.order.find::<T, CAUSAL, FEW, GENERAL>(&a, schedule, block_m);
    }
    sync_threads();
    if FEW {
        // Parts are combined by a kernel that may begin meanwhile.
        grid::launch_dependents();
    }
    let tiles = Tiles::<CAUSAL, FEW, GENERAL>::new(schedule, memory.order, block_m, BLOCK_N as u32);
    match warpgroup_id() {
        0 => {
            match GROUPS {
                2 => release_registers::<40>(),
                _ => release_registers::<32>(),
            }
            if thread_idx_x() == 0 {
                producer::produce::<T, HEADDIM, HEADDIM_V, GROUPS, QUERIES, BLOCK_N, STAGES, CAUSAL, FEW, GENERAL>(
                    &p, &a, memory, tiles,
                );
            }
        }
        group => {
            match GROUPS {
                2 => claim_registers::<{ CLAIMED[0] }>(),
                3 => claim_registers::<{ CLAIMED[1] }>(),
                _ => claim_registers::<{ CLAIMED[2] }>(),
            }
            let consumer = consumer::Consumer::<
                T,
                HEADDIM,
                HEADDIM_V,
                GROUPS,
                QUERIES,
                BLOCK_N,
                STAGES,
                STEPS,
                S_COLUMNS,
                O_COLUMNS,
                CAUSAL,
                FEW,
                GENERAL,
            >::new(memory, group - 1, &a, schedule);
            consumer.run(&a, &p.parts, tiles);
        }
    }
}
