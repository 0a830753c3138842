//! `ferroflash bench`: how fast the kernels are here, and how much memory each needs.
mod defaults;
mod measure;
mod shapes;
mod table;

use super::answer::{Facts, print, print_json};
use super::choices::{BackendArgument, dtype, one_of};
use super::options::{OptionArguments, in_words};
use anyhow::{Result, bail};
use defaults::Defaults;
use ferroflash::{Backend, DType, Kernel};
use measure::{Setting, measure};
use shapes::{Shape, ShapeArguments};
use std::num::NonZeroUsize;

const EXAMPLES: &str = "\
Examples:
  ferroflash bench
  ferroflash bench --kernels flash2 --headdim 128 --causal
  ferroflash bench --backward
  ferroflash bench --window 1024,0 --softcap 50
  ferroflash bench --backend simulator --seqlens 64,128,256";

/// Measure how fast the kernels are, and how much memory each needs
///
/// Computes attention on random inputs at a row of sequence lengths, with the number of tokens (batch x seqlen) held
/// constant, as the FlashAttention papers do. A time is the median over the repetitions, after one run to warm up: by
/// CUDA's events on a GPU, by the clock elsewhere. The GPU rests for a tenth of a second before each measurement, and the
/// kernels take turns at being first: a hot chip is slower. TFLOP/s count 4 batch nheads seqlen² headdim operations, half
/// as many with --causal, and 2.5 times as many with --backward. Extra memory is what a kernel needs besides its inputs and
/// its outputs, of which the LSE is not one.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    #[command(flatten)]
    backend: BackendArgument,
    /// The kernels [default: all of them; with --backward those that have gradients, flash2 and flash3; on the CPU, which
    /// has one algorithm of its own, auto]
    #[arg(long, value_name = "KERNEL,...", value_delimiter = ',', value_parser = one_of::<Kernel>(Kernel::NAMES))]
    kernels: Option<Vec<Kernel>>,
    #[command(flatten)]
    shapes: ShapeArguments,
    /// The type of Q, K, V and O
    #[arg(long, default_value = "bf16", value_parser = dtype())]
    dtype: DType,
    #[command(flatten)]
    options: OptionArguments,
    /// Measure the gradients, dq, dk and dv, without the forward pass before them
    #[arg(long)]
    backward: bool,
    /// How often to compute each [default: 10 on a GPU, 5 on the CPU, 1 on the simulator]
    #[arg(long, value_name = "N")]
    repetitions: Option<NonZeroUsize>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn execute(arguments: Arguments) -> Result<()> {
    let session = arguments.backend.session()?;
    let defaults = Defaults::on(&session, arguments.backward);
    let shapes = arguments.shapes.or(&defaults)?;
    let kernels = arguments.kernels.unwrap_or(defaults.kernels);
    let repetitions = arguments.repetitions.map_or(defaults.repetitions, NonZeroUsize::get);
    let setting = Setting {
        session,
        dtype: arguments.dtype,
        options: arguments.options.options(),
        backward: arguments.backward,
        repetitions,
    };

    let rows = measure(&setting, &shapes, &kernels)?;
    if arguments.json {
        print_json(&table::json(&setting, &rows))?;
    } else {
        print(format_args!("{}\n{}\n", facts(&setting, shapes[0]), table::text(&rows)))?;
    }
    // Rows that failed have said why; the command fails only if it has nothing else to show.
    if rows.iter().all(|row| row.outcome.is_err()) {
        bail!("no kernel could run any of the shapes");
    }
    Ok(())
}

fn facts(setting: &Setting, shape: Shape) -> Facts {
    let Setting { session, dtype, options, backward, repetitions } = setting;
    let backend = session.backend();
    let mut facts = Facts::default();
    facts.add("backend", backend);
    facts.add("device", session.device_name());
    let (dtype, options) = (dtype.name(), in_words(options));
    facts.add("pass", if *backward { "backward" } else { "forward" });
    facts.add("inputs", format_args!("nheads {}, headdim {}, {dtype}{options}", shape.nheads, shape.headdim));
    let of = if backend == Backend::Simulator { " of the simulation" } else { "" };
    let each = if *repetitions > 1 { format!("the median of {repetitions}") } else { "of one run".to_owned() };
    facts.add("times", format_args!("{each}{of}"));
    facts
}
