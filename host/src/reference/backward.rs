//! What gradients are compared with: those of attention by its definition, and those of a plain implementation.
//!
//! With dP = dO Vᵀ and D = rowsum(P ∘ dP), which equals rowsum(dO ∘ O),
//!
//! ```text
//! dV = Pᵀ dO,   dS = P ∘ (dP - D),   dK = softmax_scale · dSᵀ Q,   dQ = softmax_scale · dS K.
//! ```
//!
//! A row of dQ takes a row of dS, a row of dK and dV a column of dS and P: each is computed where it is needed, so that
//! memory stays linear in the lengths.
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, Sub};

use rayon::prelude::*;

use super::{LANES, RowIndex, each_row, round};
use crate::element::{Element, with_element};
use crate::error::Result;
use crate::heads::Heads;
use crate::layout::Layout;
use crate::options::AttentionOptions;
use crate::problem::Problem;
use crate::tensor::TensorRef;

/// Gradients of attention, in row-major order: f64 of the reference, f32 of a plain implementation.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Gradients<X> {
    /// dQ: (batch, seqlen_q, nheads, headdim).
    pub dq: Vec<X>,
    /// dK: (batch, seqlen_k, nheads_k, headdim).
    pub dk: Vec<X>,
    /// dV: (batch, seqlen_k, nheads_k, headdim).
    pub dv: Vec<X>,
}

/// The gradients of attention by their definition, in f64. A row that sees no key, or only keys whose scores are -inf, has
/// no part in them.
///
/// # Errors
/// As [`Problem::new`]; [`Error::Shape`](crate::Error::Shape) and others for a `dout` that is not like O.
pub fn attention_backward<'a>(
    q: impl Into<TensorRef<'a>>,
    k: impl Into<TensorRef<'a>>,
    v: impl Into<TensorRef<'a>>,
    dout: impl Into<TensorRef<'a>>,
    options: &AttentionOptions,
) -> Result<Gradients<f64>> {
    let tensors = [q.into(), k.into(), v.into(), dout.into()];
    let problem = check(&tensors, options)?;
    with_element!("q", problem.dtype, T => {
        let inputs = tensors.map(widened::<T, f64>);
        Ok(Definition::new(&problem, &inputs, |x| x).gradients())
    })
}

/// The gradients as a program without fused kernels computes them in the dtype of the inputs: S, P, dP and dS are rounded to
/// the dtype, and so are the gradients; sums are in f32. What the error of any other implementation is measured against.
///
/// # Errors
/// As [`attention_backward`].
pub fn plain_backward<'a>(
    q: impl Into<TensorRef<'a>>,
    k: impl Into<TensorRef<'a>>,
    v: impl Into<TensorRef<'a>>,
    dout: impl Into<TensorRef<'a>>,
    options: &AttentionOptions,
) -> Result<Gradients<f32>> {
    let tensors = [q.into(), k.into(), v.into(), dout.into()];
    let problem = check(&tensors, options)?;
    with_element!("q", problem.dtype, T => {
        let inputs = tensors.map(widened::<T, f32>);
        Ok(Definition::new(&problem, &inputs, round::<T>).gradients())
    })
}

fn check([q, k, v, dout]: &[TensorRef; 4], options: &AttentionOptions) -> Result<Problem> {
    let problem = Problem::new(q.layout(), k.layout(), v.layout(), options)?;
    problem.check_like("dout", dout.layout(), &problem.out_shape(), "q")?;
    Ok(problem)
}

fn widened<T: Element, X: Number>(tensor: TensorRef) -> Vec<X> {
    tensor.packed::<T>().unwrap_or_default().iter().map(|x| X::from(x.to_f32())).collect()
}

/// f64, or f32.
trait Number:
    Copy
    + Default
    + Send
    + Sync
    + PartialOrd
    + From<f32>
    + Sum
    + AddAssign
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
{
    /// e^self.
    fn exp(self) -> Self;
}

impl Number for f64 {
    fn exp(self) -> Self {
        self.exp()
    }
}

impl Number for f32 {
    fn exp(self) -> Self {
        self.exp()
    }
}

/// The definition, in the arithmetic of X.
struct Definition<'a, X, Store> {
    problem: &'a Problem,
    q: Heads<'a, X>,
    k: Heads<'a, X>,
    v: Heads<'a, X>,
    dout: Heads<'a, X>,
    /// What becomes of a number that is written to memory and read again.
    store: Store,
}

/// What a row of S needs to become one of P and of dS.
#[derive(Clone, Copy)]
struct Row<X> {
    /// The largest score: P = e^(S - max) / sum.
    max: X,
    /// Σ e^(S - max); 0 where there is no key, or none whose score is above -inf.
    sum: X,
    /// D.
    d: X,
}

impl<X: Number> Row<X> {
    /// Of these scores, but for D.
    fn of(scores: &[X]) -> Self {
        let nothing = X::from(f32::NEG_INFINITY);
        let max = scores.iter().fold(nothing, |max, &score| if score > max { score } else { max });
        let max = if max == nothing { X::default() } else { max };
        Row { max, sum: scores.iter().map(|&score| (score - max).exp()).sum(), d: X::default() }
    }
}

impl<'a, X: Number, Store: Fn(X) -> X + Sync> Definition<'a, X, Store> {
    fn new(problem: &'a Problem, [q, k, v, dout]: &'a [Vec<X>; 4], store: Store) -> Self {
        let layout =
            |shape: Vec<usize>| Layout::contiguous(problem.dtype, &shape).expect("no more than the tensor has");
        let (of_queries, of_keys) = (layout(problem.out_shape()), layout(problem.k_shape()));
        Definition {
            problem,
            q: Heads::new(q, &of_queries),
            k: Heads::new(k, &of_keys),
            v: Heads::new(v, &of_keys),
            dout: Heads::new(dout, &of_queries),
            store,
        }
    }

    fn gradients(&self) -> Gradients<X> {
        let problem = self.problem;
        let mut dq = vec![X::default(); problem.rows() * problem.headdim];
        let mut rows = vec![Row { max: X::default(), sum: X::default(), d: X::default() }; problem.rows()];
        for (index, row) in each_row(problem, &mut dq, |index, dq| self.of_query(index, dq)) {
            rows[index.lse(problem)] = row;
        }
        let Problem { seqlen_k, nheads_k, headdim, .. } = *problem;
        let mut dk = vec![X::default(); problem.k_shape().iter().product()];
        let mut dv = dk.clone();
        let keys = dk.par_chunks_mut(headdim).zip(dv.par_chunks_mut(headdim)).enumerate();
        keys.for_each(|(i, (dk, dv))| {
            let (batch, key, head_k) = (i / (seqlen_k * nheads_k), i / nheads_k % seqlen_k, i % nheads_k);
            self.of_key(batch, key, head_k, &rows, dk, dv);
        });
        Gradients { dq, dk, dv }
    }

    /// A row of dQ.
    fn of_query(&self, index: RowIndex, dq: &mut [X]) -> Row<X> {
        let RowIndex { batch, row, .. } = index;
        let (head_k, visible) =
            (index.head_k(self.problem), self.problem.sequences()[0].visible(self.problem.window, row).end);
        let scores: Vec<X> = (0..visible).map(|key| self.score(index, key)).collect();
        let mut all = Row::of(&scores);
        if all.sum == X::default() {
            return all;
        }
        let p: Vec<X> = scores.iter().map(|&score| self.probability(&all, score)).collect();
        let d_p: Vec<X> = (0..visible).map(|key| self.d_p(index, key)).collect();
        all.d = p.iter().zip(&d_p).map(|(&p, &d_p)| p * d_p).sum();
        for (key, (p, d_p)) in p.into_iter().zip(d_p).enumerate() {
            add_scaled(dq, (self.store)(p * (d_p - all.d)), self.k.row(batch, key, head_k));
        }
        let scale = X::from(self.problem.softmax_scale);
        dq.iter_mut().for_each(|dq| *dq = (self.store)(*dq * scale));
        all
    }

    /// A row of dK and one of dV.
    fn of_key(&self, batch: usize, key: usize, head_k: usize, rows: &[Row<X>], dk: &mut [X], dv: &mut [X]) {
        let group = self.problem.nheads / self.problem.nheads_k;
        for head in head_k * group..(head_k + 1) * group {
            for row in (0..self.problem.seqlen_q)
                .filter(|&row| key < self.problem.sequences()[0].visible(self.problem.window, row).end)
            {
                let index = RowIndex { batch, row, head };
                let all = &rows[index.lse(self.problem)];
                if all.sum == X::default() {
                    continue;
                }
                let p = self.probability(all, self.score(index, key));
                let d_s = (self.store)(p * (self.d_p(index, key) - all.d));
                add_scaled(dk, d_s, self.q.row(batch, row, head));
                add_scaled(dv, p, self.dout.row(batch, row, head));
            }
        }
        let scale = X::from(self.problem.softmax_scale);
        dk.iter_mut().for_each(|dk| *dk = (self.store)(*dk * scale));
        dv.iter_mut().for_each(|dv| *dv = (self.store)(*dv));
    }

    /// An element of S.
    fn score(&self, index: RowIndex, key: usize) -> X {
        let RowIndex { batch, row, head } = index;
        let k = self.k.row(batch, key, index.head_k(self.problem));
        (self.store)(X::from(self.problem.softmax_scale) * dot(self.q.row(batch, row, head), k))
    }

    /// An element of dP.
    fn d_p(&self, index: RowIndex, key: usize) -> X {
        let RowIndex { batch, row, head } = index;
        (self.store)(dot(self.dout.row(batch, row, head), self.v.row(batch, key, index.head_k(self.problem))))
    }

    /// An element of P, from that of S.
    fn probability(&self, row: &Row<X>, score: X) -> X {
        (self.store)((score - row.max).exp() / row.sum)
    }
}

/// Σ a b.
fn dot<X: Number>(a: &[X], b: &[X]) -> X {
    let mut sums = [X::default(); LANES];
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        for (sum, (&a, &b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.into_iter().sum()
}

/// sums += weight · row.
fn add_scaled<X: Number>(sums: &mut [X], weight: X, row: &[X]) {
    for (sum, &x) in sums.iter_mut().zip(row) {
        *sum += weight * x;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;
    use crate::tensor::Tensor;

    fn wave(shape: &[usize], step: f32) -> Tensor {
        let data = (0..shape.iter().product::<usize>()).map(|i| (i as f32 * step).sin()).collect();
        Tensor::from_vec::<f32>(data, shape).expect("as many")
    }

    /// The loss Σ dO ∘ O, whose gradient with respect to O is dO.
    fn loss([q, k, v]: &[Tensor; 3], dout: &Tensor, options: &AttentionOptions) -> f64 {
        let out = reference::attention(q, k, v, options).expect("valid").out;
        out.iter().zip(dout.to_f32()).map(|(o, d_o)| o * f64::from(d_o)).sum()
    }

    #[test]
    fn gradients_are_what_finite_differences_say() {
        // A power of two, so that a step up and one down are exact; the error is of the order of its square.
        const STEP: f32 = 1.0 / 1024.0;
        for (seqlen_q, seqlen_k, causal) in [(3, 5, false), (4, 4, true), (5, 3, true)] {
            let options = AttentionOptions::new().causal(causal).softmax_scale(0.7);
            let inputs =
                [wave(&[2, seqlen_q, 4, 3], 0.37), wave(&[2, seqlen_k, 2, 3], 0.71), wave(&[2, seqlen_k, 2, 3], 1.3)];
            let dout = wave(&[2, seqlen_q, 4, 3], 2.1);
            let [q, k, v] = &inputs;
            let Gradients { dq, dk, dv } = attention_backward(q, k, v, &dout, &options).expect("valid");
            for (which, gradient) in [dq, dk, dv].into_iter().enumerate() {
                for (i, found) in gradient.into_iter().enumerate() {
                    let at = |step: f32| {
                        let mut moved = inputs.clone();
                        let x = &mut moved[which].as_mut_slice::<f32>().expect("f32")[i];
                        let before = *x;
                        *x += step;
                        (loss(&moved, &dout, &options), f64::from(moved[which].to_f32()[i]) - f64::from(before))
                    };
                    let ((above, up), (below, down)) = (at(STEP), at(-STEP));
                    let expected = (above - below) / (up - down);
                    assert!((found - expected).abs() < 1e-5, "tensor {which}, element {i}: {found} {expected}");
                }
            }
        }
    }

    #[test]
    fn a_row_without_keys_has_no_part() {
        let mut dout = wave(&[1, 3, 1, 2], 0.37);
        dout.as_mut_slice::<f32>().expect("f32")[0] = f32::NAN;
        let (q, k) = (wave(&[1, 3, 1, 2], 0.71), wave(&[1, 1, 1, 2], 1.3));
        let gradients = attention_backward(&q, &k, &k, &dout, &AttentionOptions::new().causal(true)).expect("valid");
        assert_eq!(gradients.dq, [0.0; 6]);
        assert_eq!(gradients.dv, dout.to_f32()[4..].iter().map(|&x| f64::from(x)).collect::<Vec<_>>());
    }
}
