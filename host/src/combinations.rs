//! What runs where: which kernels, and the CPU backend, take which dtypes, head dimensions and features.
//!
//! Nothing of this is written down: each cell poses a small problem to what chooses kernels for calls, and says what it
//! answered.
use std::fmt;

use cuda_std::DType;

use crate::dispatch::{BackwardPlan, Optional, Plan};
use crate::error::Result;
use crate::inputs::Inputs;
use crate::layout::Layout;
use crate::options::{AttentionOptions, Kernel};
use crate::parameters::Access;
use crate::problem::Problem;
use crate::target::Target;

/// An algorithm, one of its passes, and what it computes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Combination {
    /// The kernel family; `cpu` for the CPU backend.
    pub algorithm: &'static str,
    /// `forward` or `backward`.
    pub pass: &'static str,
    /// The dtypes of Q, K and V that all of this is true of.
    pub dtypes: Vec<DType>,
    /// The head dimensions, in words, of heads of K and V that are as long as each other.
    pub headdims: String,
    /// Each of [`FEATURES`], in their order, with head dimension 64.
    pub features: Vec<Support>,
}

/// Whether a feature is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Support {
    /// The pass has no such thing.
    Meaningless,
    /// Not there.
    No,
    /// By a kernel that asks its arguments for all features, which costs time.
    General,
    /// As fast as without.
    Full,
}

impl fmt::Display for Support {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Support::Meaningless => "",
            Support::No => "no",
            Support::General => "general",
            Support::Full => "yes",
        })
    }
}

/// The features, by name.
pub const FEATURES: [&str; COLUMNS.len()] = {
    let mut names = [""; COLUMNS.len()];
    let mut i = 0;
    while i < names.len() {
        names[i] = COLUMNS[i].0;
        i += 1;
    }
    names
};

/// All combinations: kernels in the order in which they are tried, then the CPU.
pub fn combinations() -> Vec<Combination> {
    let mut all: Vec<Combination> = Vec::new();
    for (algorithm, pass) in ROWS {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let headdims = headdims(algorithm, pass, dtype);
            if headdims.is_empty() {
                continue;
            }
            let features = COLUMNS.iter().map(|column| support(algorithm, pass, dtype, column)).collect();
            let found = Combination {
                algorithm: algorithm.map_or("cpu", Kernel::name),
                pass: pass.name(),
                dtypes: vec![dtype],
                headdims: in_words(&headdims),
                features,
            };
            // Dtypes that differ in nothing share a line.
            let same = all.iter_mut().find(|other| Combination { dtypes: vec![dtype], ..(*other).clone() } == found);
            match same {
                Some(same) => same.dtypes.push(dtype),
                None => all.push(found),
            }
        }
    }
    all
}

/// The combinations as a page of Markdown.
pub fn markdown() -> String {
    let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
    let header = ["algorithm", "pass", "dtypes", "headdim"].iter().chain(&FEATURES).map(|&name| name.to_owned());
    let header: Vec<_> = header.collect();
    let mut page = PREFACE.to_owned();
    page += &line(&header);
    page += &line(&vec!["---".to_owned(); header.len()]);
    for Combination { algorithm, pass, dtypes, headdims, features } in combinations() {
        let dtypes = dtypes.into_iter().map(DType::name).collect::<Vec<_>>().join(", ");
        let mut cells = vec![algorithm.to_owned(), pass.to_owned(), dtypes, headdims];
        cells.extend(features.iter().map(Support::to_string));
        page += &line(&cells);
    }
    page += CHOSEN;
    page += &line(
        &["feature", "pass"].into_iter().chain(GPUS.map(|(name, ..)| name)).map(str::to_owned).collect::<Vec<_>>(),
    );
    page += &line(&vec!["---".to_owned(); 2 + GPUS.len()]);
    let nothing: Column = ("none", false, |_| ());
    for column @ (feature, backward_only, _) in [nothing].iter().chain(&COLUMNS) {
        for pass in [Pass::Forward, Pass::Backward] {
            if *backward_only && matches!(pass, Pass::Forward) {
                continue;
            }
            let mut cells = vec![(*feature).to_owned(), pass.name().to_owned()];
            cells.extend(GPUS.iter().map(|(_, target, dtypes)| chosen(*target, pass, dtypes, column)));
            page += &line(&cells);
        }
    }
    page
}

/// What `auto` takes for a feature, in words.
fn chosen(target: Target, pass: Pass, dtypes: &[DType], &(_, _, ask): &Column) -> String {
    let mut found: Vec<String> = Vec::new();
    for &dtype in dtypes {
        let mut probe = Probe::plain(dtype, 64);
        ask(&mut probe);
        let words =
            probe.choose(Kernel::Auto, pass, target).map_or_else(|_| "none".to_owned(), |choice| choice.in_words());
        if !found.contains(&words) {
            found.push(words);
        }
    }
    found.join(" or ")
}

const PREFACE: &str = "\
# What runs where

`ferroflash info --kernels` prints this page. It asks what chooses kernels for calls, with heads of 64 elements where
it says nothing else. `yes`: as fast as without; `general`: by a kernel that asks its arguments for all features, which
costs time; `no`: refused, with the reason. Gradients of flash2 that are `deterministic` compute S and dP twice, which costs
time too. flash3 runs on Hopper. `auto` takes the first family here that can run a problem.

";

const CHOSEN: &str = "
## What `auto` takes

The same problems, and which kernels `auto` takes for them. `general`: those that ask their arguments for all features. In the
backward pass, `fused` kernels of flash2 compute S and dP once and add to dQ as they come; `apart`: each gradient is computed
where it is owned, and S and dP twice.

";

/// The GPUs of that table, and the dtypes.
const GPUS: [(&str, Target, &[DType]); 3] = [
    ("f16, bf16 on Hopper", Target::HOPPER, &[DType::F16, DType::BF16]),
    ("f16, bf16 on sm_80", Target::OLDEST, &[DType::F16, DType::BF16]),
    ("f32", Target::HOPPER, &[DType::F32]),
];

#[derive(Clone, Copy)]
enum Pass {
    Forward,
    Backward,
}

impl Pass {
    fn name(self) -> &'static str {
        match self {
            Pass::Forward => "forward",
            Pass::Backward => "backward",
        }
    }
}

/// What computes, without a kernel the CPU, and in which pass.
const ROWS: [(Option<Kernel>, Pass); 8] = [
    (Some(Kernel::Flash3), Pass::Forward),
    (Some(Kernel::Flash3), Pass::Backward),
    (Some(Kernel::Flash2), Pass::Forward),
    (Some(Kernel::Flash2), Pass::Backward),
    (Some(Kernel::Flash1), Pass::Forward),
    (Some(Kernel::Standard), Pass::Forward),
    (None, Pass::Forward),
    (None, Pass::Backward),
];

/// A small problem.
struct Probe {
    dtype: DType,
    headdim: usize,
    headdim_v: usize,
    nheads_k: usize,
    options: AttentionOptions,
    bias: bool,
    mask: bool,
    alibi: bool,
    sinks: bool,
    varlen: bool,
    aligned: bool,
    gradients: Optional,
}

/// A feature, whether only a backward pass has it, and how a problem asks for it.
type Column = (&'static str, bool, fn(&mut Probe));

const COLUMNS: [Column; 17] = [
    ("causal", false, |probe| probe.options.causal = true),
    ("window", false, |probe| probe.options.window_size.left = Some(3)),
    ("softmax_scale <= 0", false, |probe| probe.options.softmax_scale = Some(-1.0)),
    ("softcap", false, |probe| probe.options.softcap = Some(30.0)),
    ("ALiBi", false, |probe| probe.alibi = true),
    ("bias", false, |probe| probe.bias = true),
    ("its gradient", true, |probe| (probe.bias, probe.gradients.dbias) = (true, true)),
    ("mask", false, |probe| probe.mask = true),
    ("dropout", false, |probe| probe.options = probe.options.clone().dropout(0.5, 1, 0)),
    ("sinks", false, |probe| probe.sinks = true),
    ("their gradient", true, |probe| (probe.sinks, probe.gradients.dsinks) = (true, true)),
    ("GQA, MQA", false, |probe| probe.nheads_k = 1),
    ("varlen", false, |probe| probe.varlen = true),
    ("headdim of V", false, |probe| probe.headdim_v = probe.headdim / 2),
    ("any strides", false, |probe| probe.aligned = false),
    ("dLSE", true, |_| ()),
    ("deterministic", false, |probe| probe.options.deterministic = true),
];

impl Probe {
    const BATCH: usize = 2;
    const NHEADS: usize = 4;
    const SEQLEN: usize = 16;

    fn plain(dtype: DType, headdim: usize) -> Self {
        Probe {
            dtype,
            headdim,
            headdim_v: headdim,
            nheads_k: Self::NHEADS,
            options: AttentionOptions::new().max_seqlens(Self::SEQLEN, Self::SEQLEN),
            bias: false,
            mask: false,
            alibi: false,
            sinks: false,
            varlen: false,
            aligned: true,
            gradients: Optional::default(),
        }
    }

    fn problem(&self) -> Result<Problem> {
        let Probe { dtype, headdim, headdim_v, nheads_k, .. } = *self;
        let layout = Layout::contiguous;
        let tokens = |nheads, headdim| match self.varlen {
            false => layout(dtype, &[Self::BATCH, Self::SEQLEN, nheads, headdim]),
            true => layout(dtype, &[Self::BATCH * Self::SEQLEN, nheads, headdim]),
        };
        let (q, k, v) = (tokens(Self::NHEADS, headdim)?, tokens(nheads_k, headdim)?, tokens(nheads_k, headdim_v)?);
        let scores = [Self::BATCH, Self::NHEADS, Self::SEQLEN, Self::SEQLEN];
        let (bias, mask) = (layout(dtype, &scores)?, layout(DType::U8, &scores)?);
        let of_heads = layout(DType::F32, &[Self::NHEADS])?;
        let starts = layout(DType::I32, &[Self::BATCH + 1])?;
        let inputs = Inputs {
            bias: self.bias.then_some(&bias),
            mask: self.mask.then_some(&mask),
            alibi_slopes: self.alibi.then_some(&of_heads),
            sinks: self.sinks.then_some(&of_heads),
            cu_seqlens_q: self.varlen.then_some(&starts),
            cu_seqlens_k: self.varlen.then_some(&starts),
            ..Inputs::new(&q, &k, &v)
        };
        Problem::of(&inputs, None, &self.options)
    }

    /// What a call with this problem would be answered.
    fn ask(&self, algorithm: Option<Kernel>, pass: Pass) -> Result<Support> {
        // The CPU refuses nothing.
        let Some(kernel) = algorithm else { return self.problem().map(|_| Support::Full) };
        let Choice { is_general, .. } = self.choose(kernel, pass, Target::HOPPER)?;
        Ok(if is_general { Support::General } else { Support::Full })
    }

    /// What would run it.
    fn choose(&self, kernel: Kernel, pass: Pass, target: Target) -> Result<Choice> {
        let problem = self.problem()?;
        let access = Access { aligned: self.aligned, mapped: true };
        Ok(match pass {
            Pass::Forward => {
                let plan = Plan::new(&problem, access, kernel, target)?;
                Choice { family: plan.algorithm(), is_general: plan.is_general(), way: None }
            }
            Pass::Backward => {
                let plan = BackwardPlan::new(&problem, self.gradients, access, kernel, target)?;
                let way = (plan.algorithm() == "flash2").then(|| if plan.is_apart() { "apart" } else { "fused" });
                Choice { family: plan.algorithm(), is_general: plan.is_general(), way }
            }
        })
    }
}

/// The kernels of a call.
struct Choice {
    family: &'static str,
    is_general: bool,
    /// Which of a family's ways, where it has several.
    way: Option<&'static str>,
}

impl Choice {
    fn in_words(&self) -> String {
        let ways = self.way.into_iter().chain(self.is_general.then_some("general"));
        ways.fold(self.family.to_owned(), |words, way| format!("{words}, {way}"))
    }
}

fn support(algorithm: Option<Kernel>, pass: Pass, dtype: DType, &(_, backward_only, ask): &Column) -> Support {
    if backward_only && matches!(pass, Pass::Forward) {
        return Support::Meaningless;
    }
    let mut probe = Probe::plain(dtype, 64);
    ask(&mut probe);
    probe.ask(algorithm, pass).unwrap_or(Support::No)
}

/// More than any kernel is built for.
const MOST_HEADDIM: usize = 1024;

/// The head dimensions that plain attention has.
fn headdims(algorithm: Option<Kernel>, pass: Pass, dtype: DType) -> Vec<usize> {
    (1..=MOST_HEADDIM).filter(|&headdim| Probe::plain(dtype, headdim).ask(algorithm, pass).is_ok()).collect()
}

fn in_words(headdims: &[usize]) -> String {
    let Some(&last) = headdims.last() else { return "none".to_owned() };
    if last == MOST_HEADDIM {
        return "any".to_owned();
    }
    let steps_of = |step: usize| headdims.iter().copied().eq((step..=last).step_by(step));
    if headdims.len() > 4 && steps_of(1) {
        format!("up to {last}")
    } else if headdims.len() > 4 && steps_of(8) {
        format!("multiples of 8 up to {last}")
    } else {
        headdims.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn head_dimensions_in_words() {
        assert_eq!(in_words(&[32, 64, 128]), "32, 64, 128");
        assert_eq!(in_words(&(1..=256).collect::<Vec<_>>()), "up to 256");
        assert_eq!(in_words(&(1..=16).map(|i| 8 * i).collect::<Vec<_>>()), "multiples of 8 up to 128");
    }

    #[test]
    fn the_elders_know_a_causal_mask_and_grouped_queries() {
        for combination in combinations().iter().filter(|combination| combination.algorithm == "flash1") {
            let known = FEATURES.iter().zip(&combination.features).filter(|&(_, &support)| support == Support::Full);
            let known: Vec<_> = known.map(|(name, _)| *name).collect();
            assert_eq!(known, ["causal", "GQA, MQA", "deterministic"]);
            assert_eq!(combination.headdims, "32, 64, 128");
        }
    }

    /// What the reason of a refusal calls each of the features.
    const NAMES: [&str; COLUMNS.len()] = [
        "causal",
        "window_size",
        "softmax_scale",
        "softcap",
        "alibi_slopes",
        "bias",
        "bias",
        "mask",
        "dropout_p",
        "sinks",
        "sinks",
        "nheads_k",
        "cu_seqlens",
        " of v",
        "addresses or strides",
        "dlse",
        "deterministic",
    ];

    /// A kernel that has each of two features has both together; and a refusal names one that it has not.
    #[test]
    fn features_work_together() {
        let kernels = [Kernel::Auto, Kernel::Flash3, Kernel::Flash2, Kernel::Flash1, Kernel::Standard];
        let mut pairs = 0;
        for target in [Target::HOPPER, Target::OLDEST, Target::SMALLEST] {
            for pass in [Pass::Forward, Pass::Backward] {
                for (kernel, dtype) in
                    kernels.into_iter().flat_map(|k| [DType::F32, DType::F16, DType::BF16].map(|d| (k, d)))
                {
                    for headdim in [32, 64, 96, 128, 192, 256] {
                        pairs += check_pairs(target, pass, kernel, dtype, headdim);
                    }
                }
            }
        }
        assert!(pairs > 5_000, "{pairs}");
    }

    /// Checks all pairs of features where plain attention runs; how many there were.
    fn check_pairs(target: Target, pass: Pass, kernel: Kernel, dtype: DType, headdim: usize) -> usize {
        let refusal = |features: &[usize]| {
            let mut probe = Probe::plain(dtype, headdim);
            features.iter().for_each(|&feature| COLUMNS[feature].2(&mut probe));
            probe.choose(kernel, pass, target).err().map(|refused| refused.to_string())
        };
        if refusal(&[]).is_some() {
            return 0;
        }
        let is_meant = |&feature: &usize| !COLUMNS[feature].1 || matches!(pass, Pass::Backward);
        let features: Vec<_> = (0..COLUMNS.len()).filter(is_meant).collect();
        let alone: Vec<_> = features.iter().map(|&feature| refusal(&[feature]).is_some()).collect();
        let mut pairs = 0;
        for (i, &one) in features.iter().enumerate() {
            for (j, &other) in features.iter().enumerate().skip(i) {
                pairs += 1;
                let what = || {
                    let both = [COLUMNS[one].0, COLUMNS[other].0].join(" with ");
                    format!("{kernel} {}, {}, headdim {headdim}, {target:?}: {both}", pass.name(), dtype.name())
                };
                match refusal(&[one, other]) {
                    None => (),
                    Some(reason) => {
                        // flash3's general gradients have no order: what needs both is left to flash2.
                        let is_in_order = kernel == Kernel::Flash3 && reason.contains("flash3 backward, in order: ");
                        assert!(alone[i] || alone[j] || is_in_order, "{}: {reason}", what());
                        let is_named = |feature: usize, is_refused: bool| {
                            (is_refused || is_in_order) && reason.contains(NAMES[feature])
                        };
                        assert!(is_named(one, alone[i]) || is_named(other, alone[j]), "{}: {reason}", what());
                        assert!(reason.contains("; allowed: "), "{}: {reason}", what());
                    }
                }
            }
        }
        assert!(kernel != Kernel::Auto || !alone.contains(&true), "{kernel}, {}, headdim {headdim}", dtype.name());
        pairs
    }

    #[test]
    fn the_cpu_has_everything() {
        let cpu: Vec<_> = combinations().into_iter().filter(|combination| combination.algorithm == "cpu").collect();
        assert_eq!(cpu.len(), 2, "forward and backward, of all dtypes alike");
        assert!(cpu.iter().flat_map(|combination| &combination.features).all(|&support| support != Support::No));
    }
}
