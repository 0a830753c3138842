//! FlashAttention-2, forward.
//!
//! Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", Algorithm 1.
//!
//! A block of threads owns a block of query rows, and walks over the blocks of K and V once. S, P, O and the state of the
//! softmax live in registers; each warp owns whole rows, so warps exchange nothing. K and V come in asynchronously, one
//! block ahead, into two stages of shared memory; where two stages are too large, into one, V while S is computed, and the
//! next K while P V is. Q stays in shared memory, or where a warp has but one row block and there is room, in registers.
//!
//! A key that a row does not see must not reach it, even if its value is NaN: 0 · NaN is NaN. It does, here; rows that turn
//! out not to be finite are computed again ([`spoiled_rows`](crate::spoiled_rows)).
//!
//! Three kinds of kernels: without a mask, with a causal mask, and general ones, which do all that
//! [`Attention`] can ask for.
//!
//! HBM traffic: Q and O once, LSE once, and K and V once a query block: `2 d (2 seqlen_q + 2 seqlen_k * blocks)` bytes a head.
use crate::attention::{Attention, Sequence};
use crate::config::{Config, blocks_of_all_registers};
use crate::dropout::Dropout;
use crate::mask::Mask;
use crate::online_softmax::OnlineSoftmax;
use crate::row_softmax::RowSoftmax;
use crate::schedule::{self, QueryBlock};
use crate::scores::Scores;
use crate::spoiled_rows::attend_spoiled_rows;
use cuda_std::element::{bf16, f16, tf32};
use cuda_std::fragment::{Accumulator, LeftOperand, MatrixElement};
use cuda_std::math::LOG2_E;
use cuda_std::shared::dynamic_shared;
use cuda_std::thread::{WARP, lane_id, sync_threads, warp_id};
use cuda_std::warp::{ALL, any, sync_warp};
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
    const Q_STEPS: usize,
    const M: usize,
    const S_COLUMNS: usize,
    const O_COLUMNS: usize,
    const CAUSAL: bool,
    const GENERAL: bool,
>() -> Config {
    assert!(S_COLUMNS * 8 == BLOCK_N && O_COLUMNS * 8 == HEADDIM_V && BLOCK_M.is_multiple_of(16 * M));
    assert!(Q_STEPS == 0 || (Q_STEPS * T::DEPTH == HEADDIM && STAGES == 2));
    // O's tile takes the place of Q's. Dropout takes 32 keys at a time.
    assert!(HEADDIM_V <= HEADDIM && (!GENERAL || BLOCK_N.is_multiple_of(32)));
    let elements = BLOCK_M * HEADDIM + STAGES as usize * BLOCK_N * (HEADDIM + HEADDIM_V);
    let (threads, shared_bytes) = (threads(BLOCK_M, M), (elements * size_of::<T>()) as u32);
    let sums = Accumulator::<M, S_COLUMNS>::REGISTERS + Accumulator::<M, O_COLUMNS>::REGISTERS;
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
        few: false,
        sequences: 0,
        threads,
        min_blocks_per_sm: blocks_of_all_registers(threads, shared_bytes),
        claimed_registers: 0,
        accumulators: (sums + Q_STEPS * LeftOperand::<T, M>::REGISTERS) as u32,
        shared_bytes,
        barriers: if STAGES == 1 || Q_STEPS > 0 { 3 } else { 2 },
    }
}

/// A warp for each 16 M rows of the block that a block of threads owns.
pub(crate) const fn threads(block: usize, m: usize) -> u32 {
    (block / (16 * m)) as u32 * WARP
}

/// O = softmax(softmax_scale · Q Kᵀ) V and its LSE, for `BLOCK_M` query rows of one head.
///
/// Grid: `ceil(seqlen_q / BLOCK_M) * nheads * batch`. A warp has 16 `M` rows; S is `S_COLUMNS` and O `O_COLUMNS` blocks of
/// eight columns wide. Q is loaded to registers once, in `Q_STEPS` steps; if 0, from shared memory for each block of keys.
/// Tensors may have fewer columns than `HEADDIM` and `HEADDIM_V`.
#[kernel(
    name = "flash2_fwd_{T}_d{HEADDIM}{HEADDIM_V!=HEADDIM?_v}{CAUSAL?_causal}{GENERAL?_general}",
    // Measured on an H100, bf16, 16384 tokens: the speed beside PyTorch's FlashAttention-2, geometric mean of sequences of
    // 512, 4096 and 16384, not causal and causal. Figures of other tiles and those of general kernels were taken with m raised
    // lazily throughout, which is 2 to 5 % faster.
    for T in [f16, bf16],
        (HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, STAGES, Q_STEPS, M, S_COLUMNS, O_COLUMNS) in [
            // 1.16 and 1.21; with 64 keys a block 1.17 and 1.17, with one stage 1.11 and 1.13.
            (32, 32, 128, 128, 2, 0, 2, 16, 4),
            // 1.17 and 1.25; with 96 keys a block 1.15 and 1.22; with 64 keys, or one row block a warp, slower still.
            (64, 64, 128, 128, 2, 0, 2, 16, 8),
            // 1.15 and 1.14; with 96 keys a block (spills) 1.11 and 1.12, with one stage 1.09 and 1.10.
            (96, 96, 128, 64, 2, 0, 2, 8, 12),
            // PyTorch's FlashAttention-2 has none for these: 2.00 and 1.98 times its memory-efficient attention.
            (192, 128, 128, 64, 2, 0, 1, 8, 16),
            // 1.10 and 1.17; Q in shared memory, with 96 keys a block and one stage, 1.05 and 1.16, with 64 keys 1.05 and 1.14,
            // with 128 rows and two stages 1.05 and 1.12.
            (192, 192, 64, 48, 2, 12, 1, 6, 24),
            // 1.07 and 1.15, and two blocks a multiprocessor. Q in shared memory, with 64 keys a block and one stage, 1.04 and
            // 1.15; with 128 rows and 96 keys a block 0.97 and 1.04. A tile of 128 x 32 in two stages was at 0.81.
            (256, 256, 64, 32, 2, 16, 1, 4, 32),
        ],
        (CAUSAL, GENERAL) in [(false, false), (true, false)],
    for T in [f16, bf16],
        (HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, STAGES, Q_STEPS, M, S_COLUMNS, O_COLUMNS) in [
            // 1.12; with 48 keys a block 1.12, with one stage 1.13.
            (128, 128, 128, 64, 2, 0, 2, 8, 16),
        ],
        (CAUSAL, GENERAL) in [(false, false)],
    for T in [f16, bf16],
        (HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, STAGES, Q_STEPS, M, S_COLUMNS, O_COLUMNS) in [
            // 1.21; with 64 keys a block 1.27, but that spills.
            (128, 128, 128, 48, 2, 0, 2, 6, 16),
        ],
        (CAUSAL, GENERAL) in [(true, false)],
    for T in [f16, bf16],
        (HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, STAGES, Q_STEPS, M, S_COLUMNS, O_COLUMNS) in [
            // Without anything asked; then TFLOP/s with ALiBi at 4096 tokens, not causal. 0.89 and 0.88; 154.
            (32, 32, 128, 64, 2, 0, 2, 8, 4),
            // 0.92 and 0.93; 244.
            (64, 64, 128, 64, 2, 0, 2, 8, 8),
            // 0.90 and 0.90; 259.
            (96, 96, 128, 32, 2, 0, 2, 4, 12),
            // 0.97 and 0.98; 306. With 64 x 64 and one row block a warp 0.86 and 0.95.
            (128, 128, 128, 32, 2, 0, 2, 4, 16),
            // 238 with ALiBi. One stage, as in two it is more shared memory than every GPU has.
            (192, 128, 128, 64, 1, 0, 1, 8, 16),
            // 0.99 and 1.05; 294. With 128 rows and two stages 0.87 and 0.89.
            (192, 192, 64, 64, 1, 0, 1, 8, 24),
            // 1.03 and 1.08; 330. With 128 x 32 in two stages 0.77 and 0.78.
            (256, 256, 64, 64, 1, 0, 1, 8, 32),
        ],
        (CAUSAL, GENERAL) in [(false, true)],
    // TFLOP/s at 4096 tokens, not causal. PyTorch's memory-efficient attention, which makes an f32 product of three in tf32, is at
    // 20, 33, 45 and 41 at these head dimensions.
    for (T, HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, STAGES, Q_STEPS, M, S_COLUMNS, O_COLUMNS) in [
            // 23.
            (f32, 32, 32, 64, 32, 2, 0, 1, 4, 4),
            // 25.
            (f32, 64, 64, 64, 32, 2, 0, 1, 4, 8),
            // 27.
            (f32, 128, 128, 64, 32, 2, 0, 1, 4, 16),
            // 19.3.
            (f32, 256, 256, 32, 32, 1, 0, 1, 4, 32),
            // 107.
            (tf32, 32, 32, 128, 64, 2, 0, 2, 8, 4),
            // 134.
            (tf32, 64, 64, 128, 64, 2, 0, 2, 8, 8),
            // 93.
            (tf32, 128, 128, 128, 32, 2, 0, 1, 4, 16),
            // 68.
            (tf32, 256, 256, 64, 32, 1, 0, 1, 4, 32),
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
    const Q_STEPS: usize,
    const M: usize,
    const S_COLUMNS: usize,
    const O_COLUMNS: usize,
    const CAUSAL: bool,
    const GENERAL: bool,
>(
    p: Params,
) {
    let a = p.attention.of::<T>();
    let block = if CAUSAL {
        schedule::query_block_in_turn(&a, BLOCK_M as u32)
    } else {
        schedule::query_block(&a, BLOCK_M as u32)
    };
    let QueryBlock { sequence, head, first_row } = block;
    if block.rows() == 0 {
        return;
    }
    let mask = Mask::of::<T, CAUSAL, GENERAL>(&a, &sequence);
    let key_blocks = mask.key_blocks(first_row, BLOCK_M as u32, BLOCK_N as u32);

    let q = SmemTile::<T, BLOCK_M, HEADDIM>::at(dynamic_shared());
    let k_tiles = SmemTile::<T, BLOCK_N, HEADDIM>::at(q.end());
    let v_tiles = SmemTile::<T, BLOCK_N, HEADDIM_V>::at(k_tiles.stage(STAGES - 1).end());

    let (head_k, first_key) = (a.head_k(head), key_blocks.begin * BLOCK_N as u32);
    let aligned = a.is_aligned::<GENERAL>();
    // What is copied beyond the last block of keys is not read.
    let seen = Sequence { seqlen_k: sequence.seqlen_k.min(key_blocks.end * BLOCK_N as u32), ..sequence };
    let q_rows = sequence.query_matrix(&a.q, head, first_row, a.headdim, aligned);
    let k_rows = seen.key_matrix(&a.k, head_k, first_key, a.headdim, aligned);
    let v_rows = seen.key_matrix(&a.v, head_k, first_key, a.headdim_v, aligned);
    let threads = const { threads(BLOCK_M, M) };
    let mut queries = TileStream::new(threads, q_rows);
    let mut keys = TileStream::new(threads, k_rows);
    let mut values = TileStream::new(threads, v_rows);

    queries.copy_async(q);
    if key_blocks.count() > 0 {
        keys.copy_async(k_tiles.stage(key_blocks.begin % STAGES));
        if STAGES > 1 {
            values.copy_async(v_tiles.stage(key_blocks.begin % STAGES));
        }
    }
    copy::commit();

    let logits = Logits::new::<GENERAL>(&a, &sequence, head, mask);
    let own_row = warp_id() * 16 * M as u32;
    let mut softmax = RowSoftmax::<M>::EMPTY;
    let mut o = Accumulator::<M, O_COLUMNS>::zero();
    if Q_STEPS > 0 {
        // Q is here, and with it the first block of keys.
        copy::wait::<0>();
        sync_threads();
    }
    let q_fragments: [LeftOperand<T, M>; Q_STEPS] = core::array::from_fn(|step| LeftOperand::load(q, own_row, step));
    let q_fragment = |step| if Q_STEPS > 0 { q_fragments[step] } else { LeftOperand::load(q, own_row, step) };
    let mut j = key_blocks.begin;
    // Without a mask the last block ends where the keys do, and takes no register.
    while if CAUSAL || GENERAL { j < key_blocks.end } else { j * (BLOCK_N as u32) < sequence.seqlen_k } {
        let (k, v) = (k_tiles.stage(j % STAGES), v_tiles.stage(j % STAGES));
        let (row, key, partial) = (first_row + own_row, j * BLOCK_N as u32, key_blocks.is_partial(j));
        // What is copied while S is computed: V_j, or where there are two stages, K_j+1 and V_j+1. One part of `parts`.
        let mut copy_part = |part: usize, parts: usize| {
            let next = (j + 1) % STAGES;
            if STAGES == 1 {
                values.copy_part_async(v, part, parts);
            } else if parts == 1 {
                keys.copy_async(k_tiles.stage(next));
                values.copy_async(v_tiles.stage(next));
            } else if part < parts / 2 {
                keys.copy_part_async(k_tiles.stage(next), part, parts / 2);
            } else {
                values.copy_part_async(v_tiles.stage(next), part - parts / 2, parts - parts / 2);
            }
        };

        // What was copied is here, and no warp reads any more what block j - 1 was computed with.
        copy::wait::<0>();
        sync_threads();
        let mut s = Accumulator::<M, S_COLUMNS>::zero();
        if GENERAL {
            copy_part(0, 1);
            for step in 0..T::steps(HEADDIM) {
                s.add_product_transposed(&q_fragment(step), k, 0, step);
            }
        } else {
            // A part every second step, so that the products do not wait until all copies have been started.
            for step in 0..HEADDIM / T::DEPTH {
                if step % 2 == 1 {
                    copy_part(step / 2, HEADDIM / T::DEPTH / 2);
                }
                s.add_product_transposed(&q_fragment(step), k, 0, step);
            }
        }
        copy::commit();
        if STAGES == 1 {
            // V_j is here, and K_j+1 takes the place of K_j.
            copy::wait::<0>();
            sync_threads();
            if j + 1 < key_blocks.end {
                keys.copy_async(k);
                copy::commit();
            }
        }

        let p = logits.weights(s, (row, key), partial, j - key_blocks.begin, &mut softmax, &mut o);
        if GENERAL {
            // V is not read ahead: the scores have taken the registers.
            sync_warp(ALL);
        }
        for step in 0..BLOCK_N / T::DEPTH {
            o.add_product(&p.operand::<T>(step), v, step, 0);
        }
        j += 1;
    }

    let last = o.element_mut(0, 0, 0, 0).to_bits();
    // What a general kernel of a wide head keeps for the loop takes fewer registers than what finding it anew does.
    let block = if CAUSAL || GENERAL && HEADDIM > 32 {
        block.anew(last)
    } else {
        schedule::query_block_anew(&a, BLOCK_M as u32, last)
    };
    let QueryBlock { sequence, head, first_row } = block;
    let lse = a.softmax_lse.offset(a.first_row(&sequence, head) + first_row as usize);
    let sink = a.sink(head);
    softmax.finish(
        &mut o,
        |_, _| sink,
        |row, state| {
            let row = own_row + row;
            if lane_id().is_multiple_of(4) && row < block.rows() {
                lse.store(row as usize, state.lse());
            }
        },
    );
    // Q's tile becomes O's, each warp's rows its own. If there was no block of keys, Q is only now sure to be in.
    copy::wait::<0>();
    sync_threads();
    let o_tile = SmemTile::<T, BLOCK_M, HEADDIM_V>::at(dynamic_shared());
    o.store(o_tile, own_row);
    if (CAUSAL || GENERAL) && any(ALL, !o.is_finite()) {
        // Of a narrow head it too is found anew.
        let of_batches = if HEADDIM > 32 { logits.head } else { sequence.batch * a.nheads + head };
        let logits = Logits { head: of_batches, ..logits };
        let weight = |row, key, q_k, softmax| logits.weight(row, key, q_k, softmax);
        let rows = own_row..own_row + 16 * M as u32;
        attend_spoiled_rows::<T, HEADDIM, HEADDIM_V>(&a, &block, mask, aligned, o_tile, rows, weight);
    }
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

    /// S = Q Kᵀ, which begins at this row and key, becomes P relative to the softmax's m; O is rescaled to that. `turn` counts
    /// the blocks of keys.
    #[inline(always)]
    #[track_caller]
    fn weights<const M: usize, const S_COLUMNS: usize, const O_COLUMNS: usize>(
        &self,
        mut s: Accumulator<M, S_COLUMNS>,
        (first_row, first_key): (u32, u32),
        partial: bool,
        turn: u32,
        softmax: &mut RowSoftmax<M>,
        o: &mut Accumulator<M, O_COLUMNS>,
    ) -> Accumulator<M, S_COLUMNS> {
        if let Some(scores) = &self.scores {
            scores.cap(&mut s);
            scores.finish(&mut s, (first_row, first_key), partial);
        } else if partial {
            self.mask.apply(&mut s, first_row, first_key);
        }
        softmax.follow(&s, self.scale, turn, o);
        softmax.weigh(&mut s, self.scale);
        if self.dropout.is_on() {
            self.dropout.apply(&mut s, self.head, first_row, first_key);
        }
        s
    }

    /// The weight of one key, if `row` sees it: their product is `q_k`, and `softmax` is the state of the row at its end.
    #[inline(always)]
    #[track_caller]
    fn weight(&self, row: u32, key: u32, q_k: f32, softmax: OnlineSoftmax) -> Option<f32> {
        let Some(scores) = &self.scores else {
            return Some(softmax.weight(q_k * self.scale));
        };
        let dropped = if self.dropout.is_on() { self.dropout.factor(self.head, row, key) } else { 1.0 };
        scores.sees(row, key).then(|| softmax.weight(scores.score(row, key, q_k)) * dropped)
    }
}
