//! The three algorithms, run on the simulator.
use crate::cli::inputs;
use anyhow::{Context, Result};
use ferroflash::traffic::{self, Step};
use ferroflash::{AttentionOptions, DType, Kernel, Problem, Session};

/// The algorithms, in the order of their invention.
pub const ALGORITHMS: [Kernel; 3] = [Kernel::Standard, Kernel::Flash1, Kernel::Flash2];

/// All that `explain` shows.
pub struct Comparison {
    /// Each algorithm at the one length that is shown in detail.
    pub detail: [Run; 3],
    /// Each algorithm at each length.
    pub growth: Vec<[Run; 3]>,
}

impl Comparison {
    /// All runs.
    pub fn runs(&self) -> impl Iterator<Item = &Run> {
        self.growth.iter().flatten().chain(&self.detail)
    }
}

/// One algorithm on one problem.
pub struct Run {
    pub kernel: Kernel,
    pub problem: Problem,
    /// What moved, as the simulator counted.
    pub steps: Vec<Step>,
    /// What moves, as the formula says.
    pub formula: Vec<Step>,
    /// Memory besides Q, K, V and O.
    pub extra_bytes: u64,
    /// SRAM that a block of the (largest) kernel takes, in elements of Q: the M of the paper.
    pub sram_elements: u64,
}

impl Run {
    pub fn name(&self) -> &'static str {
        self.kernel.name()
    }

    /// All bytes that moved.
    pub fn bytes(&self) -> u64 {
        traffic::total(&self.steps)
    }

    /// The leading term of the paper's count, in bytes: what stands in Θ, times the bytes of an element.
    pub fn paper_bytes(&self) -> f64 {
        let (n, d) = (self.problem.seqlen_q as f64, self.problem.headdim as f64);
        let elements = match self.kernel {
            Kernel::Standard => n * d + n * n,
            _ => n * n * d * d / self.sram_elements as f64,
        };
        elements * self.problem.dtype.bytes() as f64
    }
}

/// Runs each algorithm on one head of `seqlen` tokens, and of each of `lengths`.
pub fn measure(session: &Session, seqlen: usize, headdim: usize, lengths: &[u32]) -> Result<Comparison> {
    let all = |seqlen| {
        let [standard, flash1, flash2] = ALGORITHMS.map(|kernel| run(session, kernel, seqlen, headdim));
        Ok([standard?, flash1?, flash2?])
    };
    let growth = lengths.iter().map(|&length| all(length as usize)).collect::<Result<_>>()?;
    Ok(Comparison { detail: all(seqlen)?, growth })
}

fn run(session: &Session, kernel: Kernel, seqlen: usize, headdim: usize) -> Result<Run> {
    let tensor = |seed| inputs::normal(&[1, seqlen, 1, headdim], DType::F16, seed);
    let (q, k, v) = (tensor(1)?, tensor(2)?, tensor(3)?);
    let options = AttentionOptions::default();
    let report = session.clone().kernel(kernel).attention(&q, &k, &v, &options)?.report;
    let problem = Problem::new(q.view().layout(), k.view().layout(), v.view().layout(), &options)?;
    let steps = traffic::counted(&report).context("the simulator has counted nothing")?;
    let formula = traffic::formula(kernel, &problem).context("this kernel has no formula")?;
    let sram_bytes = report.launches.iter().map(|launch| launch.shared_bytes as u64).max().unwrap_or(0);
    let sram_elements = sram_bytes / problem.dtype.bytes() as u64;
    Ok(Run { kernel, problem, steps, formula, extra_bytes: report.extra_bytes, sram_elements })
}
