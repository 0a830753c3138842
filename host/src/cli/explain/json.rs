//! The comparison, for a program.
use super::measure::{Comparison, Run};
use ferroflash::traffic::{self, Step};
use serde_json::{Value, json};
use std::path::Path;

pub fn object(comparison: &Comparison, svg: Option<&Path>) -> Value {
    let detail = &comparison.detail;
    let problem = &detail[0].problem;
    json!({
        "problem": { "seqlen": problem.seqlen_q, "headdim": problem.headdim, "dtype": problem.dtype.name() },
        "algorithms": detail.iter().map(detailed).collect::<Vec<_>>(),
        "growth": comparison.growth.iter().flatten().map(summary).collect::<Vec<_>>(),
        "svg": svg,
    })
}

fn detailed(run: &Run) -> Value {
    let mut object = summary(run);
    object["steps"] = run.steps.iter().map(step).collect();
    object
}

fn summary(run: &Run) -> Value {
    json!({
        "kernel": run.name(),
        "seqlen": run.problem.seqlen_q,
        "bytes": run.bytes(),
        "formula_bytes": traffic::total(&run.formula),
        "paper_bytes": run.paper_bytes(),
        "extra_bytes": run.extra_bytes,
        "sram_elements": run.sram_elements,
    })
}

fn step(step: &Step) -> Value {
    let tensors = step
        .tensors
        .iter()
        .map(|moved| json!({ "tensor": moved.tensor, "loaded": moved.loaded, "stored": moved.stored }));
    json!({ "name": step.name, "tensors": tensors.collect::<Vec<_>>() })
}
