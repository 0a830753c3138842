//! The machines that kernels are chosen for, and what launches need to know of them.
use std::fmt;

use cuda_std::sim;
use cuda_std::tensor::{TensorMap, TensorMapDescription};
use kernels::{SHARED_BYTES_OF_EVERY_GPU, SHARED_BYTES_OF_LARGEST_GPU};

use crate::backend::Backend;
use crate::error::Result;
use crate::options::Kernel;
use crate::ptx;

/// The compute capability of Hopper: the one GPU that runs kernels for `sm_90a`.
const HOPPER: (u32, u32) = (9, 0);

/// A machine that kernels are chosen for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// What it is.
    pub backend: Backend,
    /// The most shared memory that a block may have, in bytes.
    pub shared_memory: u32,
    against_hopper: Option<AgainstHopper>,
}

/// A reason not to run a kernel for Hopper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AgainstHopper {
    /// The GPU has another compute capability.
    Capability(u32, u32),
    /// This build has no PTX for it.
    NotEmbedded,
    /// The simulated GPU runs it where that is asked for; else the kernels that all GPUs run.
    NotAskedFor,
}

impl Target {
    /// A GPU of Hopper's, and a build with all kernels.
    pub const HOPPER: Target =
        Target { backend: Backend::Cuda, shared_memory: SHARED_BYTES_OF_LARGEST_GPU, against_hopper: None };

    /// The oldest GPU that any kernel here runs on.
    pub const OLDEST: Target = Target {
        backend: Backend::Cuda,
        shared_memory: 163 << 10,
        against_hopper: Some(AgainstHopper::Capability(8, 0)),
    };

    /// A GPU that has no more shared memory than every other.
    pub const SMALLEST: Target = Target {
        backend: Backend::Cuda,
        shared_memory: SHARED_BYTES_OF_EVERY_GPU,
        against_hopper: Some(AgainstHopper::Capability(8, 6)),
    };

    /// The simulated GPU.
    pub const SIMULATOR: Target = Target {
        backend: Backend::Simulator,
        shared_memory: sim::MOST_SHARED_BYTES,
        against_hopper: Some(AgainstHopper::NotAskedFor),
    };

    /// A GPU of this compute capability with so much shared memory a block, in bytes, and this build.
    pub fn gpu(capability: (u32, u32), shared_memory: u32) -> Self {
        let against_hopper = if capability != HOPPER {
            Some(AgainstHopper::Capability(capability.0, capability.1))
        } else if !ptx::embeds_hopper() {
            Some(AgainstHopper::NotEmbedded)
        } else {
            None
        };
        Target { backend: Backend::Cuda, shared_memory, against_hopper }
    }

    /// The same with at most so much shared memory a block, in bytes.
    pub fn with_at_most(self, shared_memory: u32) -> Self {
        Target { shared_memory: self.shared_memory.min(shared_memory), ..self }
    }

    /// Whether kernels for Hopper may run, where this kernel was asked for; else what stands against them.
    pub fn allow_hopper(self, asked: Kernel) -> Result<(), String> {
        self.against_hopper(asked).map_or(Ok(()), |against| Err(format!("flash3: {against}")))
    }

    /// What stands against them.
    pub fn against_hopper(self, asked: Kernel) -> Option<AgainstHopper> {
        self.against_hopper.filter(|&against| against != AgainstHopper::NotAskedFor || asked != Kernel::Flash3)
    }
}

impl fmt::Display for AgainstHopper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            AgainstHopper::Capability(major, minor) => write!(f, "runs on sm_90, not on sm_{major}{minor}"),
            AgainstHopper::NotEmbedded => f.write_str("this build embeds no PTX for sm_90a"),
            AgainstHopper::NotAskedFor => f.write_str("on the simulator it runs where it is asked for"),
        }
    }
}

/// What launches need to know of their machine.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Resources {
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Makes the tensor map that its kernels take.
    pub tensor_map: fn(&TensorMapDescription) -> Result<TensorMap>,
}
