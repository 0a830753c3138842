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

    /// The memory that its kernels work in.
    fn workspace(&self) -> &[Workspace];
}

impl Planned for Plan {
    fn is_for_hopper(&self) -> bool {
        self.is_for_hopper()
    }

    fn workspace(&self) -> &[Workspace] {
        &self.workspace
    }
}

impl Planned for BackwardPlan {
    fn is_for_hopper(&self) -> bool {
        self.is_for_hopper()
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
    /// With those that all GPUs run, where the newest are for Hopper alone and these can run the problem too.
    elsewhere: Option<P>,
}

impl<P: Planned> Plans<P> {
    /// The plans that `choose` makes, for this kernel: for one machine, or without a `target` for all.
    ///
    /// # Errors
    /// Those of `choose` for the target, or for Hopper, which runs every kernel.
    pub fn new(kernel: Kernel, target: Option<Target>, choose: impl Fn(Target) -> Result<P>) -> Result<Self> {
        if let Some(target) = target {
            return Ok(Plans { kernel, newest: choose(target)?, elsewhere: None });
        }
        let newest = choose(Target::HOPPER)?;
        let elsewhere = if newest.is_for_hopper() { choose(Target::OLDEST).ok() } else { None };
        Ok(Plans { kernel, newest, elsewhere })
    }

    /// The plan for a machine.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the kernel that was asked for does not run there.
    pub fn on(&self, target: Target) -> Result<&P> {
        let refused = if self.newest.is_for_hopper() { target.allow_hopper(self.kernel).err() } else { None };
        match (refused, &self.elsewhere) {
            (None, _) => Ok(&self.newest),
            (Some(_), Some(elsewhere)) => Ok(elsewhere),
            (Some(reason), None) => {
                Err(Error::Unsupported { kernel: self.kernel, backend: target.backend, reasons: vec![reason] })
            }
        }
    }

    /// Device memory that the kernels work in on any machine, in bytes.
    pub fn workspace_bytes(&self) -> u64 {
        let bytes = |plan: &P| workspace_offsets(plan.workspace()).1;
        bytes(&self.newest).max(self.elsewhere.as_ref().map_or(0, bytes))
    }
}
