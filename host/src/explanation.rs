//! Which kernels would run a problem on a GPU, and why: what calls are answered, before there is a GPU.
//!
//! ```
//! use ferroflash::explanation::{Architecture, Explanation};
//! use ferroflash::{AttentionOptions, DType, Inputs, Kernel, Layout, Problem};
//!
//! # fn main() -> Result<(), ferroflash::Error> {
//! let x = Layout::contiguous(DType::BF16, &[1, 4096, 16, 128])?;
//! let problem = Problem::of(&Inputs::new(&x, &x, &x), None, &AttentionOptions::new())?;
//! let explanation = Explanation::new(&problem, Kernel::Auto, "sm_80".parse::<Architecture>()?);
//! assert_eq!(explanation.forward?.algorithm, "flash2");
//! # Ok(())
//! # }
//! ```
use std::fmt;
use std::str::FromStr;

use kernels::Config;

use crate::cuda::DeviceInfo;
use crate::dispatch::{BackwardPlan, Optional, Plan};
use crate::error::{Error, Result};
use crate::launch::Workspace;
use crate::options::Kernel;
use crate::parameters::Access;
use crate::problem::Problem;
use crate::target::Target;

/// What kernels are chosen by of a GPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Architecture {
    /// Its compute capability: (9, 0) for `sm_90`.
    pub compute_capability: (u32, u32),
    /// Shared memory that one block may have, in bytes.
    pub shared_memory_per_block: u32,
}

impl From<&DeviceInfo> for Architecture {
    fn from(device: &DeviceInfo) -> Self {
        let DeviceInfo { compute_capability, shared_memory_per_block, .. } = *device;
        Architecture { compute_capability, shared_memory_per_block }
    }
}

impl FromStr for Architecture {
    type Err = Error;

    /// `sm_90`: with the shared memory that the table "Technical Specifications per Compute Capability" of the CUDA
    /// programming guide says.
    fn from_str(name: &str) -> Result<Self> {
        let number = name.strip_prefix("sm_").and_then(|number| number.parse::<u32>().ok()).unwrap_or_default();
        let compute_capability = (number / 10, number % 10);
        let kibibytes = match compute_capability {
            (8, 0 | 7) => 163,
            (8, _) | (12, _) => 99,
            (9..=11, _) => 227,
            _ => {
                let allowed = "sm_80 to sm_121";
                return Err(Error::Choice { what: "architecture", found: name.to_owned(), allowed });
            }
        };
        Ok(Architecture { compute_capability, shared_memory_per_block: kibibytes << 10 })
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.compute_capability;
        write!(f, "sm_{major}{minor}")
    }
}

/// What would run a problem.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Explanation {
    /// Forward; or [`Error::Unsupported`], with the reason of each kernel family.
    pub forward: Result<Choice>,
    /// Backward, for all gradients that the problem has; likewise.
    pub backward: Result<Choice>,
}

/// The kernels that were chosen.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Choice {
    /// Their family.
    pub algorithm: &'static str,
    /// Why this family: with what stands against newer ones.
    pub reason: String,
    /// The kernels, in the order in which they run.
    pub kernels: Vec<ChosenKernel>,
    /// Device memory that they work in, in bytes.
    pub workspace_bytes: u64,
}

/// One of the kernels.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ChosenKernel {
    /// The entry point.
    pub entry: &'static str,
    /// Its configuration.
    pub config: Config,
    /// Which of its table it is: what the problem has that it was chosen by.
    pub reason: String,
}

impl Explanation {
    /// For a problem of aligned tensors, on a GPU of this architecture.
    pub fn new(problem: &Problem, kernel: Kernel, architecture: Architecture) -> Self {
        let target = Target::gpu(architecture.compute_capability, architecture.shared_memory_per_block);
        let forward = Plan::new(problem, Access::ANY, kernel, target);
        let optional = Optional { dbias: problem.bias.is_some(), dsinks: problem.sinks };
        let backward = BackwardPlan::new(problem, optional, Access::ANY, kernel, target);
        Explanation {
            forward: forward.map(|plan| Choice {
                algorithm: plan.algorithm(),
                reason: plan.reason(),
                kernels: chosen(plan.kernels(), problem),
                workspace_bytes: plan.workspace.iter().map(Workspace::bytes).fold(0, u64::saturating_add),
            }),
            backward: backward.map(|plan| Choice {
                algorithm: plan.algorithm(),
                reason: plan.reason(),
                kernels: chosen(plan.kernels(), problem),
                workspace_bytes: plan.extra_bytes(),
            }),
        }
    }
}

fn chosen(kernels: Vec<(&'static str, Config)>, problem: &Problem) -> Vec<ChosenKernel> {
    let of = |(entry, config)| ChosenKernel { entry, config, reason: reason(&config, problem) };
    kernels.into_iter().map(of).collect()
}

/// What a kernel is for, in the order in which a table is searched.
fn reason(config: &Config, problem: &Problem) -> String {
    let Config { tf32, headdim, headdim_v, causal, general, from_keys, few, .. } = *config;
    let heads = |k: u32, v: u32| if k == v { format!("headdim {k}") } else { format!("headdim {k}, {v} of v") };
    let is_longer = |built_for: u32, asked: usize| built_for as usize > asked;
    let of_heads = match (headdim, headdim_v) {
        (0, 0) => Some("any headdim".to_owned()),
        _ if is_longer(headdim, problem.headdim) || is_longer(headdim_v, problem.headdim_v) => {
            Some(format!("the next longer heads, {}", heads(headdim, headdim_v)))
        }
        _ => Some(heads(headdim, headdim_v)),
    };
    let of_mask = causal.map(|causal| if causal { "a causal mask" } else { "no mask" });
    let all = [
        tf32.then(|| "f32 that may be multiplied in tf32".to_owned()),
        of_heads,
        of_mask.map(str::to_owned),
        (from_keys > 0).then(|| format!("{from_keys} keys or more")),
        few.then(|| "few queries".to_owned()),
        general.then(|| "what its arguments ask for".to_owned()),
    ];
    all.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inputs::Inputs;
    use crate::layout::Layout;
    use crate::options::AttentionOptions;
    use cuda_std::DType;

    #[test]
    fn architectures_have_a_name_and_shared_memory() {
        let kibibytes = |name: &str| name.parse().map(|Architecture { shared_memory_per_block: s, .. }| s >> 10);
        assert_eq!(["sm_80", "sm_86", "sm_90", "sm_120"].map(kibibytes), [Ok(163), Ok(99), Ok(227), Ok(99)]);
        assert_eq!("sm_90".parse::<Architecture>().expect("known").to_string(), "sm_90");
        for bad in ["sm_75", "sm_", "90", "sm_90a", ""] {
            let refused = bad.parse::<Architecture>().expect_err("unknown").to_string();
            assert_eq!(refused, format!("architecture: {bad:?}; allowed: sm_80 to sm_121"));
        }
    }

    /// Each dtype and headdim has kernels, forward and backward, that the GPUs with the least shared memory can launch.
    #[test]
    fn every_gpu_can_launch_what_is_chosen_for_it() {
        let small: Architecture = "sm_86".parse().expect("known");
        let options = |change: fn(AttentionOptions) -> AttentionOptions| change(AttentionOptions::new());
        let variants = [
            options(|plain| plain),
            options(|plain| plain.causal(true)),
            options(|plain| plain.causal(true).deterministic(true)),
            options(|plain| plain.softcap(5.0)),
            options(|plain| plain.dropout(0.1, 1, 2)),
            options(|plain| plain.allow_tf32(true)),
        ];
        let same = (8..=256).step_by(8).map(|headdim| (headdim, headdim));
        for (headdim, headdim_v) in same.chain([(192, 128), (64, 256), (256, 64), (96, 24), (33, 33)]) {
            let dtypes = [DType::F32, DType::F16, DType::BF16];
            for (dtype, options) in dtypes.into_iter().flat_map(|dtype| variants.iter().map(move |of| (dtype, of))) {
                let of = |headdim| Layout::contiguous(dtype, &[1, 100, 2, headdim]).expect("small");
                let (q, v, bias) = (of(headdim), of(headdim_v), Layout::contiguous(dtype, &[1, 2, 100, 100]));
                let bias = bias.expect("small");
                for bias in [None, Some(&bias)] {
                    let inputs = Inputs { bias, ..Inputs::new(&q, &q, &v) };
                    let problem = Problem::of(&inputs, None, options).expect("valid");
                    let explanation = Explanation::new(&problem, Kernel::Auto, small);
                    for (pass, choice) in [("forward", explanation.forward), ("backward", explanation.backward)] {
                        let what = format!("{pass} of {}, {problem}", dtype.name());
                        let choice = choice.unwrap_or_else(|refused| panic!("{what}: {refused}"));
                        for ChosenKernel { entry, config, .. } in choice.kernels {
                            assert!(config.shared_bytes <= small.shared_memory_per_block, "{what}: {entry}");
                        }
                    }
                }
            }
        }
    }
}
