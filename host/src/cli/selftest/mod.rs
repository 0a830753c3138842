//! `ferroflash selftest`: does it compute right on this machine?
mod features;
mod grid;

use super::answer::{print, print_json};
use super::choices::{BackendArgument, one_of};
use super::units;
use anyhow::{Result, bail, ensure};
use clap::value_parser;
use ferroflash::{Kernel, Session};
use grid::Group;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json};
use std::time::Instant;

/// Compute a grid of shapes, and compare each result with f64 arithmetic
///
/// All kernels, dtypes and head dimensions that the backend has, forward and backward, causal and not, at lengths around
/// the edges of tiles; and each feature besides, from windows to sequences of different lengths. On the simulator the
/// grid is smaller, and the kernels are checked for races and other faults besides.
#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    backend: BackendArgument,
    /// Only a few shapes of each kernel
    #[arg(long)]
    quick: bool,
    /// Only this kernel of a GPU or the simulator; `auto`: all of them
    #[arg(long, default_value = "auto", value_parser = one_of::<Kernel>(Kernel::NAMES))]
    kernel: Kernel,
    /// With the kernels of a GPU whose blocks may have at most so many KiB of shared memory; every GPU has 99
    #[arg(long, value_name = "KIB", value_parser = value_parser!(u32).range(99..=1024))]
    shared_memory: Option<u32>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub fn execute(arguments: Arguments) -> Result<()> {
    let mut session = arguments.backend.session()?;
    if let Some(kibibytes) = arguments.shared_memory {
        session = session.shared_memory(kibibytes << 10);
    }
    let mut groups = grid::groups(session.backend(), &session.kernels(), arguments.quick);
    if arguments.kernel != Kernel::Auto {
        let kernels = session.kernels();
        let names: Vec<_> = [Kernel::Auto].iter().chain(&kernels).map(|kernel| kernel.name()).collect();
        groups.retain(|group| group.kernel == arguments.kernel);
        let (kernel, backend, allowed) = (arguments.kernel, session.backend(), names.join(", "));
        ensure!(!groups.is_empty(), "--kernel: {kernel}; allowed on the {backend} backend: {allowed}");
    }
    let begin = Instant::now();
    if !arguments.json {
        print(format_args!("backend {}, {}\n\n", session.backend(), session.device_name()))?;
    }

    let cases = groups.iter().map(|group| group.cases.len() as u64).sum();
    let style = ProgressStyle::with_template("{msg} [{bar:30}] {pos}/{len}, {elapsed}").expect("a valid template");
    let bar = ProgressBar::new(cases).with_style(style);
    let mut outcomes = Vec::new();
    for group in groups {
        bar.set_message(group.name.clone());
        session = session.kernel(group.kernel);
        let outcome = run(&session, group, &bar);
        if !arguments.json {
            bar.suspend(|| print(&outcome))?;
        }
        outcomes.push(outcome);
    }
    bar.finish_and_clear();

    let passed: usize = outcomes.iter().map(|outcome| outcome.passed).sum();
    let failed: usize = outcomes.iter().map(|outcome| outcome.failures.len()).sum();
    if arguments.json {
        print_json(&json!({
            "backend": session.backend().to_string(),
            "device": session.device_name(),
            "groups": outcomes.iter().map(Outcome::json).collect::<Vec<_>>(),
            "passed": passed,
            "failed": failed,
        }))?;
    } else {
        print(format_args!(
            "\n{passed} passed, {failed} failed in {}\n",
            units::seconds(begin.elapsed().as_secs_f64())
        ))?;
    }
    if failed > 0 {
        bail!("{failed} of {cases} cases failed");
    }
    Ok(())
}

/// What came of a group of cases.
struct Outcome {
    name: String,
    passed: usize,
    /// The largest error among the passed cases, as a part of what is allowed.
    worst: f64,
    /// Each failed case, and why.
    failures: Vec<String>,
}

fn run(session: &Session, group: Group, bar: &ProgressBar) -> Outcome {
    let mut outcome = Outcome { name: group.name, passed: 0, worst: 0.0, failures: Vec::new() };
    for case in &group.cases {
        // An error of one case (the simulator found a race, a launch failed) is the outcome of that case.
        match case.check(session) {
            Ok(part) => {
                outcome.passed += 1;
                outcome.worst = outcome.worst.max(part);
            }
            Err(reason) => outcome.failures.push(format!("{case}: {reason:#}")),
        }
        bar.inc(1);
    }
    outcome
}

impl Outcome {
    fn json(&self) -> Value {
        json!({ "name": self.name, "passed": self.passed, "worst": self.worst, "failures": self.failures })
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Outcome { name, passed, worst, failures } = self;
        let failed = failures.len();
        writeln!(
            f,
            "{name:32} {passed:4} passed {failed:4} failed   worst error {:3.0} % of the allowed",
            worst * 100.0
        )?;
        failures.iter().try_for_each(|failure| writeln!(f, "    {failure}"))
    }
}
