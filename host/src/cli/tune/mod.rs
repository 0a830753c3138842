//! `ferroflash tune`: which of the variants of flash3's forward kernel that `cargo xtask tune` has built are the fastest.
mod measure;
mod rows;
mod variants;

use super::answer::print;
use anyhow::{Result, bail};
use comfy_table::{CellAlignment, Table, presets};
use ferroflash::cuda::Device;
use ferroflash::{Backend, Session};
use measure::{Measured, Setting};
use std::num::NonZeroUsize;
use std::path::PathBuf;
use variants::Candidate;

/// The GPU that variants of flash3 run on.
const HOPPER: (u32, u32) = (9, 0);

/// Check and measure the variants of flash3's forward kernel that `cargo xtask tune` has built
///
/// Each variant is compared with the f64 reference at lengths around the edges of its blocks. Those that are right are
/// measured in rounds, all variants at all lengths in a random order, a new one in each round, with a rest before each
/// measurement; the median over the rounds counts. At last the rows of the kernel's table are printed that are the
/// fastest in the geometric mean.
#[derive(clap::Args)]
pub struct Arguments {
    /// The folder with variants.json and the PTX
    folder: PathBuf,
    /// Lengths to measure at
    #[arg(long, value_delimiter = ',', default_values = ["512", "2048", "16384"], value_name = "N,...")]
    seqlens: Vec<NonZeroUsize>,
    /// Tokens of a batch: batch x seqlen
    #[arg(long, default_value = "16384", value_name = "N")]
    tokens: NonZeroUsize,
    /// How often each variant has its turn at each length
    #[arg(long, default_value = "3", value_name = "N")]
    rounds: NonZeroUsize,
    /// Runs of a turn, whose median is taken
    #[arg(long, default_value = "10", value_name = "N")]
    repetitions: NonZeroUsize,
}

pub fn execute(arguments: Arguments) -> Result<()> {
    let candidates = variants::read(&arguments.folder)?;
    let session = match session() {
        Ok(session) => session,
        Err(reason) => return print(format_args!("skipped: {reason}\n")),
    };
    let device = session.device_name();
    print(format_args!("{} variants on {device}\n", candidates.len()))?;

    let (right, wrong) = measure::check(&session, candidates)?;
    wrong.iter().try_for_each(|(name, reason)| print(format_args!("FAILED {name}: {reason}\n")))?;
    print(format_args!("{} right, {} wrong\n\n", right.len(), wrong.len()))?;

    let mut seqlens: Vec<_> = arguments.seqlens.iter().map(|seqlen| seqlen.get()).collect();
    seqlens.sort_unstable();
    let setting = Setting {
        session,
        seqlens,
        tokens: arguments.tokens.get(),
        rounds: arguments.rounds.get(),
        repetitions: arguments.repetitions.get(),
    };
    let measured = measure::measure(&setting, right)?;
    print(format_args!(
        "{}\n\n{}",
        table(&measured, &setting.seqlens),
        rows::text(&measured, &setting.seqlens, &device)
    ))?;
    if !wrong.is_empty() {
        bail!("{} variants compute wrongly", wrong.len());
    }
    Ok(())
}

/// A session on a GPU that runs variants, or why there is none.
fn session() -> Result<Session, String> {
    let device = Device::get(0).map_err(|error| format!("no GPU: {error}"))?;
    let (major, minor) = device.info().compute_capability;
    if (major, minor) != HOPPER {
        return Err(format!("no GPU that runs flash3: {} is sm_{major}{minor}, not sm_90", device.info().name));
    }
    Session::new(Backend::Cuda).map_err(|error| error.to_string())
}

/// A line for each variant, of those for the same problems the fastest first.
fn table(measured: &[Measured], seqlens: &[usize]) -> String {
    let mut table = Table::new();
    let lengths = seqlens.iter().map(|seqlen| format!("TFLOP/s at {seqlen}"));
    let header = ["variant", "registers", "spills", "shared bytes"].map(str::to_owned).into_iter().chain(lengths);
    table.load_style(presets::NOTHING).set_header(header.chain([String::new()]));
    table.column_iter_mut().skip(1).take(3 + seqlens.len()).for_each(|column| {
        column.set_cell_alignment(CellAlignment::Right);
    });
    for group in rows::groups(measured) {
        for Measured { candidate, tflops } in group {
            let Candidate { variant, registers, spill_bytes, in_table, .. } = candidate;
            let known = |number: &Option<u32>| number.map_or("?".to_owned(), |number| number.to_string());
            let resources = [known(registers), known(spill_bytes), variant.config().shared_bytes.to_string()];
            let speeds = tflops.iter().map(|tflops| format!("{tflops:.0}"));
            let remark = if *in_table { "in the table" } else { "" };
            let cells = [variant.name().to_owned()].into_iter().chain(resources).chain(speeds);
            table.add_row(cells.chain([remark.to_owned()]));
        }
    }
    table.trim_fmt()
}
