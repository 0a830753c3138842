//! What can go wrong, in one enum. Every variant names the argument, what it was, and what is allowed.
use cuda_std::tensor::TensorMapError;

use crate::backend::Backend;
use crate::options::Kernel;

/// The result of everything that can fail here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a call was refused or failed. Arguments are checked before anything is launched: after an error of a check,
/// outputs are as they were.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A dtype that does not go with the others, or that an operation does not know.
    #[error("{argument}: dtype {found}; allowed: {allowed}")]
    DType {
        /// Which tensor.
        argument: &'static str,
        /// Its dtype.
        found: &'static str,
        /// What it may be.
        allowed: String,
    },
    /// The wrong number of dimensions.
    #[error("{argument}: {found} dimensions; allowed: {allowed}")]
    Rank {
        /// Which tensor.
        argument: &'static str,
        /// How many dimensions it has.
        found: usize,
        /// How many it needs, and which.
        allowed: &'static str,
    },
    /// A dimension that does not go with the others.
    #[error("{argument}: {dimension} is {found}; allowed: {allowed}")]
    Shape {
        /// Which tensor.
        argument: &'static str,
        /// Which dimension: `batch`, `seqlen`, `nheads`, `headdim`.
        dimension: &'static str,
        /// Its extent.
        found: usize,
        /// What it may be.
        allowed: String,
    },
    /// Data that do not have as many elements as the shape and the strides say.
    #[error("{argument}: {found} elements; shape {shape:?} with strides {strides:?} needs {needed}")]
    Length {
        /// Which tensor.
        argument: &'static str,
        /// Elements there are.
        found: usize,
        /// The shape.
        shape: Vec<usize>,
        /// The strides, in elements.
        strides: Vec<usize>,
        /// Elements it takes.
        needed: String,
    },
    /// Strides that this operation cannot use.
    #[error("{argument}: strides {found:?}; allowed: {allowed}")]
    Stride {
        /// Which tensor.
        argument: &'static str,
        /// Its strides, in elements.
        found: Vec<usize>,
        /// What they may be.
        allowed: &'static str,
    },
    /// An address that is not aligned.
    #[error("{argument}: address {found:#x}; allowed: multiples of {allowed} bytes")]
    Alignment {
        /// Which tensor.
        argument: &'static str,
        /// Its address.
        found: u64,
        /// The alignment that is needed, in bytes.
        allowed: usize,
    },
    /// A tensor that the tensor copy engine cannot address.
    #[error("{argument}: no tensor map: {reason}")]
    TensorMap {
        /// Which tensor.
        argument: &'static str,
        /// What it has, and what is allowed.
        reason: TensorMapError,
    },
    /// Grouped queries whose heads do not divide evenly.
    #[error(
        "nheads is {nheads}, which is no multiple of nheads_k = {nheads_k}: each head of K and V serves nheads / nheads_k heads of Q"
    )]
    HeadGroups {
        /// Heads of Q.
        nheads: usize,
        /// Heads of K and V.
        nheads_k: usize,
    },
    /// A value that an argument cannot have.
    #[error("{argument}: {found}; allowed: {allowed}")]
    Argument {
        /// Which argument.
        argument: &'static str,
        /// Its value.
        found: String,
        /// What it may be.
        allowed: String,
    },
    /// More than an index can count.
    #[error("{what}: {found}; allowed: at most {limit}")]
    TooLarge {
        /// What is too many.
        what: &'static str,
        /// How many.
        found: u128,
        /// How many there may be.
        limit: u128,
    },
    /// The chosen kernel, or all of them, cannot run this problem.
    #[error("no {kernel} kernel on the {backend} backend for this problem: {}", reasons.join("; "))]
    Unsupported {
        /// The kernel that was asked for.
        kernel: Kernel,
        /// Where.
        backend: Backend,
        /// What stands against it: each kernel's reason.
        reasons: Vec<String>,
    },
    /// A word that is not one of the choices.
    #[error("{what}: {found:?}; allowed: {allowed}")]
    Choice {
        /// What was to be chosen.
        what: &'static str,
        /// The word.
        found: String,
        /// The choices.
        allowed: &'static str,
    },
    /// The device has not enough memory.
    #[error("out of device memory: asked for {asked} bytes for {what}, {free} free")]
    OutOfMemory {
        /// What for.
        what: &'static str,
        /// Bytes.
        asked: u64,
        /// Bytes free on the device at that time.
        free: u64,
    },
    /// There is no CUDA driver.
    #[error("no CUDA driver: {reason}")]
    NoDriver {
        /// What the dynamic loader said.
        reason: String,
    },
    /// There is a driver, but not this device.
    #[error("no CUDA device {ordinal}: the driver finds {found}")]
    NoDevice {
        /// The device that was asked for.
        ordinal: u32,
        /// How many there are.
        found: u32,
    },
    /// A tensor that is on another device than the call runs on.
    #[error("{argument}: on CUDA device {found}; allowed: {allowed}, where the call runs")]
    Device {
        /// Which tensor.
        argument: &'static str,
        /// Its device.
        found: u32,
        /// The device of the call.
        allowed: u32,
    },
    /// No kernel here was built for the GPU's architecture.
    #[error("{device} has architecture {found}; allowed: {allowed}")]
    UnsupportedArchitecture {
        /// The GPU's name.
        device: String,
        /// Its architecture: `sm_75`.
        found: String,
        /// What the kernels run on.
        allowed: String,
    },
    /// A kernel that this build does not embed.
    #[error(
        "kernel {entry} is not embedded in this build ({embedded} kernels are): `cargo xtask build-ptx` builds them"
    )]
    MissingKernel {
        /// The entry point.
        entry: &'static str,
        /// How many are embedded.
        embedded: usize,
    },
    /// The simulator, in a build without it.
    #[error("backend simulator: this build leaves it out; the feature `simulator` of ferroflash has it")]
    NoSimulator,
    /// This build embeds no kernels at all.
    #[error("this build embeds no kernels: `cargo xtask build-ptx` builds them")]
    NoKernels,
    /// An embedded kernel that does not unpack.
    #[error("kernel {entry} is damaged in this build: {reason}")]
    BrokenKernel {
        /// The entry point.
        entry: &'static str,
        /// What the decompressor said.
        reason: String,
    },
    /// A kernel needs more shared memory than the GPU has for one block.
    #[error("kernel {entry} needs {needed} bytes of shared memory; {device} has {available} for a block")]
    SharedMemory {
        /// The entry point.
        entry: &'static str,
        /// The GPU's name.
        device: String,
        /// Bytes it needs.
        needed: u32,
        /// Bytes there are.
        available: u32,
    },
    /// The driver refused a call, or reports that an earlier launch failed.
    #[error("{call} failed: {name} ({code}){}{log}", if log.is_empty() { "" } else { ": " })]
    Driver {
        /// The function of the driver.
        call: &'static str,
        /// Its result.
        code: u32,
        /// The name of that.
        name: String,
        /// What the driver's compiler had to say, where it ran.
        log: String,
    },
    /// The simulated GPU found faults in a kernel.
    #[error("the simulator found {} in {entry}:\n{}", count(findings.len(), "fault"), findings.join("\n"))]
    Simulation {
        /// The entry point.
        entry: &'static str,
        /// The faults: kernel, block, thread and source line of each.
        findings: Vec<String>,
    },
}

fn count(n: usize, what: &str) -> String {
    if n == 1 { format!("a {what}") } else { format!("{n} {what}s") }
}
