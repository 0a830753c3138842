//! FlashAttention-2, forward.
//!
//! Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", Algorithm 1.
//!
//! A block of threads owns a block of query rows, and walks over the blocks of K and V once. S, P, O and the state of the
//! softmax live in registers; each warp owns whole rows, so warps exchange nothing. K and V come in asynchronously, one
//! block ahead, into two stages of shared memory; where two stages are too large, one after the other.
//!
//! A key that a row does not see must not reach it, even if its value is NaN: 0 · NaN is NaN. So blocks that are seen in part
//! are searched for what is not finite, and if something is found, the product P V leaves out what is not seen.
//!
//! Three kinds of kernels: without a mask, with a causal mask, and general ones, which do all that
//! [`Attention`] can ask for.
//!
//! HBM traffic: Q and O once, LSE once, and K and V once a query block: `2 d (2 seqlen_q + 2 seqlen_k * blocks)` bytes a head.
use crate::attention::{Attention, Sequence};
use crate::config::Config;
use crate::dropout::Dropout;
use crate::mask::Mask;
use crate::row_softmax::RowSoftmax;
use crate::schedule::{self, QueryBlock};
use crate::scores::Scores;
use cuda_std::element::{bf16, f16, tf32};
use cuda_std::fragment::{Accumulator, LeftOperand, MatrixElement};
use cuda_std::math::{LOG2_E, unknown};
use cuda_std::shared::dynamic_shared;
use cuda_std::thread::{WARP, lane_id, sync_threads, sync_threads_or, warp_id};
use cuda_std::warp::{ALL, sync_warp};
use cuda_std::{Element, SmemTile, TileStream, copy, kernel};

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
    const HEADDIM_V: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STAGES: u32,
    const M: usize,
    const S_COLUMNS: usize,
    const O_COLUMNS: usize,
    const CAUSAL: bool,
    const GENERAL: bool,
>() -> Config {
    assert!(S_COLUMNS * 8 == BLOCK_N && O_COLUMNS * 8 == HEADDIM_V && BLOCK_M.is_multiple_of(16 * M));
    // O's tile takes the place of Q's. Dropout takes 32 keys at a time.
    assert!(HEADDIM_V <= HEADDIM && (!GENERAL || BLOCK_N.is_multiple_of(32)));
    let elements = BLOCK_M * HEADDIM + STAGES as usize * BLOCK_N * (HEADDIM + HEADDIM_V);
    let threads = threads(BLOCK_M, M);
    Config {
        family: "flash2",
        dtype: T::DTYPE,
        tf32: T::TF32,
        headdim: HEADDIM as u32,
        headdim_v: HEADDIM_V as u32,
        causal: if GENERAL { None } else { Some(CAUSAL) },
        general: GENERAL,
        block_m: BLOCK_M as u32,
        block_n: BLOCK_N as u32,
        from_keys: 0,
        threads,
        // 255 registers a thread.
        min_blocks_per_sm: 256 / threads,
        shared_bytes: (elements * size_of::<T>()) as u32,
        barriers: if CAUSAL || GENERAL { 3 } else { 2 } + if STAGES == 1 { 1 } else { 0 },
    }
}

/// A warp for each 16 M rows of the block that a block of threads owns.
pub(crate) const fn threads(block: usize, m: usize) -> u32 {
    (block / (16 * m)) as u32 * WARP
}

/// O = softmax(softmax_scale · Q Kᵀ) V and its LSE, for `BLOCK_M` query rows of one head.
///
/// Grid: `ceil(seqlen_q / BLOCK_M) * nheads * batch`. A warp has 16 `M` rows; S is `S_COLUMNS` and O `O_COLUMNS` blocks of
/// eight columns wide. Tensors may have fewer columns than `HEADDIM` and `HEADDIM_V`.
#[kernel(
    name = "flash2_fwd_{T}_d{HEADDIM}{HEADDIM_V!=HEADDIM?_v}{CAUSAL?_causal}{GENERAL?_general}",
    for T in [f16, bf16],
        (HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, STAGES, M, S_COLUMNS, O_COLUMNS) in [
            // On an H100, TFLOP/s at 4k tokens, not causal: 248; with 128 keys a block 237.
            (32, 32, 128, 64, 2, 2, 8, 4),
            // 350; with 64 keys a block 326; with 64 rows and one row block a warp 302.
            (64, 64, 128, 128, 2, 2, 16, 8),
            (96, 96, 128, 64, 2, 2, 8, 12),
            // 374; with 64 keys a block (spills) 356, with 32 keys 349.
            (128, 128, 128, 48, 2, 2, 6, 16),
            (192, 128, 128, 64, 2, 1, 8, 16),
            (192, 192, 128, 64, 2, 1, 8, 24),
            (256, 256, 128, 32, 2, 1, 4, 32),
        ],
        (CAUSAL, GENERAL) in [(false, false), (true, false)],
    for T in [f16, bf16],
        (HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, STAGES, M, S_COLUMNS, O_COLUMNS) in [
            (32, 32, 128, 64, 2, 2, 8, 4),
            (64, 64, 128, 64, 2, 2, 8, 8),
            (96, 96, 128, 32, 2, 2, 4, 12),
            (128, 128, 128, 32, 2, 2, 4, 16),
            (192, 128, 128, 64, 2, 1, 8, 16),
            (192, 192, 128, 64, 2, 1, 8, 24),
            (256, 256, 128, 32, 2, 1, 4, 32),
        ],
        (CAUSAL, GENERAL) in [(false, true)],
    for (T, HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, STAGES, M, S_COLUMNS, O_COLUMNS) in [
            (f32, 32, 32, 64, 32, 2, 1, 4, 4),
            (f32, 64, 64, 64, 32, 2, 1, 4, 8),
            (f32, 128, 128, 64, 32, 2, 1, 4, 16),
            (f32, 256, 256, 64, 32, 1, 1, 4, 32),
            (tf32, 32, 32, 128, 64, 2, 2, 8, 4),
            (tf32, 64, 64, 128, 64, 2, 2, 8, 8),
            (tf32, 128, 128, 128, 32, 2, 1, 4, 16),
            (tf32, 256, 256, 64, 32, 1, 1, 4, 32),
        ],
        (CAUSAL, GENERAL) in [(false, true)],
    config = config,
    table = FORWARD,
)]
pub fn forward<
    T: MatrixElement,
    const HEADDIM: usize,
    const HEADDIM_V: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const STAGES: u32,
    const M: usize,
    const S_COLUMNS: usize,
    const O_COLUMNS: usize,
    const CAUSAL: bool,
    const GENERAL: bool,
>(
    p: Params,
) {
    let a = p.attention.of::<T>();
    let block = schedule::query_block(&a, BLOCK_M as u32);
    let QueryBlock { sequence, head, first_row } = block;
    if block.rows() == 0 {
        return;
    }
    let mask = Mask::of::<T, CAUSAL, GENERAL>(&a, &sequence);
    let key_blocks = mask.key_blocks(first_row, BLOCK_M as u32, BLOCK_N as u32);

    let q = SmemTile::<T, BLOCK_M, HEADDIM>::at(dynamic_shared());
    let k_tiles = SmemTile::<T, BLOCK_N, HEADDIM>::at(q.end());
    let v_tiles = SmemTile::<T, BLOCK_N, HEADDIM_V>::at(k_tiles.stage(STAGES - 1).end());

    let (head_k, rows, first_key) = (a.head_k(head), block.rows(), key_blocks.begin * BLOCK_N as u32);
    let aligned = a.is_aligned::<GENERAL>();
    let q_rows = sequence.query_matrix(&a.q, head, first_row, a.headdim, aligned);
    let k_rows = sequence.key_matrix(&a.k, head_k, first_key, a.headdim, aligned);
    let v_rows = sequence.key_matrix(&a.v, head_k, first_key, a.headdim_v, aligned);
    let threads = const { threads(BLOCK_M, M) };
    let mut queries = TileStream::new(threads, q_rows);
    let mut keys = TileStream::new(threads, k_rows);
    let mut values = TileStream::new(threads, v_rows);

    queries.copy_async(q);
    if key_blocks.count() > 0 {
        keys.copy_async(k_tiles.stage(key_blocks.begin % STAGES));
        values.copy_async(v_tiles.stage(key_blocks.begin % STAGES));
    }
    copy::commit();

    // Without tensor cores a step is long, and as a loop it stays in the instruction cache.
    let steps = (HEADDIM / T::DEPTH) as u32;
    let logits = Logits::new::<GENERAL>(&a, &sequence, head, mask);
    let own_row = warp_id() * 16 * M as u32;
    let mut softmax = RowSoftmax::<M>::EMPTY;
    let mut o = Accumulator::<M, O_COLUMNS>::zero();
    for j in key_blocks.begin..key_blocks.end {
        let (k, v) = (k_tiles.stage(j % STAGES), v_tiles.stage(j % STAGES));
        let (row, key, partial) = (first_row + own_row, j * BLOCK_N as u32, key_blocks.is_partial(j));

        // Block j is here, and no warp reads block j - 1 any more, whose stage block j + 1 takes.
        copy::wait::<0>();
        let poisonous = if (CAUSAL || GENERAL) && (partial || a.may_hide::<GENERAL>()) {
            sync_threads_or(values.copied_nonfinite(v))
        } else {
            sync_threads();
            false
        };
        if STAGES > 1 && j + 1 < key_blocks.end {
            keys.copy_async(k_tiles.stage((j + 1) % STAGES));
            values.copy_async(v_tiles.stage((j + 1) % STAGES));
            copy::commit();
        }

        let mut s = Accumulator::<M, S_COLUMNS>::zero();
        if poisonous {
            // All on its own, and small: the usual way has no branch between the softmax and P V, which overlap.
            for step in 0..unknown(steps) as usize {
                s.add_product_transposed(&LeftOperand::<T, M>::load(q, own_row, step), k, 0, step);
            }
            let p = logits.weights(s, row, key, partial, &mut softmax, &mut o);
            o.add_kept_product(&p, |i, j| logits.sees(row + i, key + j), v, 0);
        } else {
            for step in 0..(if const { T::TENSOR_CORES } { steps } else { unknown(steps) }) as usize {
                s.add_product_transposed(&LeftOperand::<T, M>::load(q, own_row, step), k, 0, step);
            }
            let p = logits.weights(s, row, key, partial, &mut softmax, &mut o);
            for step in 0..BLOCK_N / T::DEPTH {
                o.add_product(&p.operand::<T>(step), v, step, 0);
            }
        }

        if STAGES == 1 && j + 1 < key_blocks.end {
            // The next block comes where this one is.
            sync_threads();
            keys.copy_async(k);
            values.copy_async(v);
            copy::commit();
        }
    }

    let lse = a.softmax_lse.offset(a.first_row(&sequence, head) + first_row as usize);
    softmax.finish(&mut o, a.sink(head), |row, state| {
        let row = own_row + row;
        if lane_id().is_multiple_of(4) && row < rows {
            lse.store(row as usize, state.lse());
        }
    });
    // Q's tile becomes O's, each warp's rows its own. If there was no block of keys, Q is only now sure to be in.
    copy::wait::<0>();
    sync_threads();
    let o_tile = SmemTile::<T, BLOCK_M, HEADDIM_V>::at(dynamic_shared());
    o.store(o_tile, own_row);
    sync_warp(ALL);
    let o_rows = sequence.query_matrix(&a.o, head, first_row, a.headdim_v, aligned);
    o_tile.store_rows(own_row, 16 * M as u32, o_rows);
}

/// What becomes of the scores of one head.
struct Logits<T> {
    mask: Mask,
    /// What the softmax multiplies them with: the softmax scale in log2 units.
    scale: f32,
    /// What is done before, in a general kernel.
    scores: Option<Scores<T>>,
    dropout: Dropout,
    /// The head, counted over all batches.
    head: u32,
}

impl<T: Element> Logits<T> {
    #[inline(always)]
    #[track_caller]
    fn new<const GENERAL: bool>(a: &Attention<T>, sequence: &Sequence, head: u32, mask: Mask) -> Self {
        Logits {
            mask,
            scale: if GENERAL { 1.0 } else { a.softmax_scale * LOG2_E },
            scores: if GENERAL { Some(Scores::new(a, sequence, head, mask)) } else { None },
            dropout: if GENERAL { a.dropout } else { Dropout::NONE },
            head: sequence.batch * a.nheads + head,
        }
    }

    /// S = Q Kᵀ, which begins at row `first_row` and key `first_key`, becomes P relative to the softmax's maximum so far;
    /// O is rescaled to that.
    #[inline(always)]
    #[track_caller]
    fn weights<const M: usize, const S_COLUMNS: usize, const O_COLUMNS: usize>(
        &self,
        mut s: Accumulator<M, S_COLUMNS>,
        first_row: u32,
        first_key: u32,
        partial: bool,
        softmax: &mut RowSoftmax<M>,
        o: &mut Accumulator<M, O_COLUMNS>,
    ) -> Accumulator<M, S_COLUMNS> {
        if let Some(scores) = &self.scores {
            scores.cap(&mut s);
            scores.finish(&mut s, (first_row, first_key), partial);
        } else if partial {
            self.mask.apply(&mut s, first_row, first_key);
        }
        softmax.take(&mut s, self.scale).apply(o);
        if self.dropout.is_on() {
            self.dropout.apply(&mut s, self.head, first_row, first_key);
        }
        s
    }

    /// Whether query `row` sees key `key`.
    #[inline(always)]
    #[track_caller]
    fn sees(&self, row: u32, key: u32) -> bool {
        match &self.scores {
            Some(scores) => scores.sees(row, key),
            None => self.mask.sees(row, key),
        }
    }
}
