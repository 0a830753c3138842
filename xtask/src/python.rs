//! The Python package: its wheel, built, installed into a virtual environment, and tested there.
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::libtest::Counts;
use crate::verdict::Verdict;
use crate::workspace;

/// The oldest Python that the package is for.
const OLDEST: (u32, u32) = (3, 9);

/// Checks its types, builds and tests it, and counts the tests. Skipped where there is no Python, or no network to get PyTorch from.
pub fn test() -> (Verdict, Counts) {
    let environment = match environment() {
        Ok(environment) => environment,
        Err(reason) => return (Verdict::Skipped(format!("{reason:#}")), Counts::default()),
    };
    match check_types(&environment).and_then(|()| build_and_test(&environment)) {
        Ok((true, counts)) if counts.passed > 0 => (Verdict::Passed(counts.to_string()), counts),
        Ok((_, counts)) => (Verdict::Failed(counts.to_string()), counts),
        Err(error) => (Verdict::Failed(format!("{error:#}")), Counts::default()),
    }
}

/// The virtual environment with what the tests need, as python/requirements.txt says it.
fn environment() -> Result<PathBuf> {
    let (major, minor) = OLDEST;
    let is_new = format!("import sys; sys.exit(sys.version_info < ({major}, {minor}))");
    let found = Command::new("python3").args(["-c", &is_new]).status();
    ensure!(found.is_ok_and(|status| status.success()), "no python3 of {major}.{minor} or newer");
    let environment = target()?.join("venv");
    if !environment.join("bin/python").exists() {
        run(Command::new("python3").args(["-m", "venv"]).arg(&environment))?;
    }
    let requirements = package().join("requirements.txt");
    let mut pip = tool(&environment, "python");
    run(pip
        .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--requirement"])
        .arg(requirements))
    .context("what the tests need cannot be installed")?;
    Ok(environment)
}

/// Whether the annotations of the package fit together, as python/pyproject.toml asks for it.
fn check_types(environment: &Path) -> Result<()> {
    let mut mypy = tool(environment, "python");
    mypy.args(["-m", "mypy", "--config-file"]).arg(package().join("pyproject.toml"));
    run(mypy.arg("--cache-dir").arg(target()?.join("mypy")).arg(package().join("ferroflash")).current_dir(target()?))
}

/// A release wheel, in an empty folder: the package with the kernels' PTX, for every CPython on this platform. Skipped
/// where there is nothing to build it with.
pub fn wheel(output: &Path) -> Result<Verdict> {
    let environment = match environment() {
        Ok(environment) => environment,
        Err(reason) => return Ok(Verdict::Skipped(format!("{reason:#}"))),
    };
    build_wheel(&environment, "wheel", output)?;
    Ok(Verdict::Passed(String::new()))
}

/// The tests of the package.
pub fn tests() -> PathBuf {
    package().join("tests")
}

fn build_wheel(environment: &Path, profile: &str, output: &Path) -> Result<()> {
    let mut maturin = tool(environment, "maturin");
    maturin.args(["build", "--quiet", "--profile", profile, "--compatibility", "linux", "--out"]).arg(output);
    run(maturin.current_dir(package()))
}

/// A wheel of the development profile, which has compiled nearly all of it by now, and its tests. Whether pytest is
/// content.
fn build_and_test(environment: &Path) -> Result<(bool, Counts)> {
    let wheels = target()?.join("wheels");
    if wheels.exists() {
        fs::remove_dir_all(&wheels)?;
    }
    build_wheel(environment, "dev", &wheels)?;
    let mut pip = tool(environment, "python");
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--force-reinstall"]);
    run(pip.args(fs::read_dir(&wheels)?.map(|wheel| Ok(wheel?.path())).collect::<io::Result<Vec<_>>>()?))?;

    let mut pytest = tool(environment, "python");
    // From elsewhere, so that the package that is imported is the one that is installed.
    pytest.args(["-m", "pytest", "-q", "-p", "no:cacheprovider", "--override-ini=addopts=", "--durations=5"]);
    pytest.arg(tests()).current_dir(target()?).stdout(Stdio::piped());
    println!("$ {}", workspace::typed(&pytest));
    let mut child = pytest.spawn()?;
    let counts = count(BufReader::new(child.stdout.take().context("it is piped")?), io::stdout().lock())?;
    Ok((child.wait()?.success(), counts))
}

fn package() -> PathBuf {
    workspace::root().join("python")
}

/// Where the environment and the wheel are.
fn target() -> Result<PathBuf> {
    let target = workspace::target().join("python");
    fs::create_dir_all(&target)?;
    Ok(target)
}

/// A program of the environment, in which it is at home.
fn tool(environment: &Path, name: &str) -> Command {
    let mut command = Command::new(environment.join("bin").join(name));
    command.env("VIRTUAL_ENV", environment).env_remove("PYTHONPATH").env_remove("PYTHONHOME");
    command
}

fn run(command: &mut Command) -> Result<()> {
    println!("$ {}", workspace::typed(command));
    let status = command.status().with_context(|| workspace::typed(command))?;
    ensure!(status.success(), "{}: {status}", workspace::typed(command));
    Ok(())
}

/// Passes on what pytest prints, and reads its last line: `2 failed, 34 passed, 31 skipped in 50.73s`.
fn count(output: impl BufRead, mut shown: impl Write) -> io::Result<Counts> {
    let mut counts = Counts::default();
    for line in output.lines() {
        let line = line?;
        writeln!(shown, "{line}")?;
        if let Some(found) = summary(&line) {
            counts = found;
        }
    }
    Ok(counts)
}

/// The counts of a closing line of pytest's, if it is one.
fn summary(line: &str) -> Option<Counts> {
    let (counted, seconds) = line.trim_matches(['=', ' ']).rsplit_once(" in ")?;
    seconds.split(' ').next()?.strip_suffix('s')?.parse::<f64>().ok()?;
    let mut counts = Counts::default();
    for part in counted.split(", ") {
        let (number, outcome) = part.split_once(' ')?;
        let number: usize = number.parse().ok()?;
        match outcome {
            "passed" => counts.passed += number,
            "failed" | "error" | "errors" => counts.failed += number,
            "skipped" | "xfailed" | "deselected" => counts.skipped += number,
            "warning" | "warnings" => (),
            _ => return None,
        }
    }
    Some(counts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pytest_is_counted_by_its_last_line() {
        let output = "..F.s  [100%]\nFAILED a.py::b - 3 passed in spirit\n\
            2 failed, 34 passed, 31 skipped, 1 warning in 50.73s (0:00:50)\n";
        let mut shown = Vec::new();
        let counts = count(output.as_bytes(), &mut shown).expect("readable");
        assert_eq!(counts, Counts { passed: 34, failed: 2, skipped: 31 });
        assert_eq!(shown, output.as_bytes());
        assert_eq!(count("1 error in 0.10s\n".as_bytes(), Vec::new()).expect("readable").failed, 1);
        assert_eq!(count("no tests ran in 0.10s\n".as_bytes(), Vec::new()).expect("readable"), Counts::default());
    }
}
