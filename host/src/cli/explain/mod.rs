//! `ferroflash explain`: why FlashAttention is fast, as numbers and as a picture.
mod bars;
mod curves;
mod json;
mod measure;
mod picture;
mod svg;
mod table;
mod text;

use super::answer::{print, print_json};
use super::files::NewFile;
use super::progress::SimulationBar;
use anyhow::{Result, bail};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use ferroflash::{Backend, Session};
use measure::{Comparison, measure};
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  ferroflash explain
  ferroflash explain --svg flash.svg
  ferroflash explain --seqlen 256 --headdim 128 --seqlens 64,128,256";

/// Longer ones take the simulator minutes.
const MOST_TOKENS: i64 = 4096;

/// Show why FlashAttention is fast: every byte that attention moves between HBM and SRAM
///
/// Runs standard attention, FlashAttention and FlashAttention-2 on a simulated GPU, which counts the bytes that their
/// kernels move, and shows them by step and by tensor, how they grow with the sequence length, and the memory each takes,
/// beside the formulas of the paper. No GPU is needed.
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// Tokens of the one head whose bytes are shown one by one
    #[arg(long, value_name = "N", default_value = "512", value_parser = clap::value_parser!(u32).range(1..=MOST_TOKENS))]
    seqlen: u32,
    /// Elements of a token's row
    #[arg(long, value_name = "D", default_value = "64", value_parser = headdim())]
    headdim: u32,
    /// The lengths over which growth is shown
    #[arg(
        long,
        value_name = "N,N,...",
        value_delimiter = ',',
        default_value = "64,128,256,512,1024",
        value_parser = clap::value_parser!(u32).range(1..=MOST_TOKENS)
    )]
    seqlens: Vec<u32>,
    /// Draw it, too: an SVG picture, which any browser shows
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn headdim() -> impl TypedValueParser<Value = u32> {
    PossibleValuesParser::new(["32", "64", "128"]).try_map(|name| name.parse())
}

pub fn execute(arguments: Arguments) -> Result<()> {
    let svg = arguments.svg.map(NewFile::create).transpose()?;
    let mut lengths = arguments.seqlens;
    lengths.sort_unstable();
    lengths.dedup();

    let (session, bar) = SimulationBar::on(Session::new(Backend::Simulator)?);
    let comparison = measure(&session, arguments.seqlen as usize, arguments.headdim as usize, &lengths)?;
    drop(bar);

    let written = svg.map(|file| file.write(picture::draw(&comparison).as_bytes())).transpose()?;
    if arguments.json {
        print_json(&json::object(&comparison, written.as_deref()))?;
    } else {
        print(text::explanation(&comparison))?;
        if let Some(path) = written {
            print(format_args!("\nThe picture is in {}\n", path.display()))?;
        }
    }
    require_formulas(&comparison)
}

/// An error where the simulator has counted other bytes than the formulas say.
fn require_formulas(comparison: &Comparison) -> Result<()> {
    for run in comparison.runs() {
        if run.steps != run.formula {
            let (name, length) = (run.name(), run.problem.seqlen_q);
            bail!("{name} at {length} tokens moves {:?}, where its formula says {:?}", run.steps, run.formula);
        }
    }
    Ok(())
}
