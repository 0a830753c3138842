//! The plans of a call, which learns only when it is launched what machine it runs on.
use super::workspace_offsets;
use crate::dispatch::{BackwardPlan, Plan};
use crate::error::{Error, Result};
use crate::launch::Workspace;
use crate::options::Kernel;
use crate::target::Target;

/// What a call asks its plans.
pub(super) trait Planned {
    /// Whether its kernels are for Hopper alone.
    fn is_for_hopper(&self) -> bool;

    /// The shared memory that they need, in bytes a block.
    fn shared_bytes(&self) -> u32;

    /// The memory that its kernels work in.
    fn workspace(&self) -> &[Workspace];
}

impl Planned for Plan {
    fn is_for_hopper(&self) -> bool {
        self.is_for_hopper()
    }

    fn shared_bytes(&self) -> u32 {
        self.shared_bytes()
    }

    fn workspace(&self) -> &[Workspace] {
        &self.workspace
    }
}

impl Planned for BackwardPlan {
    fn is_for_hopper(&self) -> bool {
        self.is_for_hopper()
    }

    fn shared_bytes(&self) -> u32 {
        self.shared_bytes()
    }

    fn workspace(&self) -> &[Workspace] {
        self.workspace()
    }
}

/// A plan for each machine.
#[derive(Clone, Debug)]
pub(super) struct Plans<P> {
    kernel: Kernel,
    /// With the newest kernels.
    pub newest: P,
    /// With those for other machines, the larger ones first, where they cannot run the ones before.
    others: Vec<P>,
}

impl<P: Planned> Plans<P> {
    /// The plans that `choose` makes, for this kernel: for one machine, or without a `target` for all.
    ///
    /// # Errors
    /// Those of `choose` for the target, or for Hopper, which runs every kernel.
    pub fn new(kernel: Kernel, target: Option<Target>, choose: impl Fn(Target) -> Result<P>) -> Result<Self> {
        let mut plans = Plans { kernel, newest: choose(target.unwrap_or(Target::HOPPER))?, others: Vec::new() };
        if target.is_none() {
            for other in [Target::OLDEST, Target::SMALLEST] {
                if !plans.all().any(|plan| plans.runs(plan, other)) {
                    plans.others.extend(choose(other));
                }
            }
        }
        Ok(plans)
    }

    /// The plan for a machine.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the kernel that was asked for does not run there.
    pub fn on(&self, target: Target) -> Result<&P> {
        self.all().find(|plan| self.runs(plan, target)).ok_or_else(|| Error::Unsupported {
            kernel: self.kernel,
            backend: target.backend,
            reasons: self.all().filter_map(|plan| self.refusal(plan, target)).collect(),
        })
    }

    /// All of them, in the order in which they are preferred.
    fn all(&self) -> impl Iterator<Item = &P> {
        std::iter::once(&self.newest).chain(&self.others)
    }

    /// Whether a plan runs on a machine: there is no [`refusal`](Self::refusal), which takes longer to say.
    fn runs(&self, plan: &P, target: Target) -> bool {
        (!plan.is_for_hopper() || target.allows_hopper(self.kernel)) && plan.shared_bytes() <= target.shared_memory
    }

    /// Why a plan does not run on a machine, if it does not.
    fn refusal(&self, plan: &P, target: Target) -> Option<String> {
        if plan.is_for_hopper()
            && let Err(reason) = target.allow_hopper(self.kernel)
        {
            return Some(reason);
        }
        let (needed, allowed) = (plan.shared_bytes(), target.shared_memory);
        (needed > allowed).then(|| format!("{needed} bytes of shared memory a block; allowed on this GPU: {allowed}"))
    }

    /// Device memory that the kernels work in on any machine, in bytes.
    pub fn workspace_bytes(&self) -> u64 {
        let bytes = |plan: &P| workspace_offsets(plan.workspace()).1;
        self.others.iter().map(bytes).fold(bytes(&self.newest), u64::max)
    }
}
