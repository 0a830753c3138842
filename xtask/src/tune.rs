//! Which configurations of flash3's forward kernel are the fastest: variants that are in no table, built and measured.
mod grid;
mod source;

use crate::artefacts::{Build, Declared};
use crate::{build_ptx, bundle, sass, workspace};
use anyhow::{Context, Result, ensure};
use clap::Args;
use cuda_builder::{Arch, CudaBuilder, Toolchain};
use grid::{Grid, Headdims, Variant};
use rayon::prelude::*;
use serde_json::{Value, json};
use source::Configured;
use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

const RUN: &str = include_str!("tune/run.sh");

/// Build configurations of flash3's forward kernel, and find out which are the fastest.
///
/// All combinations of the given sizes that fit a multiprocessor are built, and those that the kernel's table has for the
/// same problems. Those that fail build-ptx's checks are left out, and where ptxas is there, those whose matrix products
/// it serialises. The others go into a folder that runs on any machine with a Hopper GPU, and needs no Rust there: its
/// run.sh checks each against the f64 reference, measures all in random order with rests, and prints the rows of the table
/// (kernels/src/flash3/mod.rs) to adopt. Where this machine has such a GPU, it runs at once.
#[derive(Args)]
pub struct Options {
    /// Head dimensions: of Q and K, and after a slash of V if another
    #[arg(long, value_delimiter = ',', default_values = ["64", "128", "256"], value_name = "D,...")]
    headdims: Vec<Headdims>,
    /// Warpgroups of consumers, 64 query rows each
    #[arg(long, value_delimiter = ',', default_values = ["2", "3", "4"], value_name = "N,...")]
    groups: Vec<u32>,
    /// Tiles of Q that are in shared memory at once: the present one, or the next one, too
    #[arg(long, value_delimiter = ',', default_values = ["1", "2"], value_name = "N,...")]
    queries: Vec<u32>,
    /// Keys a block
    #[arg(long, value_delimiter = ',', default_values = ["64", "80", "96", "112", "128", "160", "176"], value_name = "N,...")]
    block_n: Vec<u32>,
    /// Blocks of K, and of V, that are in shared memory at once
    #[arg(long, value_delimiter = ',', default_values = ["2", "3", "4"], value_name = "N,...")]
    stages: Vec<u32>,
    /// With a causal mask, without one
    #[arg(long, value_delimiter = ',', default_values = ["false", "true"], value_name = "BOOL,...", action = clap::ArgAction::Append)]
    causal: Vec<bool>,
    /// f16, bf16
    #[arg(long, value_delimiter = ',', default_values = ["bf16"], value_name = "DTYPE,...", value_parser = ["f16", "bf16"])]
    dtypes: Vec<String>,
    /// Say what would be built, and build nothing
    #[arg(long)]
    list: bool,
    /// NVIDIA's assembler [default: ptxas on the PATH or in $CUDA_HOME/bin]
    #[arg(long)]
    ptxas: Option<PathBuf>,
    /// The folder for all of it, of which `bundle` is to be copied to a machine with a GPU
    #[arg(short, long, default_value = "target/tune")]
    output: PathBuf,
    /// What run.sh is told, as `--seqlens 512,4096 --rounds 5`
    #[arg(last = true)]
    measure: Vec<String>,
}

/// Runs the command.
pub fn run(options: &Options) -> Result<ExitCode> {
    let dtypes = ["f16", "bf16"].into_iter().filter(|dtype| options.dtypes.iter().any(|asked| asked == dtype));
    let grid = Grid {
        headdims: &options.headdims,
        causal: &options.causal,
        dtypes: &dtypes.collect::<Vec<_>>(),
        groups: &options.groups,
        queries: &options.queries,
        blocks_n: &options.block_n,
        stages: &options.stages,
    };
    let table = source::table(workspace::root())?;
    let variants = grid.variants(&table)?;
    if options.list {
        variants.iter().for_each(|variant| println!("{variant}"));
        return Ok(ExitCode::SUCCESS);
    }
    println!("{} variants", variants.len());
    let output = workspace::root().join(&options.output);
    let (build, configured) = build(&variants, &output)?;
    let good = assess(&variants, &table, &build, &configured, options.ptxas.as_deref())?;
    ensure!(!good.is_empty(), "none of the variants passes the checks");
    let folder = output.join("bundle");
    write(&good, &folder)?;
    bundle::copy(&bundle::command()?, &folder.join("ferroflash"))?;
    println!(
        "{}: {} variants. Copy it to a machine with a Hopper GPU and start run.sh there.",
        folder.display(),
        good.len()
    );

    let status = Command::new(folder.join("run.sh")).args(&options.measure).status().context("run.sh")?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The variants as PTX, and what their sources say of each.
fn build(variants: &[Variant], output: &Path) -> Result<(Build, BTreeMap<String, Configured>)> {
    let arch = Arch::Sm90a;
    let source = output.join("source");
    source::write(workspace::root(), &source, variants)?;
    let toolchains = Toolchain::find_all()?;
    let kept = crate::artefacts::read(&workspace::ptx()).unwrap_or_default();
    let toolchain = build_ptx::choose(&toolchains, kept.get(arch.name()));
    let builder = CudaBuilder::new(source.join("kernels")).arch(arch).toolchain(toolchain.clone());
    let ptx = builder.target_dir(output.join("device")).copy_to(output.join(format!("{arch}.ptx"))).build()?;
    Ok((Build::new(&ptx, String::new())?, source::configured(&ptx.text)?))
}

/// A variant that may be measured.
#[derive(Debug)]
struct Good<'a> {
    variant: &'a Variant,
    /// Whether the kernel's table has it.
    in_table: bool,
    configured: &'a Configured,
    ptx: &'a str,
    /// What the assembler says, if it is there.
    usage: Option<sass::Usage>,
}

/// Says what is wrong with variants, and gives the others.
fn assess<'a>(
    variants: &'a [Variant],
    table: &[Variant],
    build: &'a Build,
    configured: &'a BTreeMap<String, Configured>,
    ptxas: Option<&Path>,
) -> Result<Vec<Good<'a>>> {
    let declared: BTreeMap<&str, Declared> =
        configured.iter().map(|(name, configured)| (name.as_str(), configured.declared())).collect();
    let complaints = build.complaints(&declared);
    let ptxas = ptxas.map(Path::to_owned).or_else(sass::find);
    if ptxas.is_none() {
        println!("sass: skipped: no ptxas on the PATH or in $CUDA_HOME/bin");
    }
    let assess = |variant: &'a Variant| -> Result<Result<Good<'a>, String>> {
        let name = variant.name();
        let (Some(entry), Some(configured)) = (build.entries.get(&name), configured.get(&name)) else {
            return Ok(Err("it is not in the PTX".to_owned()));
        };
        if let Some(complaint) = complaints.iter().find_map(|complaint| complaint.strip_prefix(&format!("{name}: "))) {
            return Ok(Err(complaint.to_owned()));
        }
        let assemble = |ptxas: &PathBuf| sass::assemble(ptxas, Arch::Sm90a.name(), &entry.ptx);
        let usage = ptxas.as_ref().map(assemble).transpose().context(name)?;
        if usage.as_ref().is_some_and(sass::Usage::is_serialised) {
            return Ok(Err("ptxas serialises its matrix products".to_owned()));
        }
        Ok(Ok(Good { variant, in_table: table.contains(variant), configured, ptx: &entry.ptx, usage }))
    };
    let assessed = variants.par_iter().map(assess).collect::<Result<Vec<_>>>()?;
    let mut all_good = Vec::new();
    for (variant, assessed) in variants.iter().zip(assessed) {
        match assessed {
            Err(complaint) => println!("{variant:<44} left out: {complaint}"),
            Ok(good) => {
                if let Some(usage) = &good.usage {
                    println!("{variant:<44} {:>3} registers, {:>4} bytes spilled", usage.registers, usage.spill_stores);
                }
                all_good.push(good);
            }
        }
    }
    Ok(all_good)
}

impl Good<'_> {
    /// What `ferroflash tune` reads of it.
    fn json(&self) -> Value {
        let Good { variant, in_table, configured, usage, .. } = self;
        json!({
            "name": variant.name(),
            "dtype": variant.dtype,
            "headdim": variant.headdims.headdim,
            "headdim_v": variant.headdims.headdim_v,
            "causal": variant.causal,
            "groups": variant.groups,
            "queries": variant.queries,
            "stages": variant.stages,
            "block_m": configured.block_m,
            "block_n": configured.block_n,
            "threads": configured.threads,
            "sequences": configured.sequences,
            "min_blocks_per_sm": configured.min_blocks_per_sm,
            "claimed_registers": configured.claimed_registers,
            "accumulators": configured.accumulators,
            "shared_bytes": configured.shared_bytes,
            "barriers": configured.barriers,
            "registers": usage.as_ref().map(|usage| usage.registers),
            "spill_bytes": usage.as_ref().map(|usage| usage.spill_stores),
            "in_table": in_table,
        })
    }
}

/// Writes the variants to a folder, which is made anew, and what runs them.
fn write(variants: &[Good], folder: &Path) -> Result<()> {
    if folder.exists() {
        let is_ours = folder.join("variants.json").exists() || fs::read_dir(folder)?.next().is_none();
        ensure!(is_ours, "{} is there already and holds no variants", folder.display());
        fs::remove_dir_all(folder)?;
    }
    fs::create_dir_all(folder)?;
    for Good { variant, ptx, .. } in variants {
        fs::write(folder.join(format!("{variant}.ptx.zst")), zstd::encode_all(ptx.as_bytes(), 0)?)?;
    }
    let list = Value::Array(variants.iter().map(Good::json).collect());
    fs::write(folder.join("variants.json"), format!("{list:#}\n"))?;
    let script = folder.join("run.sh");
    fs::write(&script, RUN)?;
    Ok(fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?)
}
