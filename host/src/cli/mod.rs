//! The commands, and what becomes of their errors: one line on stderr, and exit code 1. (clap ends a wrong usage with 2.)
mod accuracy;
mod answer;
mod bench;
mod choices;
mod explain;
mod files;
mod info;
mod inputs;
mod measured;
mod options;
mod progress;
mod ptx;
mod run;
mod selftest;
mod softmax;
mod tune;
mod units;

use clap::{Parser, Subcommand};
use std::io::{self, Write};
use std::process::ExitCode;

const EXAMPLES: &str = "\
Examples:
  ferroflash run host/examples/minilm_attention.safetensors --verify
                                 attention of a real model's layer, checked against f64
  ferroflash explain --svg flash.svg
                                 why FlashAttention is fast: every byte that moves, counted
  ferroflash info                what this machine has, and which backend would run
  ferroflash selftest            whether it computes right here
  ferroflash bench               how fast it is here, and how much memory it needs

Each command says more with --help.";

/// Exact attention: FlashAttention with kernels in Rust, on a GPU, on the CPU, or on a simulated GPU.
#[derive(Parser)]
#[command(name = "ferroflash", version, after_help = EXAMPLES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Run(run::Arguments),
    Softmax(softmax::Arguments),
    Info(info::Arguments),
    Selftest(selftest::Arguments),
    Explain(explain::Arguments),
    Bench(bench::Arguments),
    Ptx(ptx::Arguments),
    #[command(hide = true)]
    Tune(tune::Arguments),
}

pub fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Run(arguments) => run::execute(arguments),
        Command::Softmax(arguments) => softmax::execute(arguments),
        Command::Info(arguments) => info::execute(arguments),
        Command::Selftest(arguments) => selftest::execute(arguments),
        Command::Explain(arguments) => explain::execute(arguments),
        Command::Bench(arguments) => bench::execute(arguments),
        Command::Ptx(arguments) => ptx::execute(arguments),
        Command::Tune(arguments) => tune::execute(arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read the answer (`| head`) has read enough.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            // Without a stderr the exit code has to do.
            let _ = writeln!(io::stderr(), "error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
