//! `ferroflash softmax`: the softmax of rows, by itself.
use super::accuracy;
use super::answer::{Facts, print, print_json};
use super::choices::{BackendArgument, one_of};
use super::files::{NewFile, TensorFile};
use super::measured;
use super::progress::SimulationBar;
use anyhow::Result;
use ferroflash::SoftmaxMethod;
use serde_json::json;
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  ferroflash softmax scores.safetensors --verify
  ferroflash softmax scores.safetensors --method two-pass --backend simulator
  ferroflash softmax scores.safetensors -o probabilities.safetensors";

/// Compute the softmax of the rows of a tensor, exp(x) / Σ exp(x)
///
/// FlashAttention rests on the online method: it finds a row's maximum and sum in one pass, and corrects the sum whenever
/// the maximum rises. The two-pass method finds the maximum first.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// A safetensors file with a tensor x of any shape, in F32, F16 or BF16; its last dimension holds the rows
    input: PathBuf,
    /// Write the result to this safetensors file: y, shaped like x
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// How to find a row's maximum and sum
    #[arg(long, default_value = "online", value_parser = one_of::<SoftmaxMethod>(&["two-pass", "online"]))]
    method: SoftmaxMethod,
    #[command(flatten)]
    backend: BackendArgument,
    /// Compare the result with f64 arithmetic, and fail if it is less accurate than it should be
    #[arg(long)]
    verify: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn execute(arguments: Arguments) -> Result<()> {
    let x = TensorFile::open(&arguments.input)?.tensor("x")?;
    let output = arguments.output.map(NewFile::create).transpose()?;
    let (session, bar) = SimulationBar::on(arguments.backend.session()?);
    let result = session.softmax(&x, arguments.method)?;
    drop(bar);

    let accuracy = match arguments.verify {
        true => Some(ferroflash::accuracy::check_softmax(&x, &result)?),
        false => None,
    };
    let written = output.map(|file| file.write_tensors(&[("y", &result.y)])).transpose()?;

    if arguments.json {
        let mut object = measured::json(&result.report);
        object["accuracy"] = json!(accuracy.as_ref().map(accuracy::json));
        object["output"] = json!(written);
        print_json(&object)?;
    } else {
        let mut facts = Facts::default();
        measured::add_to(&mut facts, &result.report, 1);
        if let Some(accuracy) = &accuracy {
            facts.add("accuracy", accuracy);
        }
        if let Some(path) = written {
            facts.add("written", path.display());
        }
        print(facts)?;
    }
    accuracy::require(accuracy.as_ref())
}
