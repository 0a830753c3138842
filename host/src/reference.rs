//! What results are compared with: attention and softmax in f64, and a plain implementation in the dtype of the inputs.
//!
//! Both follow the definition, a row of S at a time: no tiles, no online softmax.
use rayon::prelude::*;

use crate::element::{Datum, Element, with_dtype, with_element};
use crate::error::Result;
use crate::heads::Heads;
use crate::options::AttentionOptions;
use crate::problem::Problem;
use crate::tensor::TensorRef;

mod backward;

pub use backward::{Gradients, attention_backward, plain_backward};

/// Attention in f64.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Reference {
    /// O: (batch, seqlen_q, nheads, headdim), in row-major order.
    pub out: Vec<f64>,
    /// LSE: (batch, nheads, seqlen_q), in row-major order; natural logarithm.
    pub softmax_lse: Vec<f64>,
}

/// Attention by its definition, in f64. A row that sees no key, or only keys whose scores are -inf, has O = 0 and
/// LSE = -inf.
///
/// # Errors
/// As [`Problem::new`].
pub fn attention<'a>(
    q: impl Into<TensorRef<'a>>,
    k: impl Into<TensorRef<'a>>,
    v: impl Into<TensorRef<'a>>,
    options: &AttentionOptions,
) -> Result<Reference> {
    let (q, k, v) = (q.into(), k.into(), v.into());
    let problem = Problem::new(q.layout(), k.layout(), v.layout(), options)?;
    let mut out = vec![0.0; problem.rows() * problem.headdim];
    let mut softmax_lse = vec![f64::NEG_INFINITY; problem.rows()];
    with_element!("q", problem.dtype, T => {
        let (q, k, v) = (heads::<T>(&q), heads::<T>(&k), heads::<T>(&v));
        let lse = each_row(&problem, &mut out, |index, out| row_in_f64(&problem, &q, &k, &v, index, out));
        for (index, lse) in lse {
            softmax_lse[index.lse(&problem)] = lse;
        }
    });
    Ok(Reference { out, softmax_lse })
}

/// Attention as [`plain`] computes it; shapes as in [`Reference`].
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Plain {
    /// O, rounded to the dtype.
    pub out: Vec<f32>,
    /// LSE, of scores that were rounded to the dtype.
    pub softmax_lse: Vec<f32>,
}

/// Attention as a program without fused kernels computes it in the dtype of the inputs: S and P are rounded to the dtype,
/// sums are in f32. What the error of any other implementation is measured against.
///
/// # Errors
/// As [`Problem::new`].
pub fn plain<'a>(
    q: impl Into<TensorRef<'a>>,
    k: impl Into<TensorRef<'a>>,
    v: impl Into<TensorRef<'a>>,
    options: &AttentionOptions,
) -> Result<Plain> {
    let (q, k, v) = (q.into(), k.into(), v.into());
    let problem = Problem::new(q.layout(), k.layout(), v.layout(), options)?;
    let mut out = vec![0.0; problem.rows() * problem.headdim];
    let mut softmax_lse = vec![f32::NEG_INFINITY; problem.rows()];
    with_element!("q", problem.dtype, T => {
        let (q, k, v) = (heads::<T>(&q), heads::<T>(&k), heads::<T>(&v));
        let lse = each_row(&problem, &mut out, |index, out| plain_row(&problem, &q, &k, &v, index, out));
        for (index, lse) in lse {
            softmax_lse[index.lse(&problem)] = lse;
        }
    });
    Ok(Plain { out, softmax_lse })
}

/// Softmax over the last dimension, in f64, in row-major order. A row of nothing but -inf becomes 0.
pub fn softmax<'a>(x: impl Into<TensorRef<'a>>) -> Vec<f64> {
    let x = x.into();
    let columns = x.shape().last().copied().unwrap_or(1).max(1);
    with_dtype!(x.dtype(), T => {
        let x = x.packed::<T>().unwrap_or_default();
        let mut y: Vec<f64> = widened(&x).into_iter().map(f64::from).collect();
        y.par_chunks_mut(columns).for_each(|row| {
            normalise(row);
        });
        y
    })
}

/// The same with f32 sums, rounded to the dtype of `x`: the plain implementation.
pub fn plain_softmax<'a>(x: impl Into<TensorRef<'a>>) -> Vec<f32> {
    let x = x.into();
    let columns = x.shape().last().copied().unwrap_or(1).max(1);
    with_dtype!(x.dtype(), T => {
        let x = x.packed::<T>().unwrap_or_default();
        let mut y: Vec<f32> = widened(&x);
        y.par_chunks_mut(columns).for_each(|row| {
            normalise_in_f32(row);
            round_all::<T>(row);
        });
        y
    })
}

/// Which row of O: batch, token, head.
#[derive(Clone, Copy)]
struct RowIndex {
    batch: usize,
    row: usize,
    head: usize,
}

impl RowIndex {
    /// Where its LSE is.
    fn lse(self, problem: &Problem) -> usize {
        (self.batch * problem.nheads + self.head) * problem.seqlen_q + self.row
    }

    /// The head of K and V that it reads.
    fn head_k(self, problem: &Problem) -> usize {
        self.head / (problem.nheads / problem.nheads_k)
    }
}

/// Computes every row of O, in parallel; returns what `compute` does.
fn each_row<X: Send, R: Send>(
    problem: &Problem,
    out: &mut [X],
    compute: impl Fn(RowIndex, &mut [X]) -> R + Sync,
) -> Vec<(RowIndex, R)> {
    let Problem { seqlen_q, nheads, headdim, .. } = *problem;
    let rows = out.par_chunks_mut(headdim).enumerate();
    rows.map(|(i, out)| {
        let index = RowIndex { batch: i / (seqlen_q * nheads), row: i / nheads % seqlen_q, head: i % nheads };
        (index, compute(index, out))
    })
    .collect()
}

fn heads<'a, T: Element>(tensor: &TensorRef<'a>) -> Heads<'a, T> {
    Heads::new(tensor.as_slice().unwrap_or_default(), tensor.layout())
}

fn row_in_f64<T: Element>(
    problem: &Problem,
    q: &Heads<T>,
    k: &Heads<T>,
    v: &Heads<T>,
    index: RowIndex,
    out: &mut [f64],
) -> f64 {
    let RowIndex { batch, row, head } = index;
    let (head_k, visible) = (index.head_k(problem), problem.sequences()[batch].visible(problem.window, row).end);
    let wide = |x: &T| f64::from(x.to_f32());
    let q: Vec<f64> = q.row(batch, row, head).iter().map(wide).collect();
    let score = |key: usize| f64::from(problem.softmax_scale) * dot(&q, k.row(batch, key, head_k));
    let mut p: Vec<f64> = (0..visible).map(score).collect();
    let lse = normalise(&mut p);
    // A row without keys has no V to take part; one with nothing but scores of -inf takes no part of it, be it NaN.
    if lse > f64::NEG_INFINITY || lse.is_nan() {
        for (key, p) in p.into_iter().enumerate() {
            for (out, v) in out.iter_mut().zip(v.row(batch, key, head_k)) {
                *out += p * wide(v);
            }
        }
    }
    lse
}

fn plain_row<T: Element>(
    problem: &Problem,
    q: &Heads<T>,
    k: &Heads<T>,
    v: &Heads<T>,
    index: RowIndex,
    out: &mut [f32],
) -> f32 {
    let RowIndex { batch, row, head } = index;
    let (head_k, visible) = (index.head_k(problem), problem.sequences()[batch].visible(problem.window, row).end);
    let q: Vec<f32> = q.row(batch, row, head).iter().map(|&q| q.to_f32()).collect();
    let score = |key| round::<T>(problem.softmax_scale * dot_in_f32(&q, k.row(batch, key, head_k)));
    let mut p: Vec<f32> = (0..visible).map(score).collect();
    let lse = normalise_in_f32(&mut p);
    for (key, p) in p.into_iter().enumerate() {
        let p = round::<T>(p);
        for (out, v) in out.iter_mut().zip(v.row(batch, key, head_k)) {
            *out += p * v.to_f32();
        }
    }
    out.iter_mut().for_each(|out| *out = round::<T>(*out));
    lse
}

fn widened<T: Datum>(x: &[T]) -> Vec<f32> {
    let mut wide = vec![0.0; x.len()];
    T::widen(x, &mut wide);
    wide
}

fn round_all<T: Datum>(row: &mut [f32]) {
    let mut rounded = vec![T::default(); row.len()];
    T::narrow(row, &mut rounded);
    T::widen(&rounded, row);
}

fn round<T: Element>(x: f32) -> f32 {
    T::from_f32(x).to_f32()
}

/// Sums that are independent of each other, so that they vectorise.
const LANES: usize = 8;

/// Σ q k, in f64.
fn dot<T: Element>(q: &[f64], k: &[T]) -> f64 {
    let mut sums = [0.0; LANES];
    for (q, k) in q.chunks(LANES).zip(k.chunks(LANES)) {
        for (sum, (q, k)) in sums.iter_mut().zip(q.iter().zip(k)) {
            *sum += q * f64::from(k.to_f32());
        }
    }
    sums.iter().sum()
}

/// Σ q k, in f32.
fn dot_in_f32<T: Element>(q: &[f32], k: &[T]) -> f32 {
    let mut sums = [0.0; LANES];
    for (q, k) in q.chunks(LANES).zip(k.chunks(LANES)) {
        for (sum, (q, k)) in sums.iter_mut().zip(q.iter().zip(k)) {
            *sum += q * k.to_f32();
        }
    }
    sums.iter().sum()
}

/// Replaces scores by their softmax; returns log Σ e^score. NaN and +inf make all of the row NaN.
fn normalise(row: &mut [f64]) -> f64 {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let base = if max == f64::NEG_INFINITY { 0.0 } else { max };
    row.iter_mut().for_each(|x| *x = (*x - base).exp());
    let sum: f64 = row.iter().sum();
    if sum == 0.0 {
        return f64::NEG_INFINITY;
    }
    row.iter_mut().for_each(|x| *x /= sum);
    base + sum.ln()
}

/// The same in f32, as a plain program does it.
fn normalise_in_f32(row: &mut [f32]) -> f32 {
    let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let base = if max == f32::NEG_INFINITY { 0.0 } else { max };
    row.iter_mut().for_each(|x| *x = (*x - base).exp());
    let sum: f32 = row.iter().sum();
    if sum == 0.0 {
        return f32::NEG_INFINITY;
    }
    row.iter_mut().for_each(|x| *x /= sum);
    base + sum.ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Tensor;

    #[test]
    fn two_keys_by_hand() {
        let q = Tensor::from_vec(vec![1.0f32, 0.0], &[1, 1, 1, 2]).expect("2 elements");
        let k = Tensor::from_vec(vec![1.0f32, 5.0, 3.0, 7.0], &[1, 2, 1, 2]).expect("4 elements");
        let options = AttentionOptions::new().softmax_scale(0.5);
        let reference = attention(&q, &k, &k, &options).expect("valid");
        // Scores 0.5 and 1.5.
        let p = 1.0 / (1.0 + 1f64.exp());
        assert!((reference.out[0] - (p + 3.0 * (1.0 - p))).abs() < 1e-12);
        assert!((reference.out[1] - (5.0 * p + 7.0 * (1.0 - p))).abs() < 1e-12);
        assert!((reference.softmax_lse[0] - (0.5f64.exp() + 1.5f64.exp()).ln()).abs() < 1e-12);
    }

    #[test]
    fn a_row_without_keys_is_zero() {
        let q = Tensor::from_vec(vec![1.0f32; 6], &[1, 3, 1, 2]).expect("6 elements");
        let k = Tensor::from_vec(vec![f32::NAN; 2], &[1, 1, 1, 2]).expect("2 elements");
        let reference = attention(&q, &k, &k, &AttentionOptions::new().causal(true)).expect("valid");
        assert_eq!(reference.out[..4], [0.0; 4]);
        assert_eq!(reference.softmax_lse[..2], [f64::NEG_INFINITY; 2]);
        assert!(reference.out[4].is_nan() && reference.softmax_lse[2].is_nan());
    }

    #[test]
    fn softmax_of_extremes() {
        let inf = f32::INFINITY;
        let x = Tensor::from_vec(vec![-inf, 0.0, -inf, -inf, inf, 0.0, 1e30, -1e30], &[4, 2]).expect("8 elements");
        let y = softmax(&x);
        assert_eq!(y[..4], [0.0, 1.0, 0.0, 0.0]);
        assert!(y[4].is_nan() && y[5].is_nan());
        assert_eq!(y[6..], [1.0, 0.0]);
    }
}
