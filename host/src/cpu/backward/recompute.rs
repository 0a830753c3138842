//! P and dS of a tile, from Q, K, V, dO and what the forward pass has left of each row.
use std::f32::consts::LOG2_E;

use super::Task;
use crate::cpu::blocks::Place;
use crate::cpu::dropout::{Factors, drop_out};
use crate::cpu::isa::Vector;
use crate::cpu::math::exp2;
use crate::cpu::rows::{Rows, load, load_transposed};
use crate::cpu::scores;
use crate::cpu::seen::Seen;
use crate::cpu::tile::{BLOCK, QUERIES, Tile, multiply, tile};
use crate::element::Element;
use crate::heads::Heads;
use crate::problem::Problem;

/// What a thread works in, by the names that the head of `backward` gives.
pub struct Workspace {
    /// Aᵀ, scaled: (headdim, `BLOCK`).
    a: Tile,
    /// Bᵀ: (headdim_v, `BLOCK`).
    b: Tile,
    /// X of a step: (`BLOCK`, headdim).
    pub x: Vec<f32>,
    /// Y of a step: (`BLOCK`, headdim_v).
    pub y: Vec<f32>,
    /// S, then P, less what is dropped: (`BLOCK`, `BLOCK`).
    pub p: Tile,
    /// dP, then dS: (`BLOCK`, `BLOCK`).
    pub ds: Tile,
    /// What the cap makes of dS: (`BLOCK`, `BLOCK`), empty without one.
    cap_gradient: Tile,
    /// The sum of Xᵀ dS: (headdim, `BLOCK`).
    pub from_ds: Tile,
    /// The sum of Yᵀ P: (headdim_v, `BLOCK`).
    pub from_p: Tile,
    pub seen: Seen,
    factors: Factors,
    /// A row of an input or of a gradient.
    pub row: Vec<f32>,
}

impl Workspace {
    pub fn new(problem: &Problem) -> Self {
        let Problem { headdim, headdim_v, .. } = *problem;
        Workspace {
            a: tile(headdim),
            b: tile(headdim_v),
            x: vec![0.0; BLOCK * headdim],
            y: vec![0.0; BLOCK * headdim_v],
            p: tile(BLOCK),
            ds: tile(BLOCK),
            cap_gradient: tile(if problem.softcap.is_some() { BLOCK } else { 0 }),
            from_ds: tile(headdim),
            from_p: tile(headdim_v),
            seen: Seen::new(),
            factors: Factors::new(problem),
            row: vec![0.0; headdim.max(headdim_v)],
        }
    }

    /// The bytes of one.
    pub fn bytes(problem: &Problem) -> usize {
        let Problem { headdim, headdim_v, .. } = *problem;
        let tiles = if problem.softcap.is_some() { 3 } else { 2 };
        let floats = (3 * (headdim + headdim_v) + tiles * BLOCK) * BLOCK + headdim.max(headdim_v);
        (floats + Factors::len(problem)) * size_of::<f32>() + Seen::BYTES
    }

    /// Loads A and B of a block.
    #[inline(always)]
    pub fn load_own<T: Element>(&mut self, problem: &Problem, (a, b): (&Heads<T>, &Heads<T>), rows: Rows) {
        load_transposed(a, rows, scores::scale(problem), &mut self.a, &mut self.row);
        load_transposed(b, rows, 1.0, &mut self.b, &mut self.row);
    }

    /// P, as dV needs it, and dS, before it goes through the cap, of a tile whose lanes are the own block. What is
    /// hidden is 0 in both. Returns whether anything is seen; else there is neither.
    ///
    /// # Safety
    /// The CPU has the instructions of V.
    #[inline(always)]
    pub unsafe fn recompute<T: Element, V: Vector, const ROWS: usize, const LANES: bool>(
        &mut self,
        task: &Task<T>,
        place: &Place,
    ) -> bool {
        let Task { problem, operands, row_sums } = task;
        let first = problem.lse_index(&place.sequence, place.head, place.first_q);
        let softmax_lse = &operands.softmax_lse[first..first + place.queries];
        let row_sums = &row_sums[first..first + place.queries];
        let Workspace { a, b, x, y, p, ds, cap_gradient, seen, factors, .. } = self;
        if !seen.find::<T, LANES>(problem, operands.forward, place, Some(softmax_lse)) {
            return false;
        }

        let (rows, from) = if LANES == QUERIES {
            (place.k_rows(problem), (&operands.forward.k, &operands.forward.v))
        } else {
            (place.q_rows(), (&operands.forward.q, &operands.dout))
        };
        load(from.0, rows, problem.headdim, x);
        load(from.1, rows, problem.headdim_v, y);
        let (p, ds) = (&mut p[..rows.len], &mut ds[..rows.len]);
        // SAFETY: as the caller promises.
        unsafe {
            multiply::<V, ROWS>(x, a, p);
            multiply::<V, ROWS>(y, b, ds);
        }
        let cap_gradient = problem.softcap.is_some().then_some(&mut cap_gradient[..]);
        scores::finish::<T, V, LANES>(problem, operands.forward, place, p, cap_gradient);
        let factors = factors.find::<LANES>(problem, place);
        if let Some(factors) = factors {
            drop_out(ds, factors);
        }

        let (mut base, mut sum) = ([0.0; BLOCK], [0.0; BLOCK]);
        for i in 0..place.queries {
            (base[i], sum[i]) = (softmax_lse[i] * LOG2_E, row_sums[i]);
        }
        for i in 0..rows.len {
            let (p, ds) = (&mut p[i], &mut ds[i]);
            for lane in 0..BLOCK {
                let query = if LANES == QUERIES { lane } else { i };
                p[lane] = exp2::<V>(p[lane] - base[query]);
                ds[lane] = p[lane] * (ds[lane] - sum[query]);
            }
            if let Some(seen) = seen.hiding() {
                for lane in 0..BLOCK {
                    p[lane] = if seen[i][lane] != 0 { p[lane] } else { 0.0 };
                    ds[lane] = if seen[i][lane] != 0 { ds[lane] } else { 0.0 };
                }
            }
        }
        if let Some(factors) = factors {
            drop_out(p, factors);
        }
        true
    }

    /// Takes dS of a tile of so many rows through the cap: it becomes the gradient of Q Kᵀ, but for the scale.
    #[inline(always)]
    pub fn take_cap_gradient(&mut self, rows: usize) {
        for (ds, gradient) in self.ds[..rows].iter_mut().zip(&self.cap_gradient) {
            for lane in 0..BLOCK {
                // What is hidden is 0, and what the cap would make of it may be NaN.
                ds[lane] = if ds[lane] == 0.0 { 0.0 } else { ds[lane] * gradient[lane] };
            }
        }
    }
}
