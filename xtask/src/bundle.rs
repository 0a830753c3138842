//! The tests as a folder that runs on another machine.
use crate::verdict::Verdict;
use crate::{python, workspace};
use anyhow::{Context, Result, bail, ensure};
use cargo_metadata::{Artifact, Message, TargetKind};
use clap::Args;
use std::fs;
use std::io::BufReader;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

const RUN: &str = include_str!("bundle/run.sh");

/// Collect the release build, all tests and the example inputs in a folder, to run them where there is no Rust.
///
/// Copy the folder to a machine with a GPU and start its `run.sh`: it needs bash, awk, and NVIDIA's driver; for the
/// tests of the Python package, which are skipped without, also Python with PyTorch and pytest.
/// Its last line counts the tests; those that found no GPU are skipped, not passed.
#[derive(Args)]
pub struct Options {
    /// The folder, which is made anew
    #[arg(short, long, default_value = ".bundle")]
    output: PathBuf,
}

/// Runs the command.
pub fn run(options: &Options) -> Result<ExitCode> {
    let output = workspace::root().join(&options.output);
    let program = command()?;
    let tests = build(&["test", "--release", "--workspace", "--no-run"])?;
    if output.exists() {
        let is_bundle = output.join("run.sh").exists() || fs::read_dir(&output)?.next().is_none();
        ensure!(is_bundle, "{} is there already and is no bundle", output.display());
        fs::remove_dir_all(&output)?;
    }
    for folder in ["tests", "examples"] {
        fs::create_dir_all(output.join(folder))?;
    }
    copy(&program, &output.join("ferroflash"))?;
    for artifact in tests.iter().filter(|artifact| artifact.profile.test && runs_alone(artifact)) {
        copy(executable(artifact)?, &output.join("tests").join(test_name(artifact)))?;
    }
    for example in examples()? {
        fs::copy(&example, output.join("examples").join(example.file_name().context("a file has a name")?))?;
    }
    python_package(&output.join("python"))?;
    let script = output.join("run.sh");
    fs::write(&script, RUN)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    println!("{}: {:.1} MiB. Copy it to any machine and start run.sh there.", output.display(), mebibytes(&output)?);
    Ok(ExitCode::SUCCESS)
}

/// Builds the command for this machine, optimised; gives its path.
pub fn command() -> Result<PathBuf> {
    let built = build(&["build", "--release", "--package", "ferroflash", "--bin", "ferroflash"])?;
    let program = built.iter().find(|artifact| !artifact.profile.test).context("cargo names no executable")?;
    Ok(executable(program)?.to_owned())
}

/// Puts the wheel of the Python package and its tests in a folder.
fn python_package(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder.join("tests"))?;
    if let Verdict::Skipped(reason) = python::wheel(folder)? {
        println!("skipped: no wheel of the Python package: {reason}");
    }
    for test in fs::read_dir(python::tests())? {
        let test = test?.path();
        if test.extension().is_some_and(|extension| extension == "py") {
            fs::copy(&test, folder.join("tests").join(test.file_name().context("a file has a name")?))?;
        }
    }
    Ok(())
}

/// Runs cargo; gives the executables that it made.
fn build(arguments: &[&str]) -> Result<Vec<Artifact>> {
    let mut command = workspace::cargo();
    command.args(arguments);
    println!("$ {}", workspace::typed(&command));
    let mut child = command.arg("--message-format=json-render-diagnostics").stdout(Stdio::piped()).spawn()?;
    let mut artifacts = Vec::new();
    for message in Message::parse_stream(BufReader::new(child.stdout.take().context("it is piped")?)) {
        if let Message::CompilerArtifact(artifact) = message?
            && artifact.executable.is_some()
        {
            artifacts.push(artifact);
        }
    }
    if !child.wait()?.success() {
        bail!("it does not compile");
    }
    Ok(artifacts)
}

/// Whether a test needs no Rust on the machine: those of macros link with the compiler, the developer's tools run it.
fn runs_alone(artifact: &Artifact) -> bool {
    let tools = ["xtask", "cuda_builder"];
    !artifact.target.kind.contains(&TargetKind::ProcMacro) && !tools.contains(&artifact.target.name.as_str())
}

/// `ferroflash`, or `ferroflash-main` for the tests in a program.
fn test_name(artifact: &Artifact) -> String {
    let kind = &artifact.target.kind;
    let suffix = if kind.contains(&TargetKind::Bin) { "-main" } else { "" };
    let package = artifact.manifest_path.parent().and_then(|folder| folder.file_name()).unwrap_or_default();
    format!("{package}-{}{suffix}", artifact.target.name)
}

fn executable(artifact: &Artifact) -> Result<&Path> {
    Ok(artifact.executable.as_deref().context("only executables are kept")?.as_std_path())
}

/// Copies a program, without its symbols where `strip` is there to remove them.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::copy(from, to).with_context(|| from.display().to_string())?;
    // A larger file does no harm.
    let _ = Command::new("strip").arg(to).stderr(Stdio::null()).status();
    Ok(())
}

/// The inputs in `host/examples` and `examples`.
fn examples() -> Result<Vec<PathBuf>> {
    let mut examples = Vec::new();
    for folder in ["host/examples", "examples"] {
        let Ok(files) = fs::read_dir(workspace::root().join(folder)) else { continue };
        for file in files {
            let path = file?.path();
            if path.extension().is_some_and(|extension| extension == "safetensors") {
                examples.push(path);
            }
        }
    }
    examples.sort();
    Ok(examples)
}

fn mebibytes(folder: &Path) -> Result<f64> {
    let mut bytes = 0.0;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        bytes += if metadata.is_dir() { mebibytes(&entry.path())? } else { metadata.len() as f64 / (1 << 20) as f64 };
    }
    Ok(bytes)
}
