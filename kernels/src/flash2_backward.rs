//! FlashAttention-2, backward.
//!
//! Source: Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", Algorithm 2.
//!
//! P is not kept from the forward pass: it is recomputed from Q, K and the LSE, P = 2^(scale · S - LSE), tile by tile. With
//! dP = dO Vᵀ and D = rowsum(dO ∘ O),
//!
//! ```text
//! dV = Pᵀ dO,   dS = P ∘ (dP - D),   dK = softmax_scale · dSᵀ Q,   dQ = softmax_scale · dS K.
//! ```
//!
//! Three kernels. [`row_sums`] finds D. [`keys_and_values`] owns a block of K and V, walks over the blocks of Q and dO, and
//! sums dK and dV in registers, over all heads of Q that share the head of K and V. [`queries`] owns a block of Q and dO,
//! walks over the blocks of K and V, and sums dQ. S and dP are so computed twice; in return there is no atomic addition and
//! no accumulator in HBM: the gradients are the same bits in every run and in every batch, and the extra memory is D.
use crate::attention::{Attention, Tensor, Untyped, divisor};
use crate::config::Config;
use crate::flash2::threads;
use crate::mask::Mask;
use crate::schedule::{self, KeyBlock, QueryBlock};
use cuda_std::element::{bf16, f16};
use cuda_std::fragment::{Accumulator, ColumnVector, LeftOperand, MatrixElement, RowVector};
use cuda_std::math::{LOG2_E, ex2, fma};
use cuda_std::shared::{Shared, dynamic_shared};
use cuda_std::thread::{block_idx_x, sync_threads, thread_idx_x, warp_id};
use cuda_std::warp::{ALL, reduce, sync_warp};
use cuda_std::{Element, Global, SmemTile, TileStream, copy, kernel};

/// Stages of what a block of threads walks over: one is computed on while the next comes in.
const STAGES: u32 = 2;

/// Arguments of the three kernels. Gradients have the shapes of what they are the gradients of.
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
    /// The gradient of the LSE, contiguous and in its order. Null: 0.
    pub d_lse: Global<f32>,
    /// D = rowsum(dO ∘ O) - dLSE, in the order of the LSE.
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
}

/// What the configurations of the three kernels have in common. Tiles, threads and shared memory are each kernel's own.
const fn config<T: Element, const HEADDIM: usize>() -> Config {
    Config {
        family: "flash2",
        dtype: T::DTYPE,
        tf32: false,
        headdim: HEADDIM as u32,
        headdim_v: HEADDIM as u32,
        causal: None,
        general: false,
        block_m: 0,
        block_n: 0,
        threads: 0,
        min_blocks_per_sm: 1,
        shared_bytes: 0,
        barriers: 0,
    }
}

const ROW_SUM_THREADS: u32 = 128;

const fn row_sums_config<T: Element, const HEADDIM: usize>() -> Config {
    Config {
        family: "flash2.row_sums",
        block_m: ROW_SUM_THREADS / lanes_a_row(HEADDIM),
        threads: ROW_SUM_THREADS,
        min_blocks_per_sm: 8,
        ..config::<T, HEADDIM>()
    }
}

/// Eight elements a lane: one access of 16 bytes.
const fn lanes_a_row(headdim: usize) -> u32 {
    (headdim / 8) as u32
}

/// D = rowsum(dO ∘ O). Grid: `ceil(seqlen_q * nheads * batch / block_m)`.
#[kernel(
    name = "flash2_bwd_row_sums_{T}_d{HEADDIM}",
    for T in [f16, bf16], HEADDIM in [32, 64, 128],
    config = row_sums_config,
    table = ROW_SUMS,
)]
pub fn row_sums<T: Element, const HEADDIM: usize>(p: Params) {
    let a = p.attention.of::<T>();
    let lanes = const { lanes_a_row(HEADDIM) };
    let index = block_idx_x() as u64 * (ROW_SUM_THREADS / lanes) as u64 + (thread_idx_x() / lanes) as u64;
    let rows = a.seqlen_q as u64 * a.nheads as u64 * a.batch as u64;
    let mut sum = 0.0;
    if index < rows {
        let seqlen_q = divisor(a.seqlen_q) as u64;
        let (row, (head, batch)) = (index % seqlen_q, schedule::head_of((index / seqlen_q) as u32, a.nheads));
        let column = (thread_idx_x() % lanes * 8) as usize;
        let o = a.o.row(batch, head, row).load_vector::<8>(column);
        let d_o = p.d_o.cast::<T>().row(batch, head, row).load_vector::<8>(column);
        for i in 0..8 {
            sum = fma(o[i].to_f32(), d_o[i].to_f32(), sum);
        }
    }
    let sum = match lanes {
        4 => reduce::<4, f32>(sum, |x, y| x + y),
        8 => reduce::<8, f32>(sum, |x, y| x + y),
        _ => reduce::<16, f32>(sum, |x, y| x + y),
    };
    if index < rows && thread_idx_x().is_multiple_of(lanes) {
        p.row_sums.store(index as usize, sum);
    }
}

const fn keys_and_values_config<
    T: MatrixElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const M: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const CAUSAL: bool,
>() -> Config {
    assert!(S_COLUMNS * 8 == BLOCK_M && D_COLUMNS * 8 == HEADDIM && BLOCK_N.is_multiple_of(16 * M));
    let tiles = (2 * BLOCK_N + 2 * STAGES as usize * BLOCK_M) * HEADDIM * size_of::<T>();
    let statistics = 2 * STAGES as usize * BLOCK_M * size_of::<f32>();
    Config {
        family: "flash2.keys_and_values",
        causal: Some(CAUSAL),
        block_m: BLOCK_M as u32,
        block_n: BLOCK_N as u32,
        threads: threads(BLOCK_N, M),
        shared_bytes: (tiles + statistics) as u32,
        barriers: 1,
        ..config::<T, HEADDIM>()
    }
}

/// dK and dV of `BLOCK_N` keys of one head of K and V.
///
/// Grid: `ceil(seqlen_k / BLOCK_N) * nheads_k * batch`. A warp has 16 `M` keys. S and dP are computed transposed, with keys
/// as rows, so that Pᵀ and dSᵀ come out as left operands of the products that dV and dK are the sums of.
#[kernel(
    name = "flash2_bwd_dkdv_{T}_d{HEADDIM}{CAUSAL?_causal}",
    for T in [f16, bf16],
        (HEADDIM, BLOCK_M, BLOCK_N, M, S_COLUMNS, D_COLUMNS) in [
            // On an H100, TFLOP/s of this kernel alone (four products) at 4k tokens, not causal: 309.
            (32, 64, 128, 2, 8, 4),
            // 350; with 64 queries a block and one row block a warp 291, with 64 keys a block 249.
            (64, 32, 128, 2, 4, 8),
            // 315; with 32 queries a block 277, with 64 keys a block 285.
            (128, 64, 128, 1, 8, 16),
        ],
        CAUSAL in [false, true],
    config = keys_and_values_config,
    table = KEYS_AND_VALUES,
)]
pub fn keys_and_values<
    T: MatrixElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const M: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const CAUSAL: bool,
>(
    p: Params,
) {
    let a = p.attention.of::<T>();
    let d_o = p.d_o.cast::<T>();
    let threads = const { threads(BLOCK_N, M) };
    let block = schedule::key_block(&a, BLOCK_N as u32);
    let KeyBlock { first_key, head_k, sequence } = block;
    if block.rows() == 0 {
        return;
    }
    let mask = Mask::of::<T, CAUSAL, false>(&a, &sequence);
    let blocks = mask.query_blocks(first_key, BLOCK_N as u32, BLOCK_M as u32);
    let group = a.nheads / divisor(a.nheads_k);
    // The blocks of all heads of the group, one after the other.
    let steps = blocks.count() * group;

    let k = SmemTile::<T, BLOCK_N, HEADDIM>::at(dynamic_shared());
    let v = SmemTile::<T, BLOCK_N, HEADDIM>::at(k.end());
    let q = SmemTile::<T, BLOCK_M, HEADDIM>::at(v.end());
    let d_o_tile = SmemTile::<T, BLOCK_M, HEADDIM>::at(q.stage(STAGES - 1).end());
    let lse: Shared<f32> = d_o_tile.stage(STAGES - 1).end();
    let sums = lse.offset(STAGES * BLOCK_M as u32);

    // The head of Q and the first row of step `step`.
    let place = |step: u32| {
        let count = divisor(blocks.count());
        let (head, block) = (head_k * group + step / count, blocks.begin + step % count);
        (head, block * BLOCK_M as u32)
    };
    let load_step = |step: u32| {
        let (head, first_row) = place(step);
        let rows = sequence.seqlen_q - first_row;
        let q_rows = sequence.queries(&a.q, head, first_row);
        let d_o_rows = sequence.queries(&d_o, head, first_row);
        TileStream::new(threads, q_rows, a.q.row_stride, rows).copy_async(q.stage(step % STAGES));
        TileStream::new(threads, d_o_rows, d_o.row_stride, rows).copy_async(d_o_tile.stage(step % STAGES));
        copy::commit();
    };
    // This thread's row of step `step`: what its exponents subtract, and D. A row that is not there, or saw no key, has P = 0.
    let load_statistics = |step: u32| {
        let (head, first_row) = place(step);
        let row = first_row + thread_idx_x();
        if thread_idx_x() >= BLOCK_M as u32 || row >= sequence.seqlen_q {
            return (f32::INFINITY, 0.0);
        }
        let at = a.first_row(&sequence, head) + row as usize;
        (exponent_base(a.softmax_lse.load(at)), p.row_sums.load(at))
    };
    let store_statistics = |step: u32, (base, sum): (f32, f32)| {
        if thread_idx_x() < BLOCK_M as u32 {
            let at = step % STAGES * BLOCK_M as u32 + thread_idx_x();
            lse.store(at, base);
            sums.store(at, sum);
        }
    };

    let rows = block.rows();
    let k_rows = sequence.keys(&a.k, head_k, first_key);
    let v_rows = sequence.keys(&a.v, head_k, first_key);
    TileStream::new(threads, k_rows, a.k.row_stride, rows).copy_async(k);
    TileStream::new(threads, v_rows, a.v.row_stride, rows).copy_async(v);
    copy::commit();
    if steps > 0 {
        load_step(0);
        store_statistics(0, load_statistics(0));
    }

    let scale = a.softmax_scale * LOG2_E;
    let own_row = warp_id() * 16 * M as u32;
    let mut d_k = Accumulator::<M, D_COLUMNS>::zero();
    let mut d_v = Accumulator::<M, D_COLUMNS>::zero();
    let mut step = 0;
    loop {
        // This step's tiles are here, and no warp reads those before, whose stage the next take. After the last step the
        // barrier says that K and V are in and read by nobody, and their tiles become dK's and dV's.
        copy::wait::<0>();
        sync_threads();
        if step == steps {
            break;
        }
        let mut next = (f32::INFINITY, 0.0);
        if step + 1 < steps {
            load_step(step + 1);
            next = load_statistics(step + 1);
        }
        let stage = step % STAGES;
        let (q, d_o) = (q.stage(stage), d_o_tile.stage(stage));
        let at = stage * BLOCK_M as u32;
        let (_, first_row) = place(step);

        // Pᵀ = 2^(scale · K Qᵀ - LSE)
        let mut s = Accumulator::<M, S_COLUMNS>::zero();
        for depth in 0..HEADDIM / T::DEPTH {
            s.add_product_transposed(&LeftOperand::<T, M>::load(k, own_row, depth), q, 0, depth);
        }
        if CAUSAL && blocks.is_partial(first_row / BLOCK_M as u32) {
            mask.apply_transposed(&mut s, first_key + own_row, first_row);
        }
        s.zip_columns(&ColumnVector::load(lse.offset(at)), |s, lse| ex2(fma(s, scale, -lse)));
        let p = s;

        // dV += Pᵀ dO
        for depth in 0..BLOCK_M / T::DEPTH {
            d_v.add_product(&p.operand::<T>(depth), d_o, depth, 0);
        }

        // dSᵀ = Pᵀ ∘ (V dOᵀ - D)
        let mut d_s = Accumulator::<M, S_COLUMNS>::zero();
        for depth in 0..HEADDIM / T::DEPTH {
            d_s.add_product_transposed(&LeftOperand::<T, M>::load(v, own_row, depth), d_o, 0, depth);
        }
        d_s.zip_columns(&ColumnVector::load(sums.offset(at)), |d_p, sum| d_p - sum);
        d_s.zip(&p, |d_p, p| d_p * p);

        // dK += dSᵀ Q
        for depth in 0..BLOCK_M / T::DEPTH {
            d_k.add_product(&d_s.operand::<T>(depth), q, depth, 0);
        }

        step += 1;
        if step < steps {
            store_statistics(step, next);
        }
    }

    d_k.map(|_, _, d_k| d_k * a.softmax_scale);
    let write = |sum: Accumulator<M, D_COLUMNS>, tile: SmemTile<T, BLOCK_N, HEADDIM>, gradient: Tensor<T>| {
        sum.store(tile, own_row);
        sync_warp(ALL);
        let to = sequence.keys(&gradient, head_k, first_key);
        tile.store_rows(own_row, 16 * M as u32, to, gradient.row_stride, rows);
    };
    write(d_k, k, p.d_k.cast());
    write(d_v, v, p.d_v.cast());
}

/// What P = 2^(scale · S - base) is taken relative to: the LSE in log2 units; infinity, which makes P 0, for a row that sees
/// no key.
#[inline(always)]
fn exponent_base(lse: f32) -> f32 {
    if lse == f32::NEG_INFINITY { f32::INFINITY } else { lse * LOG2_E }
}

const fn queries_config<
    T: MatrixElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const M: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const CAUSAL: bool,
>() -> Config {
    assert!(S_COLUMNS * 8 == BLOCK_N && D_COLUMNS * 8 == HEADDIM && BLOCK_M.is_multiple_of(16 * M));
    let tiles = (2 * BLOCK_M + 2 * STAGES as usize * BLOCK_N) * HEADDIM * size_of::<T>();
    Config {
        family: "flash2.queries",
        causal: Some(CAUSAL),
        block_m: BLOCK_M as u32,
        block_n: BLOCK_N as u32,
        threads: threads(BLOCK_M, M),
        shared_bytes: tiles as u32,
        barriers: 2,
        ..config::<T, HEADDIM>()
    }
}

/// dQ of `BLOCK_M` queries of one head.
///
/// Grid: `ceil(seqlen_q / BLOCK_M) * nheads * batch`. A warp has 16 `M` queries.
#[kernel(
    name = "flash2_bwd_dq_{T}_d{HEADDIM}{CAUSAL?_causal}",
    for T in [f16, bf16],
        (HEADDIM, BLOCK_M, BLOCK_N, M, S_COLUMNS, D_COLUMNS) in [
            // On an H100, TFLOP/s of this kernel alone (three products) at 4k tokens, not causal: 339.
            (32, 128, 64, 2, 8, 4),
            // 422; with 32 keys a block 394, with 64 queries and one row block a warp 326.
            (64, 128, 64, 2, 8, 8),
            // 392; with 64 keys a block and one row block a warp 335, with 64 queries so 312.
            (128, 128, 32, 2, 4, 16),
        ],
        CAUSAL in [false, true],
    config = queries_config,
    table = QUERIES,
)]
pub fn queries<
    T: MatrixElement,
    const HEADDIM: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const M: usize,
    const S_COLUMNS: usize,
    const D_COLUMNS: usize,
    const CAUSAL: bool,
>(
    p: Params,
) {
    let a = p.attention.of::<T>();
    let (d_o, d_q) = (p.d_o.cast::<T>(), p.d_q.cast::<T>());
    let threads = const { threads(BLOCK_M, M) };
    let block = schedule::query_block(&a, BLOCK_M as u32);
    let QueryBlock { sequence, head, first_row } = block;
    if block.rows() == 0 {
        return;
    }
    let mask = Mask::of::<T, CAUSAL, false>(&a, &sequence);
    let key_blocks = mask.key_blocks(first_row, BLOCK_M as u32, BLOCK_N as u32);

    let q = SmemTile::<T, BLOCK_M, HEADDIM>::at(dynamic_shared());
    let d_o_tile = SmemTile::<T, BLOCK_M, HEADDIM>::at(q.end());
    let k = SmemTile::<T, BLOCK_N, HEADDIM>::at(d_o_tile.end());
    let v = SmemTile::<T, BLOCK_N, HEADDIM>::at(k.stage(STAGES - 1).end());

    let (head_k, rows) = (a.head_k(head), block.rows());
    let of_block = |tensor: &Tensor<T>| sequence.queries(tensor, head, first_row);
    let (k_rows, v_rows) = (sequence.keys(&a.k, head_k, 0), sequence.keys(&a.v, head_k, 0));
    let mut keys = TileStream::new(threads, k_rows, a.k.row_stride, sequence.seqlen_k);
    let mut values = TileStream::new(threads, v_rows, a.v.row_stride, sequence.seqlen_k);
    TileStream::new(threads, of_block(&a.q), a.q.row_stride, rows).copy_async(q);
    TileStream::new(threads, of_block(&d_o), d_o.row_stride, rows).copy_async(d_o_tile);
    if key_blocks.end > 0 {
        keys.copy_async(k.stage(0));
        values.copy_async(v.stage(0));
    }
    copy::commit();

    let own_row = warp_id() * 16 * M as u32;
    let first = a.first_row(&sequence, head) + first_row as usize;
    let statistic = |of: Global<f32>, absent: f32| {
        RowVector::<M>::new(|row| if own_row + row < rows { of.load(first + (own_row + row) as usize) } else { absent })
    };
    let lse = statistic(a.softmax_lse, f32::NEG_INFINITY).map(exponent_base);
    let sums = statistic(p.row_sums, 0.0);

    let scale = a.softmax_scale * LOG2_E;
    let mut d_q_sum = Accumulator::<M, D_COLUMNS>::zero();
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

        // P = 2^(scale · Q Kᵀ - LSE)
        let mut s = Accumulator::<M, S_COLUMNS>::zero();
        for depth in 0..HEADDIM / T::DEPTH {
            s.add_product_transposed(&LeftOperand::<T, M>::load(q, own_row, depth), k, 0, depth);
        }
        if key_blocks.is_partial(j) {
            mask.apply(&mut s, first_row + own_row, j * BLOCK_N as u32);
        }
        s.zip_rows(&lse, |s, lse| ex2(fma(s, scale, -lse)));
        let p = s;

        // dS = P ∘ (dO Vᵀ - D)
        let mut d_s = Accumulator::<M, S_COLUMNS>::zero();
        for depth in 0..HEADDIM / T::DEPTH {
            d_s.add_product_transposed(&LeftOperand::<T, M>::load(d_o_tile, own_row, depth), v, 0, depth);
        }
        d_s.zip_rows(&sums, |d_p, sum| d_p - sum);
        d_s.zip(&p, |d_p, p| d_p * p);

        // dQ += dS K
        for depth in 0..BLOCK_N / T::DEPTH {
            d_q_sum.add_product(&d_s.operand::<T>(depth), k, depth, 0);
        }
    }

    // Q's tile becomes dQ's, each warp's rows its own. If there was no block of keys, Q is only now sure to be in.
    copy::wait::<0>();
    sync_threads();
    d_q_sum.map(|_, _, d_q| d_q * a.softmax_scale);
    d_q_sum.store(q, own_row);
    sync_warp(ALL);
    q.store_rows(own_row, 16 * M as u32, of_block(&d_q), d_q.row_stride, rows);
}
