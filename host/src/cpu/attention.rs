//! Attention, a block of query rows a task.
use kernels::OnlineSoftmax;
use rayon::prelude::*;

use super::isa::{Isa, Vector, multiversion};
use super::tile::{Left, add_kept_product, add_product, exp2, max};
use crate::element::Element;
use crate::heads::{Heads, HeadsMut};
use crate::problem::Problem;

#[cfg(test)]
mod tests;

/// Query rows a task: four vectors of AVX-512, and O of head dim 128 in 32 KiB.
const BLOCK_M: usize = 64;
/// Keys a step: S and P take 16 KiB, K and V of head dim 128 32 KiB each.
const BLOCK_N: usize = 64;

/// Rows of a tile whose columns are queries.
type Tile = Vec<[f32; BLOCK_M]>;

/// Computes O and LSE. `softmax_lse` has a place for each of `problem.rows()`.
pub fn attention<T: Element>(
    problem: &Problem,
    q: Heads<T>,
    k: Heads<T>,
    v: Heads<T>,
    out: HeadsMut<T>,
    softmax_lse: &mut [f32],
) {
    run(Isa::detect(), &Inputs { problem, q, k, v }, &out, softmax_lse);
}

fn run<T: Element>(isa: Isa, inputs: &Inputs<T>, out: &HeadsMut<T>, softmax_lse: &mut [f32]) {
    let Problem { nheads, seqlen_q, headdim, .. } = *inputs.problem;
    if inputs.problem.rows() == 0 {
        return;
    }
    // Chunks of the LSE are the tasks: each is one query block of one head.
    let heads = softmax_lse.par_chunks_mut(seqlen_q).enumerate();
    let blocks = heads.flat_map(|(sequence, lse)| {
        let blocks = lse.par_chunks_mut(BLOCK_M).enumerate();
        blocks
            .map(move |(i, lse)| (Block { batch: sequence / nheads, head: sequence % nheads, first: i * BLOCK_M }, lse))
    });
    blocks.for_each_init(
        || Workspace::new(headdim),
        |workspace, (block, lse)| {
            query_block(isa, inputs, block, workspace, out, lse);
        },
    );
}

/// Bytes that all threads together work in.
pub fn extra_bytes(problem: &Problem) -> u64 {
    let floats = 2 * problem.headdim * BLOCK_M + BLOCK_N * BLOCK_M + 2 * BLOCK_N * problem.headdim;
    (floats * size_of::<f32>() * rayon::current_num_threads()) as u64
}

struct Inputs<'a, T> {
    problem: &'a Problem,
    q: Heads<'a, T>,
    k: Heads<'a, T>,
    v: Heads<'a, T>,
}

/// The query rows of a task: `BLOCK_M` from `first` on, or what is left of them.
#[derive(Clone, Copy)]
struct Block {
    batch: usize,
    head: usize,
    first: usize,
}

/// What a thread works in.
struct Workspace {
    /// Qᵀ, scaled to log2 units: (headdim, `BLOCK_M`).
    q: Tile,
    /// Oᵀ, not normalised: (headdim, `BLOCK_M`).
    o: Tile,
    /// Sᵀ, then Pᵀ: (`BLOCK_N`, `BLOCK_M`).
    s: Tile,
    /// K: (`BLOCK_N`, headdim).
    k: Vec<f32>,
    /// V: (`BLOCK_N`, headdim).
    v: Vec<f32>,
    /// A row of Q or O.
    row: Vec<f32>,
}

impl Workspace {
    fn new(headdim: usize) -> Self {
        let tile = |rows| vec![[0.0; BLOCK_M]; rows];
        let rows = || vec![0.0; BLOCK_N * headdim];
        Workspace {
            q: tile(headdim),
            o: tile(headdim),
            s: tile(BLOCK_N),
            k: rows(),
            v: rows(),
            row: vec![0.0; headdim],
        }
    }
}

multiversion! {
    /// O and LSE of one block.
    fn query_block<T>(
        inputs: &Inputs<T>,
        block: Block,
        workspace: &mut Workspace,
        out: &HeadsMut<T>,
        lse: &mut [f32],
    ) = query_block_with
}

/// # Safety
/// The CPU has the instructions of V.
#[inline(always)]
unsafe fn query_block_with<T: Element, V: Vector, const ROWS: usize>(
    inputs: &Inputs<T>,
    block: Block,
    workspace: &mut Workspace,
    out: &HeadsMut<T>,
    lse: &mut [f32],
) {
    let Inputs { problem, q, k, v } = inputs;
    let Problem { headdim, softmax_scale, .. } = **problem;
    let Block { batch, head, first } = block;
    let head_k = head / (problem.nheads / problem.nheads_k);
    let rows = lse.len();

    load_transposed(q, block, rows, softmax_scale * std::f32::consts::LOG2_E, &mut workspace.q, &mut workspace.row);
    workspace.o.fill([0.0; BLOCK_M]);
    let mut state = [OnlineSoftmax::EMPTY; BLOCK_M];
    // Lanes beyond the last row repeat it; nobody reads them.
    let visible: [usize; BLOCK_M] =
        std::array::from_fn(|lane| problem.sequences()[batch].visible(problem.window, first + lane.min(rows - 1)).end);

    for first_key in (0..visible[BLOCK_M - 1]).step_by(BLOCK_N) {
        let keys = BLOCK_N.min(visible[BLOCK_M - 1] - first_key);
        for (i, (k_row, v_row)) in
            workspace.k.chunks_mut(headdim).zip(workspace.v.chunks_mut(headdim)).enumerate().take(keys)
        {
            T::widen(k.row(batch, first_key + i, head_k), k_row);
            T::widen(v.row(batch, first_key + i, head_k), v_row);
        }
        let visible_here = visible.map(|visible| visible.saturating_sub(first_key) as u32);
        // SAFETY: as the caller promises.
        unsafe { step::<V, ROWS>(workspace, headdim, keys, visible_here, &mut state) };
    }

    let inverse = state.map(OnlineSoftmax::inverse);
    for (i, lse) in lse.iter_mut().enumerate() {
        for (x, o) in workspace.row.iter_mut().zip(&workspace.o) {
            *x = o[i] * inverse[i];
        }
        // SAFETY: the rows of this block of this head are this task's alone.
        T::narrow(&workspace.row, unsafe { out.row(batch, first + i, head) });
        *lse = state[i].lse();
    }
}

/// Qᵀ of a block, multiplied with `scale`; columns beyond the last row are 0.
#[inline(always)]
fn load_transposed<T: Element>(q: &Heads<T>, block: Block, rows: usize, scale: f32, tile: &mut Tile, row: &mut [f32]) {
    tile.fill([0.0; BLOCK_M]);
    for i in 0..rows {
        T::widen(q.row(block.batch, block.first + i, block.head), row);
        for (column, x) in tile.iter_mut().zip(&*row) {
            column[i] = x * scale;
        }
    }
}

/// Takes one block of K and V: S = Q Kᵀ; online softmax; O = O alpha + P V. Query i sees the first `visible[i]` of its
/// `keys` keys.
///
/// # Safety
/// The CPU has the instructions of V.
#[inline(always)]
unsafe fn step<V: Vector, const ROWS: usize>(
    workspace: &mut Workspace,
    headdim: usize,
    keys: usize,
    visible: [u32; BLOCK_M],
    state: &mut [OnlineSoftmax; BLOCK_M],
) {
    let Workspace { q, o, s, k, v, .. } = workspace;
    let (s, k, v) = (&mut s[..keys], &k[..keys * headdim], &v[..keys * headdim]);
    let masked = (visible[0] as usize) < keys;
    s.fill([0.0; BLOCK_M]);
    let k = Left { data: k, rows: keys, row_stride: headdim, step_stride: 1 };
    // SAFETY: as the caller promises.
    unsafe { add_product::<V, ROWS, BLOCK_M>(k, q, s) };
    if masked {
        for (key, s) in s.iter_mut().enumerate() {
            for lane in 0..BLOCK_M {
                s[lane] = if (key as u32) < visible[lane] { s[lane] } else { f32::NEG_INFINITY };
            }
        }
    }

    let mut row_max = [f32::NEG_INFINITY; BLOCK_M];
    for s in &*s {
        for lane in 0..BLOCK_M {
            row_max[lane] = max(row_max[lane], s[lane]);
        }
    }
    let mut alpha = [1.0; BLOCK_M];
    let mut raised = false;
    for lane in 0..BLOCK_M {
        if row_max[lane] > state[lane].m {
            alpha[lane] = state[lane].raise(row_max[lane]);
            raised = true;
        }
    }
    if raised {
        for o in o.iter_mut() {
            for lane in 0..BLOCK_M {
                o[lane] *= alpha[lane];
            }
        }
    }

    let base = state.map(OnlineSoftmax::base);
    let mut sums = [0.0; BLOCK_M];
    for s in s.iter_mut() {
        for lane in 0..BLOCK_M {
            s[lane] = exp2::<V>(s[lane] - base[lane]);
            sums[lane] += s[lane];
        }
    }
    for lane in 0..BLOCK_M {
        state[lane].l += sums[lane];
    }

    let hides = !masked || v.iter().fold(true, |finite, v| finite & v.is_finite());
    let v = Left { data: v, rows: headdim, row_stride: 1, step_stride: headdim };
    if !hides {
        // A weight of 0 hides every masked value but a NaN or infinity.
        add_kept_product(v, s, o, |key, lane| (key as u32) < visible[lane]);
    } else {
        // SAFETY: as the caller promises.
        unsafe { add_product::<V, ROWS, BLOCK_M>(v, s, o) };
    }
}
