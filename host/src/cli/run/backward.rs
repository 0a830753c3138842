//! `ferroflash run --backward`: the gradients besides.
use crate::cli::answer::Facts;
use crate::cli::{accuracy, measured};
use anyhow::Result;
use ferroflash::accuracy::BackwardAccuracy;
use ferroflash::{AttentionOptions, BackwardInputs, Gradients, Session, Tensor, TensorRef};
use serde_json::{Value, json};

/// The gradients of a forward pass, and how accurate they are, if that was asked for.
pub struct Backward {
    gradients: Gradients,
    accuracy: Option<BackwardAccuracy>,
}

impl Backward {
    /// Computes them.
    pub fn compute(
        session: &Session,
        inputs: &BackwardInputs<TensorRef>,
        options: &AttentionOptions,
        verify: bool,
    ) -> Result<Self> {
        let gradients = session.attention_backward_with(inputs, options)?;
        let accuracy = match verify {
            true => Some(accuracy::check_backward(inputs, options, &gradients)?),
            false => None,
        };
        Ok(Backward { gradients, accuracy })
    }

    /// The gradients, by the names that they are written under.
    pub fn tensors(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        let Gradients { dq, dk, dv, dbias, dsinks, .. } = &self.gradients;
        let optional = [("dbias", dbias), ("dsinks", dsinks)];
        let optional = optional.into_iter().filter_map(|(name, tensor)| Some((name, tensor.as_ref()?)));
        [("dq", dq), ("dk", dk), ("dv", dv)].into_iter().chain(optional)
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
