//! Which kernels run a backward pass.
use cuda_std::{DType, Global, Kernel as EntryPoint};
use kernels::Config;
use kernels::attention::Untyped;
use kernels::flash2_backward::{BIAS, KEYS_AND_VALUES, Params, QUERIES, ROW_SUMS, SINKS, WIDE_KEYS_AND_VALUES};

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::families::{Table, Wanted};
use crate::features::Feature;
use crate::inputs::GradientOutputs;
use crate::launch::{Launch, Workspace};
use crate::options::Kernel;
use crate::problem::Problem;

/// The gradients that not every backward pass has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Optional {
    /// Of the bias.
    pub dbias: bool,
    /// Of the sinks.
    pub dsinks: bool,
}

impl Optional {
    /// Those that are to be written.
    pub fn of<X>(gradients: &GradientOutputs<X>) -> Self {
        Optional { dbias: gradients.dbias.is_some(), dsinks: gradients.dsinks.is_some() }
    }
}

/// FlashAttention-2's backward kernels for one problem, in the order in which they run: the only family that has any.
#[derive(Clone, Debug)]
pub(crate) struct BackwardPlan {
    steps: Vec<Step>,
    /// Why these.
    pub reason: &'static str,
    /// The memory that they need besides the inputs and the gradients.
    pub workspace: Vec<Workspace>,
}

/// One launch.
#[derive(Clone, Copy, Debug)]
struct Step {
    kernel: &'static EntryPoint<Params, Config>,
    grid: Grid,
}

/// What each block of threads owns.
#[derive(Clone, Copy, Debug)]
enum Grid {
    /// `block_m` rows of S, whatever their head.
    Rows,
    /// `block_m` queries of a head of Q.
    Queries,
    /// `block_n` keys of a head of K.
    Keys,
    /// `block_n` keys and `block_m` rows of the bias, of one of its heads.
    Bias,
    /// A head of Q, of all sequences.
    Heads,
}

impl BackwardPlan {
    /// The kernels for a problem. `aligned`: whether its tensors are.
    ///
    /// # Errors
    /// [`Error::Unsupported`], with the reason.
    pub fn new(problem: &Problem, optional: Optional, aligned: bool, kernel: Kernel, backend: Backend) -> Result<Self> {
        let unsupported = |reason| Error::Unsupported { kernel, backend, reasons: vec![reason] };
        if let Kernel::Standard | Kernel::Flash1 = kernel {
            return Err(unsupported(format!("{kernel} has no backward pass; allowed: auto, flash2")));
        }
        let wanted = Wanted::new(problem, aligned);
        let steps = Self::flash2(&wanted, optional).map_err(unsupported)?;
        let reason = match kernel {
            Kernel::Auto => "flash2 is the family with a backward pass",
            _ => "flash2 was asked for",
        };
        let row_sums = Workspace { name: "D", dtype: DType::F32, len: problem.rows() as u64 };
        Ok(BackwardPlan { steps, reason, workspace: vec![row_sums] })
    }

    /// The passes that compute each gradient where it is owned: the same bits in every run.
    fn flash2(wanted: &Wanted, optional: Optional) -> Result<Vec<Step>, String> {
        let step = |grid, name, kernels: &[_], plain| {
            let kernel = Table { name, kernels, plain, pads: true }.find(wanted)?;
            Ok::<_, String>(Step { kernel, grid })
        };
        let mut steps = vec![
            step(Grid::Rows, "flash2 backward", &[ROW_SUMS], Feature::WITHOUT_SCORES)?,
            step(Grid::Keys, "flash2 backward", &[KEYS_AND_VALUES, WIDE_KEYS_AND_VALUES], Feature::PLAIN)?,
            step(Grid::Queries, "flash2 backward", &[QUERIES], Feature::PLAIN)?,
        ];
        if optional.dbias {
            steps.push(step(Grid::Bias, "flash2 backward, the gradient of the bias", &[BIAS], Feature::PLAIN)?);
        }
        if optional.dsinks {
            // One kernel for all: it reads the LSE and D, which are f32 whatever Q is.
            steps.extend(SINKS.iter().map(|kernel| Step { kernel, grid: Grid::Heads }));
        }
        Ok(steps)
    }

    /// The name of the family.
    pub fn algorithm(&self) -> &'static str {
        "flash2"
    }

    /// Whether a kernel of scores runs that asks its arguments for all features.
    pub fn is_general(&self) -> bool {
        self.steps
            .iter()
            .any(|Step { kernel, grid }| kernel.config.general && matches!(grid, Grid::Queries | Grid::Keys))
    }

    /// Bytes of memory besides the inputs and the gradients.
    pub fn extra_bytes(&self) -> u64 {
        self.workspace.iter().map(Workspace::bytes).fold(0, u64::saturating_add)
    }

    /// The launches, in order, for tensors and a workspace at these addresses. Where a grid would be empty there is
    /// none: no queries, or no keys.
    pub fn launches(
        &self,
        problem: &Problem,
        parameters: Params,
        workspace: &[Global<Untyped>],
    ) -> Result<Vec<Launch>> {
        let &[row_sums] = workspace else { unreachable!("the workspace is what the plan lists") };
        let parameters = Params { row_sums: row_sums.cast(), ..parameters };
        let launch = |step: &Step| {
            let blocks = step.blocks(problem);
            (blocks > 0).then(|| Launch::new(step.kernel, blocks, parameters))
        };
        self.steps.iter().filter_map(launch).collect()
    }
}

impl Step {
    /// Blocks of its grid.
    fn blocks(&self, problem: &Problem) -> u64 {
        let Config { block_m, block_n, .. } = self.kernel.config;
        let blocks = |extent: usize, of: u32| (extent as u64).div_ceil(u64::from(of));
        let product = |factors: [usize; 2], blocks: u64| {
            factors.into_iter().fold(blocks, |product, factor| product.saturating_mul(factor as u64))
        };
        let Problem { batch, seqlen_q, seqlen_k, nheads, nheads_k, .. } = *problem;
        match self.grid {
            Grid::Rows => blocks(problem.rows(), block_m),
            Grid::Queries => product([nheads, batch], blocks(seqlen_q, block_m)),
            Grid::Keys => product([nheads_k, batch], blocks(seqlen_k, block_n)),
            Grid::Bias => {
                let [batch, heads, rows, keys] = problem.bias.unwrap_or_default();
                let row_blocks = if rows == 1 { 1 } else { blocks(rows, block_m) };
                product([heads, batch], blocks(keys, block_n).saturating_mul(row_blocks))
            }
            Grid::Heads => nheads as u64,
        }
    }
}
