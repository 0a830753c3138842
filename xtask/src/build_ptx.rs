//! The kernels' PTX: built, checked, and compared with what is in the repository.
use crate::artefacts::{self, Artefacts, Build, declared};
use crate::verdict::Verdict;
use crate::{fingerprint, sass, workspace};
use anyhow::{Result, ensure};
use clap::Args;
use cuda_builder::{Arch, CudaBuilder, Toolchain};
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::{panic, thread};

/// Build the kernels for the GPU, and keep their PTX in host/ptx, one file for each entry point.
///
/// Run it after a change of `kernels` or `cuda_std`, and commit what it writes: users compile no kernels. It needs a
/// device toolchain (`cargo xtask setup`) but no GPU and no CUDA. An entry point that uses local memory, calls a
/// function, can panic, accesses memory generically, or has another number of barriers than its source, is an error. The
/// whole module, as LLVM wrote it, is left in target/device/ARCH.ptx.
#[derive(Args)]
pub struct Options {
    /// Write nothing: check that host/ptx is what the sources give, or without a device toolchain, that it claims to be
    #[arg(long)]
    check: bool,
    /// Build for this architecture alone: sm_80 or sm_90a [default: all that have entry points]
    #[arg(long)]
    arch: Option<Arch>,
    /// Build only the entry points whose name contains one of these parts, and write them to target/device/only instead, to
    /// look at a kernel; with --force also to host/ptx, to measure it: what is there then counts as stale
    #[arg(long, value_name = "PART,...", conflicts_with = "check")]
    only: Option<String>,
    /// Write even what has not passed the checks, or is not all of it, to look at it or to measure it
    #[arg(long, conflicts_with = "check")]
    force: bool,
    /// Print what NVIDIA's assembler makes of each entry point (registers, spills, shared memory, stack), and which spill
    #[arg(long)]
    sass: bool,
    /// Fail if any of them spills
    #[arg(long, requires = "sass")]
    deny_spills: bool,
    /// The GPUs to assemble for
    #[arg(long, value_delimiter = ',', default_values = ["sm_80", "sm_86", "sm_89", "sm_90"], value_name = "ARCH")]
    sass_arch: Vec<String>,
    /// NVIDIA's assembler [default: ptxas on the PATH or in $CUDA_HOME/bin]
    #[arg(long)]
    ptxas: Option<PathBuf>,
}

/// Runs the command.
pub fn run(options: &Options) -> Result<ExitCode> {
    let archs = archs(options.arch)?;
    if let Some(parts) = &options.only {
        return build_only(&archs, parts, options);
    }
    let failed = if options.check {
        let verdicts = [("artefacts", check(&archs)), ("rebuild", rebuild(&archs))];
        verdicts.iter().for_each(|(step, verdict)| println!("{step}: {verdict}"));
        verdicts.iter().any(|(_, verdict)| verdict.is_failure())
    } else {
        let verdict = build(&archs, options.force)?;
        println!("{verdict}");
        verdict.is_failure()
    };
    if options.sass {
        sass::print(
            &artefacts::read(&workspace::ptx())?,
            &options.sass_arch,
            options.ptxas.as_deref(),
            options.deny_spills,
        )?;
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Builds some entry points, each as a file for itself. What is kept stays as it is, but with `--force`.
fn build_only(archs: &[Arch], parts: &str, options: &Options) -> Result<ExitCode> {
    let is_wanted = |name: &str| parts.split(',').any(|part| name.contains(part));
    let toolchains = Toolchain::find_all()?;
    let kept = artefacts::read(&workspace::ptx())?;
    let folder = workspace::root().join("target/device/only");
    fs::create_dir_all(&folder)?;
    let (mut built, mut complaints) = (Artefacts::new(), Vec::new());
    for arch in archs {
        let mut declared = declared(*arch);
        declared.retain(|name, _| is_wanted(name));
        if declared.is_empty() {
            continue;
        }
        let toolchain = choose(&toolchains, kept.get(arch.name()));
        let build = build_one(*arch, toolchain, Some(parts))?;
        complaints.extend(build.complaints(&declared).iter().map(|complaint| format!("{arch} {complaint}")));
        for (name, entry) in &build.entries {
            fs::write(folder.join(format!("{name}.ptx")), &entry.ptx)?;
        }
        built.insert(arch.to_string(), build);
    }
    let count: usize = built.values().map(|build| build.entries.len()).sum();
    ensure!(count > 0, "no entry point's name contains any of {parts}");
    let verdict = Verdict::of(complaints);
    println!("{verdict}\n{count} entry points in {}", folder.display());
    if options.force {
        let mut all = kept;
        for (arch, build) in &built {
            let of_arch =
                all.entry(arch.clone()).or_insert_with(|| Build { entries: Default::default(), ..build.clone() });
            of_arch.entries.extend(build.entries.clone());
            of_arch.sources = format!("of {parts} alone");
        }
        artefacts::write(&workspace::ptx(), &all)?;
    }
    if options.sass {
        sass::print(&built, &options.sass_arch, options.ptxas.as_deref(), options.deny_spills)?;
    }
    Ok(if verdict.is_failure() { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The architectures that have entry points.
pub fn archs(only: Option<Arch>) -> Result<Vec<Arch>> {
    let chosen = |arch: &Arch| only.is_none_or(|only| only == *arch) && !declared(*arch).is_empty();
    let archs: Vec<Arch> = Arch::ALL.into_iter().filter(chosen).collect();
    ensure!(
        !archs.is_empty(),
        "the tables of `kernels` have no entry point{}",
        only.map(|arch| format!(" for {arch}")).unwrap_or_default()
    );
    Ok(archs)
}

/// Builds, and writes what has passed the checks.
fn build(archs: &[Arch], force: bool) -> Result<Verdict> {
    let toolchains = Toolchain::find_all()?;
    let before = artefacts::read(&workspace::ptx()).unwrap_or_default();
    let mut after: Artefacts = before.clone();
    // Of the architectures that are not built now, those stay that still have entry points.
    after.retain(|name, _| Arch::ALL.iter().any(|arch| arch.name() == name && !declared(*arch).is_empty()));
    let mut complaints = Vec::new();
    for (arch, build) in build_all(archs, |arch| choose(&toolchains, before.get(arch.name())))? {
        complaints.extend(build.complaints(&declared(arch)).iter().map(|complaint| format!("{arch} {complaint}")));
        after.insert(arch.to_string(), build);
    }
    let verdict = Verdict::of(complaints);
    if !verdict.is_failure() || force {
        artefacts::write(&workspace::ptx(), &after)?;
    }
    if verdict.is_failure() {
        return Ok(verdict);
    }
    let count: usize = archs.iter().map(|arch| after[arch.name()].entries.len()).sum();
    let news = if before == after { "host/ptx has them already" } else { "host/ptx has changed: commit it" };
    Ok(Verdict::Passed(format!("{count} entry points built; {news}")))
}

/// The toolchain that built what is kept, so that the same sources give the same PTX; else the first.
pub fn choose<'a>(toolchains: &'a [Toolchain], kept: Option<&Build>) -> &'a Toolchain {
    let same = |toolchain: &&Toolchain| kept.is_some_and(|kept| kept.toolchain == toolchain.version);
    toolchains.iter().find(same).unwrap_or(&toolchains[0])
}

/// All entry points of several architectures, each with its toolchain. Side by side: one architecture keeps one core busy.
fn build_all<'a>(archs: &[Arch], toolchain: impl Fn(Arch) -> &'a Toolchain) -> Result<Vec<(Arch, Build)>> {
    thread::scope(|scope| {
        let start = |arch: Arch| {
            let toolchain = toolchain(arch);
            (arch, scope.spawn(move || build_one(arch, toolchain, None)))
        };
        let started: Vec<_> = archs.iter().copied().map(start).collect();
        let join = |(arch, thread): (Arch, thread::ScopedJoinHandle<'_, Result<Build>>)| {
            let build = thread.join().unwrap_or_else(|panic| panic::resume_unwind(panic))?;
            Ok((arch, build))
        };
        started.into_iter().map(join).collect()
    })
}

/// The entry points whose name contains one of the parts `only`, or all.
fn build_one(arch: Arch, toolchain: &Toolchain, only: Option<&str>) -> Result<Build> {
    let device = workspace::root().join("target/device");
    fs::create_dir_all(&device)?;
    let builder = CudaBuilder::new(workspace::root().join("kernels")).arch(arch).toolchain(toolchain.clone());
    let mut builder = builder.target_dir(&device).copy_to(device.join(format!("{arch}.ptx")));
    if let Some(parts) = only {
        builder = builder.only(parts);
    }
    Build::new(&builder.build()?, fingerprint::of_sources(workspace::root(), arch)?)
}

/// Whether the PTX in the repository is that of the sources, as far as can be said without building it.
pub fn check(archs: &[Arch]) -> Verdict {
    let check = || -> Result<Verdict> {
        let artefacts = artefacts::read(&workspace::ptx())?;
        let unused = artefacts.keys().filter(|name| name.parse().map_or(true, |arch| declared(arch).is_empty()));
        let mut complaints: Vec<String> = unused.map(|name| format!("{name}: `kernels` has nothing for it")).collect();
        for arch in archs {
            let Some(build) = artefacts.get(arch.name()) else {
                complaints.push(format!("{arch}: there is no PTX: run `cargo xtask build-ptx`"));
                continue;
            };
            if build.sources != fingerprint::of_sources(workspace::root(), *arch)? {
                let stale = "the sources have changed since its PTX was built: run `cargo xtask build-ptx`";
                complaints.push(format!("{arch}: {stale}"));
            }
            complaints.extend(build.complaints(&declared(*arch)).iter().map(|complaint| format!("{arch} {complaint}")));
        }
        Ok(Verdict::of(complaints))
    };
    check().unwrap_or_else(|error| Verdict::Failed(format!("{error:#}: run `cargo xtask build-ptx`")))
}

/// Whether the sources give the PTX in the repository.
pub fn rebuild(archs: &[Arch]) -> Verdict {
    let toolchains = match Toolchain::find_all() {
        Ok(toolchains) => toolchains,
        Err(missing) => return Verdict::Skipped(missing.to_string()),
    };
    let rebuild = || -> Result<Verdict> {
        let artefacts = artefacts::read(&workspace::ptx())?;
        let mut complaints = Vec::new();
        let mut remarks = Vec::new();
        let kept: Vec<Arch> = archs.iter().copied().filter(|arch| artefacts.contains_key(arch.name())).collect();
        for (arch, build) in build_all(&kept, |arch| choose(&toolchains, artefacts.get(arch.name())))? {
            let kept = &artefacts[arch.name()];
            let mut wrong = build.complaints(&declared(arch));
            if build.toolchain == kept.toolchain {
                wrong.extend(kept.differences(&build));
            } else {
                let (this, that) = (&build.toolchain, &kept.toolchain);
                remarks.push(format!("{arch}: checked, not compared: built by {this}, kept from {that}"));
            }
            complaints.extend(wrong.iter().map(|complaint| format!("{arch} {complaint}")));
        }
        Ok(if complaints.is_empty() { Verdict::Passed(remarks.join("\n")) } else { Verdict::of(complaints) })
    };
    rebuild().unwrap_or_else(|error| Verdict::Failed(format!("{error:#}")))
}
