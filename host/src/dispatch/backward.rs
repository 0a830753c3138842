//! Which kernels run a backward pass.
use std::fmt;

use cuda_std::{DType, Global, Kernel as EntryPoint};
use kernels::Config;
use kernels::attention::Untyped;
use kernels::flash2_backward::{BIAS, KEYS_AND_VALUES, Params, QUERIES, ROW_SUMS, SINKS, WIDE_KEYS_AND_VALUES, fused};
use kernels::flash3_backward as flash3;

use super::{FamilyFor, first_able, why};
use crate::error::{Error, Result};
use crate::families::hopper::backward::{Sums, Together, Turns};
use crate::families::hopper::shares::{self, Sharing};
use crate::families::{Table, Wanted, hopper};
use crate::features::Feature;
use crate::inputs::GradientOutputs;
use crate::launch::{Launch, Workspace};
use crate::options::Kernel;
use crate::parameters::Access;
use crate::problem::Problem;
use crate::target::{Resources, Target};

/// What kernels work in.
const ROW_SUMS_OF: &str = "D";
const STATISTICS: &str = "LSE and D";
const D_Q_SUMS: &str = "dQ";
const COUNTERS: &str = "counters";

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

/// The backward kernels for one problem, in the order in which they run.
#[derive(Clone, Debug)]
pub(crate) struct BackwardPlan {
    passes: Passes,
    asked: Kernel,
    /// What stands against newer families, each with its name.
    pub refused: Vec<String>,
}

/// What one family does.
#[derive(Clone, Debug)]
struct Passes {
    family: &'static str,
    steps: Vec<Step>,
    /// How the gradients are summed, and why so.
    how: String,
    workspace: Vec<Workspace>,
    /// How blocks of keys meet at the sums of dQ.
    sums: Sums,
    /// Which blocks of keys are shared.
    sharing: Option<Sharing>,
}

/// One launch.
#[derive(Clone, Copy, Debug)]
struct Step {
    kernel: Entry,
    grid: Grid,
}

/// The entry point of a step.
#[derive(Clone, Copy)]
enum Entry {
    /// It takes addresses.
    Plain(&'static EntryPoint<Params, Config>),
    /// It takes tensor maps too.
    Mapped(&'static EntryPoint<flash3::Params, Config>),
}

impl Entry {
    fn name(self) -> &'static str {
        match self {
            Entry::Plain(kernel) => kernel.name,
            Entry::Mapped(kernel) => kernel.name,
        }
    }

    fn config(self) -> Config {
        match self {
            Entry::Plain(kernel) => kernel.config,
            Entry::Mapped(kernel) => kernel.config,
        }
    }

    /// Blocks of threads that share the rows and keys of as many.
    fn cluster(self) -> u32 {
        match self {
            Entry::Plain(kernel) => kernel.cluster,
            Entry::Mapped(kernel) => kernel.cluster,
        }
    }
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
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
    /// The same, or a share of their queries: so many in all.
    SharedKeys(u64),
    /// All keys of a head of K.
    KeyHeads,
    /// `block_m` queries of a head of Q, of the last heads of a ring, which have so many.
    LastQueries(u64),
    /// `block_n` keys and `block_m` rows of the bias, of one of its heads.
    Bias,
    /// A head of Q, of all sequences.
    Heads,
}

impl BackwardPlan {
    /// The kernels for a problem, whose tensors may be accessed so, on a machine: those of the family that is asked for, or
    /// with [`Kernel::Auto`] of the newest that can.
    ///
    /// # Errors
    /// [`Error::Unsupported`], with the reason of each family.
    pub fn new(problem: &Problem, optional: Optional, access: Access, kernel: Kernel, target: Target) -> Result<Self> {
        let unsupported = |reasons| Error::Unsupported { kernel, backend: target.backend, reasons };
        let wanted = Wanted::new(problem, access, target);
        let flash3 = || {
            target
                .allow_hopper(kernel)
                .and_then(|()| Passes::flash3(&wanted))
                .map(|passes| passes.with(optional, problem))
        };
        let flash2 = || Passes::flash2(&wanted, optional);
        let families: &[FamilyFor<Passes>] = match kernel {
            Kernel::Auto => &[&flash3, &flash2],
            Kernel::Flash3 => &[&flash3],
            Kernel::Flash2 => &[&flash2],
            Kernel::Flash1 | Kernel::Standard => {
                let reason = format!("{kernel} has no backward pass; allowed: auto, flash2, flash3");
                return Err(unsupported(vec![reason]));
            }
        };
        let (passes, refused) = first_able(families).map_err(unsupported)?;
        Ok(BackwardPlan { passes, asked: kernel, refused })
    }

    /// The name of the family.
    pub fn algorithm(&self) -> &'static str {
        self.passes.family
    }

    /// Why these.
    pub fn reason(&self) -> String {
        format!("{}; {}", why(self.passes.family, self.asked, &self.refused), self.passes.how)
    }

    /// The memory that they need besides the inputs and the gradients.
    pub fn workspace(&self) -> &[Workspace] {
        &self.passes.workspace
    }

    /// Whether its kernels are for Hopper alone.
    pub fn is_for_hopper(&self) -> bool {
        self.passes.steps.iter().any(|step| matches!(step.kernel, Entry::Mapped(_)))
    }

    /// Whether a kernel of scores runs that asks its arguments for all features.
    pub fn is_general(&self) -> bool {
        self.passes
            .steps
            .iter()
            .any(|Step { kernel, grid }| kernel.config().general && matches!(grid, Grid::Queries | Grid::Keys))
    }

    /// Whether S and dP are computed twice, for gradients that are each computed where they are owned.
    pub fn is_apart(&self) -> bool {
        self.passes.steps.iter().any(|step| step.kernel.config().family == "flash2.keys_and_values")
    }

    /// Bytes of memory besides the inputs and the gradients.
    pub fn extra_bytes(&self) -> u64 {
        self.workspace().iter().map(Workspace::bytes).fold(0, u64::saturating_add)
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
        let (mut counters, mut left, mut counters_of_shares) = (Global::NULL, Global::NULL, Global::NULL);
        for (part, address) in self.workspace().iter().zip(workspace) {
            match part.name {
                ROW_SUMS_OF => parameters.row_sums = address.cast(),
                STATISTICS => parameters.statistics = address.cast(),
                D_Q_SUMS => parameters.d_q_sums = address.cast(),
                COUNTERS => counters = address.cast(),
                shares::LEFT => left = *address,
                shares::COUNTERS => counters_of_shares = *address,
                name => unreachable!("{name} is part of no plan"),
            }
        }
        let Passes { sums, sharing, .. } = self.passes;
        let shares = sharing.map_or(flash3::Shares::NONE, |sharing| sharing.shares(left, counters_of_shares));
        let together = Together { sums, counters, shares };
        let launch = |step: &Step| {
            let blocks = step.blocks(problem);
            (blocks > 0).then(|| match step.kernel {
                Entry::Plain(kernel) => Launch::new(kernel, blocks, parameters),
                Entry::Mapped(kernel) => {
                    hopper::backward::launch(kernel, blocks, problem, parameters, together, machine)
                }
            })
        };
        self.passes.steps.iter().filter_map(launch).collect()
    }

    /// The kernels, in the order in which they run.
    pub fn kernels(&self) -> Vec<(&'static str, Config)> {
        self.passes.steps.iter().map(|Step { kernel, .. }| (kernel.name(), kernel.config())).collect()
    }

    /// The shared memory that they need, in bytes a block.
    pub fn shared_bytes(&self) -> u32 {
        self.passes.steps.iter().map(|step| step.kernel.config().shared_bytes).max().unwrap_or(0)
    }
}

impl Passes {
    /// FlashAttention-3's. The gradients that not every pass has are of what it does not know.
    fn flash3(wanted: &Wanted) -> Result<Self, String> {
        let name = "flash3 backward";
        let (plain, general) = (Feature::OF_HOPPER_BACKWARD, Feature::OF_GENERAL_HOPPER_BACKWARD);
        let find = |kernels: &[&'static [_]]| Table { name, kernels, plain, general, pads: true }.find(wanted);
        let pass = find(&[flash3::WHOLE, flash3::SPLIT, flash3::GENERAL, flash3::GENERAL_SPLIT])?;
        let is_deterministic = wanted.problem.deterministic;
        // In a batch of sequences that are not equally long, order alone is independent of the longest.
        let may_be_whole = !is_deterministic || wanted.problem.varlen.is_none();
        let heads = find(&[flash3::HEADS]).ok();
        let heads = heads.filter(|_| may_be_whole && hopper::backward::takes_whole_heads(wanted.problem, &pass.config));
        let is_ordered = !pass.config.general && hopper::backward::is_fast_in_order(wanted.problem, &pass.config);
        if let Some(heads) = heads
            && !is_ordered
            && wanted.problem.seqlen_k <= hopper::backward::HEADS_RATHER_THAN_RINGS_UP_TO
        {
            return Self::flash3_heads(wanted.problem, heads);
        }
        if is_deterministic || is_ordered {
            return Self::flash3_ordered(wanted, is_ordered);
        }
        if let Ok(pass) = find(&[flash3::RING])
            && let Some(turns) = hopper::backward::ring(wanted.problem, &pass.config)
        {
            return Self::flash3_ring(wanted.problem, pass, turns);
        }
        if let Some(heads) = heads {
            return Self::flash3_heads(wanted.problem, heads);
        }
        let (of_keys, sharing) = shared(wanted.problem, pass, &[flash3::SHARED, flash3::SHARED_SPLIT]);
        let mut workspace = Self::fused_workspace(wanted.problem, pass.config.headdim, pass.config.block_m);
        workspace.extend(sharing.into_iter().flat_map(Sharing::workspace));
        Ok(Passes {
            family: "flash3",
            steps: vec![
                Step { kernel: Entry::Mapped(in_step(flash3::PREPARE, pass)?), grid: Grid::Queries },
                of_keys,
                Step { kernel: Entry::Plain(in_step(flash3::FINISH, pass)?), grid: Grid::Queries },
            ],
            how: with_shares(FUSED, sharing),
            workspace,
            sums: Sums::AsTheyCome,
            sharing,
        })
    }

    /// These, and the gradient of the sinks, if that is asked for.
    fn with(mut self, optional: Optional, problem: &Problem) -> Self {
        if optional.dsinks {
            self.workspace.push(Workspace { name: ROW_SUMS_OF, dtype: DType::F32, len: problem.rows() as u64 });
            self.steps.push(OF_SINKS);
        }
        self
    }

    /// FlashAttention-3's, whose blocks of keys add to dQ in their order. What goes for a sequence does not depend on those
    /// that it is in a batch with: not on the longest of them either, where they are not equally long. `is_fast`: whether that
    /// is the fastest way, whether or not `deterministic` asks for it.
    fn flash3_ordered(wanted: &Wanted, is_fast: bool) -> Result<Self, String> {
        let problem = wanted.problem;
        let (kernels, known) = (&[flash3::ORDERED, flash3::ORDERED_SPLIT][..], Feature::OF_HOPPER_BACKWARD);
        let table = Table { name: "flash3 backward, in order", kernels, plain: known, general: known, pads: true };
        let pass = table.find_among(wanted, |config| config.from_keys == 0 || problem.varlen.is_none(), |_| true)?;
        let Config { headdim, block_m, .. } = pass.config;
        let mut workspace = Self::fused_workspace(problem, headdim, block_m);
        let counters = hopper::backward::counters_of_order(problem);
        workspace.push(Workspace { name: COUNTERS, dtype: DType::I32, len: counters });
        let mut steps = vec![
            Step { kernel: Entry::Mapped(in_step(flash3::PREPARE_ORDERED, pass)?), grid: Grid::Queries },
            Step { kernel: Entry::Mapped(pass), grid: Grid::Keys },
        ];
        let finishes = hopper::backward::finishes_in_order(problem, &pass.config);
        if !finishes {
            steps.push(Step { kernel: Entry::Plain(in_step(flash3::FINISH, pass)?), grid: Grid::Queries });
        }
        let sums = Sums::InOrder { finishes };
        let how = format!("{ORDERED}; {}", if is_fast { "fastest for many heads of few keys" } else { ASKED_FOR });
        Ok(Passes { family: "flash3", steps, how, workspace, sums, sharing: None })
    }

    /// FlashAttention-3's, by blocks of threads that take whole heads.
    fn flash3_heads(problem: &Problem, pass: &'static EntryPoint<flash3::Params, Config>) -> Result<Self, String> {
        Ok(Passes {
            family: "flash3",
            steps: vec![
                Step { kernel: Entry::Plain(in_step(flash3::PREPARE_HEADS, pass)?), grid: Grid::Queries },
                Step { kernel: Entry::Mapped(pass), grid: Grid::KeyHeads },
            ],
            how: WHOLE_HEADS.to_owned(),
            workspace: Self::fused_workspace(problem, pass.config.headdim, pass.config.block_m),
            sums: Sums::AsTheyCome,
            sharing: None,
        })
    }

    /// FlashAttention-3's, where heads take turns at the sums of dQ.
    fn flash3_ring(
        problem: &Problem,
        pass: &'static EntryPoint<flash3::Params, Config>,
        turns: Turns,
    ) -> Result<Self, String> {
        let Config { headdim, block_m, .. } = pass.config;
        let mut workspace = Self::fused_workspace(problem, headdim, block_m);
        workspace.retain(|part| part.name != D_Q_SUMS);
        let heads = hopper::backward::heads_of_k(problem);
        workspace.push(Workspace { name: D_Q_SUMS, dtype: DType::F32, len: turns.sums });
        workspace.push(Workspace { name: COUNTERS, dtype: DType::I32, len: heads.saturating_mul(2) });
        let mebibytes = (4 * turns.sums) as f64 / f64::from(1 << 20);
        let ring =
            format!("{RING}; those of {} heads of K at a time, {mebibytes:.1} MiB, stay in the L2 cache", turns.heads);
        let (of_keys, sharing) = shared(problem, pass, &[flash3::SHARED_RING]);
        workspace.extend(sharing.into_iter().flat_map(Sharing::workspace));
        Ok(Passes {
            family: "flash3",
            steps: vec![
                Step { kernel: Entry::Mapped(in_step(flash3::PREPARE_RING, pass)?), grid: Grid::Queries },
                of_keys,
                Step {
                    kernel: Entry::Mapped(in_step(flash3::FINISH_RING, pass)?),
                    grid: Grid::LastQueries(turns.left),
                },
            ],
            how: with_shares(&ring, sharing),
            workspace,
            sums: Sums::InRing(turns),
            sharing,
        })
    }

    /// FlashAttention-2's.
    fn flash2(wanted: &Wanted, optional: Optional) -> Result<Self, String> {
        let family = "flash2";
        let problem = wanted.problem;
        let row_sums = Workspace { name: ROW_SUMS_OF, dtype: DType::F32, len: problem.rows() as u64 };
        let fused =
            if problem.deterministic { Err("deterministic asks for it".to_owned()) } else { Self::fused_pass(wanted) };
        Ok(match fused {
            Ok(pass) => {
                let workspace = Self::fused_workspace(problem, pass.config.headdim, fused::ROWS);
                let steps = Self::fused(pass, wanted)?;
                Passes { family, steps, how: FUSED.to_owned(), workspace, sums: Sums::AsTheyCome, sharing: None }
                    .with(optional, problem)
            }
            Err(why) => Passes {
                family,
                steps: Self::apart(wanted, optional)?,
                how: format!("each gradient is computed where it is owned: {why}"),
                workspace: vec![row_sums],
                sums: Sums::AsTheyCome,
                sharing: None,
            },
        })
    }

    /// The passes that compute each gradient where it is owned: the same bits in every run.
    fn apart(wanted: &Wanted, optional: Optional) -> Result<Vec<Step>, String> {
        let name = "flash2 backward";
        let of_keys = found(name, &[KEYS_AND_VALUES, WIDE_KEYS_AND_VALUES], wanted)?;
        let mut steps = vec![
            Step { kernel: Entry::Plain(found(name, &[ROW_SUMS], wanted)?), grid: Grid::Rows },
            Step { kernel: Entry::Plain(of_keys), grid: Grid::Keys },
            Step { kernel: Entry::Plain(found(name, &[QUERIES], wanted)?), grid: Grid::Queries },
        ];
        if optional.dbias {
            let kernel = found("flash2 backward, the gradient of the bias", &[BIAS], wanted)?;
            steps.push(Step { kernel: Entry::Plain(kernel), grid: Grid::Bias });
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
    fn fused(pass: &'static EntryPoint<Params, Config>, wanted: &Wanted) -> Result<Vec<Step>, String> {
        let Config { headdim, block_m, .. } = pass.config;
        let finish = fused::FINISH.iter().find(|EntryPoint { config, .. }| {
            (config.dtype, config.headdim, config.block_m) == (pass.config.dtype, headdim, block_m)
        });
        let prepare = found("flash2 backward, fused", &[fused::PREPARE], wanted)?;
        Ok(vec![
            Step { kernel: Entry::Plain(prepare), grid: Grid::Queries },
            Step { kernel: Entry::Plain(pass), grid: Grid::Keys },
            Step { kernel: Entry::Plain(finish.ok_or("flash2 backward, fused: no end")?), grid: Grid::Queries },
        ])
    }

    /// What a pass that sums dQ works in, with heads of so many elements and statistics in blocks of so many rows.
    fn fused_workspace(problem: &Problem, headdim: u32, rows: u32) -> Vec<Workspace> {
        let tokens = problem.varlen.as_ref().map(|varlen| varlen.total_q as u64);
        let of_head = fused::places_in_blocks(rows, problem.batch as u64, problem.seqlen_q as u64, tokens);
        let places = of_head.saturating_mul(problem.nheads as u64);
        let of = |name, len| Workspace { name, dtype: DType::F32, len };
        vec![of(STATISTICS, places.saturating_mul(2)), of(D_Q_SUMS, places.saturating_mul(u64::from(headdim)))]
    }
}

/// How a pass that computes S and dP once is one.
const FUSED: &str = "fused: dQ is summed by atomic additions, unless deterministic forbids it";

/// How a pass whose blocks of threads take whole heads is one.
const WHOLE_HEADS: &str = "fused, short heads one after the other: dQ is summed in the same order in every run";

/// How a pass whose blocks of keys add to dQ in their order is one.
const ORDERED: &str = "fused: dQ is summed in the order of the keys, the same in every run";

/// Why such a pass, where another would be faster.
const ASKED_FOR: &str = "deterministic asks for it";

/// How a pass whose heads take turns at the sums of dQ is one.
const RING: &str =
    "fused: dQ is summed by atomic additions, unless deterministic forbids it, in sums that heads take turns at";

/// A pass, or that of these tables whose blocks of keys are shared, where there is one and it pays.
fn shared(
    problem: &Problem,
    pass: &'static EntryPoint<flash3::Params, Config>,
    tables: &[&'static [EntryPoint<flash3::Params, Config>]],
) -> (Step, Option<Sharing>) {
    let key = |config: Config| (config.dtype, config.headdim, config.block_m, config.causal);
    let shared = tables.iter().copied().flatten().find(|kernel| key(kernel.config) == key(pass.config));
    match shared.and_then(|kernel| Some((kernel, Sharing::of(problem, kernel)?))) {
        Some((kernel, sharing)) => {
            let blocks = sharing.blocks(kernel.cluster);
            (Step { kernel: Entry::Mapped(kernel), grid: Grid::SharedKeys(blocks) }, Some(sharing))
        }
        None => (Step { kernel: Entry::Mapped(pass), grid: Grid::Keys }, None),
    }
}

/// How a pass is one whose blocks of keys may be shared.
fn with_shares(how: &str, sharing: Option<Sharing>) -> String {
    match sharing {
        None => how.to_owned(),
        Some(Sharing { count, parts, .. }) => {
            format!("{how}; {parts} blocks of threads share the queries of each of {count} blocks of keys")
        }
    }
}

/// The kernel of a table that goes with a pass.
fn in_step<P>(
    kernels: &'static [EntryPoint<P, Config>],
    pass: &'static EntryPoint<flash3::Params, Config>,
) -> Result<&'static EntryPoint<P, Config>, String> {
    let key = |config: Config| (config.dtype, config.headdim, config.block_m);
    let found = kernels.iter().find(|kernel| key(kernel.config) == key(pass.config));
    found.ok_or_else(|| format!("flash3 backward: nothing goes with {}", pass.name))
}

/// The gradient of the sinks. Its kernel is for everything.
const OF_SINKS: Step = Step { kernel: Entry::Plain(&SINKS[0]), grid: Grid::Heads };

/// That of them which suits a problem best, or what stands against all of them.
fn found(
    name: &'static str,
    kernels: &[&'static [EntryPoint<Params, Config>]],
    wanted: &Wanted,
) -> Result<&'static EntryPoint<Params, Config>, String> {
    Table { name, kernels, plain: Feature::PLAIN, general: Feature::ALL, pads: true }.find(wanted)
}

impl Step {
    /// Blocks of its grid.
    fn blocks(&self, problem: &Problem) -> u64 {
        let Config { block_m, block_n, .. } = self.kernel.config();
        let blocks = |extent: usize, of: u32| (extent as u64).div_ceil(u64::from(of));
        let product = |factors: [usize; 2], blocks: u64| {
            factors.into_iter().fold(blocks, |product, factor| product.saturating_mul(factor as u64))
        };
        let Problem { batch, seqlen_q, seqlen_k, nheads, nheads_k, .. } = *problem;
        match self.grid {
            Grid::Rows => blocks(problem.rows(), block_m),
            Grid::Queries => product([nheads, batch], blocks(seqlen_q, block_m)),
            Grid::Keys => {
                let cluster = self.kernel.cluster();
                product([nheads_k, batch], blocks(seqlen_k, block_n * cluster).saturating_mul(u64::from(cluster)))
            }
            Grid::KeyHeads => product([nheads_k, batch], 1),
            Grid::LastQueries(blocks) | Grid::SharedKeys(blocks) => blocks,
            Grid::Bias => {
                let [batch, heads, rows, keys] = problem.bias.unwrap_or_default();
                let row_blocks = if rows == 1 { 1 } else { blocks(rows, block_m) };
                product([heads, batch], blocks(keys, block_n).saturating_mul(row_blocks))
            }
            Grid::Heads => nheads as u64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inputs::Inputs;
    use crate::layout::Layout;
    use crate::options::AttentionOptions;
    use cuda_std::DType;

    /// Many short heads are summed in the order of the keys in any case, and whole heads give the same bits.
    #[test]
    fn short_heads_are_summed_in_order_or_taken_whole() {
        let plan = |batch, seqlen, headdim, deterministic| {
            let x = Layout::contiguous(DType::BF16, &[batch, seqlen, 2048 / headdim, headdim]).expect("small");
            let options = AttentionOptions::new().causal(true).deterministic(deterministic);
            let problem = Problem::new(&x, &x, &x, &options).expect("valid");
            let none = Optional { dbias: false, dsinks: false };
            let plan = BackwardPlan::new(&problem, none, Access::ANY, Kernel::Auto, Target::HOPPER);
            // Whether keys are shared is said after it.
            let how = plan.expect("there are kernels").passes.how;
            how.split(';').next().unwrap_or_default().to_owned()
        };
        for deterministic in [false, true] {
            assert_eq!(plan(32, 512, 64, deterministic), WHOLE_HEADS);
            assert_eq!(plan(32, 512, 128, deterministic), ORDERED);
            assert_eq!(plan(16, 1024, 256, deterministic), ORDERED);
        }
        let both =
            |batch, seqlen, headdim| [false, true].map(|deterministic| plan(batch, seqlen, headdim, deterministic));
        assert_eq!(both(1, 512, 64), [FUSED, ORDERED]);
        assert_eq!(both(1, 512, 128), [FUSED, ORDERED]);
        assert_eq!(both(8, 2048, 128), [RING, ORDERED]);
    }

    /// Neither how many sequences nor how long the others are chooses the kernel of one.
    #[test]
    fn the_order_of_a_sequence_does_not_depend_on_its_batch() {
        let pass = |shape: &[usize], headdim, causal| {
            let x = Layout::contiguous(DType::BF16, &[shape, &[8, headdim]].concat()).expect("small");
            let starts = Layout::contiguous(DType::I32, &[3]).expect("small");
            let options = AttentionOptions::new().causal(causal).deterministic(true).max_seqlens(4096, 4096);
            let mut inputs = Inputs::new(&x, &x, &x);
            (inputs.cu_seqlens_q, inputs.cu_seqlens_k) = match shape {
                [_] => (Some(&starts), Some(&starts)),
                _ => (None, None),
            };
            let problem = Problem::of(&inputs, None, &options).expect("valid");
            let plan = BackwardPlan::new(&problem, Optional::default(), Access::ANY, Kernel::Auto, Target::HOPPER);
            let plan = plan.expect("there are kernels");
            plan.passes.steps[1].kernel.name()
        };
        for batch in [1, 64] {
            assert_eq!(pass(&[batch, 4096], 128, false), "flash3_bwd_ordered_bf16_d128_m80");
            assert_eq!(pass(&[batch, 1024], 128, false), "flash3_bwd_ordered_bf16_d128_m64");
            assert_eq!(pass(&[batch * 4096], 128, false), "flash3_bwd_ordered_bf16_d128_m64");
            assert_eq!(pass(&[batch, 4096], 64, true), "flash3_bwd_ordered_bf16_d64_m128_causal");
            assert_eq!(pass(&[batch, 4096], 256, true), "flash3_bwd_ordered_bf16_d256_m64_causal");
        }
    }

    /// What passes work in, in bytes, by its names.
    fn bytes_of(plan: &BackwardPlan, names: &[&str]) -> u64 {
        plan.workspace().iter().filter(|part| names.contains(&part.name)).map(Workspace::bytes).sum()
    }

    /// The table of the book's page on FlashAttention-3.
    #[test]
    fn the_book_says_how_much_memory_gradients_take() {
        const PAGE: &str = include_str!("../../../docs/src/algorithm/flash3.md");
        let mebibytes = |bytes: u64| format!("{:.2}", bytes as f64 / f64::from(1 << 20));
        let row = |[batch, seqlen, nheads, headdim]: [usize; 4], causal: bool| {
            let plan = |deterministic| {
                let x = Layout::contiguous(DType::BF16, &[batch, seqlen, nheads, headdim]).expect("small");
                let options = AttentionOptions::new().causal(causal).deterministic(deterministic);
                let problem = Problem::new(&x, &x, &x, &options).expect("valid");
                BackwardPlan::new(&problem, Optional::default(), Access::ANY, Kernel::Auto, Target::HOPPER)
            };
            let [plan, ordered] = [false, true].map(|deterministic| plan(deterministic).expect("there are kernels"));
            let of = |names: &[&str]| mebibytes(bytes_of(&plan, names));
            let pass = match plan.passes.sums {
                Sums::InOrder { .. } => "order",
                Sums::InRing(_) => "ring",
                Sums::AsTheyCome if plan.kernels()[1].0.contains("_heads_") => "whole heads",
                Sums::AsTheyCome => "sums",
            };
            let mask = if causal { ", causal" } else { "" };
            let counters = bytes_of(&plan, &[COUNTERS, shares::COUNTERS]);
            format!(
                "| {batch} x {seqlen}, {nheads} heads of {headdim}{mask} | {pass} | {} | {} | {} | {:.1} KiB | {} | {} |",
                of(&[STATISTICS]),
                of(&[D_Q_SUMS]),
                of(&[shares::LEFT]),
                counters as f64 / 1024.0,
                mebibytes(plan.extra_bytes()),
                mebibytes(ordered.extra_bytes())
            )
        };
        let shapes =
            [[1, 16384, 32, 64], [1, 16384, 16, 128], [1, 16384, 8, 256], [8, 2048, 16, 128], [1, 2048, 4, 128]];
        let rows: Vec<_> = shapes.iter().flat_map(|&shape| [false, true].map(|causal| row(shape, causal))).collect();
        let table = rows.join("\n");
        assert!(PAGE.contains(&table), "docs/src/algorithm/flash3.md should have\n{table}");
    }

    /// As the book says: what sums take, and what a block of keys that is shared leaves.
    #[test]
    fn memory_is_what_the_formulas_of_the_book_say() {
        let plan = |[batch, seqlen_q, seqlen_k, nheads, nheads_k, headdim]: [usize; 6], deterministic| {
            let of = |seqlen, heads| Layout::contiguous(DType::BF16, &[batch, seqlen, heads, headdim]).expect("small");
            let (q, k) = (of(seqlen_q, nheads), of(seqlen_k, nheads_k));
            let options = AttentionOptions::new().deterministic(deterministic);
            let problem = Problem::new(&q, &k, &k, &options).expect("valid");
            let plan = BackwardPlan::new(&problem, Optional::default(), Access::ANY, Kernel::Auto, Target::HOPPER);
            plan.expect("there are kernels")
        };
        // 64 rows a block of queries, so 1024 for 1000; and 80, so 1040.
        for (seqlen_k, rows) in [(1000, 1024), (4000, 1040)] {
            let ordered = plan([2, 1000, seqlen_k, 8, 4, 128], true);
            let places = 2 * 8 * rows;
            assert_eq!(bytes_of(&ordered, &[STATISTICS]), 8 * places, "{seqlen_k}");
            assert_eq!(bytes_of(&ordered, &[D_Q_SUMS]), 4 * 128 * places, "{seqlen_k}");
            assert_eq!(bytes_of(&ordered, &[COUNTERS]), 16 * 2 * 4 * (seqlen_k as u64).div_ceil(128), "{seqlen_k}");
        }
        let ring = plan([8, 2048, 2048, 16, 16, 128], false);
        let Sums::InRing(turns) = ring.passes.sums else { panic!("{}", ring.reason()) };
        assert_eq!(bytes_of(&ring, &[D_Q_SUMS]), 4 * 128 * 2048 * u64::from(turns.heads));
        assert_eq!(bytes_of(&ring, &[COUNTERS]), 8 * 8 * 16);
        let shared = plan([1, 2048, 2048, 4, 4, 128], false);
        let Sharing { count, parts, .. } = shared.passes.sharing.expect("shares");
        assert_eq!(bytes_of(&shared, &[shares::LEFT]), 4 * 128 * (128 + 128) * u64::from(count * (parts - 1)));
    }
}
