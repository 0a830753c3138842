//! What a developer of ferroflash types: `cargo xtask --help`.
mod artefacts;
mod build_ptx;
mod bundle;
mod fingerprint;
mod libtest;
mod python;
mod sass;
mod setup;
mod test;
mod tune;
mod verdict;
mod workspace;

use clap::Parser;
use std::process::ExitCode;

/// The developer's commands of ferroflash. A new machine needs `setup` once; `test` runs everything that CI runs.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Command {
    /// Make this machine ready: find a Rust toolchain that can build the kernels for the GPU, or install one.
    ///
    /// Using ferroflash, working on the host code and running the tests need none: the kernels' PTX is in the
    /// repository. Only a change of a kernel does.
    Setup,
    BuildPtx(build_ptx::Options),
    Test(test::Options),
    Bundle(bundle::Options),
    Tune(tune::Options),
}

fn main() -> ExitCode {
    let done = match Command::parse() {
        Command::Setup => setup::run(),
        Command::BuildPtx(options) => build_ptx::run(&options),
        Command::Test(options) => test::run(&options),
        Command::Bundle(options) => bundle::run(&options),
        Command::Tune(options) => tune::run(&options),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
