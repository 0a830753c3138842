//! Which kernels run a backward pass.
use cuda_std::{DType, Global, Kernel as EntryPoint};
use kernels::Config;
use kernels::attention::Untyped;
use kernels::flash2_backward::{BIAS, KEYS_AND_VALUES, Params, QUERIES, ROW_SUMS, SINKS, WIDE_KEYS_AND_VALUES, fused};

use crate::backend::Backend;
use crate::error::{Error, Result};
use crate::families::{Table, Wanted};
use crate::features::Feature;
use crate::inputs::GradientOutputs;
use crate::launch::{Launch, Workspace};
use crate::options::Kernel;
use crate::parameters::Access;
use crate::problem::Problem;
use crate::target::Resources;

/// What kernels work in.
const ROW_SUMS_OF: &str = "D";
const STATISTICS: &str = "LSE and D";
const D_Q_SUMS: &str = "dQ";

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
    /// The same in less shared memory, for machines that do not have as much as the steps take.
    leaner: Option<Vec<Step>>,
    /// Why these.
    pub reason: String,
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
        if let Kernel::Standard | Kernel::Flash1 | Kernel::Flash3 = kernel {
            return Err(unsupported(format!("{kernel} has no backward pass; allowed: auto, flash2")));
        }
        let wanted = Wanted::new(problem, Access { aligned, mapped: false });
        let family = match kernel {
            Kernel::Auto => "flash2 is the family with a backward pass",
            _ => "flash2 was asked for",
        };
        if !problem.deterministic
            && let Ok(pass) = Self::fused_pass(&wanted)
        {
            let same = |other: &&EntryPoint<Params, Config>| {
                let key = |config: Config| (config.dtype, config.headdim, config.causal);
                key(other.config) == key(pass.config) && other.config.shared_bytes < pass.config.shared_bytes
            };
            let leaner = fused::SPLIT.iter().find(same);
            return Ok(BackwardPlan {
                steps: Self::fused(pass, &wanted, optional).map_err(unsupported)?,
                leaner: leaner.map(|pass| Self::fused(pass, &wanted, optional)).transpose().map_err(unsupported)?,
                reason: format!("{family}; fused: dQ is summed by atomic additions, unless deterministic forbids it"),
                workspace: Self::fused_workspace(problem, pass.config.headdim, optional),
            });
        }
        let steps = Self::apart(&wanted, optional).map_err(unsupported)?;
        let why =
            if problem.deterministic { "deterministic asks for it" } else { "no fused kernel can run this problem" };
        let reason = format!("{family}; each gradient is computed where it is owned: {why}");
        let row_sums = Workspace { name: ROW_SUMS_OF, dtype: DType::F32, len: problem.rows() as u64 };
        Ok(BackwardPlan { steps, leaner: None, reason, workspace: vec![row_sums] })
    }

    /// The passes that compute each gradient where it is owned: the same bits in every run.
    fn apart(wanted: &Wanted, optional: Optional) -> Result<Vec<Step>, String> {
        let name = "flash2 backward";
        let of_keys = found(name, &[KEYS_AND_VALUES, WIDE_KEYS_AND_VALUES], wanted)?;
        let mut steps = vec![
            Step { kernel: found(name, &[ROW_SUMS], wanted)?, grid: Grid::Rows },
            Step { kernel: of_keys, grid: Grid::Keys },
            Step { kernel: found(name, &[QUERIES], wanted)?, grid: Grid::Queries },
        ];
        if optional.dbias {
            let kernel = found("flash2 backward, the gradient of the bias", &[BIAS], wanted)?;
            steps.push(Step { kernel, grid: Grid::Bias });
        }
        steps.extend(optional.dsinks.then_some(OF_SINKS));
        Ok(steps)
    }

    /// The pass that computes S and dP once.
    fn fused_pass(wanted: &Wanted) -> Result<&'static EntryPoint<Params, Config>, String> {
        let name = "flash2 backward, fused";
        found(name, &[fused::WHOLE, fused::SPLIT], wanted)
    }

    /// That pass with what goes before and after it. A problem with a gradient of the bias has none.
    fn fused(
        pass: &'static EntryPoint<Params, Config>,
        wanted: &Wanted,
        optional: Optional,
    ) -> Result<Vec<Step>, String> {
        let Config { headdim, block_m, .. } = pass.config;
        let finish = fused::FINISH.iter().find(|EntryPoint { config, .. }| {
            (config.dtype, config.headdim, config.block_m) == (pass.config.dtype, headdim, block_m)
        });
        let mut steps = vec![
            Step { kernel: found("flash2 backward, fused", &[fused::PREPARE], wanted)?, grid: Grid::Queries },
            Step { kernel: pass, grid: Grid::Keys },
            Step { kernel: finish.ok_or("flash2 backward, fused: no end")?, grid: Grid::Queries },
        ];
        steps.extend(optional.dsinks.then_some(OF_SINKS));
        Ok(steps)
    }

    /// What they work in, with heads of so many elements.
    fn fused_workspace(problem: &Problem, headdim: u32, optional: Optional) -> Vec<Workspace> {
        let tokens = problem.varlen.as_ref().map(|varlen| varlen.total_q as u64);
        let of_head = fused::places(problem.batch as u64, problem.seqlen_q as u64, tokens);
        let places = of_head.saturating_mul(problem.nheads as u64);
        let of = |name, len| Workspace { name, dtype: DType::F32, len };
        let mut workspace =
            vec![of(STATISTICS, places.saturating_mul(2)), of(D_Q_SUMS, places.saturating_mul(u64::from(headdim)))];
        workspace.extend(optional.dsinks.then(|| of(ROW_SUMS_OF, problem.rows() as u64)));
        workspace
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

    /// The launches, in order, for tensors and a workspace at these addresses of a machine. Where a grid would be empty
    /// there is none: no queries, or no keys.
    pub fn launches(
        &self,
        problem: &Problem,
        mut parameters: Params,
        workspace: &[Global<Untyped>],
        machine: &Resources,
    ) -> Result<Vec<Launch>> {
        for (part, address) in self.workspace.iter().zip(workspace) {
            let of_part = match part.name {
                ROW_SUMS_OF => &mut parameters.row_sums,
                STATISTICS => &mut parameters.statistics,
                D_Q_SUMS => &mut parameters.d_q_sums,
                name => unreachable!("{name} is part of no plan"),
            };
            *of_part = address.cast();
        }
        let launch = |step: &Step| {
            let blocks = step.blocks(problem);
            (blocks > 0).then(|| Launch::new(step.kernel, blocks, parameters))
        };
        self.steps_in(machine.shared_memory).iter().filter_map(launch).collect()
    }

    /// The kernels on a machine with so many bytes of shared memory a block, in the order in which they run.
    pub fn kernels(&self, shared_memory: u32) -> Vec<(&'static str, Config)> {
        self.steps_in(shared_memory).iter().map(|Step { kernel, .. }| (kernel.name, kernel.config)).collect()
    }

    fn steps_in(&self, shared_memory: u32) -> &[Step] {
        let fits = |step: &Step| step.kernel.config.shared_bytes <= shared_memory;
        self.leaner.as_ref().filter(|_| !self.steps.iter().all(fits)).unwrap_or(&self.steps)
    }
}

/// The gradient of the sinks. Its kernel is for everything.
const OF_SINKS: Step = Step { kernel: &SINKS[0], grid: Grid::Heads };

/// That of them which suits a problem best, or what stands against all of them.
fn found(
    name: &'static str,
    kernels: &[&'static [EntryPoint<Params, Config>]],
    wanted: &Wanted,
) -> Result<&'static EntryPoint<Params, Config>, String> {
    Table { name, kernels, plain: Feature::PLAIN, pads: true }.find(wanted)
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
