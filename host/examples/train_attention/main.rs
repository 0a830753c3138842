//! Trains a small transformer twice, from the same weights and on the same data: with standard attention, and with
//! ferroflash's forward and backward pass. The losses agree; the memory does not.
//!
//! `cargo run --release --example train_attention -- --help`
mod attention;
mod layers;
mod model;
mod optimizer;
mod picture;
mod task;
#[cfg(test)]
mod tests;

use anyhow::{Result, ensure};
use attention::{CausalAttention, Costs, FlashAttention, StandardAttention};
use clap::Parser;
use comfy_table::{Cell, CellAlignment, Table, presets};
use ferroflash::{Backend, Session};
use model::{Size, Transformer};
use optimizer::Adam;
use picture::Curve;
use rand::SeedableRng;
use rand::rngs::StdRng;
use std::path::PathBuf;
use std::time::Instant;
use task::Copying;

/// Train a small causal transformer to copy what it has read, with standard attention and with ferroflash.
#[derive(Parser)]
struct Arguments {
    /// Where ferroflash runs: cpu, simulator or cuda; auto: cuda where there is a GPU, else cpu
    #[arg(long, default_value = "auto")]
    backend: String,
    /// Steps of training
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..))]
    steps: u32,
    /// Tokens in a sequence, an even number
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(8..=4096))]
    seqlen: u32,
    /// Sequences in a batch
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    batch: u32,
    /// Of the weights and of the data
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The picture of both curves
    #[arg(long, default_value = "target/train_attention.svg", value_name = "SVG")]
    out: PathBuf,
}

const VOCABULARY: usize = 32;
const LEARNING_RATE: f32 = 3e-3;
/// Steps in which the learning rate grows to that.
const WARMUP: i32 = 20;
/// How far the losses of a step may be apart, in nats.
const TOLERANCE: f64 = 1e-3;

/// What training gave.
struct History {
    losses: Vec<f64>,
    accuracies: Vec<f64>,
    seconds: f64,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    ensure!(arguments.seqlen.is_multiple_of(2), "seqlen: {}; allowed: even numbers", arguments.seqlen);
    let session = match arguments.backend.as_str() {
        "auto" => Session::auto()?,
        backend => Session::new(backend.parse::<Backend>()?)?,
    };
    let device = session.device_name();
    println!("{device} ({})", session.reason());

    let (mut standard, mut flash) = (StandardAttention::default(), FlashAttention::new(session));
    let of_standard = train("standard", &mut standard, &arguments)?;
    let of_flash = train("ferroflash", &mut flash, &arguments)?;
    print_table([("standard", &of_standard, standard.costs()), ("ferroflash", &of_flash, flash.costs())]);
    println!("ferroflash: {}, {} on {device}", flash.algorithms[0], flash.algorithms[1]);

    let names = ["standard attention", "ferroflash"];
    let curves =
        [Curve { name: names[0], losses: &of_standard.losses }, Curve { name: names[1], losses: &of_flash.losses }];
    picture::draw(&arguments.out, "A transformer learns to copy", curves)?;
    println!("both curves: {}", arguments.out.display());

    let apart = of_standard.losses.iter().zip(&of_flash.losses).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    println!("the losses of a step are at most {apart:.1e} apart; allowed: {TOLERANCE}");
    // A loss that is no number is not apart from anything.
    ensure!(of_standard.losses.iter().chain(&of_flash.losses).all(|loss| loss.is_finite()), "a loss is not finite");
    ensure!(apart <= TOLERANCE, "the losses are {apart} apart; allowed: {TOLERANCE}");
    Ok(())
}

/// Trains a new model. The same arguments give the same weights and batches, whatever computes attention.
fn train(name: &str, attention: &mut impl CausalAttention, arguments: &Arguments) -> Result<History> {
    let Arguments { steps, seed, .. } = *arguments;
    let (batch, seqlen) = (arguments.batch as usize, arguments.seqlen as usize);
    let mut random = StdRng::seed_from_u64(seed);
    let mut model = Transformer::new(Size { vocabulary: VOCABULARY, blocks: 2, nheads: 2, headdim: 32 }, &mut random);
    let mut optimizer = Adam::new(&model.parameters, LEARNING_RATE, WARMUP);
    let task = Copying { batch, seqlen, vocabulary: VOCABULARY };
    let start = Instant::now();
    let mut history = History { losses: Vec::new(), accuracies: Vec::new(), seconds: 0.0 };
    for step in 1..=steps {
        let (prediction, gradients) = model.gradients(attention, &task.batch(&mut random))?;
        optimizer.step(&mut model.parameters, &gradients);
        history.losses.push(prediction.loss);
        history.accuracies.push(prediction.accuracy);
        if step % (steps / 10).max(1) == 0 {
            println!(
                "{name:>10} step {step:>5}: loss {:.4}, {:.1} % copied right",
                prediction.loss,
                prediction.accuracy * 100.0
            );
        }
    }
    history.seconds = start.elapsed().as_secs_f64();
    Ok(history)
}

fn print_table(runs: [(&str, &History, &Costs); 2]) {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    let names = runs.map(|(name, ..)| name);
    table.set_header(["attention", names[0], names[1]]);
    let mut row = |what: &str, of: &dyn Fn(&History, &Costs) -> String| {
        let cells = runs.map(|(_, history, costs)| Cell::new(of(history, costs)).set_alignment(CellAlignment::Right));
        table.add_row([Cell::new(what)].into_iter().chain(cells));
    };
    row("copied right at the end, on new sequences", &|history, _| format!("{:.1} %", history.last_accuracy() * 100.0));
    row("wall time of training", &|history, _| format!("{:.1} s", history.seconds));
    row("of that, attention", &|_, costs| format!("{:.1} s", costs.seconds));
    row("kept for the backward pass besides Q, K, V and O: P, LSE", &|_, costs| kibibytes(costs.most_kept));
    row("workspace of a call: S and P or dP and dS; as reported", &|_, costs| kibibytes(costs.workspace));
    println!("{table}");
}

impl History {
    /// Over the last tenth of the steps, whose sequences were all new.
    fn last_accuracy(&self) -> f64 {
        let last = &self.accuracies[self.accuracies.len() * 9 / 10..];
        last.iter().sum::<f64>() / last.len() as f64
    }
}

fn kibibytes(bytes: u64) -> String {
    format!("{:.1} KiB", bytes as f64 / 1024.0)
}
