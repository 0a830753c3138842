//! FlashAttention-2, forward.
//!
//! Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", Algorithm 1.
//!
//! A block of threads owns a block of query rows, and walks over the blocks of K and V once. S, P, O and the state of the
//! softmax live in registers; each warp owns whole rows, so warps exchange nothing. K and V come in asynchronously, one
//! block ahead, into two stages of shared memory.
//!
//! HBM traffic: Q and O once, LSE once, and K and V once a query block: `2 d (2 seqlen_q + 2 seqlen_k * blocks)` bytes a head.
use crate::attention::Attention;
use crate::config::Config;
use crate::mask::Mask;
use crate::row_softmax::RowSoftmax;
use crate::schedule::{self, QueryBlock};
use cuda_std::element::{bf16, f16};
use cuda_std::fragment::{Accumulator, LeftOperand, MatrixElement};
use cuda_std::math::LOG2_E;
use cuda_std::shared::dynamic_shared;
use cuda_std::thread::{WARP, lane_id, sync_threads, warp_id};
use cuda_std::warp::{ALL, sync_warp};
use cuda_std::{SmemTile, TileStream, copy, kernel};

/// Stages of K and V: one is computed on while the next comes in.
const STAGES: u32 = 2;

/// Arguments of the forward kernel.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Params {
    /// The problem.
    pub attention: Attention,
}

const fn config<
    T: MatrixElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const M: usize,
    const S_COLUMNS: usize,
    const O_COLUMNS: usize,
    const CAUSAL: bool,
>() -> Config {
    assert!(S_COLUMNS * 8 == BLOCK_N && O_COLUMNS * 8 == HEADDIM && BLOCK_M.is_multiple_of(16 * M));
    Config {
        family: "flash2",
        dtype: T::DTYPE,
        headdim: HEADDIM as u32,
        tf32: false,
        headdim_v: HEADDIM as u32,
        causal: Some(CAUSAL),
        general: false,
        block_m: BLOCK_M as u32,
        block_n: BLOCK_N as u32,
        threads: threads(BLOCK_M, M),
        min_blocks_per_sm: 2,
        shared_bytes: ((BLOCK_M + 2 * STAGES as usize * BLOCK_N) * HEADDIM * size_of::<T>()) as u32,
        barriers: 2,
    }
}

/// A warp for each 16 M rows of the block that a block of threads owns.
pub(crate) const fn threads(block: usize, m: usize) -> u32 {
    (block / (16 * m)) as u32 * WARP
}

/// O = softmax(softmax_scale · Q Kᵀ) V and its LSE, for `BLOCK_M` query rows of one head.
///
/// Grid: `ceil(seqlen_q / BLOCK_M) * nheads * batch`. A warp has 16 `M` rows; S is `S_COLUMNS` and O `O_COLUMNS` blocks of
/// eight columns wide.
#[kernel(
    name = "flash2_fwd_{T}_d{HEADDIM}{CAUSAL?_causal}",
    for T in [f16, bf16],
        (HEADDIM, BLOCK_M, BLOCK_N, M, S_COLUMNS, O_COLUMNS) in [
            // On an H100, TFLOP/s at 4k tokens, not causal: 248; with 128 keys a block 237.
            (32, 128, 64, 2, 8, 4),
            // 350; with 64 keys a block 326; with 64 rows and one row block a warp 302.
            (64, 128, 128, 2, 16, 8),
            // 374; with 64 keys a block (spills) 356, with 32 keys 349.
            (128, 128, 48, 2, 6, 16),
        ],
        CAUSAL in [false, true],
    config = config,
    table = FORWARD,
)]
pub fn forward<
    T: MatrixElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const M: usize,
    const S_COLUMNS: usize,
    const O_COLUMNS: usize,
    const CAUSAL: bool,
>(
    p: Params,
) {
    let a = p.attention.of::<T>();
    let block = schedule::query_block(&a, BLOCK_M as u32);
    let QueryBlock { sequence, head, first_row } = block;
    if block.rows() == 0 {
        return;
    }
    let mask = Mask::of::<T, CAUSAL, false>(&a, &sequence);
    let key_blocks = mask.key_blocks(first_row, BLOCK_M as u32, BLOCK_N as u32);

    let q = SmemTile::<T, BLOCK_M, HEADDIM>::at(dynamic_shared());
    let k = SmemTile::<T, BLOCK_N, HEADDIM>::at(q.end());
    let v = SmemTile::<T, BLOCK_N, HEADDIM>::at(k.stage(STAGES - 1).end());

    let (head_k, rows) = (a.head_k(head), block.rows());
    let q_rows = sequence.query_matrix(&a.q, head, first_row, a.headdim, true);
    let k_rows = sequence.key_matrix(&a.k, head_k, 0, a.headdim, true);
    let v_rows = sequence.key_matrix(&a.v, head_k, 0, a.headdim_v, true);
    let threads = const { threads(BLOCK_M, M) };
    let mut queries = TileStream::new(threads, q_rows);
    let mut keys = TileStream::new(threads, k_rows);
    let mut values = TileStream::new(threads, v_rows);

    queries.copy_async(q);
    if key_blocks.end > 0 {
        keys.copy_async(k.stage(0));
        values.copy_async(v.stage(0));
    }
    copy::commit();

    let scale = a.softmax_scale * LOG2_E;
    let own_row = warp_id() * 16 * M as u32;
    let mut softmax = RowSoftmax::<M>::EMPTY;
    let mut o = Accumulator::<M, O_COLUMNS>::zero();
    for j in 0..key_blocks.end {
        // Block j is here, and no warp reads block j - 1 any more, whose stage block j + 1 takes.
        copy::wait::<0>();
        sync_threads();
        if j + 1 < key_blocks.end {
            keys.copy_async(k.stage((j + 1) % STAGES));
            values.copy_async(v.stage((j + 1) % STAGES));
            copy::commit();
        }
        let (k, v) = (k.stage(j % STAGES), v.stage(j % STAGES));

        let mut s = Accumulator::<M, S_COLUMNS>::zero();
        for step in 0..HEADDIM / T::DEPTH {
            s.add_product_transposed(&LeftOperand::<T, M>::load(q, own_row, step), k, 0, step);
        }
        if key_blocks.is_partial(j) {
            mask.apply(&mut s, first_row + own_row, j * BLOCK_N as u32);
        }
        softmax.take(&mut s, scale).apply(&mut o);
        let p = s;
        for step in 0..BLOCK_N / T::DEPTH {
            o.add_product(&p.operand::<T>(step), v, step, 0);
        }
    }

    let lse = a.softmax_lse.offset(a.first_row(&sequence, head) + first_row as usize);
    softmax.finish(&mut o, |row, state| {
        let row = own_row + row;
        if lane_id().is_multiple_of(4) && row < rows {
            lse.store(row as usize, state.lse());
        }
    });
    // Q's tile becomes O's, each warp's rows its own. If there was no block of keys, Q is only now sure to be in.
    copy::wait::<0>();
    sync_threads();
    o.store(q, own_row);
    sync_warp(ALL);
    let o_rows = sequence.query_matrix(&a.o, head, first_row, a.headdim_v, true);
    q.store_rows(own_row, 16 * M as u32, o_rows);
}
