//! Attention, a block of queries a task.
use std::f32::consts::LOG2_E;

use kernels::OnlineSoftmax;
use rayon::prelude::*;

use super::blocks::{Block, Blocks, Place, keys_seen, steps};
use super::dropout::{Factors, drop_out};
use super::isa::{Isa, Vector, multiversion};
use super::math::{exp2, max};
use super::rows::{load, load_transposed, lse_rows, write};
use super::scores;
use super::seen::Seen;
use super::tile::{BLOCK, Lanes, QUERIES, Tile, add_weighted, multiply, tile};
use crate::element::Element;
use crate::heads::HeadsMut;
use crate::operands::Operands;
use crate::problem::Problem;

#[cfg(test)]
mod tests;

/// Computes O and LSE. `softmax_lse` has a place for each of `problem.rows()`, where `problem.lse_index` says.
pub fn attention<T: Element>(problem: &Problem, operands: &Operands<T>, out: HeadsMut<T>, softmax_lse: &mut [f32]) {
    run(Isa::detect(), problem, operands, out, softmax_lse);
}

fn run<T: Element>(isa: Isa, problem: &Problem, operands: &Operands<T>, out: HeadsMut<T>, softmax_lse: &mut [f32]) {
    let task = Task { problem, operands, out, softmax_lse: lse_rows(problem, softmax_lse) };
    let blocks = Blocks::of_queries(problem);
    blocks.par_iter().for_each_init(
        || Workspace::new(problem),
        |workspace, block| {
            query_block(isa, &task, block, workspace);
        },
    );
}

/// Bytes that all threads together work in.
pub fn extra_bytes(problem: &Problem) -> u64 {
    let Problem { headdim, headdim_v, .. } = *problem;
    let floats = 2 * (headdim + headdim_v) * BLOCK + BLOCK * BLOCK + headdim.max(headdim_v) + Factors::len(problem);
    ((floats * size_of::<f32>() + Seen::BYTES) * rayon::current_num_threads()) as u64 + Blocks::bytes(problem)
}

/// What all tasks share.
struct Task<'a, T> {
    problem: &'a Problem,
    operands: &'a Operands<'a, T>,
    out: HeadsMut<'a, T>,
    softmax_lse: HeadsMut<'a, f32>,
}

/// What a thread works in.
struct Workspace {
    /// Qᵀ, scaled: (headdim, `BLOCK`).
    q: Tile,
    /// Oᵀ, not normalised: (headdim_v, `BLOCK`).
    o: Tile,
    /// Sᵀ, then Pᵀ: (`BLOCK`, `BLOCK`).
    s: Tile,
    /// K: (`BLOCK`, headdim).
    k: Vec<f32>,
    /// V: (`BLOCK`, headdim_v).
    v: Vec<f32>,
    seen: Seen,
    factors: Factors,
    /// A row of Q or O.
    row: Vec<f32>,
}

impl Workspace {
    fn new(problem: &Problem) -> Self {
        let Problem { headdim, headdim_v, .. } = *problem;
        Workspace {
            q: tile(headdim),
            o: tile(headdim_v),
            s: tile(BLOCK),
            k: vec![0.0; BLOCK * headdim],
            v: vec![0.0; BLOCK * headdim_v],
            seen: Seen::new(),
            factors: Factors::new(problem),
            row: vec![0.0; headdim.max(headdim_v)],
        }
    }
}

multiversion! {
    /// O and LSE of one block.
    fn query_block<T>(task: &Task<T>, block: Block, workspace: &mut Workspace) = query_block_with
}

/// # Safety
/// The CPU has the instructions of V.
#[inline(always)]
unsafe fn query_block_with<T: Element, V: Vector, const ROWS: usize>(
    task: &Task<T>,
    block: Block,
    workspace: &mut Workspace,
) {
    let Task { problem, operands, out, softmax_lse } = task;
    let Block { sequence, head, first: first_q, len: queries } = block;
    let mut place = Place { sequence, head, first_q, queries, first_k: 0, keys: 0 };
    load_transposed(&operands.q, place.q_rows(), scores::scale(problem), &mut workspace.q, &mut workspace.row);
    workspace.o.fill([0.0; BLOCK]);
    let mut state = [OnlineSoftmax::EMPTY; BLOCK];

    for (first_k, keys) in steps(keys_seen(problem.window, &sequence, first_q..first_q + queries)) {
        place = Place { first_k, keys, ..place };
        // SAFETY: as the caller promises.
        unsafe { step::<T, V, ROWS>(problem, operands, &place, workspace, &mut state) };
    }

    let mut normalisation = [0.0; BLOCK];
    for lane in 0..BLOCK {
        // The sink is one more element of the row, without a value.
        let alpha = operands.sink(head).map_or(1.0, |sink| {
            let alpha = state[lane].raise(sink * LOG2_E);
            state[lane].l += state[lane].weight(sink * LOG2_E);
            alpha
        });
        normalisation[lane] = alpha * state[lane].inverse();
    }
    for o in &mut workspace.o {
        for lane in 0..BLOCK {
            // O of a row whose keys have no weight at all is 0, whatever their V.
            o[lane] = if normalisation[lane] == 0.0 { 0.0 } else { o[lane] * normalisation[lane] };
        }
    }
    let rows = place.q_rows();
    // SAFETY: the rows of this block of this head are this task's alone.
    unsafe { write(&workspace.o, rows, &mut workspace.row, out) };
    for i in 0..queries {
        // SAFETY: as above.
        unsafe { softmax_lse.row(rows.batch, rows.first + i, head)[0] = state[i].lse() };
    }
}

/// Takes one block of K and V: S = Q Kᵀ; online softmax; O = O alpha + P V.
///
/// # Safety
/// The CPU has the instructions of V.
#[inline(always)]
unsafe fn step<T: Element, V: Vector, const ROWS: usize>(
    problem: &Problem,
    operands: &Operands<T>,
    place: &Place,
    workspace: &mut Workspace,
    state: &mut [OnlineSoftmax; BLOCK],
) {
    let Workspace { q, o, s, k, v, seen, factors, .. } = workspace;
    if !seen.find::<T, QUERIES>(problem, operands, place, None) {
        return;
    }
    let rows = place.k_rows(problem);
    load(&operands.k, rows, problem.headdim, k);
    load(&operands.v, rows, problem.headdim_v, v);
    let s = &mut s[..place.keys];
    // SAFETY: as the caller promises.
    unsafe { multiply::<V, ROWS>(k, q, s) };
    scores::finish::<T, V, QUERIES>(problem, operands, place, s, None);
    if let Some(seen) = seen.hiding() {
        for (s, seen) in s.iter_mut().zip(seen) {
            for lane in 0..BLOCK {
                s[lane] = if seen[lane] != 0 { s[lane] } else { f32::NEG_INFINITY };
            }
        }
    }
    softmax::<V>(s, o, state);
    if let Some(factors) = factors.find::<QUERIES>(problem, place) {
        drop_out(s, factors);
    }
    // SAFETY: as the caller promises.
    unsafe { add_weighted::<V, ROWS>(v, s, o, seen.hiding()) };
}

/// Sᵀ becomes Pᵀ, not normalised; what the state and O have so far is rescaled to the new maximum.
#[inline(always)]
fn softmax<V: Vector>(s: &mut [Lanes], o: &mut [Lanes], state: &mut [OnlineSoftmax; BLOCK]) {
    let mut row_max = [f32::NEG_INFINITY; BLOCK];
    for s in &*s {
        for lane in 0..BLOCK {
            row_max[lane] = max(row_max[lane], s[lane]);
        }
    }
    let mut alpha = [1.0; BLOCK];
    let mut raised = false;
    for lane in 0..BLOCK {
        if row_max[lane] > state[lane].m {
            alpha[lane] = state[lane].raise(row_max[lane]);
            raised = true;
        }
    }
    if raised {
        for o in o.iter_mut() {
            for lane in 0..BLOCK {
                o[lane] *= alpha[lane];
            }
        }
    }

    let base = state.map(OnlineSoftmax::base);
    let mut sums = [0.0; BLOCK];
    for s in s.iter_mut() {
        for lane in 0..BLOCK {
            s[lane] = exp2::<V>(s[lane] - base[lane]);
            sums[lane] += s[lane];
        }
    }
    for lane in 0..BLOCK {
        state[lane].l += sums[lane];
    }
}
