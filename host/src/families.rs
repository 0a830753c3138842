//! The kernel families of attention: which problems each runs, with what memory, in which launches.
//!
//! All that the host knows of a family's entry points is here.
use std::cmp::Reverse;
use std::fmt;

use cuda_std::{DType, Global, Kernel};
use kernels::attention::{Attention, Untyped};
use kernels::{Config, flash1, flash2, flash3, standard};

use crate::error::Result;
use crate::features::Feature;
use crate::launch::{Launch, Workspace};
use crate::parameters::Access;
use crate::problem::Problem;
use crate::target::{Resources, Target};

pub(crate) mod hopper;

use hopper::Flash3;

/// A problem, and what it asks of kernels.
#[derive(Clone, Debug)]
pub(crate) struct Wanted<'a> {
    pub problem: &'a Problem,
    features: Vec<Feature>,
    /// The most shared memory that a block may have, in bytes.
    shared_memory: u32,
}

impl<'a> Wanted<'a> {
    /// A problem whose tensors may be accessed so, on this machine.
    pub fn new(problem: &'a Problem, access: Access, target: Target) -> Self {
        Wanted { problem, features: Feature::of(problem, access), shared_memory: target.shared_memory }
    }
}

/// Entry points that compute the same.
pub(crate) struct Table<'a, P: 'static> {
    /// What reasons call them.
    pub name: &'static str,
    pub kernels: &'a [&'static [Kernel<P, Config>]],
    /// What those know that are not `general`.
    pub plain: &'static [Feature],
    /// What those know that are.
    pub general: &'static [Feature],
    /// Whether they take shorter heads than they are built for.
    pub pads: bool,
}

impl<P> Table<'_, P> {
    /// The entry point that suits a problem best, or what stands against all of them: of those that can run it on the machine
    /// one in tf32 where that is allowed, one that does not ask its arguments what this problem does not need, the smallest, and
    /// of several tiles the one for sequences of this length.
    pub fn find(&self, wanted: &Wanted) -> Result<&'static Kernel<P, Config>, String> {
        self.find_among(wanted, |_| true, |_| true)
    }

    /// The same among some entry points, but of several tiles rather one that this problem fills.
    pub fn find_among(
        &self,
        wanted: &Wanted,
        is_among: impl Fn(&Config) -> bool,
        is_filled: impl Fn(&Config) -> bool,
    ) -> Result<&'static Kernel<P, Config>, String> {
        let Wanted { problem, features, shared_memory } = wanted;
        let Problem { headdim, headdim_v, .. } = **problem;
        let all = || self.kernels.iter().copied().flatten();
        let dtypes = || all().map(|kernel| kernel.config.dtype.name());
        let of_dtype = || {
            let allowed = |config: &Config| problem.allow_tf32 || !config.tf32;
            all().filter(move |Kernel { config, .. }| config.dtype == problem.dtype && allowed(config))
        };
        if of_dtype().next().is_none() {
            return Err(format!("{}: dtype {}; allowed: {}", self.name, problem.dtype.name(), listed(dtypes())));
        }
        let fitting = || {
            of_dtype().filter(|Kernel { config, .. }| {
                self.takes(config.headdim, headdim) && self.takes(config.headdim_v, headdim_v)
            })
        };
        if fitting().next().is_none() {
            let mut built_for: Vec<_> =
                of_dtype().map(|kernel| (kernel.config.headdim, kernel.config.headdim_v)).collect();
            built_for.sort_unstable();
            let smaller = if self.pads { built_for.len() - 1 } else { 0 };
            let allowed = listed(built_for[smaller..].iter().map(|&(k, v)| in_words(k as usize, v as usize)));
            let up_to = if self.pads { "up to " } else { "" };
            return Err(format!("{}: headdim {}; allowed: {up_to}{allowed}", self.name, in_words(headdim, headdim_v)));
        }
        let known = |config: &Config| if config.general { self.general } else { self.plain };
        let knows = |config: &Config, feature: &Feature| known(config).contains(feature);
        let runs_mask =
            |config: &Config| config.general || config.causal.is_none_or(|causal| causal == problem.is_causal());
        let able = fitting().filter(|Kernel { config, .. }| {
            is_among(config)
                && runs_mask(config)
                && features.iter().all(|feature| knows(config, feature))
                && config.from_keys as usize <= problem.seqlen_k
        });
        let on_machine = able.clone().filter(|kernel| kernel.config.shared_bytes <= *shared_memory);
        let size = |config: &Config| (config.headdim == 0, config.headdim, config.headdim_v);
        let best = on_machine.min_by_key(|Kernel { config, .. }| {
            let is_unfilled = config.from_keys > 0 && !is_filled(config);
            (config.tf32 != problem.allow_tf32, config.general, size(config), is_unfilled, Reverse(config.from_keys))
        });
        best.ok_or_else(|| {
            if let Some(needed) = able.map(|kernel| kernel.config.shared_bytes).min() {
                let name = self.name;
                return format!(
                    "{name}: {needed} bytes of shared memory a block; allowed on this GPU: {shared_memory}"
                );
            }
            let unknown = |feature: &&Feature| !fitting().any(|kernel| knows(&kernel.config, feature));
            let unknown = || features.iter().filter(unknown);
            let asked = listed(unknown().map(|feature| feature.asked(problem)));
            let allowed = listed(unknown().map(|feature| feature.allowed(problem)));
            let (name, dtype) = (self.name, problem.dtype.name());
            format!("{name}: no kernel of {dtype} and headdim {headdim} for {asked}; allowed: {allowed}")
        })
    }

    /// Whether a kernel that is built for heads of one length, 0 for any, takes those of another.
    fn takes(&self, built_for: u32, headdim: usize) -> bool {
        built_for == 0 || if self.pads { built_for as usize >= headdim } else { built_for as usize == headdim }
    }
}

/// The length of heads of K and of V.
fn in_words(headdim: usize, headdim_v: usize) -> String {
    if headdim == headdim_v { headdim.to_string() } else { format!("{headdim} with {headdim_v} of v") }
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
#[derive(Clone, Copy)]
pub(crate) enum Family {
    Standard {
        scores: &'static Kernel<standard::Params, Config>,
        probabilities: &'static Kernel<standard::Params, Config>,
        output: &'static Kernel<standard::Params, Config>,
    },
    Flash1(&'static Kernel<flash1::Params, Config>),
    Flash2(&'static Kernel<flash2::Params, Config>),
    Flash3(Flash3),
}

impl fmt::Debug for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Family {
    /// Standard attention for this problem, or why there is none.
    pub fn standard(wanted: &Wanted) -> Result<Self, String> {
        let known = Feature::OF_ELDERS;
        let find =
            |kernels: &[_]| Table { name: "standard", kernels, plain: known, general: known, pads: false }.find(wanted);
        Ok(Family::Standard {
            scores: find(&[standard::SCORES])?,
            probabilities: find(&[standard::PROBABILITIES])?,
            output: find(&[standard::OUTPUT])?,
        })
    }

    /// FlashAttention for this problem, or why there is none.
    pub fn flash1(wanted: &Wanted) -> Result<Self, String> {
        let known = Feature::OF_ELDERS;
        let table = Table { name: "flash1", kernels: &[flash1::FORWARD], plain: known, general: known, pads: false };
        table.find(wanted).map(Family::Flash1)
    }

    /// FlashAttention-2 for this problem, or why there is none.
    pub fn flash2(wanted: &Wanted) -> Result<Self, String> {
        let kernels = &[flash2::FORWARD];
        let table = Table { name: "flash2", kernels, plain: Feature::PLAIN, general: Feature::ALL, pads: true };
        table.find(wanted).map(Family::Flash2)
    }

    /// FlashAttention-3 for this problem, or why there is none.
    pub fn flash3(wanted: &Wanted) -> Result<Self, String> {
        Self::flash3_of(wanted, flash3::FORWARD)
    }

    /// FlashAttention-3 with one of these entry points for this problem, or why there is none.
    pub fn flash3_of(wanted: &Wanted, kernels: &'static [Kernel<flash3::Params, Config>]) -> Result<Self, String> {
        let (plain, general) = (Feature::OF_HOPPER, Feature::OF_GENERAL_HOPPER);
        let table = Table { name: "flash3", kernels: &[kernels], plain, general, pads: true };
        let is_filled = |config: &_| hopper::fills_tiles(wanted.problem, config);
        // Gradients that depend on nothing but their sequence need an O and an LSE that do not depend on the longest one.
        let Problem { deterministic, ref varlen, .. } = *wanted.problem;
        let knows_length = |config: &Config| config.from_keys == 0 || !deterministic || varlen.is_none();
        let find = |is_few| table.find_among(wanted, |config| config.few == is_few && knows_length(config), is_filled);
        let kernel = find(false)?;
        let few = find(true).ok().filter(|few| hopper::has_few_queries(wanted.problem, &few.config, &kernel.config));
        Ok(Family::Flash3(Flash3::new(few.unwrap_or(kernel), wanted.problem)))
    }

    /// Its name in reports.
    pub fn name(&self) -> &'static str {
        match self {
            Family::Standard { .. } => "standard",
            Family::Flash1(_) => "flash1",
            Family::Flash2(_) => "flash2",
            Family::Flash3(_) => "flash3",
        }
    }

    /// Its kernels, in the order in which they run.
    pub fn kernels(&self) -> Vec<(&'static str, Config)> {
        fn of<P>(kernel: &Kernel<P, Config>) -> (&'static str, Config) {
            (kernel.name, kernel.config)
        }
        match self {
            Family::Standard { scores, probabilities, output } => vec![of(scores), of(probabilities), of(output)],
            Family::Flash1(kernel) => vec![of(kernel)],
            Family::Flash2(kernel) => vec![of(kernel)],
            Family::Flash3(Flash3 { forward, combine }) => [of(forward)].into_iter().chain(combine.map(of)).collect(),
        }
    }

    /// The shared memory that they need, in bytes a block.
    pub fn shared_bytes(&self) -> u32 {
        match self {
            Family::Standard { scores, probabilities, output } => {
                let scores_or_output = scores.config.shared_bytes.max(output.config.shared_bytes);
                probabilities.config.shared_bytes.max(scores_or_output)
            }
            Family::Flash1(kernel) => kernel.config.shared_bytes,
            Family::Flash2(kernel) => kernel.config.shared_bytes,
            Family::Flash3(Flash3 { forward, combine }) => {
                forward.config.shared_bytes.max(combine.map_or(0, |combine| combine.config.shared_bytes))
            }
        }
    }

    /// Whether its kernel asks its arguments for all features.
    pub fn is_general(&self) -> bool {
        match self {
            Family::Standard { scores, .. } => scores.config.general,
            Family::Flash1(kernel) => kernel.config.general,
            Family::Flash2(kernel) => kernel.config.general,
            Family::Flash3(Flash3 { forward, .. }) => forward.config.general,
        }
    }

    /// How it runs this problem, where there is a choice.
    pub fn how(&self, problem: &Problem) -> Option<String> {
        match self {
            Family::Flash3(Flash3 { forward, .. }) => {
                let packing = hopper::packing::in_words(problem, &forward.config);
                let splits = hopper::splits::in_words(hopper::splits_of(problem, &forward.config));
                let ways: Vec<_> = packing.into_iter().chain(splits).collect();
                (!ways.is_empty()).then(|| ways.join("; "))
            }
            _ => None,
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
            Family::Flash3(Flash3 { forward, .. }) => {
                hopper::splits::workspace(problem, hopper::splits_of(problem, &forward.config))
            }
        }
    }

    /// Its launches on a machine, in order, with the workspace at these addresses. Without rows there are none.
    pub fn launches(
        &self,
        problem: &Problem,
        attention: Attention,
        workspace: &[Global<Untyped>],
        machine: &Resources,
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
            (Family::Flash3(flash3), workspace) => flash3.launches(problem, attention, workspace, machine),
            _ => unreachable!("the workspace is what `workspace` lists"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layout;
    use crate::options::AttentionOptions;
    use std::marker::PhantomData;

    type Entry = Kernel<(), Config>;

    const fn entry(name: &'static str, headdim: u32, causal: Option<bool>, general: bool) -> Entry {
        Kernel {
            name,
            arch: "sm_80",
            cluster: 1,
            config: Config { headdim, headdim_v: headdim, causal, general, ..F16 },
            run: |()| (),
            parameters: PhantomData,
        }
    }

    const F16: Config = Config {
        family: "test",
        dtype: DType::F16,
        tf32: false,
        headdim: 64,
        headdim_v: 64,
        causal: None,
        general: true,
        block_m: 64,
        block_n: 64,
        from_keys: 0,
        few: false,
        sequences: 0,
        threads: 128,
        min_blocks_per_sm: 1,
        claimed_registers: 0,
        accumulators: 0,
        shared_bytes: 0,
        barriers: 0,
    };
    const F32: Config = Config { dtype: DType::F32, ..F16 };

    static KERNELS: [Entry; 7] = [
        entry("general_256", 256, None, true),
        entry("general_64", 64, None, true),
        entry("plain_128", 128, Some(false), false),
        entry("causal_128", 128, Some(true), false),
        entry("plain_64", 64, Some(false), false),
        Entry { config: F32, ..entry("exact", 64, None, true) },
        Entry { config: Config { tf32: true, ..F32 }, ..entry("tf32", 64, None, true) },
    ];

    fn chosen(
        dtype: DType,
        headdims: [usize; 2],
        options: &AttentionOptions,
        aligned: bool,
    ) -> Result<&'static str, String> {
        let layout = |headdim| Layout::contiguous(dtype, &[1, 8, 1, headdim]).expect("small");
        let (q, v) = (layout(headdims[0]), layout(headdims[1]));
        let problem = Problem::new(&q, &q, &v, options).expect("valid");
        let table =
            Table { name: "test", kernels: &[&KERNELS], plain: Feature::PLAIN, general: Feature::ALL, pads: true };
        table.find(&Wanted::new(&problem, Access { aligned, mapped: true }, Target::SMALLEST)).map(|kernel| kernel.name)
    }

    #[test]
    fn the_smallest_kernel_that_asks_the_fewest_questions_is_chosen() {
        let plain = AttentionOptions::new();
        let of = |headdims, options: &AttentionOptions| chosen(DType::F16, headdims, options, true);
        assert_eq!(of([64, 64], &plain), Ok("plain_64"));
        assert_eq!(of([40, 40], &plain), Ok("plain_64"));
        assert_eq!(of([64, 72], &plain), Ok("plain_128"));
        assert_eq!(of([32, 32], &plain.clone().causal(true)), Ok("causal_128"));
        assert_eq!(of([192, 128], &plain), Ok("general_256"));
        assert_eq!(of([36, 36], &plain), Ok("general_64"));
        for options in [plain.clone().softcap(9.0), plain.clone().softmax_scale(0.0), plain.clone().window_size(2, 0)] {
            assert_eq!(of([64, 64], &options), Ok("general_64"), "{options:?}");
        }
        assert_eq!(chosen(DType::F16, [64, 64], &plain, false), Ok("general_64"));
        assert_eq!(of([512, 512], &plain), Err("test: headdim 512; allowed: up to 256".to_owned()));
        let both = of([512, 64], &plain).expect_err("too long");
        assert_eq!(both, "test: headdim 512 with 64 of v; allowed: up to 256");
    }

    #[test]
    fn tf32_is_chosen_where_it_is_allowed() {
        let of = |options: &AttentionOptions| chosen(DType::F32, [64, 64], options, true);
        assert_eq!(of(&AttentionOptions::new()), Ok("exact"));
        assert_eq!(of(&AttentionOptions::new().allow_tf32(true)), Ok("tf32"));
        let reason = chosen(DType::BF16, [64, 64], &AttentionOptions::new(), true);
        assert_eq!(reason, Err("test: dtype bf16; allowed: f16, f32".to_owned()));
    }
}
