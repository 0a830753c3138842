//! `ferroflash run`: attention on the tensors of a file.
mod alibi;
mod backward;
mod tensors;

use super::accuracy;
use super::answer::{Facts, print, print_json};
use super::choices::{BackendArgument, one_of};
use super::files::{NewFile, TensorFile};
use super::measured;
use super::options::OptionArguments;
use super::progress::SimulationBar;
use anyhow::Result;
use backward::Backward;
use ferroflash::Kernel;
use serde_json::json;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use tensors::{BackwardTensors, ForwardTensors, TensorArguments};

const EXAMPLES: &str = "\
Examples:
  ferroflash run attention.safetensors --verify
  ferroflash run attention.safetensors --causal -o out.safetensors
  ferroflash run attention.safetensors --backend simulator --kernel flash2
  ferroflash run attention.safetensors --backward --verify -o gradients.safetensors
  ferroflash run attention.safetensors --window 1024,0 --softcap 50 --sinks
  ferroflash run padded.safetensors --mask --alibi standard
  ferroflash run packed.safetensors --varlen --causal --dropout 0.1 --seed 7

To make an input in Python:
  from safetensors.numpy import save_file
  save_file({\"q\": q, \"k\": k, \"v\": v}, \"attention.safetensors\")";

/// Compute attention, softmax(scale · Q Kᵀ) V, on the tensors of a file
///
/// Reads tensors q, k and v from a safetensors file, and others under the names that the options say, and prints how
/// attention on them was computed and how long it took.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// A safetensors file with tensors q, k and v of shape (batch, seqlen, nheads, headdim), in F32, F16 or BF16; with
    /// --backward also dout, like out
    input: PathBuf,
    /// Write the results to this safetensors file: out, shaped like q, and softmax_lse (batch, nheads, seqlen), in F32;
    /// with --backward also dq, dk and dv, and dbias and dsinks where there are a bias and sinks
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    backend: BackendArgument,
    /// The kernel on a GPU or the simulator; `auto`: the best that can run the problem
    #[arg(long, default_value = "auto", value_parser = one_of::<Kernel>(Kernel::NAMES))]
    kernel: Kernel,
    #[command(flatten)]
    options: OptionArguments,
    #[command(flatten)]
    tensors: TensorArguments,
    /// Compute also dq, dk and dv, the gradients of a loss whose gradient with respect to out is the tensor dout
    #[arg(long)]
    backward: bool,
    /// Compare the result with f64 arithmetic, and fail if it is less accurate than it should be
    #[arg(long)]
    verify: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    /// Compute so many times, after once to warm up, and report the median time
    #[arg(long, value_name = "N", default_value = "1")]
    repetitions: NonZeroUsize,
}

pub fn execute(arguments: Arguments) -> Result<()> {
    let file = TensorFile::open(&arguments.input)?;
    let forward = ForwardTensors::read(&file, &arguments.tensors)?;
    let backward = match arguments.backward {
        true => Some(BackwardTensors::read(&file, &arguments.tensors, &forward)?),
        false => None,
    };
    let output = arguments.output.map(NewFile::create).transpose()?;
    let (inputs, options) = (forward.inputs(), arguments.options.options());

    let repetitions = arguments.repetitions.get();
    let warmup = if repetitions > 1 { 1 } else { 0 };
    let session = arguments.backend.session()?.kernel(arguments.kernel).repetitions(warmup, repetitions);
    let (session, bar) = SimulationBar::on(session);
    let result = session.attention_with(&inputs, &options)?;
    let verify = arguments.verify;
    let backward = backward
        .map(|backward| Backward::compute(&session, &backward.inputs(inputs.clone(), &result), &options, verify));
    let backward = backward.transpose()?;
    drop(bar);

    let accuracy = match verify {
        true => Some(accuracy::check(&inputs, &options, &result)?),
        false => None,
    };
    let mut tensors = vec![("out", &result.out), ("softmax_lse", &result.softmax_lse)];
    tensors.extend(backward.iter().flat_map(Backward::tensors));
    let written = output.map(|file| file.write_tensors(&tensors)).transpose()?;

    if arguments.json {
        let mut object = measured::json(&result.report);
        object["accuracy"] = json!(accuracy.as_ref().map(accuracy::json));
        object["backward"] = json!(backward.as_ref().map(Backward::json));
        object["output"] = json!(written);
        print_json(&object)?;
    } else {
        let mut facts = Facts::default();
        measured::add_to(&mut facts, &result.report, repetitions);
        if let Some(accuracy) = &accuracy {
            facts.add("accuracy", accuracy);
        }
        if let Some(backward) = &backward {
            backward.add_to(&mut facts, repetitions);
        }
        if let Some(path) = written {
            facts.add("written", path.display());
        }
        print(facts)?;
    }
    accuracy::require(accuracy.as_ref())?;
    backward.map_or(Ok(()), |backward| backward.require_accuracy())
}
