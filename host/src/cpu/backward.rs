//! Gradients of attention, a block of queries or of keys a task.
//!
//! P is recomputed from Q, K and the LSE, as FlashAttention-2 does. One pass owns blocks of queries and sums dQ, one
//! owns blocks of keys and sums dK and dV; so nobody writes what another writes, and the sums are the same in every
//! run. The passes are each other's mirror image: with A, B of the own block and X, Y of those that it walks over,
//!
//! ```text
//!              A, B     X, Y     S = X Aᵀ, dP = Y Bᵀ, dS = P ∘ (dP - D + dLSE)
//! dQ:          Q, dO    K, V     dQ = softmax_scale · dSᵀ X
//! dK, dV:      K, V     Q, dO    dK = softmax_scale · dSᵀ X, dV = Pᵀ Y
//! ```
//!
//! With dropout, dP and the P of dV are those times its factor; a cap of the scores makes dS smaller on its way to dQ
//! and dK. The gradients of the bias and of the sinks are sums of their own: `bias` over dS, `sinks` over rows.
use rayon::prelude::*;

use super::blocks::{Block, Blocks, Place, keys_seen, queries_that_see, steps};
use super::isa::{Isa, Vector, multiversion};
use super::rows::write;
use super::tile::{BLOCK, KEYS, Lanes, QUERIES, add_weighted};
use crate::element::Element;
use crate::heads::{Heads, HeadsMut};
use crate::operands::Operands;
use crate::problem::Problem;
use recompute::Workspace;

mod bias;
mod recompute;
mod sinks;
#[cfg(test)]
mod tests;

/// What gradients are computed from.
#[derive(Clone, Copy)]
pub struct BackwardOperands<'a, T> {
    /// The inputs of the forward pass.
    pub forward: &'a Operands<'a, T>,
    /// O of the forward pass.
    pub out: Heads<'a, T>,
    /// dO.
    pub dout: Heads<'a, T>,
    /// The LSE of the forward pass, where `Problem::lse_index` says.
    pub softmax_lse: &'a [f32],
    /// The gradient of the LSE, likewise. `None`: 0.
    pub dlse: Option<&'a [f32]>,
}

/// Where gradients go. All of it is overwritten.
pub struct GradientHeads<'a, T> {
    /// Shaped like Q.
    pub dq: HeadsMut<'a, T>,
    /// Shaped like K.
    pub dk: HeadsMut<'a, T>,
    /// Shaped like V.
    pub dv: HeadsMut<'a, T>,
    /// Shaped like the bias, `Problem::bias`, and without gaps. `None`: nobody asks for it.
    pub dbias: Option<&'a mut [T]>,
    /// (nheads); `None`: nobody asks for it.
    pub dsinks: Option<&'a mut [f32]>,
}

/// Computes the gradients: the same bits in every run, whatever the number of threads.
pub fn attention_backward<T: Element>(
    problem: &Problem,
    operands: &BackwardOperands<T>,
    gradients: &mut GradientHeads<T>,
) {
    run(Isa::detect(), problem, operands, gradients);
}

/// Bytes that all threads together work in, but for one number a row.
pub fn backward_extra_bytes(problem: &Problem) -> u64 {
    (Workspace::bytes(problem) * rayon::current_num_threads()) as u64 + Blocks::bytes(problem)
}

fn run<T: Element>(isa: Isa, problem: &Problem, operands: &BackwardOperands<T>, gradients: &mut GradientHeads<T>) {
    let GradientHeads { dq, dk, dv, dbias, dsinks } = gradients;
    let task = Task { problem, operands, row_sums: &row_sums(problem, operands) };
    let workspace = || Workspace::new(problem);
    let blocks = Blocks::of_queries(problem);
    blocks.par_iter().for_each_init(workspace, |workspace, block| query_block(isa, &task, block, workspace, dq));
    let blocks = Blocks::of_keys(problem);
    blocks.par_iter().for_each_init(workspace, |workspace, block| key_block(isa, &task, block, workspace, dk, dv));
    if let Some(dbias) = dbias {
        bias::run(isa, &task, dbias);
    }
    if let Some(dsinks) = dsinks {
        sinks::run(&task, dsinks);
    }
}

/// D - dLSE of all rows, in the order of the LSE, where D = rowsum(dO ∘ O).
fn row_sums<T: Element>(problem: &Problem, operands: &BackwardOperands<T>) -> Vec<f32> {
    let Problem { nheads, headdim_v, .. } = *problem;
    let tokens = problem.varlen.as_ref().map_or(problem.seqlen_q, |varlen| varlen.total_q);
    let buffers = || [vec![0.0; headdim_v], vec![0.0; headdim_v]];
    let rows = (0..problem.rows()).into_par_iter();
    rows.map_init(buffers, |[o, d_o], i| {
        let (batch, head, token) = (i / (tokens * nheads), i / tokens % nheads, i % tokens);
        T::widen(operands.out.row(batch, token, head), o);
        T::widen(operands.dout.row(batch, token, head), d_o);
        let sum: f32 = o.iter().zip(d_o).map(|(o, d_o)| *o * *d_o).sum();
        sum - operands.dlse.map_or(0.0, |dlse| dlse[i])
    })
    .collect()
}

/// What all tasks share.
struct Task<'a, T> {
    problem: &'a Problem,
    operands: &'a BackwardOperands<'a, T>,
    /// D - dLSE, in the order of the LSE.
    row_sums: &'a [f32],
}

multiversion! {
    /// dQ of one block of queries.
    fn query_block<T>(
        task: &Task<T>,
        own: Block,
        workspace: &mut Workspace,
        dq: &HeadsMut<T>,
    ) = query_block_with
}

multiversion! {
    /// dK and dV of one block of keys.
    fn key_block<T>(
        task: &Task<T>,
        own: Block,
        workspace: &mut Workspace,
        dk: &HeadsMut<T>,
        dv: &HeadsMut<T>,
    ) = key_block_with
}

/// # Safety
/// The CPU has the instructions of V.
#[inline(always)]
unsafe fn query_block_with<T: Element, V: Vector, const ROWS: usize>(
    task: &Task<T>,
    own: Block,
    workspace: &mut Workspace,
    dq: &HeadsMut<T>,
) {
    let Task { problem, operands, .. } = task;
    let Block { sequence, head, first: first_q, len: queries } = own;
    let mut place = Place { sequence, head, first_q, queries, first_k: 0, keys: 0 };
    let rows = place.q_rows();
    workspace.load_own(problem, (&operands.forward.q, &operands.dout), rows);
    workspace.from_ds.fill([0.0; BLOCK]);
    for (first_k, keys) in steps(keys_seen(problem.window, &sequence, first_q..first_q + queries)) {
        place = Place { first_k, keys, ..place };
        // SAFETY: as the caller promises.
        unsafe {
            if workspace.recompute::<T, V, ROWS, QUERIES>(task, &place) {
                workspace.take_cap_gradient(keys);
                let Workspace { x, ds, from_ds, seen, .. } = workspace;
                add_weighted::<V, ROWS>(x, &ds[..keys], from_ds, seen.hiding());
            }
        }
    }
    let Workspace { from_ds, row, .. } = workspace;
    scale(from_ds, problem.softmax_scale);
    // SAFETY: the rows of this block of this head are this task's alone.
    unsafe { write(from_ds, rows, row, dq) };
}

/// # Safety
/// The CPU has the instructions of V.
#[inline(always)]
unsafe fn key_block_with<T: Element, V: Vector, const ROWS: usize>(
    task: &Task<T>,
    own: Block,
    workspace: &mut Workspace,
    dk: &HeadsMut<T>,
    dv: &HeadsMut<T>,
) {
    let Task { problem, operands, .. } = task;
    let Block { sequence, first: first_k, len: keys, .. } = own;
    let group = problem.nheads / problem.nheads_k;
    let mut place = Place { sequence, head: own.head * group, first_q: 0, queries: 0, first_k, keys };
    let rows = place.k_rows(problem);
    workspace.load_own(problem, (&operands.forward.k, &operands.forward.v), rows);
    workspace.from_ds.fill([0.0; BLOCK]);
    workspace.from_p.fill([0.0; BLOCK]);
    for head in own.head * group..(own.head + 1) * group {
        for (first_q, queries) in steps(queries_that_see(problem.window, &sequence, first_k..first_k + keys)) {
            place = Place { head, first_q, queries, ..place };
            // SAFETY: as the caller promises.
            unsafe {
                if workspace.recompute::<T, V, ROWS, KEYS>(task, &place) {
                    workspace.take_cap_gradient(queries);
                    let Workspace { x, y, p, ds, from_ds, from_p, seen, .. } = workspace;
                    add_weighted::<V, ROWS>(x, &ds[..queries], from_ds, seen.hiding());
                    add_weighted::<V, ROWS>(y, &p[..queries], from_p, seen.hiding());
                }
            }
        }
    }
    let Workspace { from_ds, from_p, row, .. } = workspace;
    scale(from_ds, problem.softmax_scale);
    // SAFETY: the rows of this block of this head are this task's alone.
    unsafe {
        write(from_ds, rows, row, dk);
        write(from_p, rows, row, dv);
    }
}

#[inline(always)]
fn scale(tile: &mut [Lanes], scale: f32) {
    for x in tile {
        for lane in 0..BLOCK {
            x[lane] *= scale;
        }
    }
}
