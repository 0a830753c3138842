//! The numbers of a call.
use ferroflash::AttentionOptions;
use pyo3::prelude::*;

/// What a caller may choose, as Python passes it: one tuple.
#[derive(FromPyObject)]
pub struct Options(
    /// Length of the longest sequence of queries.
    Option<usize>,
    /// Of keys.
    Option<usize>,
    /// softmax_scale
    Option<f64>,
    /// causal
    bool,
    /// Keys to the left.
    Option<usize>,
    /// To the right.
    Option<usize>,
    /// softcap
    Option<f64>,
    /// dropout_p
    f64,
    /// Seed and offset of dropout.
    (i64, i64),
    /// deterministic
    bool,
    /// allow_tf32
    bool,
);

impl Options {
    /// The same in the words of the host crate.
    pub fn attention(self) -> AttentionOptions {
        let Options(max_q, max_k, scale, causal, left, right, softcap, p, (seed, offset), deterministic, tf32) = self;
        let mut options = AttentionOptions::new().causal(causal).window_size(left, right);
        options = options.dropout(p as f32, seed as u64, offset as u64).deterministic(deterministic).allow_tf32(tf32);
        options.softmax_scale = scale.map(|scale| scale as f32);
        options.softcap = softcap.map(|softcap| softcap as f32);
        (options.max_seqlen_q, options.max_seqlen_k) = (max_q, max_k);
        options
    }
}
