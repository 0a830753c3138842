//! The gradient of the bias: dS, summed over all that share an element of the bias.
//!
//! A task owns a part of the gradient and walks over those that share it, in order: so the sums are the same in every
//! run. It recomputes dS, once more than the other gradients do; in memory there is nothing of the size of S but the
//! result.
use std::ops::Range;

use rayon::prelude::*;

use super::Task;
use super::recompute::Workspace;
use crate::cpu::blocks::{Place, queries_that_see, steps};
use crate::cpu::isa::{Isa, Vector, multiversion};
use crate::cpu::tile::{BLOCK, KEYS, Tile, tile};
use crate::element::Element;
use crate::problem::Problem;
use crate::sequences::Sequence;

/// Those whose dS a task sums, and the keys of its elements.
struct Part<'a> {
    sequences: &'a [Sequence],
    heads: Range<usize>,
    queries: Range<usize>,
    /// Whether all queries share one row of the bias.
    one_row: bool,
    keys: Range<usize>,
}

/// Computes dbias, of the shape that `problem.bias` says; nothing if there is no bias.
pub fn run<T: Element>(isa: Isa, task: &Task<T>, dbias: &mut [T]) {
    let Problem { batch, nheads, seqlen_q, seqlen_k, .. } = *task.problem;
    let Some([batches, heads, rows, _]) = task.problem.bias.filter(|_| !dbias.is_empty()) else { return };
    let sequences = &task.problem.sequences();
    // A task owns some keys of the one row that all queries share; or all keys of some rows.
    let one_row = rows == 1;
    let own = if one_row { BLOCK } else { BLOCK * seqlen_k };
    let matrices = dbias.par_chunks_mut(rows * seqlen_k).enumerate();
    let parts = matrices.flat_map(|(matrix, dbias)| {
        dbias.par_chunks_mut(own).enumerate().map(move |(i, dbias)| {
            let shared = |all: usize, extent: usize, i: usize| if extent == all { i..i + 1 } else { 0..all };
            let block = |all: usize| i * BLOCK..((i + 1) * BLOCK).min(all);
            let part = Part {
                sequences: &sequences[shared(batch, batches, matrix / heads)],
                heads: shared(nheads, heads, matrix % heads),
                queries: if one_row { 0..seqlen_q } else { block(seqlen_q) },
                one_row,
                keys: if one_row { block(seqlen_k) } else { 0..seqlen_k },
            };
            (part, dbias)
        })
    });
    let workspace = || (Workspace::new(task.problem), tile(BLOCK));
    parts.for_each_init(workspace, |(workspace, sums), (part, dbias)| sum(isa, task, &part, workspace, sums, dbias));
}

multiversion! {
    /// dbias of one part.
    fn sum<T>(
        task: &Task<T>,
        part: &Part,
        workspace: &mut Workspace,
        sums: &mut Tile,
        dbias: &mut [T],
    ) = sum_with
}

/// # Safety
/// The CPU has the instructions of V.
#[inline(always)]
unsafe fn sum_with<T: Element, V: Vector, const ROWS: usize>(
    task: &Task<T>,
    part: &Part,
    workspace: &mut Workspace,
    sums: &mut Tile,
    dbias: &mut [T],
) {
    let Task { problem, operands, .. } = task;
    for (first_k, keys) in steps(part.keys.clone()) {
        sums.fill([0.0; BLOCK]);
        for &sequence in part.sequences.iter().filter(|sequence| sequence.seqlen_k > first_k) {
            let keys = keys.min(sequence.seqlen_k - first_k);
            let seen_by = queries_that_see(problem.window, &sequence, first_k..first_k + keys);
            let queries = seen_by.start.max(part.queries.start)..seen_by.end.min(part.queries.end);
            if queries.is_empty() {
                continue;
            }
            for head in part.heads.clone() {
                let place = Place { sequence, head, first_q: 0, queries: 0, first_k, keys };
                workspace.load_own(problem, (&operands.forward.k, &operands.forward.v), place.k_rows(problem));
                for (first_q, queries) in steps(queries.clone()) {
                    let place = Place { first_q, queries, ..place };
                    // SAFETY: as the caller promises.
                    if !unsafe { workspace.recompute::<T, V, ROWS, KEYS>(task, &place) } {
                        continue;
                    }
                    for (i, ds) in workspace.ds[..queries].iter().enumerate() {
                        let sums = &mut sums[if part.one_row { 0 } else { i }];
                        // Lanes beyond the last key hold anything.
                        for (sum, ds) in sums[..keys].iter_mut().zip(ds) {
                            *sum += ds;
                        }
                    }
                }
            }
        }
        let first = first_k - part.keys.start;
        for (dbias, sums) in dbias.chunks_mut(part.keys.len()).zip(&*sums) {
            T::narrow(&sums[..keys], &mut dbias[first..first + keys]);
        }
    }
}
