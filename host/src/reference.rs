//! What results are compared with: attention and softmax in f64, and a plain implementation in the dtype of the inputs.
//!
//! Both follow the definition, a row of S at a time: no tiles, no online softmax. With s = softmax_scale · q kᵀ, the
//! score of query i and key j is
//!
//! ```text
//! softcap · tanh(s / softcap) - slope · |i + seqlen_k - seqlen_q - j| + bias,
//! ```
//!
//! without a cap s in place of the first term. A key that the window or the mask hides takes no part, whatever is in
//! it. P is the softmax of the scores and, if there is one, the sink of the head; O = (P ∘ dropout) V, where dropout is
//! 0 or 1 / (1 - p).
use rayon::prelude::*;

use crate::element::{Datum, with_dtype, with_element};
use crate::error::Result;
use crate::inputs::Inputs;
use crate::options::AttentionOptions;
use crate::problem::Problem;
use crate::sequences::Sequences;
use crate::tensor::TensorRef;

mod backward;
mod definition;
mod number;
mod rounding;

pub(crate) use backward::Terms;
pub use backward::{Gradients, attention_backward, attention_backward_with, plain_backward, plain_backward_with};
use definition::Definition;
use number::{Number, Softmax};
use rounding::Rounding;

/// Attention in f64.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Reference {
    /// O: (batch, seqlen_q, nheads, headdim_v), or (total_q, nheads, headdim_v), in row-major order.
    pub out: Vec<f64>,
    /// LSE: (batch, nheads, seqlen_q), or (nheads, total_q), in row-major order; natural logarithm. It includes the
    /// sinks, and is that of before dropout.
    pub softmax_lse: Vec<f64>,
}

/// Attention of Q, K and V alone by its definition, in f64, as [`attention_with`].
///
/// # Errors
/// As [`Problem::new`].
pub fn attention<'a>(
    q: impl Into<TensorRef<'a>>,
    k: impl Into<TensorRef<'a>>,
    v: impl Into<TensorRef<'a>>,
    options: &AttentionOptions,
) -> Result<Reference> {
    attention_with(&Inputs::new(q, k, v), options)
}

/// Attention by its definition, in f64. A row that sees no key, or only keys whose scores are -inf, has O = 0 and LSE =
/// -inf; with a sink one that sees no key has O = 0 and the sink as its LSE.
///
/// # Errors
/// As [`Problem::of`], and [`Sequences::new`].
pub fn attention_with(inputs: &Inputs<TensorRef>, options: &AttentionOptions) -> Result<Reference> {
    let problem = problem(inputs, options)?;
    with_element!("q", problem.dtype, T => {
        let (out, softmax_lse) = Definition::<T, f64>::new(&problem, inputs, Rounding::NONE).forward();
        Ok(Reference { out, softmax_lse })
    })
}

/// Attention as [`plain_with`] computes it; shapes as in [`Reference`].
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Plain {
    /// O, rounded to the dtype.
    pub out: Vec<f32>,
    /// LSE, of scores that were rounded to the dtype.
    pub softmax_lse: Vec<f32>,
}

/// Attention of Q, K and V alone as [`plain_with`].
///
/// # Errors
/// As [`Problem::new`].
pub fn plain<'a>(
    q: impl Into<TensorRef<'a>>,
    k: impl Into<TensorRef<'a>>,
    v: impl Into<TensorRef<'a>>,
    options: &AttentionOptions,
) -> Result<Plain> {
    plain_with(&Inputs::new(q, k, v), options)
}

/// Attention as a program without fused kernels computes it in the dtype of the inputs: the scores, P, what dropout
/// makes of P, and O are rounded to the dtype; sums, caps and exponentials are in f32. What the error of any other
/// implementation is measured against.
///
/// # Errors
/// As [`attention_with`].
pub fn plain_with(inputs: &Inputs<TensorRef>, options: &AttentionOptions) -> Result<Plain> {
    let problem = problem(inputs, options)?;
    with_element!("q", problem.dtype, T => {
        let (out, softmax_lse) = Definition::<T, f32>::new(&problem, inputs, Rounding::plain::<T>(&problem)).forward();
        Ok(Plain { out, softmax_lse })
    })
}

/// Softmax over the last dimension, in f64, in row-major order. A row of nothing but -inf becomes 0.
pub fn softmax<'a>(x: impl Into<TensorRef<'a>>) -> Vec<f64> {
    let x = x.into();
    let columns = x.shape().last().copied().unwrap_or(1).max(1);
    with_dtype!(x.dtype(), T => {
        let x = x.packed::<T>().unwrap_or_default();
        let mut y: Vec<f64> = widened(&x).into_iter().map(f64::from).collect();
        y.par_chunks_mut(columns).for_each(normalise);
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
            normalise(row);
            round_all::<T>(row);
        });
        y
    })
}

/// The problem that tensors in host memory pose.
pub(crate) fn problem(inputs: &Inputs<TensorRef>, options: &AttentionOptions) -> Result<Problem> {
    Problem::of(&inputs.map(|_, tensor| tensor.layout()), Sequences::read(inputs)?, options)
}

/// Replaces scores by their softmax.
fn normalise<X: Number>(row: &mut [X]) {
    let softmax = Softmax::of(row.iter().copied());
    row.iter_mut().for_each(|x| *x = softmax.probability(*x));
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

#[cfg(test)]
mod tests;
