//! The kernel families of attention: which problems each runs, with what memory, in which launches.
//!
//! All that the host knows of a family's entry points is here.
use cuda_std::{DType, Global, Kernel};
use kernels::attention::{Attention, Untyped};
use kernels::{Config, flash1, flash2, standard};

use crate::error::Result;
use crate::features::Feature;
use crate::launch::{Launch, Workspace};
use crate::problem::Problem;

/// A problem, and what it asks of kernels.
#[derive(Clone, Debug)]
pub(crate) struct Wanted<'a> {
    pub problem: &'a Problem,
    features: Vec<Feature>,
}

impl<'a> Wanted<'a> {
    /// `aligned`: whether the problem's tensors are, as [`RawTensor::is_aligned`](crate::raw::RawTensor::is_aligned) says.
    pub fn new(problem: &'a Problem, aligned: bool) -> Self {
        Wanted { problem, features: Feature::of(problem, aligned) }
    }
}

/// Entry points that compute the same.
pub(crate) struct Table<P: 'static> {
    /// What reasons call them.
    pub name: &'static str,
    pub kernels: &'static [Kernel<P, Config>],
    /// What those know that are not `general`; these know everything.
    pub plain: &'static [Feature],
    /// Whether they take shorter heads than they are built for.
    pub pads: bool,
}

impl<P> Table<P> {
    /// The entry point that suits a problem best, or what stands against all of them: of those that can run it one in tf32
    /// where that is allowed, one that does not ask its arguments what this problem does not need, and the smallest.
    pub fn find(&self, wanted: &Wanted) -> Result<&'static Kernel<P, Config>, String> {
        let Wanted { problem, features } = wanted;
        let Problem { headdim, headdim_v, .. } = **problem;
        let dtypes = || self.kernels.iter().map(|kernel| kernel.config.dtype.name());
        let of_dtype = || {
            let allowed = |config: &Config| problem.allow_tf32 || !config.tf32;
            self.kernels.iter().filter(move |Kernel { config, .. }| config.dtype == problem.dtype && allowed(config))
        };
        if of_dtype().next().is_none() {
            return Err(format!("{}: dtype {}; allowed: {}", self.name, problem.dtype.name(), listed(dtypes())));
        }
        let heads: [(_, _, fn(&Config) -> u32); 2] =
            [("headdim", headdim, |config| config.headdim), ("headdim_v", headdim_v, |config| config.headdim_v)];
        for (dimension, extent, built_for) in heads {
            if !of_dtype().any(|kernel| self.takes(built_for(&kernel.config), extent)) {
                let mut extents: Vec<_> = of_dtype().map(|kernel| built_for(&kernel.config)).collect();
                extents.sort_unstable();
                let allowed = if self.pads { format!("up to {}", extents[extents.len() - 1]) } else { listed(extents) };
                return Err(format!("{}: {dimension} {extent}; allowed: {allowed}", self.name));
            }
        }
        let fitting = || {
            of_dtype().filter(|Kernel { config, .. }| {
                self.takes(config.headdim, headdim) && self.takes(config.headdim_v, headdim_v)
            })
        };
        let knows = |config: &Config, feature: &Feature| config.general || self.plain.contains(feature);
        let runs_mask =
            |config: &Config| config.general || config.causal.is_none_or(|causal| causal == problem.is_causal());
        let able = fitting()
            .filter(|Kernel { config, .. }| runs_mask(config) && features.iter().all(|feature| knows(config, feature)));
        let size = |config: &Config| (config.headdim == 0, config.headdim, config.headdim_v);
        let best =
            able.min_by_key(|Kernel { config, .. }| (config.tf32 != problem.allow_tf32, config.general, size(config)));
        best.ok_or_else(|| {
            let unknown = |feature: &&Feature| !fitting().any(|kernel| knows(&kernel.config, feature));
            let unknown = listed(features.iter().filter(unknown));
            format!("{}: no kernel of {} and headdim {headdim} for {unknown}", self.name, problem.dtype.name())
        })
    }

    /// Whether a kernel that is built for heads of one length, 0 for any, takes those of another.
    fn takes(&self, built_for: u32, headdim: usize) -> bool {
        built_for == 0 || if self.pads { built_for as usize >= headdim } else { built_for as usize == headdim }
    }
}

fn listed<X: ToString>(all: impl IntoIterator<Item = X>) -> String {
    let mut distinct = Vec::new();
    for x in all.into_iter().map(|x| x.to_string()) {
        if !distinct.contains(&x) {
            distinct.push(x);
        }
    }
    if distinct.is_empty() { "none".to_owned() } else { distinct.join(", ") }
}

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
    pub fn standard(wanted: &Wanted) -> Result<Self, String> {
        let find = |kernels| Table { name: "standard", kernels, plain: Feature::OF_ELDERS, pads: false }.find(wanted);
        Ok(Family::Standard {
            scores: find(standard::SCORES)?,
            probabilities: find(standard::PROBABILITIES)?,
            output: find(standard::OUTPUT)?,
        })
    }

    /// FlashAttention for this problem, or why there is none.
    pub fn flash1(wanted: &Wanted) -> Result<Self, String> {
        let table = Table { name: "flash1", kernels: flash1::FORWARD, plain: Feature::OF_ELDERS, pads: false };
        table.find(wanted).map(Family::Flash1)
    }

    /// FlashAttention-2 for this problem, or why there is none.
    pub fn flash2(wanted: &Wanted) -> Result<Self, String> {
        let table = Table { name: "flash2", kernels: flash2::FORWARD, plain: Feature::PLAIN, pads: true };
        table.find(wanted).map(Family::Flash2)
    }

    /// Its name in reports.
    pub fn name(&self) -> &'static str {
        match self {
            Family::Standard { .. } => "standard",
            Family::Flash1(_) => "flash1",
            Family::Flash2(_) => "flash2",
        }
    }

    /// Whether its kernel asks its arguments for all features.
    pub fn is_general(&self) -> bool {
        match self {
            Family::Standard { scores, .. } => scores.config.general,
            Family::Flash1(kernel) => kernel.config.general,
            Family::Flash2(kernel) => kernel.config.general,
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
                vec![of("O", rows.saturating_mul(problem.headdim as u64)), of("l", rows), of("m", rows)]
            }
            Family::Flash2(_) => Vec::new(),
        }
    }

    /// Its launches, in order, with the workspace at these addresses. Without rows there are none.
    pub fn launches(
        &self,
        problem: &Problem,
        attention: Attention,
        workspace: &[Global<Untyped>],
    ) -> Result<Vec<Launch>> {
        if problem.rows() == 0 {
            return Ok(Vec::new());
        }
        let heads = (problem.batch as u64).saturating_mul(problem.nheads as u64);
        let query_blocks =
            |config: Config| (problem.seqlen_q.div_ceil(config.block_m as usize) as u64).saturating_mul(heads);
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
