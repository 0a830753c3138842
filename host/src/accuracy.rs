//! The rule by which results are right.
//!
//! FlashAttention's own: `max |out - ref|` is at most twice that of a plain implementation in the same dtype, plus
//! 1e-5, where the reference is f64. In f32, where there is no rounding to hide behind, it is at most 1e-5 of the
//! largest output; where tf32 is allowed, the rule is that of 16 bits, for the LSE too, and the plain implementation is
//! one whose products take operands of tf32. dQ, dK and dV each keep the same rule; in 16 bits with a cap of the scores, through whose derivative
//! errors of S pass too, thrice in place of twice.
//!
//! dbias and dsinks are sums of a term a row, which mostly cancel. Their 1e-5 is of the largest sum of magnitudes; and
//! as few sums are right by luck in one program and not in another, the error of the plain implementation counts in 16
//! bits as no less than u √Σ m²: what is left of as many independent roundings of the numbers m that the terms are made
//! of, with u = 2⁻¹¹ in f16 and 2⁻⁸ in bf16. The m of dbias are P (|dP| + |D| + |dLSE|); those of dsinks 2 e^(sink -
//! LSE) P dP, twice as D takes the roundings of P and of O.
//!
//! Dropout needs no more than twice: a fused implementation rounds no more with it than without.
//!
//! LSE is right within 1e-5 relative (absolute below 1); of `standard` in 16 bits, whose LSE is that of scores which
//! were rounded on their way through memory, twice the plain implementation's error more. NaN and infinities are where
//! the reference has them.
use std::fmt;

use cuda_std::DType;

use crate::error::{Error, Result};
use crate::inputs::Inputs;
use crate::options::AttentionOptions;
use crate::reference;
use crate::session::{Attention, Softmax};
use crate::tensor::{Tensor, TensorRef};

mod backward;

pub use backward::{BackwardAccuracy, GradientAccuracy, check_backward, check_backward_with};

/// What every bound allows.
const FLOOR: f64 = 1e-5;

/// Errors of a result beside what the rule allows.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Accuracy {
    /// max |out - reference|.
    pub out_error: f64,
    /// max |plain - reference|, of a plain implementation in the same dtype.
    pub plain_error: f64,
    /// The most that `out_error` may be.
    pub out_bound: f64,
    /// max |LSE - reference| / max(1, |reference|).
    pub lse_error: f64,
    /// The most that `lse_error` may be.
    pub lse_bound: f64,
    /// Elements of out and LSE that are NaN or infinite where the reference is not, or the other way round, or infinite
    /// with another sign. None may be.
    pub misplaced: usize,
}

impl Accuracy {
    /// Whether the rule is kept.
    pub fn passed(&self) -> bool {
        self.misplaced == 0 && self.out_error <= self.out_bound && self.lse_error <= self.lse_bound
    }
}

impl fmt::Display for Accuracy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Accuracy { out_error, plain_error, out_bound, lse_error, lse_bound, misplaced } = self;
        write!(f, "out {out_error:.2e} (allowed {out_bound:.2e}; plain implementation {plain_error:.2e}), ")?;
        write!(f, "LSE {lse_error:.2e} (allowed {lse_bound:.0e}), {misplaced} misplaced NaN or inf: ")?;
        f.write_str(if self.passed() { "passed" } else { "FAILED" })
    }
}

/// Compares a result of attention of Q, K and V alone with the reference.
///
/// # Errors
/// As [`Problem::new`](crate::Problem::new), or [`Error::Length`] if the result is not that of these inputs.
pub fn check<'a>(
    q: impl Into<TensorRef<'a>>,
    k: impl Into<TensorRef<'a>>,
    v: impl Into<TensorRef<'a>>,
    options: &AttentionOptions,
    result: &Attention,
) -> Result<Accuracy> {
    check_with(&Inputs::new(q, k, v), options, result)
}

/// Compares a result of attention with the reference.
///
/// # Errors
/// As [`reference::attention_with`], or [`Error::Length`] if the result is not that of these inputs.
pub fn check_with(inputs: &Inputs<TensorRef>, options: &AttentionOptions, result: &Attention) -> Result<Accuracy> {
    let reference = reference::attention_with(inputs, options)?;
    same_length("out", &result.out, reference.out.len())?;
    same_length("softmax_lse", &result.softmax_lse, reference.softmax_lse.len())?;
    let plain = reference::plain_with(inputs, options)?;
    let narrow = is_narrow(result.out.dtype(), options);
    let out = compare_outputs(narrow, &result.out.to_f32(), &plain.out, &reference.out);
    let compare_lse = |found: &[f32]| compare(found, &reference.softmax_lse, |reference| reference.abs().max(1.0));
    let lse = compare_lse(&result.softmax_lse.to_f32());
    let tf32 = narrow && result.out.dtype() == DType::F32;
    let rounds_scores = tf32 || (narrow && result.report.algorithm == "standard");
    let lse_bound = if rounds_scores { 2.0 * compare_lse(&plain.softmax_lse).error + FLOOR } else { FLOOR };
    Ok(Accuracy { lse_error: lse.error, lse_bound, misplaced: out.misplaced + lse.misplaced, ..out })
}

/// Compares a softmax with the reference.
///
/// # Errors
/// [`Error::Length`] if the result is not that of `x`.
pub fn check_softmax<'a>(x: impl Into<TensorRef<'a>>, result: &Softmax) -> Result<Accuracy> {
    let x = x.into();
    let reference = reference::softmax(&x);
    same_length("y", &result.y, reference.len())?;
    Ok(compare_outputs(
        is_narrow(result.y.dtype(), &AttentionOptions::new()),
        &result.y.to_f32(),
        &reference::plain_softmax(&x),
        &reference,
    ))
}

fn compare_outputs(narrow: bool, out: &[f32], plain: &[f32], reference: &[f64]) -> Accuracy {
    let Comparison { error: out_error, misplaced } = compare(out, reference, |_| 1.0);
    let plain_error = compare(plain, reference, |_| 1.0).error;
    let out_bound = if narrow { 2.0 * plain_error + FLOOR } else { FLOOR * largest(reference) };
    Accuracy { out_error, plain_error, out_bound, lse_error: 0.0, lse_bound: FLOOR, misplaced }
}

/// Whether products of a dtype take operands of fewer bits than f32 has.
fn is_narrow(dtype: DType, options: &AttentionOptions) -> bool {
    dtype != DType::F32 || options.allow_tf32
}

/// The largest magnitude, or 1.
pub(crate) fn largest(reference: &[f64]) -> f64 {
    reference.iter().filter(|x| x.is_finite()).fold(1.0, |largest: f64, x| largest.max(x.abs()))
}

struct Comparison {
    /// The largest difference of two finite elements, in units of their scale.
    error: f64,
    misplaced: usize,
}

fn compare(found: &[f32], reference: &[f64], scale: impl Fn(f64) -> f64) -> Comparison {
    let mut comparison = Comparison { error: 0.0, misplaced: 0 };
    for (&found, &reference) in found.iter().zip(reference) {
        let found = f64::from(found);
        if found.is_finite() && reference.is_finite() {
            comparison.error = comparison.error.max((found - reference).abs() / scale(reference));
        } else if found != reference && !(found.is_nan() && reference.is_nan()) {
            comparison.misplaced += 1;
        }
    }
    comparison
}

fn same_length(argument: &'static str, tensor: &Tensor, needed: usize) -> Result<()> {
    if tensor.len() == needed {
        return Ok(());
    }
    let view = tensor.view();
    let (shape, strides) = (tensor.shape().to_vec(), view.layout().strides().to_vec());
    Err(Error::Length { argument, found: tensor.len(), shape, strides, needed: needed.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_and_infinities_must_be_where_the_reference_has_them() {
        let (nan, inf) = (f64::NAN, f64::INFINITY);
        let reference = [nan, inf, -inf, 1.0, nan, inf];
        let found = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1.0, f32::NEG_INFINITY];
        assert_eq!(compare(&found, &reference, |_| 1.0).misplaced, 3);
    }

    #[test]
    fn f16_may_err_twice_as_much_as_a_plain_implementation() {
        let accuracy = |found| compare_outputs(true, &[found], &[1.001], &[1.0]);
        assert!(accuracy(1.002).passed());
        assert!(!accuracy(1.0021).passed());
        assert!(!compare_outputs(false, &[1.002], &[1.001], &[1.0]).passed());
    }
}
