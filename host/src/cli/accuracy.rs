//! The outcome of `--verify`.
use anyhow::{Result, bail};
use ferroflash::accuracy::{self, Accuracy, BackwardAccuracy};
use ferroflash::{Attention, AttentionOptions, BackwardInputs, Gradients, Inputs, TensorRef};
use serde_json::{Value, json};

/// Compares a result of attention with f64 arithmetic.
pub fn check(inputs: &Inputs<TensorRef>, options: &AttentionOptions, result: &Attention) -> Result<Accuracy> {
    Ok(accuracy::check_with(inputs, options, result)?)
}

/// Compares gradients with f64 arithmetic.
pub fn check_backward(
    inputs: &BackwardInputs<TensorRef>,
    options: &AttentionOptions,
    gradients: &Gradients,
) -> Result<BackwardAccuracy> {
    let BackwardInputs { forward, dout, dlse, .. } = inputs;
    Ok(accuracy::check_backward_with(forward, dout, dlse.as_ref(), options, gradients)?)
}

/// Numbers beside their bounds, for a program.
pub fn json(accuracy: &Accuracy) -> Value {
    json!({
        "passed": accuracy.passed(),
        "out_error": accuracy.out_error,
        "out_bound": accuracy.out_bound,
        "plain_error": accuracy.plain_error,
        "lse_error": accuracy.lse_error,
        "lse_bound": accuracy.lse_bound,
        "misplaced": accuracy.misplaced,
    })
}

/// An error where the rule is broken.
pub fn require(accuracy: Option<&Accuracy>) -> Result<()> {
    match accuracy {
        Some(accuracy) if !accuracy.passed() => bail!("not accurate: {accuracy}"),
        _ => Ok(()),
    }
}

/// The numbers of each gradient.
pub fn backward_json(accuracy: &BackwardAccuracy) -> Value {
    let mut object = json!({ "passed": accuracy.passed() });
    for (name, gradient) in accuracy.gradients() {
        object[name] = json!({
            "error": gradient.error,
            "bound": gradient.bound,
            "plain_error": gradient.plain_error,
            "misplaced": gradient.misplaced,
        });
    }
    object
}

/// An error where the rule is broken for a gradient.
pub fn require_backward(accuracy: Option<&BackwardAccuracy>) -> Result<()> {
    match accuracy {
        Some(accuracy) if !accuracy.passed() => bail!("gradients not accurate: {accuracy}"),
        _ => Ok(()),
    }
}
