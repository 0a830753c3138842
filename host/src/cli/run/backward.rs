//! `ferroflash run --backward`: the gradients besides.
use crate::cli::answer::Facts;
use crate::cli::files::read_tensors;
use crate::cli::{accuracy, measured};
use anyhow::{Context, Result};
use ferroflash::accuracy::{BackwardAccuracy, check_backward};
use ferroflash::{Attention, AttentionOptions, Gradients, Session, Tensor};
use serde_json::{Value, json};
use std::path::Path;

/// Reads dO.
pub fn read_dout(input: &Path, q: &Tensor) -> Result<Tensor> {
    let needed = || format!("--backward needs dout, {} of shape {:?}, like q", q.dtype().name(), q.shape());
    let [dout] = read_tensors(input, ["dout"]).with_context(needed)?;
    Ok(dout)
}

/// The gradients of a forward pass, and how accurate they are, if that was asked for.
pub struct Backward {
    gradients: Gradients,
    accuracy: Option<BackwardAccuracy>,
}

impl Backward {
    /// Computes them.
    pub fn compute(
        session: &Session,
        [q, k, v]: [&Tensor; 3],
        forward: &Attention,
        dout: &Tensor,
        options: &AttentionOptions,
        verify: bool,
    ) -> Result<Self> {
        let gradients = session.attention_backward(q, k, v, &forward.out, &forward.softmax_lse, dout, options)?;
        let accuracy = match verify {
            true => Some(check_backward(q, k, v, dout, options, &gradients)?),
            false => None,
        };
        Ok(Backward { gradients, accuracy })
    }

    /// The gradients, by the names that they are written under.
    pub fn tensors(&self) -> [(&'static str, &Tensor); 3] {
        let Gradients { dq, dk, dv, .. } = &self.gradients;
        [("dq", dq), ("dk", dk), ("dv", dv)]
    }

    /// Adds what it took, for a reader.
    pub fn add_to(&self, facts: &mut Facts, repetitions: usize) {
        facts.add("backward", measured::summary(&self.gradients.report, repetitions));
        if let Some(accuracy) = &self.accuracy {
            facts.add("gradients", accuracy);
        }
    }

    /// The same as an object, for a program.
    pub fn json(&self) -> Value {
        let mut object = measured::json(&self.gradients.report);
        object["accuracy"] = json!(self.accuracy.as_ref().map(accuracy::backward_json));
        object
    }

    /// An error where the rule is broken.
    pub fn require_accuracy(&self) -> Result<()> {
        accuracy::require_backward(self.accuracy.as_ref())
    }
}
