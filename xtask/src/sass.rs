//! What NVIDIA's assembler makes of the PTX.
use crate::artefacts::{Artefacts, declared};
use anyhow::{Context, Result, bail, ensure};
use cuda_builder::Arch;
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs};

/// What `ptxas -v` reports of one entry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Of a thread.
    pub registers: u32,
    /// Bytes that are stored because registers do not suffice.
    pub spill_stores: u32,
    spill_loads: u32,
    stack: u32,
    static_shared: u32,
    /// Warnings, such as those of serialised matrix instructions.
    pub warnings: Vec<String>,
}

/// Prints a table: each entry, assembled for each of `sass_archs`; after it the entries that use local memory, and last, how many
/// of each GPU's spill.
///
/// # Errors
/// With `deny_spills` if any spills, or there is no assembler to say so.
pub fn print(artefacts: &Artefacts, sass_archs: &[String], ptxas: Option<&Path>, deny_spills: bool) -> Result<()> {
    let Some(ptxas) = ptxas.map(Path::to_owned).or_else(find) else {
        ensure!(!deny_spills, "--deny-spills: no ptxas; allowed: on the PATH, in $CUDA_HOME/bin, or by --ptxas");
        println!("sass: skipped: no ptxas on the PATH or in $CUDA_HOME/bin");
        println!("  It is part of the CUDA toolkit, and of the Python package nvidia-cuda-nvcc.");
        return Ok(());
    };
    println!(
        "{:<44} {:>8} {:>9} {:>13} {:>12} {:>6} {:>14} {:>15}",
        "entry", "GPU", "registers", "spill stores", "spill loads", "stack", "static shared", "dynamic shared"
    );
    let (mut count, mut local, mut spills) = (0, Vec::new(), Spills::default());
    for (arch, build) in artefacts {
        let declared = arch.parse::<Arch>().map(declared).unwrap_or_default();
        // Code with the instructions of one GPU assembles for that alone.
        let only = [arch.clone()];
        let gpus = if arch.ends_with('a') { &only[..] } else { sass_archs };
        let jobs: Vec<_> =
            build.entries.iter().flat_map(|(name, entry)| gpus.iter().map(move |gpu| (name, entry, gpu))).collect();
        let usages: Vec<Result<Usage>> =
            jobs.par_iter().map(|(_, entry, gpu)| assemble(&ptxas, gpu, &entry.ptx)).collect();
        for ((name, _, gpu), usage) in jobs.iter().zip(usages) {
            let usage = usage.with_context(|| format!("{name} for {gpu}"))?;
            let dynamic = declared.get(name.as_str()).map_or(0, |declared| declared.shared_bytes);
            println!(
                "{name:<44} {gpu:>8} {:>9} {:>13} {:>12} {:>6} {:>14} {dynamic:>15}",
                usage.registers, usage.spill_stores, usage.spill_loads, usage.stack, usage.static_shared
            );
            usage.warnings.iter().for_each(|warning| println!("    {warning}"));
            count += 1;
            spills.add(gpu, usage.spills());
            if usage.uses_local_memory() {
                local.push(format!("{name} for {gpu}: {} bytes", usage.spill_stores.max(usage.stack)));
            }
        }
    }
    println!("sass: {} of {count} use local memory", local.len());
    local.iter().for_each(|line| println!("  {line}"));
    println!("{}", spills.in_words());
    ensure!(!deny_spills || spills.of_all() == 0, "--deny-spills: {} spill; allowed: 0", spills.of_all());
    Ok(())
}

/// Of the entries of each GPU, how many spill, and how many there are.
#[derive(Default)]
struct Spills(BTreeMap<String, (usize, usize)>);

impl Spills {
    fn add(&mut self, gpu: &str, spills: bool) {
        let (spilling, all) = self.0.entry(gpu.to_owned()).or_default();
        *spilling += usize::from(spills);
        *all += 1;
    }

    fn of_all(&self) -> usize {
        self.0.values().map(|(spilling, _)| spilling).sum()
    }

    fn in_words(&self) -> String {
        let of_gpu = |(gpu, (spilling, all)): (&String, &(usize, usize))| format!("{gpu} {spilling} of {all}");
        format!("sass: entries that spill: {}", self.0.iter().map(of_gpu).collect::<Vec<_>>().join(", "))
    }
}

/// The assembler on the PATH or of the CUDA toolkit.
pub fn find() -> Option<PathBuf> {
    let cuda =
        ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(env::var_os).map(|home| PathBuf::from(home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).chain(cuda).map(|folder| folder.join("ptxas")).find(|ptxas| ptxas.is_file())
}

/// What the assembler says of a module with one entry.
pub fn assemble(ptxas: &Path, gpu: &str, ptx: &str) -> Result<Usage> {
    // It reads no pipe.
    let name = format!(
        "ferroflash-{}-{}.ptx",
        std::process::id(),
        crate::fingerprint::sha256(format!("{gpu}{ptx}").as_bytes())
    );
    let source = env::temp_dir().join(name);
    fs::File::create(&source)?.write_all(ptx.as_bytes())?;
    let mut command = Command::new(ptxas);
    command.args(["-v", "-arch", gpu, "-o", "/dev/null"]).arg(&source).stdin(Stdio::null());
    let output = command.output().with_context(|| ptxas.display().to_string());
    fs::remove_file(&source)?;
    let output = output?;
    let log = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    if !output.status.success() {
        bail!("{}", log.trim());
    }
    Ok(usage(&log))
}

/// Whether a line is a warning. Of serialised matrix instructions the assembler speaks as of information.
fn is_warning(line: &str) -> bool {
    line.contains("warning") || line.contains("Potential Performance Loss")
}

impl Usage {
    /// Whether registers do not suffice.
    fn spills(&self) -> bool {
        self.spill_stores > 0 || self.spill_loads > 0
    }

    /// Whether a thread has anything in local memory: what its registers do not hold, or what has an address.
    fn uses_local_memory(&self) -> bool {
        self.spills() || self.stack > 0
    }

    /// Whether the assembler makes each matrix instruction wait for the one before.
    pub fn is_serialised(&self) -> bool {
        self.warnings.iter().any(|warning| warning.contains("wgmma.mma_async instructions are serialized"))
    }
}

fn usage(log: &str) -> Usage {
    let number = |unit: &str| {
        let before = log.split(unit).next().filter(|before| before.len() < log.len())?;
        before.rsplit(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    };
    let of = |unit| number(unit).unwrap_or(0);
    Usage {
        registers: of(" registers"),
        spill_stores: of(" bytes spill stores"),
        spill_loads: of(" bytes spill loads"),
        stack: of(" bytes stack frame"),
        static_shared: of(" bytes smem"),
        warnings: log.lines().filter(|line| is_warning(line)).map(str::to_owned).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_of_ptxas() {
        let log = "ptxas info    : 0 bytes gmem\n\
            ptxas info    : Compiling entry function 'f' for 'sm_80'\n\
            ptxas info    : Function properties for f\n    \
                16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n\
            ptxas info    : Used 128 registers, used 1 barriers, 49152 bytes smem, 400 bytes cmem[0]\n";
        let expected = Usage {
            registers: 128,
            spill_stores: 4,
            spill_loads: 8,
            stack: 16,
            static_shared: 49152,
            warnings: Vec::new(),
        };
        assert_eq!(usage(log), expected);
        assert!(
            expected.uses_local_memory()
                && !Usage { stack: 0, spill_stores: 0, spill_loads: 0, ..expected }.uses_local_memory()
        );
        let warned = usage("ptxas warning : Value of threads per SM is out of range");
        assert_eq!((warned.warnings.len(), warned.is_serialised()), (1, false));
    }

    #[test]
    fn spills_are_counted_by_gpu() {
        let mut spills = Spills::default();
        for (gpu, does) in [("sm_90", false), ("sm_80", true), ("sm_80", false)] {
            spills.add(gpu, does);
        }
        assert_eq!(spills.in_words(), "sass: entries that spill: sm_80 1 of 2, sm_90 0 of 1");
        assert_eq!(spills.of_all(), 1);
    }

    #[test]
    fn serialised_matrix_products_are_a_warning() {
        let log = "ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due \
            to insufficient register resources for the wgmma pipeline in the function 'f'\n\
            ptxas info    : Used 168 registers\n";
        let usage = usage(log);
        assert_eq!((usage.warnings.len(), usage.registers), (1, 168));
        assert!(usage.is_serialised());
    }
}
