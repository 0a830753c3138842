//! A faulty kernel for each kind of fault, which must be reported with the lines of both sides, and its corrected twin, of
//! which nothing must be reported.
//!
//! A kernel and its twin are one function of a `bool`: whether it is right. Comments at the ends of lines name those that
//! a report must name.
mod arrivals;
mod barriers;
mod blocks;
mod copies;
mod endings;
mod global_memory;
mod shared_memory;
mod warps;

use cuda_std::sim::{Finding, FindingKind, Launch, Memory, Options, Report, launch};

/// The source of a file of tests.
struct Source(&'static str);

impl Source {
    /// Checks that a report says one thing: a fault of this kind, in the line that ends with the comment `at`, with the
    /// other side in that which ends with `other`.
    #[track_caller]
    fn expect(&self, report: &Report, kind: FindingKind, at: &str, other: Option<&str>) {
        let [finding] = &report.findings[..] else { panic!("one finding expected:\n{}", list(report)) };
        assert_eq!(finding.kind, kind, "{finding}");
        assert_eq!(finding.location.line(), self.line(at), "{finding}");
        let other_line = finding.other.map(|other| other.location.line());
        assert_eq!(other_line, other.map(|other| self.line(other)), "{finding}");
    }

    fn line(&self, comment: &str) -> u32 {
        let is_it = |line: &str| line.ends_with(&format!("// {comment}"));
        self.0.lines().position(is_it).expect("a line with this comment") as u32 + 1
    }
}

/// Checks that a report says nothing.
#[track_caller]
fn expect_clean(report: &Report) {
    assert!(report.findings.is_empty(), "{}", list(report));
}

fn list(report: &Report) -> String {
    report.findings.iter().map(Finding::to_string).collect::<Vec<_>>().join("\n")
}

/// Runs one block that has 4 KiB of shared memory.
fn run(threads: u32, kernel: impl Fn() + Sync) -> Report {
    run_blocks(1, threads, &Memory::new(), kernel)
}

/// Runs several, that share global memory. One after the other: which of two blocks that nothing orders comes first, and so
/// what a report says besides, is then the same in every run.
fn run_blocks(blocks: u32, threads: u32, memory: &Memory, kernel: impl Fn() + Sync) -> Report {
    let launch_of = Launch { kernel: "faulty", grid: [blocks, 1, 1], block: [threads, 1, 1], shared_bytes: 4096 };
    launch(&launch_of, memory, &Options { workers: 1, ..Options::default() }, kernel)
}
