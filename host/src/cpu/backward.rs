//! Gradients of attention, a block of queries or of keys a task.
//!
//! P is recomputed from Q, K and the LSE, as FlashAttention-2 does. One pass owns blocks of queries and sums dQ, one owns
//! blocks of keys and sums dK and dV; so nobody writes what another writes, and the sums are the same in every run. The
//! passes are each other's mirror image: with A and B of the own block and X and Y of the blocks that it walks over,
//!
//! ```text
//!              A, B     X, Y     S = X Aᵀ, dP = Y Bᵀ, dS = P ∘ (dP - D)
//! dQ:          Q, dO    K, V     dQ = softmax_scale · dSᵀ X
//! dK, dV:      K, V     Q, dO    dK = softmax_scale · dSᵀ X, dV = Pᵀ Y
//! ```
use std::f32::consts::LOG2_E;

use rayon::prelude::*;

use super::isa::{Isa, Vector, multiversion};
use super::tile::{Left, add_kept_product, add_product, exp2};
use crate::element::Element;
use crate::heads::{Heads, HeadsMut};
use crate::problem::Problem;

#[cfg(test)]
mod tests;

/// Queries or keys that a task owns, and that it takes a step.
const BLOCK: usize = 64;

/// Rows of a tile whose columns are the queries or the keys that a task owns.
type Tile = Vec<[f32; BLOCK]>;

/// What gradients are computed from.
#[derive(Clone, Copy)]
pub struct BackwardInputs<'a, T> {
    pub q: Heads<'a, T>,
    pub k: Heads<'a, T>,
    pub v: Heads<'a, T>,
    pub out: Heads<'a, T>,
    pub dout: Heads<'a, T>,
    /// (batch, nheads, seqlen_q), without gaps.
    pub softmax_lse: &'a [f32],
}

/// Where gradients go.
pub struct GradientHeads<'a, T> {
    pub dq: HeadsMut<'a, T>,
    pub dk: HeadsMut<'a, T>,
    pub dv: HeadsMut<'a, T>,
}

/// Computes dQ, dK and dV.
pub fn attention_backward<T: Element>(problem: &Problem, inputs: BackwardInputs<T>, gradients: &GradientHeads<T>) {
    run(Isa::detect(), problem, inputs, gradients);
}

/// Bytes that all threads together work in.
pub fn backward_extra_bytes(problem: &Problem) -> u64 {
    let floats = 6 * problem.headdim * BLOCK + 2 * BLOCK * BLOCK;
    (floats * size_of::<f32>() * rayon::current_num_threads()) as u64
}

fn run<T: Element>(isa: Isa, problem: &Problem, inputs: BackwardInputs<T>, gradients: &GradientHeads<T>) {
    let Problem { batch, seqlen_q, seqlen_k, nheads, nheads_k, headdim, .. } = *problem;
    let task = Task { problem, inputs, rows: &row_statistics(problem, &inputs), gradients };
    let blocks_of = |seqlen: usize, nheads: usize| {
        let blocks = seqlen.div_ceil(BLOCK);
        (0..batch * nheads * blocks).into_par_iter().map(move |i| {
            let (sequence, first) = (i / blocks, i % blocks * BLOCK);
            Block { batch: sequence / nheads, head: sequence % nheads, first, len: BLOCK.min(seqlen - first) }
        })
    };
    let workspace = || Workspace::new(headdim);
    blocks_of(seqlen_q, nheads).for_each_init(workspace, |workspace, block| query_block(isa, &task, block, workspace));
    blocks_of(seqlen_k, nheads_k).for_each_init(workspace, |workspace, block| key_block(isa, &task, block, workspace));
}

/// What a row of S needs to become one of P and of dS.
#[derive(Clone, Copy)]
struct Row {
    /// The LSE in log2 units: P = 2^(S - base).
    base: f32,
    /// D = rowsum(dO ∘ O).
    sum: f32,
    /// The keys that take part: the first so many. None where all scores are -inf, whatever dO is.
    visible: u32,
}

impl Row {
    const ABSENT: Row = Row { base: 0.0, sum: 0.0, visible: 0 };
}

/// Of all rows: (batch, nheads, seqlen_q).
fn row_statistics<T: Element>(problem: &Problem, inputs: &BackwardInputs<T>) -> Vec<Row> {
    let Problem { seqlen_q, nheads, headdim, .. } = *problem;
    let rows = inputs.softmax_lse.par_iter().enumerate();
    let buffers = || [vec![0.0; headdim], vec![0.0; headdim]];
    rows.map_init(buffers, |[o, d_o], (i, &lse)| {
        let (row, head, batch) = (i % seqlen_q, i / seqlen_q % nheads, i / (seqlen_q * nheads));
        T::widen(inputs.out.row(batch, row, head), o);
        T::widen(inputs.dout.row(batch, row, head), d_o);
        let sum = o.iter().zip(d_o).map(|(o, d_o)| *o * *d_o).sum();
        let visible =
            if lse == f32::NEG_INFINITY { 0 } else { problem.sequences()[0].visible(problem.window, row).end as u32 };
        Row { base: lse * LOG2_E, sum, visible }
    })
    .collect()
}

/// What all tasks share.
struct Task<'a, T> {
    problem: &'a Problem,
    inputs: BackwardInputs<'a, T>,
    rows: &'a [Row],
    gradients: &'a GradientHeads<'a, T>,
}

impl<T> Task<'_, T> {
    /// The statistics of the rows of one head.
    fn rows_of(&self, batch: usize, head: usize) -> &[Row] {
        let first = (batch * self.problem.nheads + head) * self.problem.seqlen_q;
        &self.rows[first..first + self.problem.seqlen_q]
    }
}

/// `len` queries, or keys, from `first` on.
#[derive(Clone, Copy)]
struct Block {
    batch: usize,
    head: usize,
    first: usize,
    len: usize,
}

/// What a thread works in, by the names that the head of this file gives.
struct Workspace {
    /// Aᵀ, scaled to log2 units: (headdim, `BLOCK`).
    a: Tile,
    /// Bᵀ: (headdim, `BLOCK`).
    b: Tile,
    /// X of a step: (`BLOCK`, headdim).
    x: Vec<f32>,
    /// Y of a step: (`BLOCK`, headdim).
    y: Vec<f32>,
    /// S, then P: (`BLOCK`, `BLOCK`).
    p: Tile,
    /// dP, then dS: (`BLOCK`, `BLOCK`).
    ds: Tile,
    /// The sum of Xᵀ dS: (headdim, `BLOCK`).
    from_ds: Tile,
    /// The sum of Yᵀ P: (headdim, `BLOCK`).
    from_p: Tile,
    /// A row of an input or of a gradient.
    row: Vec<f32>,
}

impl Workspace {
    fn new(headdim: usize) -> Self {
        let tile = |rows| vec![[0.0; BLOCK]; rows];
        let rows = || vec![0.0; BLOCK * headdim];
        Workspace {
            a: tile(headdim),
            b: tile(headdim),
            x: rows(),
            y: rows(),
            p: tile(BLOCK),
            ds: tile(BLOCK),
            from_ds: tile(headdim),
            from_p: tile(headdim),
            row: vec![0.0; headdim],
        }
    }
}

multiversion! {
    /// dQ of one block of queries.
    fn query_block<T>(task: &Task<T>, own: Block, workspace: &mut Workspace) = query_block_with
}

multiversion! {
    /// dK and dV of one block of keys.
    fn key_block<T>(task: &Task<T>, own: Block, workspace: &mut Workspace) = key_block_with
}

/// # Safety
/// The CPU has the instructions of V.
#[inline(always)]
unsafe fn query_block_with<T: Element, V: Vector, const ROWS: usize>(
    task: &Task<T>,
    own: Block,
    workspace: &mut Workspace,
) {
    let Task { problem, inputs, gradients, .. } = task;
    let Problem { headdim, softmax_scale, .. } = **problem;
    let head_k = own.head / (problem.nheads / problem.nheads_k);
    workspace.begin(&inputs.q, &inputs.dout, own, softmax_scale);
    let mut rows = [Row::ABSENT; BLOCK];
    rows[..own.len].copy_from_slice(&task.rows_of(own.batch, own.head)[own.first..own.first + own.len]);

    let end = problem.sequences()[0].visible(problem.window, own.first + own.len - 1).end;
    for first in (0..end).step_by(BLOCK) {
        let step = Block { batch: own.batch, head: head_k, first, len: BLOCK.min(end - first) };
        workspace.load_step(&inputs.k, &inputs.v, step);
        // SAFETY: as the caller promises.
        unsafe { workspace.multiply::<V, ROWS>(headdim, step.len) };
        for i in 0..step.len {
            let (p, ds) = (&mut workspace.p[i], &mut workspace.ds[i]);
            for lane in 0..BLOCK {
                let seen = ((first + i) as u32) < rows[lane].visible;
                p[lane] = if seen { exp2::<V>(p[lane] - rows[lane].base) } else { 0.0 };
                ds[lane] = if seen { p[lane] * (ds[lane] - rows[lane].sum) } else { 0.0 };
            }
        }
        let Workspace { x, ds, from_ds, .. } = workspace;
        let seen = |i: usize, lane: usize| ((first + i) as u32) < rows[lane].visible;
        // SAFETY: as the caller promises.
        unsafe { add_gradient::<V, ROWS>(x, headdim, &ds[..step.len], from_ds, seen) };
    }
    write(&workspace.from_ds, softmax_scale, own, &mut workspace.row, &gradients.dq);
}

/// # Safety
/// The CPU has the instructions of V.
#[inline(always)]
unsafe fn key_block_with<T: Element, V: Vector, const ROWS: usize>(
    task: &Task<T>,
    own: Block,
    workspace: &mut Workspace,
) {
    let Task { problem, inputs, gradients, .. } = task;
    let Problem { headdim, softmax_scale, seqlen_q, seqlen_k, .. } = **problem;
    let group = problem.nheads / problem.nheads_k;
    workspace.begin(&inputs.k, &inputs.v, own, softmax_scale);
    // The first query that sees the first key.
    let begin = if problem.is_causal() { (own.first + seqlen_q).saturating_sub(seqlen_k) } else { 0 };
    for head in own.head * group..(own.head + 1) * group {
        let rows = task.rows_of(own.batch, head);
        for first in (begin..seqlen_q).step_by(BLOCK) {
            let step = Block { batch: own.batch, head, first, len: BLOCK.min(seqlen_q - first) };
            workspace.load_step(&inputs.q, &inputs.dout, step);
            // SAFETY: as the caller promises.
            unsafe { workspace.multiply::<V, ROWS>(headdim, step.len) };
            let rows = &rows[first..first + step.len];
            for (i, row) in rows.iter().enumerate() {
                let (p, ds) = (&mut workspace.p[i], &mut workspace.ds[i]);
                for lane in 0..BLOCK {
                    let seen = ((own.first + lane) as u32) < row.visible;
                    p[lane] = if seen { exp2::<V>(p[lane] - row.base) } else { 0.0 };
                    ds[lane] = if seen { p[lane] * (ds[lane] - row.sum) } else { 0.0 };
                }
            }
            let Workspace { x, y, p, ds, from_ds, from_p, .. } = workspace;
            let seen = |i: usize, lane: usize| ((own.first + lane) as u32) < rows[i].visible;
            // SAFETY: as the caller promises.
            unsafe {
                add_gradient::<V, ROWS>(x, headdim, &ds[..step.len], from_ds, seen);
                add_gradient::<V, ROWS>(y, headdim, &p[..step.len], from_p, seen);
            }
        }
    }
    write(&workspace.from_ds, softmax_scale, own, &mut workspace.row, &gradients.dk);
    write(&workspace.from_p, 1.0, own, &mut workspace.row, &gradients.dv);
}

impl Workspace {
    /// Loads A and B of a block, and begins its sums.
    #[inline(always)]
    fn begin<T: Element>(&mut self, a: &Heads<T>, b: &Heads<T>, own: Block, softmax_scale: f32) {
        load_transposed(a, own, softmax_scale * LOG2_E, &mut self.a, &mut self.row);
        load_transposed(b, own, 1.0, &mut self.b, &mut self.row);
        self.from_ds.fill([0.0; BLOCK]);
        self.from_p.fill([0.0; BLOCK]);
    }

    /// Loads X and Y of a step.
    #[inline(always)]
    fn load_step<T: Element>(&mut self, x: &Heads<T>, y: &Heads<T>, step: Block) {
        let headdim = self.row.len();
        let rows = self.x.chunks_mut(headdim).zip(self.y.chunks_mut(headdim)).enumerate().take(step.len);
        for (i, (x_row, y_row)) in rows {
            T::widen(x.row(step.batch, step.first + i, step.head), x_row);
            T::widen(y.row(step.batch, step.first + i, step.head), y_row);
        }
    }

    /// S = X Aᵀ and dP = Y Bᵀ, of `len` rows of X and Y.
    ///
    /// # Safety
    /// The CPU has the instructions of V.
    #[inline(always)]
    unsafe fn multiply<V: Vector, const ROWS: usize>(&mut self, headdim: usize, len: usize) {
        let Workspace { a, b, x, y, p, ds, .. } = self;
        for (left, right, product) in [(&*x, &*a, p), (&*y, &*b, ds)] {
            let product = &mut product[..len];
            product.fill([0.0; BLOCK]);
            let left = Left { data: left, rows: len, row_stride: headdim, step_stride: 1 };
            // SAFETY: as the caller promises.
            unsafe { add_product::<V, ROWS, BLOCK>(left, right, product) };
        }
    }
}

/// Aᵀ of a block, multiplied with `scale`; columns beyond its last row are 0.
#[inline(always)]
fn load_transposed<T: Element>(from: &Heads<T>, own: Block, scale: f32, tile: &mut Tile, row: &mut [f32]) {
    tile.fill([0.0; BLOCK]);
    for i in 0..own.len {
        T::widen(from.row(own.batch, own.first + i, own.head), row);
        for (column, x) in tile.iter_mut().zip(&*row) {
            column[i] = x * scale;
        }
    }
}

/// Adds Xᵀ W, where W is P or dS and has a row for each of X. A weight of 0 hides what is not `seen(row, lane)`, unless it
/// is NaN or infinite.
///
/// # Safety
/// The CPU has the instructions of V.
#[inline(always)]
unsafe fn add_gradient<V: Vector, const ROWS: usize>(
    x: &[f32],
    headdim: usize,
    weights: &[[f32; BLOCK]],
    sums: &mut Tile,
    seen: impl Fn(usize, usize) -> bool,
) {
    let x = &x[..weights.len() * headdim];
    let finite = x.iter().fold(true, |finite, x| finite & x.is_finite());
    let x = Left { data: x, rows: headdim, row_stride: 1, step_stride: headdim };
    if finite {
        // SAFETY: as the caller promises.
        unsafe { add_product::<V, ROWS, BLOCK>(x, weights, sums) };
    } else {
        add_kept_product(x, weights, sums, seen);
    }
}

/// Writes the rows of a gradient, multiplied with `scale`.
#[inline(always)]
fn write<T: Element>(sums: &Tile, scale: f32, own: Block, row: &mut [f32], gradient: &HeadsMut<T>) {
    for i in 0..own.len {
        for (x, sums) in row.iter_mut().zip(sums) {
            *x = sums[i] * scale;
        }
        // SAFETY: the rows of this block of this head are this task's alone.
        T::narrow(row, unsafe { gradient.row(own.batch, own.first + i, own.head) });
    }
}
