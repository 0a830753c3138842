//! `ferroflash ptx`: the embedded kernels, for profilers, assemblers and other programs that launch them.
use super::answer::{print, print_json};
use super::files::NewFile;
use anyhow::{Result, bail};
use ferroflash::ptx::{self, Entry};
use serde_json::{Value, json};
use std::path::PathBuf;

const EXAMPLES: &str = "\
Examples:
  ferroflash ptx
  ferroflash ptx flash2_fwd_bf16_d64 | less
  ferroflash ptx flash2_fwd_bf16_d64 -o flash2.ptx && ptxas -arch=sm_90 -v flash2.ptx
  ferroflash ptx flash2_fwd_bf16_d64 --json";

/// Print the PTX of a kernel as it is embedded in this program, or list the kernels
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Arguments {
    /// The entry point; without it, the names of all are listed
    entry: Option<String>,
    /// Only kernels that were built for this architecture, as sm_80
    #[arg(long)]
    arch: Option<String>,
    /// Write the PTX to this file instead of stdout
    #[arg(short, long, value_name = "FILE", requires = "entry", conflicts_with = "json")]
    output: Option<PathBuf>,
    /// Print one JSON object, with what a launch needs (threads, shared memory, rows a block), and the PTX of the entry
    #[arg(long)]
    json: bool,
}

pub fn execute(arguments: Arguments) -> Result<()> {
    let of_arch = |entry: &&Entry| arguments.arch.as_ref().is_none_or(|arch| entry.arch == arch);
    let entries: Vec<_> = ptx::embedded().iter().filter(of_arch).collect();
    let Some(name) = &arguments.entry else {
        return if arguments.json {
            print_json(&json!({ "kernels": entries.into_iter().map(description).collect::<Vec<_>>() }))
        } else {
            entries.iter().try_for_each(|entry| print(format_args!("{}\n", entry.name)))
        };
    };
    let entry = find(&entries, name)?;
    let text = entry.text()?;
    if arguments.json {
        let mut object = description(entry);
        object["ptx"] = json!(text);
        return print_json(&object);
    }
    match arguments.output {
        Some(path) => NewFile::create(path)?.write(text.as_bytes()).map(drop),
        None => print(text),
    }
}

/// The one entry of this name.
fn find<'a>(entries: &[&'a Entry], name: &str) -> Result<&'a Entry> {
    let found: Vec<_> = entries.iter().filter(|entry| entry.name == name).collect();
    match found[..] {
        [entry] => Ok(entry),
        [] => bail!("no kernel {name:?} is embedded here; `ferroflash ptx` lists those that are"),
        _ => {
            let archs: Vec<_> = found.iter().map(|entry| entry.arch).collect();
            bail!("kernel {name} is embedded for several architectures; choose with --arch: {}", archs.join(", "))
        }
    }
}

/// What a program needs to know of a kernel to choose and to launch it. `headdim`, `headdim_v` and `causal` are null where
/// the kernel takes any.
pub fn description(entry: &Entry) -> Value {
    let mut object = json!({ "name": entry.name, "arch": entry.arch, "ptx_bytes": entry.ptx_bytes });
    if let Some(info) = kernels::entries().find(|info| info.name == entry.name) {
        let config = info.config;
        object["family"] = json!(config.family);
        object["dtype"] = json!(config.dtype.name());
        object["tf32"] = json!(config.tf32);
        object["headdim"] = json!(Some(config.headdim).filter(|&headdim| headdim != 0));
        object["headdim_v"] = json!(Some(config.headdim_v).filter(|&headdim_v| headdim_v != 0));
        object["causal"] = json!(config.causal);
        object["general"] = json!(config.general);
        object["block_m"] = json!(config.block_m);
        object["block_n"] = json!(config.block_n);
        object["threads"] = json!(config.threads);
        object["shared_bytes"] = json!(config.shared_bytes);
    }
    object
}
