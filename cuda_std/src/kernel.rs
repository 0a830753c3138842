//! Kernels as a host sees them.

/// One entry point: a kernel function with all its generic parameters fixed.
///
/// The attribute [`kernel`](macro@crate::kernel) makes a table of these where it stands above a generic function.
#[derive(Clone, Copy, Debug)]
pub struct Kernel<P, C> {
    /// The name of the entry point in PTX, and in every report.
    pub name: &'static str,
    /// What a host needs to choose and to launch it.
    pub config: C,
    /// What it is built for: `sm_80`, which later GPUs run too, or `sm_90a`, which only Hopper runs.
    pub arch: &'static str,
    /// Blocks of a cluster: 1, if it says nothing of clusters.
    pub cluster: u32,
    /// The kernel itself, to run on the simulated GPU, if this build [has it](HAS_SIMULATOR).
    #[cfg(not(target_arch = "nvptx64"))]
    pub run: fn(P),
    #[doc(hidden)]
    pub parameters: core::marker::PhantomData<fn(P)>,
}

/// Whether kernels can run on the simulated GPU: the feature `simulator`. A program that leaves it out is smaller and compiles
/// faster, as no kernel is compiled for the CPU.
pub const HAS_SIMULATOR: bool = cfg!(feature = "simulator");

/// The function of a kernel, if this build simulates kernels.
#[cfg(feature = "simulator")]
#[doc(hidden)]
#[macro_export]
macro_rules! simulated {
    ($kernel:expr) => {
        $kernel
    };
}

/// As above.
#[cfg(not(feature = "simulator"))]
#[doc(hidden)]
#[macro_export]
macro_rules! simulated {
    ($kernel:expr) => {
        $crate::not_simulated
    };
}

/// In the place of a kernel that is not simulated.
#[doc(hidden)]
pub fn not_simulated<P>(_: P) {
    unreachable!("a host asks HAS_SIMULATOR before it simulates a launch")
}
