//! Attention on plain pointers: addresses, strides and a CUDA stream, from any framework.
//!
//! ```no_run
//! # use ferroflash::{AttentionOptions, DType, Inputs, Kernel, Layout, cuda, raw};
//! # fn main() -> ferroflash::Result<()> {
//! # let (q, k, v, out, softmax_lse, stream) = (0, 0, 0, 0, 0, std::ptr::null_mut());
//! # let allocate = |_bytes: u64| 0;
//! let tensor = |address| raw::RawTensor { address, layout: Layout::contiguous(DType::BF16, &[2, 4096, 16, 128]).unwrap() };
//! let lse = raw::RawTensor { address: softmax_lse, layout: Layout::contiguous(DType::F32, &[2, 16, 4096])? };
//! let call = raw::Call::new(&raw::Arguments {
//!     inputs: Inputs::new(tensor(q), tensor(k), tensor(v)),
//!     out: tensor(out),
//!     softmax_lse: lse,
//!     options: AttentionOptions::new().causal(true),
//!     kernel: Kernel::Auto,
//! })?;
//! let workspace = allocate(call.workspace_bytes());
//! // SAFETY: the tensors live on this device until the stream has got here.
//! unsafe { call.launch(cuda::Device::get(0)?, workspace, stream)? };
//! # Ok(())
//! # }
//! ```
//!
//! Tensors of tokens, bias and mask may have any strides but of their last dimension, and any address that is a
//! multiple of the size of an element. Kernels are fastest where addresses and strides are multiples of [`ALIGNMENT`]
//! bytes; where they are not, another one runs.
use std::ffi::c_void;

use cuda_std::{Global, sim};
use kernels::attention::{Attention, Untyped};

use crate::cuda::{Device, Entered};
use crate::dispatch::Plan;
use crate::error::{Error, Result};
use crate::inputs::Inputs;
use crate::launch::{Launch, Workspace};
use crate::layout::Layout;
use crate::options::{AttentionOptions, Kernel};
use crate::parameters::{self, Access};
use crate::problem::Problem;
use crate::report::LaunchReport;
use crate::simulator::{self, SimulatorOptions};
use crate::target::{Resources, Target};

mod backward;
mod plans;
mod softmax;

pub use backward::{BackwardArguments, BackwardCall};
pub use softmax::SoftmaxCall;

use plans::Plans;

/// A `CUstream`; null for the default one.
pub type Stream = *mut c_void;

/// What addresses and strides of tensors are multiples of, in bytes, for the fastest kernels: the widest access.
pub const ALIGNMENT: usize = parameters::ALIGNMENT;

/// What the address of a workspace is a multiple of, in bytes.
pub const WORKSPACE_ALIGNMENT: u64 = 256;

/// A tensor in device memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawTensor {
    /// The address of its first element.
    pub address: u64,
    /// Its dtype, shape and strides.
    pub layout: Layout,
}

/// The arguments of attention.
#[derive(Clone, Debug, PartialEq)]
pub struct Arguments {
    /// Q, K, V, and what scores and masks take besides. Slopes and sinks are contiguous, but for a batch dimension.
    pub inputs: Inputs<RawTensor>,
    /// O, which is written: (batch, seqlen_q, nheads, headdim_v), with `cu_seqlens_q` (total_q, nheads, headdim_v).
    /// Overlaps none of the others.
    pub out: RawTensor,
    /// The LSE, which is written: f32, (batch, nheads, seqlen_q), with `cu_seqlens_q` (nheads, total_q), contiguous.
    pub softmax_lse: RawTensor,
    /// Scale, masks and the rest. With `cu_seqlens_q` they say the longest lengths.
    pub options: AttentionOptions,
    /// Which kernel family.
    pub kernel: Kernel,
}

/// A call whose arguments fit together, ready to be launched.
#[derive(Clone, Debug)]
pub struct Call {
    problem: Problem,
    plans: Plans<Plan>,
    attention: Attention,
}

impl Call {
    /// Checks the arguments and chooses the kernels.
    ///
    /// # Errors
    /// Those of [`Problem::of`]; [`Error::Alignment`] for an address that is no multiple of the size of an element;
    /// [`Error::Stride`] for outputs that overlap themselves and for gaps where there may be none;
    /// [`Error::Unsupported`] if the kernel cannot run this problem.
    pub fn new(arguments: &Arguments) -> Result<Self> {
        Self::planned(arguments, None)
    }

    /// The same for one device, which is cheaper: kernels are chosen once, and the workspace is no larger than they need
    /// there. On another device its kernels run if they can.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn for_device(arguments: &Arguments, device: &Device) -> Result<Self> {
        Self::planned(arguments, Some(device.target()))
    }

    fn planned(arguments: &Arguments, target: Option<Target>) -> Result<Self> {
        let Arguments { inputs, out, softmax_lse, options, kernel } = arguments;
        let problem = Problem::of(&inputs.map(|_, tensor| &tensor.layout), None, options)?;
        problem.check_outputs(&out.layout, None)?;
        problem.check_rows("softmax_lse", &softmax_lse.layout)?;
        check_inputs(inputs)?;
        out.check_address("out")?;
        out.check_distinct("out")?;
        softmax_lse.check_contiguous("softmax_lse")?;
        let attention = parameters::attention(&problem, inputs, out, softmax_lse.address);
        let (kernel, access) = (*kernel, Access::of(inputs, out));
        let plans = Plans::new(kernel, target, |target| Plan::new(&problem, access, kernel, target))?;
        Ok(Call { problem, plans, attention })
    }

    /// The problem.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// The kernel family that will run on a device.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the kernel that was asked for does not run there.
    pub fn algorithm(&self, device: &Device) -> Result<&'static str> {
        self.plans.on(device.target()).map(Plan::algorithm)
    }

    /// Device memory that the kernels work in on any device that the call was made for, in bytes; none for
    /// FlashAttention-2, and for -3 where it divides no keys.
    pub fn workspace_bytes(&self) -> u64 {
        self.plans.workspace_bytes()
    }

    /// The launches on a machine, in a workspace at this address.
    fn launches(&self, target: Target, machine: &Resources, workspace: u64) -> Result<Vec<Launch>> {
        let plan = self.plans.on(target)?;
        let addresses = workspace_addresses(&plan.workspace, workspace)?;
        plan.launches(&self.problem, self.attention, &addresses, machine)
    }

    /// Puts the launches on a stream. Returns at once; what is in the workspace afterwards means nothing.
    ///
    /// `workspace` is the address of [`workspace_bytes`](Self::workspace_bytes) bytes, a multiple of
    /// [`WORKSPACE_ALIGNMENT`]. The device's primary context is current during the call, and afterwards the one that was.
    ///
    /// # Errors
    /// [`Error::Alignment`] for the workspace; [`Error::Unsupported`] if the kernel that was asked for does not run on
    /// this device; [`Error::MissingKernel`]; [`Error::UnsupportedArchitecture`]; [`Error::Driver`]. A kernel that fails
    /// while it runs shows at the next synchronisation.
    ///
    /// # Safety
    /// The tensors and the workspace lie in memory of `device`, as large as their layouts say, until the stream has
    /// done the launches; outputs and workspace overlap nothing else, and nothing else uses them meanwhile.
    /// `cu_seqlens_q` and `cu_seqlens_k` then hold numbers that begin with 0, never fall, and end with total_q and
    /// total_k, no two neighbours further apart than the options say that the longest sequences are. `stream` is a
    /// stream of the device's primary context, or null.
    pub unsafe fn launch(&self, device: &'static Device, workspace: u64, stream: Stream) -> Result<Vec<LaunchReport>> {
        let entered = device.enter()?;
        let launches = self.launches(device.target(), &device.resources(&entered), workspace)?;
        // SAFETY: as the caller promises.
        unsafe { launch_all(&launches, device, stream, &entered) }
    }

    /// Runs the launches on a simulated GPU, in whose memory the tensors and the workspace are, and waits for them. The
    /// same kernels with the same arguments as [`launch`](Self::launch)'s; but addresses need no promise, as each
    /// access is checked.
    ///
    /// # Errors
    /// [`Error::Alignment`] for the workspace; [`Error::Simulation`] for a kernel that accesses what is not allocated,
    /// or is at fault otherwise.
    pub fn simulate(
        &self,
        memory: &sim::Memory,
        workspace: u64,
        options: &SimulatorOptions,
    ) -> Result<Vec<LaunchReport>> {
        let launches = self.launches(Target::SIMULATOR, &simulator::RESOURCES, workspace)?;
        launches.iter().map(|launch| simulator::run(launch, memory, options)).collect()
    }
}

/// Where each part of a workspace begins, and where the last ends.
fn workspace_offsets(workspace: &[Workspace]) -> (Vec<u64>, u64) {
    let mut end = 0u64;
    let begin = |part: &Workspace| {
        let begin = end;
        end = end.saturating_add(part.bytes()).checked_next_multiple_of(WORKSPACE_ALIGNMENT).unwrap_or(u64::MAX);
        begin
    };
    (workspace.iter().map(begin).collect(), end)
}

/// Where each part of the workspace at `address` is.
fn workspace_addresses(workspace: &[Workspace], address: u64) -> Result<Vec<Global<Untyped>>> {
    let (offsets, bytes) = workspace_offsets(workspace);
    if bytes > 0 {
        check_address("workspace", address, WORKSPACE_ALIGNMENT as usize)?;
    }
    Ok(offsets.iter().map(|offset| parameters::global(address.wrapping_add(*offset))).collect())
}

/// Puts launches on a stream of a device.
///
/// # Safety
/// As [`Call::launch`].
unsafe fn launch_all(
    launches: &[Launch],
    device: &'static Device,
    stream: Stream,
    entered: &Entered,
) -> Result<Vec<LaunchReport>> {
    device.load(launches, entered)?;
    for launch in launches {
        // SAFETY: as the caller promises.
        unsafe { device.launch(launch, stream, entered)? };
    }
    Ok(launches.iter().map(Launch::report).collect())
}

/// Checks the addresses of inputs, and that those are contiguous whose strides kernels do not ask for.
fn check_inputs(inputs: &Inputs<RawTensor>) -> Result<()> {
    inputs.try_map(|argument, tensor| tensor.check_address(argument))?;
    if let Some(slopes) = &inputs.alibi_slopes {
        slopes.check_contiguous_rows("alibi_slopes")?;
    }
    inputs.sinks.as_ref().map_or(Ok(()), |sinks| sinks.check_contiguous_rows("sinks"))
}

impl RawTensor {
    /// Checks that elements may be read at this address.
    fn check_address(&self, argument: &'static str) -> Result<()> {
        if self.layout.is_empty() {
            return Ok(());
        }
        check_address(argument, self.address, self.layout.dtype().bytes())
    }

    fn check_distinct(&self, argument: &'static str) -> Result<()> {
        self.check_strides(argument, self.layout.is_distinct(), "those with which no two elements share memory")
    }

    fn check_contiguous_rows(&self, argument: &'static str) -> Result<()> {
        self.check_strides(argument, self.layout.has_contiguous_rows(), "a last stride of 1")
    }

    /// Checks that this may be read or written as one row of elements.
    fn check_contiguous(&self, argument: &'static str) -> Result<()> {
        self.check_address(argument)?;
        self.check_strides(argument, self.layout.is_contiguous(), "those of a contiguous tensor")
    }

    fn check_strides(&self, argument: &'static str, passed: bool, allowed: &'static str) -> Result<()> {
        if passed { Ok(()) } else { Err(Error::Stride { argument, found: self.layout.strides().to_vec(), allowed }) }
    }
}

fn check_address(argument: &'static str, found: u64, allowed: usize) -> Result<()> {
    if found != 0 && found.is_multiple_of(allowed as u64) {
        return Ok(());
    }
    Err(Error::Alignment { argument, found, allowed })
}

#[cfg(test)]
mod tests {
    use super::*;
    use cuda_std::DType;

    const SHAPE: [usize; 4] = [1, 8, 2, 64];

    fn tensor(dtype: DType, address: u64, shape: &[usize]) -> RawTensor {
        RawTensor { address, layout: Layout::contiguous(dtype, shape).expect("small") }
    }

    fn arguments() -> Arguments {
        let tokens = |address| tensor(DType::F16, address, &SHAPE);
        Arguments {
            inputs: Inputs::new(tokens(0x1000), tokens(0x2000), tokens(0x3000)),
            out: tokens(0x4000),
            softmax_lse: tensor(DType::F32, 0x5000, &[1, 2, 8]),
            options: AttentionOptions::new(),
            kernel: Kernel::Auto,
        }
    }

    fn refused(change: fn(&mut Arguments)) -> String {
        let mut arguments = arguments();
        change(&mut arguments);
        Call::new(&arguments).expect_err("bad").to_string()
    }

    #[test]
    fn each_bad_argument_is_named() {
        assert_eq!(refused(|a| a.inputs.k.address += 1), "k: address 0x2001; allowed: multiples of 2 bytes");
        assert_eq!(refused(|a| a.softmax_lse.address = 0), "softmax_lse: address 0x0; allowed: multiples of 4 bytes");
        let short = refused(|a| a.softmax_lse = tensor(DType::F32, 0x5000, &[1, 2, 7]));
        assert_eq!(short, "softmax_lse: seqlen is 7; allowed: 8, as of q");
        let overlap = |a: &mut Arguments| {
            a.out.layout = Layout::strided(DType::F16, &SHAPE, &[0, 0, 64, 1]).expect("four strides");
        };
        assert!(refused(overlap).starts_with("out: strides [0, 0, 64, 1]; allowed: those with which no two"));
        let slopes = |a: &mut Arguments| {
            let layout = Layout::strided(DType::F32, &[2], &[2]).expect("one stride");
            a.inputs.alibi_slopes = Some(RawTensor { address: 0x6000, layout });
        };
        assert_eq!(refused(slopes), "alibi_slopes: strides [2]; allowed: a last stride of 1");
        let lengths = |a: &mut Arguments| {
            let tokens = |address| tensor(DType::F16, address, &SHAPE[1..]);
            let starts = tensor(DType::I32, 0x6000, &[3]);
            a.inputs = Inputs::new(tokens(0x1000), tokens(0x2000), tokens(0x3000)).cu_seqlens(starts.clone(), starts);
        };
        assert_eq!(refused(lengths), "max_seqlen_q: none; allowed: a number: cu_seqlens is in device memory");
    }

    #[test]
    fn elders_refuse_what_is_not_aligned() {
        let unaligned = |a: &mut Arguments| {
            a.kernel = Kernel::Flash1;
            a.inputs.v.layout = Layout::strided(DType::F16, &SHAPE, &[1056, 132, 64, 1]).expect("four strides");
        };
        let reason = refused(unaligned);
        assert!(reason.contains("addresses or strides that are no multiples of 16 bytes"), "{reason}");
        assert_eq!(Call::new(&arguments()).expect("valid").attention.aligned, 1);
    }

    #[test]
    fn a_call_knows_what_runs_on_every_gpu() {
        let call = |change: fn(&mut Arguments)| {
            let mut arguments = arguments();
            change(&mut arguments);
            Call::new(&arguments).expect("valid")
        };
        let on = |call: &Call, target| call.plans.on(target).map(Plan::algorithm).map_err(|error| error.to_string());
        let plain = call(|_| ());
        assert_eq!(on(&plain, Target::HOPPER).as_deref(), Ok("flash3"));
        assert_eq!(on(&plain, Target::OLDEST).as_deref(), Ok("flash2"));
        assert_eq!(on(&plain, Target::SIMULATOR).as_deref(), Ok("flash2"));
        let asked = call(|a| a.kernel = Kernel::Flash3);
        assert_eq!(on(&asked, Target::SIMULATOR).as_deref(), Ok("flash3"));
        let refused = on(&asked, Target::OLDEST).expect_err("no Hopper");
        let expected = "no flash3 kernel on the cuda backend for this problem: flash3: runs on sm_90, not on sm_80";
        assert_eq!(refused, expected);
        let broadcast = call(|a| {
            a.inputs.k.layout = Layout::strided(DType::F16, &SHAPE, &[0, 0, 64, 1]).expect("four strides");
        });
        assert_eq!(on(&broadcast, Target::HOPPER).as_deref(), Ok("flash2"));
        let strides_of_0 = "flash3: no kernel of f16 and headdim 64 for strides of 0 or of 2^40 bytes and more; \
                            allowed: strides of 1 element to 2^40 bytes";
        assert_eq!(broadcast.plans.newest.refused, [strides_of_0]);
        assert_eq!(on(&call(|a| a.options.softcap = Some(9.0)), Target::HOPPER).as_deref(), Ok("flash3"));
        assert_eq!(on(&call(|a| a.options.softcap = Some(1e30)), Target::HOPPER).as_deref(), Ok("flash2"));
    }

    #[test]
    fn a_call_has_a_plan_for_gpus_with_less_shared_memory() {
        let call = |target| {
            let mut arguments = Arguments { kernel: Kernel::Flash2, ..arguments() };
            let tokens = |address, headdim| tensor(DType::F16, address, &[1, 8, 2, headdim]);
            arguments.inputs = Inputs::new(tokens(0x1_0000, 192), tokens(0x2_0000, 192), tokens(0x3_0000, 128));
            arguments.out = tokens(0x4_0000, 128);
            Call::planned(&arguments, target).expect("valid")
        };
        let shared_bytes =
            |call: &Call, target| call.plans.on(target).map(Plan::shared_bytes).map_err(|error| error.to_string());
        let everywhere = call(None);
        for large in [Target::HOPPER, Target::OLDEST] {
            assert_eq!(shared_bytes(&everywhere, large), Ok(131_072));
        }
        assert!(shared_bytes(&everywhere, Target::SMALLEST).is_ok_and(|bytes| bytes <= Target::SMALLEST.shared_memory));
        let refused = shared_bytes(&call(Some(Target::HOPPER)), Target::SMALLEST).expect_err("it has less");
        assert!(refused.ends_with("131072 bytes of shared memory a block; allowed on this GPU: 101376"), "{refused}");
    }

    #[test]
    fn a_call_for_one_gpu_has_one_plan() {
        let on = |planned_for, target| {
            let call = Call::planned(&arguments(), Some(planned_for)).expect("valid");
            call.plans.on(target).map(Plan::algorithm).map_err(|error| error.to_string())
        };
        assert_eq!(on(Target::HOPPER, Target::HOPPER).as_deref(), Ok("flash3"));
        assert_eq!(on(Target::OLDEST, Target::OLDEST).as_deref(), Ok("flash2"));
        assert_eq!(on(Target::OLDEST, Target::HOPPER).as_deref(), Ok("flash2"));
        let refused = on(Target::HOPPER, Target::OLDEST).expect_err("no Hopper");
        let expected = "no auto kernel on the cuda backend for this problem: flash3: runs on sm_90, not on sm_80";
        assert_eq!(refused, expected);
    }

    #[test]
    fn the_workspace_holds_what_the_kernel_keeps_in_hbm() {
        let bytes = |kernel| Call::new(&Arguments { kernel, ..arguments() }).expect("valid").workspace_bytes();
        // O in f32, l and m; S and P of 64 columns.
        assert_eq!(bytes(Kernel::Flash1), 8 * 2 * 64 * 4 + 2 * 256);
        assert_eq!(bytes(Kernel::Standard), 2 * (8 * 2 * 64 * 2));
        assert_eq!(bytes(Kernel::Flash2), 0);
    }
}
