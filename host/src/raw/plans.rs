//! The plans of a call, which learns only when it is launched what machine it runs on.
use super::workspace_offsets;
use crate::dispatch::{BackwardPlan, Plan};
use crate::error::{Error, Result};
use crate::launch::Workspace;
use crate::options::Kernel;
use crate::target::{AgainstHopper, Target};
use std::fmt;

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

/// What stands against a plan. It is put into words only where someone hears them.
enum Refusal {
    Hopper(AgainstHopper),
    SharedMemory { needed: u32, allowed: u32 },
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Refusal::Hopper(against) => write!(f, "flash3: {against}"),
            Refusal::SharedMemory { needed, allowed } => {
                write!(f, "{needed} bytes of shared memory a block; allowed on this GPU: {allowed}")
            }
        }
    }
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
                if plans.all().all(|plan| plans.refusal(plan, other).is_some()) {
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
        self.all().find(|plan| self.refusal(plan, target).is_none()).ok_or_else(|| Error::Unsupported {
            kernel: self.kernel,
            backend: target.backend,
            reasons: self.all().filter_map(|plan| Some(self.refusal(plan, target)?.to_string())).collect(),
        })
    }

    /// All of them, in the order in which they are preferred.
    fn all(&self) -> impl Iterator<Item = &P> {
        std::iter::once(&self.newest).chain(&self.others)
    }

    /// Why a plan does not run on a machine, if it does not.
    fn refusal(&self, plan: &P, target: Target) -> Option<Refusal> {
        let against_hopper = if plan.is_for_hopper() { target.against_hopper(self.kernel) } else { None };
        let (needed, allowed) = (plan.shared_bytes(), target.shared_memory);
        let shared_memory = (needed > allowed).then_some(Refusal::SharedMemory { needed, allowed });
        against_hopper.map(Refusal::Hopper).or(shared_memory)
    }

    /// Device memory that the kernels work in on any machine, in bytes.
    pub fn workspace_bytes(&self) -> u64 {
        let bytes = |plan: &P| workspace_offsets(plan.workspace()).1;
        self.others.iter().map(bytes).fold(bytes(&self.newest), u64::max)
    }
}
