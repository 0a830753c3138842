//! What a call tells besides its result.
use cuda_std::DType;
use cuda_std::sim;

use crate::backend::Backend;

/// What ran, where and why, how long it took, and how much memory it needed.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Report {
    /// Where it ran.
    pub backend: Backend,
    /// The name of the device.
    pub device: String,
    /// The kernel family, as `flash2`; on the CPU `tiled online softmax`, and backward `tiled recomputation`.
    pub algorithm: &'static str,
    /// Why this backend and this kernel.
    pub reason: String,
    /// The dtype of inputs and outputs.
    pub dtype: DType,
    /// The shape of the problem, in words.
    pub shape: String,
    /// Seconds that the computation took, without copies between host and device: by CUDA's events on a GPU, by the clock
    /// elsewhere. The median, where it was repeated.
    pub seconds: f64,
    /// Floating-point operations: 4 batch nheads seqlen_q seqlen_k headdim for attention, half of it when causal; 2.5 times
    /// as many for its gradients.
    pub flops: u64,
    /// Bytes of device memory beyond inputs and outputs: the workspace of the kernels and the LSE; of a backward pass, to
    /// which the LSE is an input, the workspace. On the CPU also what its threads work in.
    pub extra_bytes: u64,
    /// The launches, in order; none on the CPU.
    pub launches: Vec<LaunchReport>,
}

impl Report {
    /// Floating-point operations a second, in units of 10^12.
    pub fn tflops(&self) -> f64 {
        if self.seconds > 0.0 { self.flops as f64 / self.seconds * 1e-12 } else { 0.0 }
    }
}

/// One launch of a kernel.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct LaunchReport {
    /// The entry point.
    pub entry: &'static str,
    /// Blocks.
    pub grid: u32,
    /// Threads a block.
    pub block: u32,
    /// Dynamic shared memory a block, in bytes.
    pub shared_bytes: u32,
    /// What the simulated GPU counted, where that ran it.
    pub simulation: Option<sim::Report>,
}
