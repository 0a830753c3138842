//! The command `ferroflash`: attention on files, and a look at how it is computed.
use std::process::ExitCode;

mod cli;

fn main() -> ExitCode {
    cli::main()
}
