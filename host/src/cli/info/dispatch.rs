//! `ferroflash info --explain-dispatch`: which kernels would run a problem, and why.
use crate::cli::answer::{Facts, print, print_json};
use crate::cli::choices::{dtype, one_of};
use crate::cli::options::OptionArguments;
use crate::cli::units;
use anyhow::{Context, Result};
use clap::{ArgGroup, value_parser};
use ferroflash::explanation::{Architecture, Choice, ChosenKernel, Explanation};
use ferroflash::{DType, Inputs, Kernel, Layout, Problem, cuda};
use serde_json::{Value, json};

/// A problem, and a GPU.
#[derive(clap::Args)]
#[command(group = ArgGroup::new("of a problem").args(OF_A_PROBLEM).multiple(true).requires("explain_dispatch"))]
pub struct DispatchArguments {
    /// Show instead which kernels would run a problem forward and backward, and why, without running them
    #[arg(long)]
    explain_dispatch: bool,
    /// On a GPU of this architecture, as sm_90 [default: the one that is here]
    #[arg(long, value_name = "SM", value_parser = one_of::<Architecture>(&ARCHITECTURES))]
    arch: Option<Architecture>,
    /// The kernel that is asked for
    #[arg(long, default_value = "auto", value_parser = one_of::<Kernel>(Kernel::NAMES))]
    kernel: Kernel,
    /// The type of Q, K, V and O
    #[arg(long, default_value = "bf16", value_parser = dtype())]
    dtype: DType,
    /// Sequences
    #[arg(long, value_name = "N", default_value = "1", value_parser = value_parser!(u32).range(1..))]
    batch: u32,
    /// Tokens of Q
    #[arg(long, value_name = "N", default_value = "4096")]
    seqlen: u32,
    /// Tokens of K and V [default: as many as of Q]
    #[arg(long, value_name = "N")]
    seqlen_k: Option<u32>,
    /// Heads of Q
    #[arg(long, value_name = "N", default_value = "16", value_parser = value_parser!(u32).range(1..))]
    nheads: u32,
    /// Heads of K and V [default: as many as of Q]
    #[arg(long, value_name = "N", value_parser = value_parser!(u32).range(1..))]
    nheads_k: Option<u32>,
    /// Elements of one head's row of Q and K
    #[arg(long, value_name = "D", default_value = "64", value_parser = value_parser!(u32).range(1..))]
    headdim: u32,
    /// Elements of one head's row of V and O [default: as many as of Q]
    #[arg(long, value_name = "D", value_parser = value_parser!(u32).range(1..))]
    headdim_v: Option<u32>,
    #[command(flatten)]
    options: OptionArguments,
    /// With a bias
    #[arg(long)]
    bias: bool,
    /// With a boolean mask
    #[arg(long)]
    mask: bool,
    /// With ALiBi slopes
    #[arg(long)]
    alibi: bool,
    /// With attention sinks
    #[arg(long)]
    sinks: bool,
    /// With sequences of different lengths, of which --seqlen and --seqlen-k are the longest
    #[arg(long)]
    varlen: bool,
}

/// All arguments but the one that asks, also those of [`OptionArguments`].
const OF_A_PROBLEM: [&str; 22] = [
    "arch",
    "kernel",
    "dtype",
    "batch",
    "seqlen",
    "seqlen_k",
    "nheads",
    "nheads_k",
    "headdim",
    "headdim_v",
    "causal",
    "window",
    "softmax_scale",
    "softcap",
    "dropout",
    "deterministic",
    "tf32",
    "bias",
    "mask",
    "alibi",
    "sinks",
    "varlen",
];

const ARCHITECTURES: [&str; 9] = ["sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "sm_121"];

impl DispatchArguments {
    /// Whether this is what is asked for.
    pub fn wanted(&self) -> bool {
        self.explain_dispatch
    }

    /// Prints which kernels would run.
    pub fn explain(&self, json: bool) -> Result<()> {
        let problem = self.problem()?;
        let architecture = match self.arch {
            Some(architecture) => architecture,
            None => {
                let device = cuda::devices().context("--arch says for which GPU, where there is none")?;
                device.first().map(Architecture::from).context("no GPU here: --arch says for which")?
            }
        };
        let explanation = Explanation::new(&problem, self.kernel, architecture);
        let passes = [("forward", explanation.forward), ("backward", explanation.backward)];
        if json {
            let mut object = json!({ "problem": problem.to_string(), "architecture": architecture.to_string() });
            for (pass, choice) in passes {
                object[pass] = choice.map_or_else(|reason| json!({ "refused": reason.to_string() }), |c| of_choice(&c));
            }
            return print_json(&object);
        }
        let mut facts = Facts::default();
        facts.add("problem", format_args!("{}, {problem}", problem.dtype.name()));
        let shared_memory = units::bytes(u64::from(architecture.shared_memory_per_block));
        facts.add("architecture", format_args!("{architecture}, {shared_memory} of shared memory a block"));
        for (pass, choice) in passes {
            match choice {
                Err(reason) => facts.add(pass, format_args!("none: {reason}")),
                Ok(choice) => {
                    facts.add(pass, format_args!("{}: {}", choice.algorithm, choice.reason));
                    choice.kernels.iter().for_each(|kernel| facts.add("", in_words(kernel)));
                    if choice.workspace_bytes > 0 {
                        facts.add("", format_args!("{} of workspace", units::bytes(choice.workspace_bytes)));
                    }
                }
            }
        }
        print(facts)
    }

    fn problem(&self) -> Result<Problem> {
        let [batch, seqlen_q, nheads, headdim] =
            [self.batch, self.seqlen, self.nheads, self.headdim].map(|extent| extent as usize);
        let or = |given: Option<u32>, default| given.map_or(default, |given| given as usize);
        let (seqlen_k, nheads_k) = (or(self.seqlen_k, seqlen_q), or(self.nheads_k, nheads));
        let tokens = |seqlen: usize, nheads, headdim| match self.varlen {
            false => Layout::contiguous(self.dtype, &[batch, seqlen, nheads, headdim]),
            true => Layout::contiguous(self.dtype, &[batch.saturating_mul(seqlen), nheads, headdim]),
        };
        let (q, k) = (tokens(seqlen_q, nheads, headdim)?, tokens(seqlen_k, nheads_k, headdim)?);
        let v = tokens(seqlen_k, nheads_k, or(self.headdim_v, headdim))?;
        let scores = [batch, nheads, seqlen_q, seqlen_k];
        let (bias, mask) = (Layout::contiguous(self.dtype, &scores)?, Layout::contiguous(DType::U8, &scores)?);
        let of_heads = Layout::contiguous(DType::F32, &[nheads])?;
        let starts = Layout::contiguous(DType::I32, &[batch + 1])?;
        let mut inputs = Inputs::new(&q, &k, &v);
        (inputs.bias, inputs.mask) = (self.bias.then_some(&bias), self.mask.then_some(&mask));
        (inputs.alibi_slopes, inputs.sinks) = (self.alibi.then_some(&of_heads), self.sinks.then_some(&of_heads));
        let mut options = self.options.options();
        if self.varlen {
            (inputs, options) = (inputs.cu_seqlens(&starts, &starts), options.max_seqlens(seqlen_q, seqlen_k));
        }
        Ok(Problem::of(&inputs, None, &options)?)
    }
}

fn in_words(ChosenKernel { entry, config, reason, .. }: &ChosenKernel) -> String {
    let shared = units::bytes(u64::from(config.shared_bytes));
    let tile = match (config.block_m, config.block_n) {
        (rows, 0) => format!("blocks of {rows} rows"),
        (rows, keys) => format!("tiles of {rows} queries and {keys} keys"),
    };
    format!("{entry}: {tile}, {} threads, {shared} of shared memory; for {reason}", config.threads)
}

fn of_choice(Choice { algorithm, reason, kernels, workspace_bytes, .. }: &Choice) -> Value {
    let of_kernel = |ChosenKernel { entry, config, reason, .. }: &ChosenKernel| {
        json!({
            "entry": entry,
            "block_m": config.block_m,
            "block_n": config.block_n,
            "threads": config.threads,
            "shared_bytes": config.shared_bytes,
            "general": config.general,
            "for": reason,
        })
    };
    json!({
        "kernel": algorithm,
        "reason": reason,
        "launches": kernels.iter().map(of_kernel).collect::<Vec<_>>(),
        "workspace_bytes": workspace_bytes,
    })
}
