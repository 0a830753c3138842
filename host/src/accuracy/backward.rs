//! The rule for gradients: that for outputs, for each of dQ, dK and dV.
use std::fmt;

use super::{bound, compare, same_length};
use crate::error::Result;
use crate::options::AttentionOptions;
use crate::reference;
use crate::session::Gradients;
use crate::tensor::{Tensor, TensorRef};

/// Errors of gradients beside what the rule allows.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct BackwardAccuracy {
    /// Of dQ.
    pub dq: GradientAccuracy,
    /// Of dK.
    pub dk: GradientAccuracy,
    /// Of dV.
    pub dv: GradientAccuracy,
}

/// The error of one gradient beside what the rule allows.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct GradientAccuracy {
    /// max |gradient - reference|.
    pub error: f64,
    /// max |plain - reference|, of a plain implementation in the same dtype.
    pub plain_error: f64,
    /// The most that `error` may be: 2 `plain_error` + 1e-5; in f32 1e-5 of the largest element, or of 1.
    pub bound: f64,
    /// Elements that are NaN or infinite where the reference is not, or the other way round, or infinite with another
    /// sign. None may be.
    pub misplaced: usize,
}

impl BackwardAccuracy {
    /// Whether the rule is kept.
    pub fn passed(&self) -> bool {
        self.gradients().iter().all(|(_, gradient)| gradient.passed())
    }

    /// The three, with their names.
    pub fn gradients(&self) -> [(&'static str, &GradientAccuracy); 3] {
        [("dq", &self.dq), ("dk", &self.dk), ("dv", &self.dv)]
    }
}

impl GradientAccuracy {
    /// Whether the rule is kept.
    pub fn passed(&self) -> bool {
        self.misplaced == 0 && self.error <= self.bound
    }

    fn of(name: &'static str, found: &Tensor, plain: &[f32], reference: &[f64]) -> Result<Self> {
        same_length(name, found, reference.len())?;
        let comparison = compare(&found.to_f32(), reference, |_| 1.0);
        let plain_error = compare(plain, reference, |_| 1.0).error;
        let bound = bound(found.dtype(), plain_error, reference);
        Ok(GradientAccuracy { error: comparison.error, plain_error, bound, misplaced: comparison.misplaced })
    }
}

impl fmt::Display for BackwardAccuracy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, GradientAccuracy { error, plain_error, bound, .. }) in self.gradients() {
            write!(f, "{name} {error:.2e} (allowed {bound:.2e}; plain implementation {plain_error:.2e}), ")?;
        }
        let misplaced: usize = self.gradients().iter().map(|(_, gradient)| gradient.misplaced).sum();
        write!(f, "{misplaced} misplaced NaN or inf: ")?;
        f.write_str(if self.passed() { "passed" } else { "FAILED" })
    }
}

/// Compares gradients with the reference.
///
/// # Errors
/// As [`reference::attention_backward`], or [`Error::Length`](crate::Error::Length) if the gradients are not those of these
/// inputs.
pub fn check_backward<'a>(
    q: impl Into<TensorRef<'a>>,
    k: impl Into<TensorRef<'a>>,
    v: impl Into<TensorRef<'a>>,
    dout: impl Into<TensorRef<'a>>,
    options: &AttentionOptions,
    gradients: &Gradients,
) -> Result<BackwardAccuracy> {
    let (q, k, v, dout) = (q.into(), k.into(), v.into(), dout.into());
    let reference = reference::attention_backward(&q, &k, &v, &dout, options)?;
    let plain = reference::plain_backward(&q, &k, &v, &dout, options)?;
    Ok(BackwardAccuracy {
        dq: GradientAccuracy::of("dq", &gradients.dq, &plain.dq, &reference.dq)?,
        dk: GradientAccuracy::of("dk", &gradients.dk, &plain.dk, &reference.dk)?,
        dv: GradientAccuracy::of("dv", &gradients.dv, &plain.dv, &reference.dv)?,
    })
}
