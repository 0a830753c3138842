//! Tensors, and sums of dQ, of more elements than 32 bits count: their last rows, against those of a call of the last head alone.
use ferroflash::{AttentionOptions, DType, Error, Kernel, Tensor};

use crate::arena::{Arena, Placed};
use crate::inputs::normal;
use crate::passes::{Given, Places, Results, Shapes, run};
use crate::pointers::Machine;

const DTYPE: DType = DType::BF16;

/// Rows at each end of a tensor that are looked at.
const ROWS: usize = 300;

/// One sequence, without a mask.
#[derive(Clone, Copy, Debug)]
pub struct Vast {
    /// (seqlen_q, seqlen_k).
    pub lengths: (usize, usize),
    /// Heads of Q, and of K.
    pub nheads: usize,
    /// Elements of a row.
    pub headdim: usize,
    /// Elements after which the inputs repeat: an odd number, so that no two rows are alike that are a power of two apart.
    pub period: usize,
    /// Whether gradients are to be the same bits in every run.
    pub deterministic: bool,
}

impl Vast {
    /// Runs all heads, and the last one, forward and backward, and compares.
    ///
    /// # Errors
    /// What differs, or what the machine says.
    pub fn check(&self, machine: Machine, kernel: Kernel) -> Result<(), String> {
        let named = |reason: String| format!("{kernel}, {self:?}: {reason}");
        let failed = |error: Error| named(error.to_string());
        let mut places = Places::default();
        let given = self.shapes(self.nheads).given(&mut places);
        let [all, alone] = [self.nheads, 1].map(|nheads| self.shapes(nheads).results(&mut places));
        let pattern = normal(DTYPE, &[self.period], 1.0, 1);
        let arena = Arena::holding(machine, places.end, |write| {
            for (i, placed) in [&given.q, &given.k, &given.v, &given.dout].into_iter().enumerate() {
                repeat(pattern.bytes(), i * 997 % self.period * DTYPE.bytes(), placed, write);
            }
        });
        let arena = arena.map_err(failed)?;
        let options = AttentionOptions::new().deterministic(self.deterministic);
        run(&arena, &given, &all, &options, kernel).map_err(failed)?;
        run(&arena, &self.last_head(&given), &alone, &options, kernel).map_err(failed)?;
        self.compare(&arena, &all, &alone).map_err(named)
    }

    /// The shapes of so many heads.
    fn shapes(&self, nheads: usize) -> Shapes {
        Shapes { dtype: DTYPE, batch: 1, lengths: self.lengths, nheads, headdim: self.headdim }
    }

    fn last_head(&self, given: &Given) -> Given {
        let head = |placed: &Placed| {
            let seqlen = placed.layout.shape()[1];
            placed.part(&[0, 0, self.nheads - 1, 0], &[1, seqlen, 1, self.headdim])
        };
        Given { q: head(&given.q), k: head(&given.k), v: head(&given.v), dout: head(&given.dout) }
    }

    /// The first and the last rows of the last head.
    fn compare(&self, arena: &Arena, all: &Results, alone: &Results) -> Result<(), String> {
        let head = self.nheads - 1;
        for (name, all, alone) in [
            ("out", &all.out, &alone.out),
            ("dq", &all.dq, &alone.dq),
            ("dk", &all.dk, &alone.dk),
            ("dv", &all.dv, &alone.dv),
        ] {
            let seqlen = all.layout.shape()[1];
            let rows = ROWS.min(seqlen);
            for first in [0, seqlen - rows] {
                let shape = [1, rows, 1, self.headdim];
                let [all, alone] =
                    arena.read([&all.part(&[0, first, head, 0], &shape), &alone.part(&[0, first, 0, 0], &shape)]);
                near(&all, &alone).map_err(|reason| format!("{name}, {rows} rows from row {first} on: {reason}"))?;
            }
        }
        let seqlen = self.lengths.0;
        let rows = ROWS.min(seqlen);
        let last = |placed: &Placed, head| placed.part(&[0, head, seqlen - rows], &[1, 1, rows]);
        let [all, alone] = arena.read([&last(&all.softmax_lse, head), &last(&alone.softmax_lse, 0)]);
        near(&all, &alone).map_err(|reason| format!("softmax_lse, the last {rows} rows: {reason}"))
    }
}

/// Fills a contiguous tensor with a pattern, from this byte of it on.
fn repeat(pattern: &[u8], phase: usize, placed: &Placed, write: &mut dyn FnMut(usize, &[u8])) {
    let (mut at, end) = (placed.at, placed.at + placed.layout.len() * placed.layout.dtype().bytes());
    let mut next = &pattern[phase..];
    while at < end {
        let run = &next[..next.len().min(end - at)];
        write(at, run);
        at += run.len();
        next = pattern;
    }
}

/// Whether results are the same but for two roundings to bf16 at the scale of the largest: calls of more heads may divide their
/// sums otherwise.
fn near(found: &Tensor, expected: &Tensor) -> Result<(), String> {
    let (found, expected) = (found.to_f32(), expected.to_f32());
    let largest = expected.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    let bound = largest * 2f32.powi(-7);
    // NaN is near nothing.
    let is_near = |found: f32, expected: f32| (found - expected).abs() <= bound;
    let wrong = found.iter().zip(&expected).filter(|&(&found, &expected)| !is_near(found, expected));
    match wrong.clone().next() {
        None if largest > 0.0 => Ok(()),
        None => Err("all are 0".to_owned()),
        Some((found, expected)) => {
            Err(format!("{} of them are others, as {found} for {expected}; allowed: {bound:e} apart", wrong.count()))
        }
    }
}
