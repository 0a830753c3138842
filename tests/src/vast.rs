//! Tensors, and sums of dQ, of more elements than 32 bits count: their last rows, against those of a call of the last head alone.
use ferroflash::raw::{Arguments, BackwardArguments, BackwardCall, Call};
use ferroflash::{AttentionOptions, BackwardInputs, DType, Error, GradientOutputs, Inputs, Kernel, Layout, Tensor};

use crate::arena::{Arena, Placed};
use crate::inputs::normal;
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

/// Where the inputs lie.
struct Given {
    q: Placed,
    k: Placed,
    v: Placed,
    dout: Placed,
}

/// Where the results of as many heads lie.
struct Results {
    out: Placed,
    softmax_lse: Placed,
    dq: Placed,
    dk: Placed,
    dv: Placed,
}

/// Contiguous tensors, one after the other.
#[derive(Default)]
struct Places {
    end: usize,
}

impl Places {
    fn place(&mut self, dtype: DType, shape: &[usize]) -> Placed {
        let layout = Layout::contiguous(dtype, shape).expect("below 2^63");
        let at = self.end.next_multiple_of(256);
        self.end = at + layout.len() * dtype.bytes();
        Placed { at, layout }
    }

    fn tokens(&mut self, seqlen: usize, nheads: usize, headdim: usize) -> Placed {
        self.place(DTYPE, &[1, seqlen, nheads, headdim])
    }
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
        let given = self.given(&mut places);
        let (all, alone) = (self.results(self.nheads, &mut places), self.results(1, &mut places));
        let pattern = normal(DTYPE, &[self.period], 1.0, 1);
        let arena = Arena::holding(machine, places.end, |write| {
            for (i, placed) in [&given.q, &given.k, &given.v, &given.dout].into_iter().enumerate() {
                repeat(pattern.bytes(), i * 997 % self.period * DTYPE.bytes(), placed, write);
            }
        });
        let arena = arena.map_err(failed)?;
        self.run(&arena, &given, &all, kernel).map_err(failed)?;
        self.run(&arena, &self.last_head(&given), &alone, kernel).map_err(failed)?;
        self.compare(&arena, &all, &alone).map_err(named)
    }

    fn given(&self, places: &mut Places) -> Given {
        let (seqlen_q, seqlen_k) = self.lengths;
        let [q, dout] = [(); 2].map(|()| places.tokens(seqlen_q, self.nheads, self.headdim));
        let [k, v] = [(); 2].map(|()| places.tokens(seqlen_k, self.nheads, self.headdim));
        Given { q, k, v, dout }
    }

    fn results(&self, nheads: usize, places: &mut Places) -> Results {
        let (seqlen_q, seqlen_k) = self.lengths;
        let [out, dq] = [(); 2].map(|()| places.tokens(seqlen_q, nheads, self.headdim));
        let [dk, dv] = [(); 2].map(|()| places.tokens(seqlen_k, nheads, self.headdim));
        Results { out, softmax_lse: places.place(DType::F32, &[1, nheads, seqlen_q]), dq, dk, dv }
    }

    fn last_head(&self, given: &Given) -> Given {
        let head = |placed: &Placed| {
            let seqlen = placed.layout.shape()[1];
            placed.part(&[0, 0, self.nheads - 1, 0], &[1, seqlen, 1, self.headdim])
        };
        Given { q: head(&given.q), k: head(&given.k), v: head(&given.v), dout: head(&given.dout) }
    }

    fn run(&self, arena: &Arena, given: &Given, results: &Results, kernel: Kernel) -> Result<(), Error> {
        let raw = |placed| arena.raw(placed);
        let inputs = Inputs::new(raw(&given.q), raw(&given.k), raw(&given.v));
        let (out, softmax_lse) = (raw(&results.out), raw(&results.softmax_lse));
        let options = AttentionOptions::new().deterministic(self.deterministic);
        let arguments = Arguments {
            inputs: inputs.clone(),
            out: out.clone(),
            softmax_lse: softmax_lse.clone(),
            options: options.clone(),
            kernel,
        };
        arena.forward(&Call::new(&arguments)?)?;
        let inputs = BackwardInputs::new(inputs, out, softmax_lse, raw(&given.dout));
        let gradients = GradientOutputs::new(raw(&results.dq), raw(&results.dk), raw(&results.dv));
        arena.backward(&BackwardCall::new(&BackwardArguments { inputs, gradients, options, kernel })?)
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
    let wrong = found.iter().zip(&expected).filter(|(found, expected)| !((*found - *expected).abs() <= bound));
    match wrong.clone().next() {
        None if largest > 0.0 => Ok(()),
        None => Err("all are 0".to_owned()),
        Some((found, expected)) => {
            Err(format!("{} of them are others, as {found} for {expected}; allowed: {bound:e} apart", wrong.count()))
        }
    }
}
