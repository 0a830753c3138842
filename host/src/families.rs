//! The kernel families of attention: which problems each runs, with what memory, in which launches.
//!
//! All that the host knows of a family's entry points is here.
use cuda_std::{DType, Global, Kernel};
use kernels::attention::{Attention, Untyped};
use kernels::{Config, flash1, flash2, standard};

use crate::error::Result;
use crate::launch::{Launch, Workspace};
use crate::problem::Problem;

/// The entry points of one family that run a problem.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Family {
    Standard {
        scores: &'static Kernel<standard::Params, Config>,
        probabilities: &'static Kernel<standard::Params, Config>,
        output: &'static Kernel<standard::Params, Config>,
    },
    Flash1(&'static Kernel<flash1::Params, Config>),
    Flash2(&'static Kernel<flash2::Params, Config>),
}

impl Family {
    /// Standard attention for this problem, or why there is none.
    pub fn standard(problem: &Problem) -> Result<Self, String> {
        Ok(Family::Standard {
            scores: find("standard", standard::SCORES, problem)?,
            probabilities: find("standard", standard::PROBABILITIES, problem)?,
            output: find("standard", standard::OUTPUT, problem)?,
        })
    }

    /// FlashAttention for this problem, or why there is none.
    pub fn flash1(problem: &Problem) -> Result<Self, String> {
        find("flash1", flash1::FORWARD, problem).map(Family::Flash1)
    }

    /// FlashAttention-2 for this problem, or why there is none.
    pub fn flash2(problem: &Problem) -> Result<Self, String> {
        find("flash2", flash2::FORWARD, problem).map(Family::Flash2)
    }

    /// Its name in reports.
    pub fn name(&self) -> &'static str {
        match self {
            Family::Standard { .. } => "standard",
            Family::Flash1(_) => "flash1",
            Family::Flash2(_) => "flash2",
        }
    }

    /// The memory that it needs besides Q, K, V, O and LSE.
    pub fn workspace(&self, problem: &Problem) -> Vec<Workspace> {
        let rows = problem.rows() as u64;
        match self {
            Family::Standard { .. } => {
                let len = rows.saturating_mul(u64::from(standard::columns(problem.seqlen_k as u32)));
                ["S", "P"].map(|name| Workspace { name, dtype: problem.dtype, len }).to_vec()
            }
            Family::Flash1(_) => {
                let of = |name, len| Workspace { name, dtype: DType::F32, len };
                vec![of("O", rows * problem.headdim as u64), of("l", rows), of("m", rows)]
            }
            Family::Flash2(_) => Vec::new(),
        }
    }

    /// Its launches, in order, with the workspace at these addresses. None of seqlen_q, seqlen_k and batch is 0.
    pub fn launches(
        &self,
        problem: &Problem,
        attention: Attention,
        workspace: &[Global<Untyped>],
    ) -> Result<Vec<Launch>> {
        let heads = (problem.batch * problem.nheads) as u64;
        let query_blocks = |config: Config| problem.seqlen_q.div_ceil(config.block_m as usize) as u64 * heads;
        match (*self, workspace) {
            (Family::Standard { scores, probabilities, output }, &[s, p]) => {
                let parameters = standard::Params { attention, s, p };
                let key_blocks = problem.seqlen_k.div_ceil(scores.config.block_n as usize) as u64;
                let row_blocks = (problem.rows() as u64).div_ceil(u64::from(probabilities.config.block_m));
                Ok(vec![
                    Launch::new(scores, query_blocks(scores.config).saturating_mul(key_blocks), parameters)?,
                    Launch::new(probabilities, row_blocks, parameters)?,
                    Launch::new(output, query_blocks(output.config), parameters)?,
                ])
            }
            (Family::Flash1(kernel), &[o, l, m]) => {
                let parameters = flash1::Params { attention, o: o.cast(), l: l.cast(), m: m.cast() };
                Ok(vec![Launch::new(kernel, heads, parameters)?])
            }
            (Family::Flash2(kernel), &[]) => {
                Ok(vec![Launch::new(kernel, query_blocks(kernel.config), flash2::Params { attention })?])
            }
            _ => unreachable!("the workspace is what `workspace` lists"),
        }
    }
}

/// The entry point of a table that runs this problem, or what its entries want instead.
pub(crate) fn find<P>(
    family: &str,
    table: &'static [Kernel<P, Config>],
    problem: &Problem,
) -> Result<&'static Kernel<P, Config>, String> {
    let runs_dtype = |config: &Config| config.dtype == problem.dtype;
    let runs_headdim = |config: &Config| config.headdim == 0 || config.headdim as usize == problem.headdim;
    let runs_mask = |config: &Config| config.causal.is_none_or(|causal| causal == problem.is_causal());
    let configs = || table.iter().map(|kernel| kernel.config);
    let of_dtype = || configs().filter(runs_dtype);
    if of_dtype().next().is_none() {
        let dtypes = listed(configs().map(|config| config.dtype.name()));
        return Err(format!("{family}: dtype {}; allowed: {dtypes}", problem.dtype.name()));
    }
    let found =
        table.iter().find(|Kernel { config, .. }| runs_dtype(config) && runs_headdim(config) && runs_mask(config));
    found.ok_or_else(|| {
        let headdims = listed(of_dtype().map(|config| config.headdim));
        format!("{family}: headdim {}; allowed: {headdims}", problem.headdim)
    })
}

fn listed<X: ToString + PartialEq>(all: impl Iterator<Item = X>) -> String {
    let mut distinct = Vec::new();
    for x in all {
        if !distinct.contains(&x) {
            distinct.push(x);
        }
    }
    distinct.iter().map(X::to_string).collect::<Vec<_>>().join(", ")
}
