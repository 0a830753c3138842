//! Everything that CI runs.
use crate::libtest::{self, Counts};
use crate::verdict::Verdict;
use crate::{build_ptx, python, workspace};
use anyhow::Result;
use clap::Args;
use std::io::{self, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// Run all that CI runs: formatting, lints, documentation, tests, and the kernels' PTX against their sources.
///
/// A step that fails does not keep the others from running. The last line counts tests, and each other step as one. How long each
/// step took stands beside it; of tests that take longer than they should, there is a warning.
#[derive(Args)]
pub struct Options {
    /// Fewer random cases, no documentation, no Python, no rebuild of the PTX
    #[arg(long)]
    quick: bool,
}

struct Step {
    name: &'static str,
    verdict: Verdict,
    counts: Counts,
    took: Duration,
}

/// What the tests of the workspace may take on a machine with two cores, with what it takes to compile them. More is no failure, as
/// there are slower machines.
const TESTS_MAY_TAKE: Duration = Duration::from_secs(20 * 60);
/// The step that is bounded so.
const TESTS: &str = "tests";

/// Runs the command.
pub fn run(options: &Options) -> Result<ExitCode> {
    let quick = |what: &str| Verdict::Skipped(format!("--quick: no {what}"));
    let mut steps = vec![
        step("formatting", || succeeds(workspace::cargo().args(["fmt", "--all", "--check"]))),
        step("lints", || {
            let lints = ["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"];
            succeeds(workspace::cargo().args(lints))
        }),
        step("documentation", || {
            if options.quick {
                return quick("documentation");
            }
            let mut doc = workspace::cargo();
            succeeds(doc.args(["doc", "--workspace", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings"))
        }),
        tests(options.quick),
        python(options.quick),
    ];
    steps.extend(match build_ptx::archs(None) {
        Ok(archs) => vec![
            step("PTX", || build_ptx::check(&archs)),
            step("PTX rebuild", || if options.quick { quick("rebuild") } else { build_ptx::rebuild(&archs) }),
        ],
        Err(error) => vec![step("PTX", || Verdict::Failed(format!("{error:#}")))],
    });
    Ok(summary(&steps))
}

fn step(name: &'static str, run: impl FnOnce() -> Verdict) -> Step {
    println!("\n== {name}");
    let start = Instant::now();
    let verdict = run();
    let took = start.elapsed();
    let one = |is| usize::from(is);
    let counts = Counts {
        passed: one(matches!(verdict, Verdict::Passed(_))),
        failed: one(verdict.is_failure()),
        skipped: one(matches!(verdict, Verdict::Skipped(_))),
    };
    println!("{name}: {verdict}");
    Step { name, verdict, counts, took }
}

/// `cargo test`, whose tests are counted one by one.
fn tests(quick: bool) -> Step {
    let mut counts = Counts::default();
    let step = step(TESTS, || {
        let mut command = workspace::cargo();
        command.args(["test", "--workspace", "--no-fail-fast", "--", "--show-output"]).stdout(Stdio::piped());
        if quick {
            command.env("PROPTEST_CASES", "8");
        }
        println!("$ {}", workspace::typed(&command));
        let mut run = || -> io::Result<bool> {
            let mut child = command.spawn()?;
            counts = libtest::count(BufReader::new(child.stdout.take().expect("it is piped")), io::stdout().lock())?;
            Ok(child.wait()?.success())
        };
        match run() {
            Ok(true) => Verdict::Passed(counts.to_string()),
            Ok(false) => Verdict::Failed(counts.to_string()),
            Err(error) => Verdict::Failed(format!("{error}: {counts}")),
        }
    });
    counted(step, counts)
}

/// The Python package's tests, which pytest counts.
fn python(quick: bool) -> Step {
    let mut counts = Counts::default();
    let step = step("Python", || {
        if quick {
            return Verdict::Skipped("--quick: no Python".to_owned());
        }
        let (verdict, counted) = python::test();
        counts = counted;
        verdict
    });
    if matches!(step.verdict, Verdict::Skipped(_)) { step } else { counted(step, counts) }
}

/// A step whose tests were counted.
fn counted(step: Step, mut counts: Counts) -> Step {
    // It did not compile, or a test took its whole process down.
    if step.verdict.is_failure() && counts.failed == 0 {
        counts.failed = 1;
    }
    Step { counts, ..step }
}

/// Prints and runs a command.
fn succeeds(command: &mut Command) -> Verdict {
    println!("$ {}", workspace::typed(command));
    match command.status() {
        Ok(status) if status.success() => Verdict::Passed(String::new()),
        Ok(status) => Verdict::Failed(status.to_string()),
        Err(error) => Verdict::Failed(error.to_string()),
    }
}

fn summary(steps: &[Step]) -> ExitCode {
    println!("\n== summary");
    let mut total = Counts::default();
    for Step { name, verdict, counts, took } in steps {
        println!("{:<8} {:>8}  {name}", verdict.word(), in_words(*took));
        total += *counts;
    }
    println!("{:<8} {:>8}", "in all", in_words(steps.iter().map(|step| step.took).sum()));
    steps.iter().filter_map(warning).for_each(|warning| println!("{warning}"));
    println!("{total}");
    if total.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What is to be said of a step that took too long.
fn warning(&Step { name, took, .. }: &Step) -> Option<String> {
    let (took, most) = (in_words(took), (name == TESTS && took > TESTS_MAY_TAKE).then(|| in_words(TESTS_MAY_TAKE))?);
    Some(format!("warning: {name} took {took}; they are to take at most {most} on a machine with two cores"))
}

/// `4:05`: minutes and seconds.
fn in_words(duration: Duration) -> String {
    let seconds = duration.as_secs_f64().round() as u64;
    format!("{}:{:02}", seconds / 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_that_take_long_are_warned_of() {
        let of = |name, seconds| {
            let (verdict, counts) = (Verdict::Passed(String::new()), Counts::default());
            warning(&Step { name, verdict, counts, took: Duration::from_secs(seconds) })
        };
        assert_eq!((of(TESTS, 1200), of("PTX rebuild", 5000)), (None, None));
        let expected = "warning: tests took 21:05; they are to take at most 20:00 on a machine with two cores";
        assert_eq!(of(TESTS, 1265).as_deref(), Some(expected));
    }
}
