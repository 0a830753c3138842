//! The rule for gradients: that for outputs, for each of them.
use std::fmt;

use cuda_std::DType;

use super::{FLOOR, compare, largest, same_length};
use crate::error::{Error, Result};
use crate::inputs::Inputs;
use crate::options::AttentionOptions;
use crate::reference::{self, Terms};
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
    /// Of dbias, if there is a bias.
    pub dbias: Option<GradientAccuracy>,
    /// Of dsinks, if there are sinks.
    pub dsinks: Option<GradientAccuracy>,
}

/// The error of one gradient beside what the rule allows.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct GradientAccuracy {
    /// max |gradient - reference|.
    pub error: f64,
    /// max |plain - reference|, of a plain implementation in the same dtype; of dbias and dsinks in 16 bits not less
    /// than what [the rule](super) says that luck may hide.
    pub plain_error: f64,
    /// The most that `error` may be: in 16 bits twice `plain_error`, or with a cap of the scores thrice for dQ, dK and
    /// dV, and 1e-5; in f32 1e-5 of the largest element, or of 1. Of dbias and dsinks 1e-5 of the largest sum of
    /// magnitudes, or of 1.
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

    /// All that there are, with their names.
    pub fn gradients(&self) -> Vec<(&'static str, &GradientAccuracy)> {
        let all = [("dq", &self.dq), ("dk", &self.dk), ("dv", &self.dv)].map(|(name, gradient)| (name, Some(gradient)));
        let others = [("dbias", self.dbias.as_ref()), ("dsinks", self.dsinks.as_ref())];
        all.into_iter().chain(others).filter_map(|(name, gradient)| Some((name, gradient?))).collect()
    }
}

/// What the rule asks of a problem.
#[derive(Clone, Copy)]
struct Rule {
    /// Of the operands of products; `None`: f32, exactly.
    unit_roundoff: Option<f64>,
    /// How many times the plain implementation's error is allowed where these are rounded.
    factor: f64,
}

impl Rule {
    fn of(dtype: DType, options: &AttentionOptions) -> Self {
        let unit_roundoff = match dtype {
            DType::BF16 => Some(2f64.powi(-8)),
            DType::F16 => Some(2f64.powi(-11)),
            // tf32 has as many bits as f16.
            _ => options.allow_tf32.then(|| 2f64.powi(-11)),
        };
        Rule { unit_roundoff, factor: if options.softcap.is_some() { 3.0 } else { 2.0 } }
    }
}

impl GradientAccuracy {
    /// Whether the rule is kept.
    pub fn passed(&self) -> bool {
        self.misplaced == 0 && self.error <= self.bound
    }

    /// dQ, dK or dV.
    fn of(name: &'static str, found: &Tensor, plain: &[f32], reference: &[f64], rule: Rule) -> Result<Self> {
        let accuracy = Self::unbounded(name, found, plain, reference)?;
        let bound = match rule.unit_roundoff {
            Some(_) => rule.factor * accuracy.plain_error + FLOOR,
            None => FLOOR * largest(reference),
        };
        Ok(GradientAccuracy { bound, ..accuracy })
    }

    /// dbias or dsinks: sums of these terms.
    fn of_sums(
        name: &'static str,
        found: Option<&Tensor>,
        plain: Option<&[f32]>,
        reference: Option<&[f64]>,
        terms: Terms,
        rule: Rule,
    ) -> Result<Option<Self>> {
        let (found, plain, reference) = match (found, plain, reference) {
            (Some(found), Some(plain), Some(reference)) => (found, plain, reference),
            (None, None, None) => return Ok(None),
            (found, _, reference) => {
                let of = |len: Option<usize>| len.map_or_else(|| "none".to_owned(), |len| format!("{len} elements"));
                let (found, allowed) = (of(found.map(Tensor::len)), of(reference.map(<[f64]>::len)));
                return Err(Error::Argument { argument: name, found, allowed });
            }
        };
        let accuracy = Self::unbounded(name, found, plain, reference)?;
        let least = rule.unit_roundoff.map_or(0.0, |unit_roundoff| unit_roundoff * terms.squares.sqrt());
        let plain_error = accuracy.plain_error.max(least);
        let floor = FLOOR * terms.sum.max(1.0);
        let bound = if rule.unit_roundoff.is_some() { 2.0 * plain_error + floor } else { floor };
        Ok(Some(GradientAccuracy { plain_error, bound, ..accuracy }))
    }

    /// All but the bound.
    fn unbounded(name: &'static str, found: &Tensor, plain: &[f32], reference: &[f64]) -> Result<Self> {
        same_length(name, found, reference.len())?;
        let comparison = compare(&found.to_f32(), reference, |_| 1.0);
        let plain_error = compare(plain, reference, |_| 1.0).error;
        Ok(GradientAccuracy { error: comparison.error, plain_error, bound: 0.0, misplaced: comparison.misplaced })
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

/// Compares gradients of attention of Q, K and V alone with the reference.
///
/// # Errors
/// As [`reference::attention_backward`], or [`Error::Length`] or [`Error::Argument`] if the gradients are not those of
/// these inputs.
pub fn check_backward<'a>(
    q: impl Into<TensorRef<'a>>,
    k: impl Into<TensorRef<'a>>,
    v: impl Into<TensorRef<'a>>,
    dout: impl Into<TensorRef<'a>>,
    options: &AttentionOptions,
    gradients: &Gradients,
) -> Result<BackwardAccuracy> {
    check_backward_with(&Inputs::new(q, k, v), &dout.into(), None, options, gradients)
}

/// Compares gradients, of a loss whose gradients with respect to O and the LSE are `dout` and `dlse`, with the
/// reference.
///
/// # Errors
/// As [`reference::attention_backward_with`], or [`Error::Length`] or [`Error::Argument`] if the gradients are not those of
/// these inputs.
pub fn check_backward_with(
    inputs: &Inputs<TensorRef>,
    dout: &TensorRef,
    dlse: Option<&TensorRef>,
    options: &AttentionOptions,
    gradients: &Gradients,
) -> Result<BackwardAccuracy> {
    let reference = reference::attention_backward_with(inputs, dout, dlse, options)?;
    let plain = reference::plain_backward_with(inputs, dout, dlse, options)?;
    let rule = Rule::of(inputs.q.dtype(), options);
    let of_sums = |name, found: &Option<Tensor>, plain: &Option<Vec<f32>>, reference: &Option<Vec<f64>>, terms| {
        let (plain, reference) = (plain.as_deref(), reference.as_deref());
        GradientAccuracy::of_sums(name, found.as_ref(), plain, reference, terms, rule)
    };
    Ok(BackwardAccuracy {
        dq: GradientAccuracy::of("dq", &gradients.dq, &plain.dq, &reference.dq, rule)?,
        dk: GradientAccuracy::of("dk", &gradients.dk, &plain.dk, &reference.dk, rule)?,
        dv: GradientAccuracy::of("dv", &gradients.dv, &plain.dv, &reference.dv, rule)?,
        dbias: of_sums("dbias", &gradients.dbias, &plain.dbias, &reference.dbias, reference.dbias_terms)?,
        dsinks: of_sums("dsinks", &gradients.dsinks, &plain.dsinks, &reference.dsinks, reference.dsinks_terms)?,
    })
}

#[cfg(test)]
mod tests;
