//! The backward pass on plain pointers.
use cuda_std::sim;
use kernels::flash2_backward::Params;

use super::plans::Plans;
use super::{RawTensor, Stream, check_inputs, launch_all, workspace_addresses};
use crate::cuda::Device;
use crate::dispatch::{BackwardPlan, Optional};
use crate::error::Result;
use crate::inputs::{BackwardInputs, GradientOutputs};
use crate::launch::Launch;
use crate::options::{AttentionOptions, Kernel};
use crate::parameters::{self, Access};
use crate::problem::Problem;
use crate::report::LaunchReport;
use crate::simulator::{self, SimulatorOptions};
use crate::target::{Resources, Target};

/// The arguments of a backward pass.
#[derive(Clone, Debug, PartialEq)]
pub struct BackwardArguments {
    /// The inputs and the results of the forward pass, and the gradients of these. The LSE and its gradient are
    /// contiguous.
    pub inputs: BackwardInputs<RawTensor>,
    /// The gradients, which are written: each shaped like what it is the gradient of. They overlap none of the others.
    pub gradients: GradientOutputs<RawTensor>,
    /// Those of the forward pass.
    pub options: AttentionOptions,
    /// Which kernel family.
    pub kernel: Kernel,
}

/// A backward pass whose arguments fit together, ready to be launched.
#[derive(Clone, Debug)]
pub struct BackwardCall {
    problem: Problem,
    plans: Plans<BackwardPlan>,
    /// All but the addresses of the workspace.
    parameters: Params,
}

impl BackwardCall {
    /// Checks the arguments and chooses the kernels.
    ///
    /// # Errors
    /// As [`Call::new`](super::Call::new), for these arguments.
    pub fn new(arguments: &BackwardArguments) -> Result<Self> {
        Self::planned(arguments, None)
    }

    /// The same for one device, as [`Call::for_device`](super::Call::for_device).
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn for_device(arguments: &BackwardArguments, device: &Device) -> Result<Self> {
        Self::planned(arguments, Some(device.target()))
    }

    fn planned(arguments: &BackwardArguments, target: Option<Target>) -> Result<Self> {
        let BackwardArguments { inputs, gradients, options, kernel } = arguments;
        let layouts = inputs.map(|_, tensor| &tensor.layout);
        let problem = Problem::of(&layouts.forward, None, options)?;
        problem.check_backward(&layouts)?;
        problem.check_gradients(&gradients.map(|_, gradient| &gradient.layout))?;
        check_inputs(&inputs.forward)?;
        inputs.out.check_address("out")?;
        inputs.dout.check_address("dout")?;
        inputs.softmax_lse.check_contiguous("softmax_lse")?;
        inputs.dlse.as_ref().map_or(Ok(()), |dlse| dlse.check_contiguous("dlse"))?;
        gradients.try_map(|argument, gradient| {
            gradient.check_address(argument)?;
            gradient.check_distinct(argument)
        })?;
        gradients.dsinks.as_ref().map_or(Ok(()), |dsinks| dsinks.check_contiguous("dsinks"))?;
        let parameters = parameters::backward(&problem, inputs, gradients);
        let (kernel, optional, access) = (*kernel, Optional::of(gradients), Access::of_backward(inputs, gradients));
        let plans = Plans::new(kernel, target, |target| BackwardPlan::new(&problem, optional, access, kernel, target))?;
        Ok(BackwardCall { problem, plans, parameters })
    }

    /// The problem.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// The kernel family that will run on a device.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) if the kernel that was asked for does not run there.
    pub fn algorithm(&self, device: &Device) -> Result<&'static str> {
        self.plans.on(device.target()).map(BackwardPlan::algorithm)
    }

    /// Device memory that the kernels work in on any device that the call was made for, in bytes. For each row of Q the kernels of
    /// flash2 that [`deterministic`](AttentionOptions::deterministic) asks for keep D = rowsum(dO ∘ O) in f32; all others keep dQ too.
    pub fn workspace_bytes(&self) -> u64 {
        self.plans.workspace_bytes()
    }

    /// The launches on a machine, in a workspace at this address.
    fn launches(&self, target: Target, machine: &Resources, workspace: u64) -> Result<Vec<Launch>> {
        let plan = self.plans.on(target)?;
        let addresses = workspace_addresses(plan.workspace(), workspace)?;
        plan.launches(&self.problem, self.parameters, &addresses, machine)
    }

    /// Puts the launches on a stream. Returns at once; what is in the workspace afterwards means nothing.
    ///
    /// `workspace` is the address of [`workspace_bytes`](Self::workspace_bytes) bytes, a multiple of
    /// [`WORKSPACE_ALIGNMENT`](super::WORKSPACE_ALIGNMENT). The device's primary context is current during the call,
    /// and afterwards the one that was.
    ///
    /// # Errors
    /// As [`Call::launch`](super::Call::launch).
    ///
    /// # Safety
    /// As [`Call::launch`](super::Call::launch), of these tensors; the outputs are the gradients.
    pub unsafe fn launch(&self, device: &'static Device, workspace: u64, stream: Stream) -> Result<Vec<LaunchReport>> {
        let entered = device.enter()?;
        let launches = self.launches(device.target(), &device.resources(&entered), workspace)?;
        // SAFETY: as the caller promises.
        unsafe { launch_all(&launches, device, stream, &entered) }
    }

    /// Runs the launches on a simulated GPU, as [`Call::simulate`](super::Call::simulate).
    ///
    /// # Errors
    /// As [`Call::simulate`](super::Call::simulate).
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::inputs::Inputs;
    use crate::layout::Layout;
    use cuda_std::DType;

    fn tensor(dtype: DType, address: u64, shape: &[usize]) -> RawTensor {
        RawTensor { address, layout: Layout::contiguous(dtype, shape).expect("small") }
    }

    fn arguments() -> BackwardArguments {
        let of_queries = |address| tensor(DType::BF16, address, &[2, 8, 4, 64]);
        let of_keys = |address| tensor(DType::BF16, address, &[2, 5, 2, 64]);
        let lse = tensor(DType::F32, 0x5000, &[2, 4, 8]);
        let forward = Inputs::new(of_queries(0x1000), of_keys(0x2000), of_keys(0x3000));
        BackwardArguments {
            inputs: BackwardInputs::new(forward, of_queries(0x4000), lse, of_queries(0x6000)),
            gradients: GradientOutputs::new(of_queries(0x7000), of_keys(0x8000), of_keys(0x9000)),
            options: AttentionOptions::new(),
            kernel: Kernel::Auto,
        }
    }

    #[test]
    fn the_workspace_holds_d_or_d_q_as_well() {
        let bytes = |kernel, deterministic| {
            let options = AttentionOptions::new().deterministic(deterministic);
            let call = BackwardCall::new(&BackwardArguments { options, kernel, ..arguments() });
            call.expect("valid").workspace_bytes()
        };
        assert_eq!(bytes(Kernel::Flash2, true), 2 * 4 * 8 * 4);
        // 128 rows instead of 8; and counters, of which there are few.
        let with_d_q = 2 * 4 * 128 * (64 + 2) * 4;
        assert_eq!((bytes(Kernel::Auto, false), bytes(Kernel::Auto, true)), (with_d_q, with_d_q + 256));
    }

    #[test]
    fn a_call_knows_what_runs_on_every_gpu() {
        let call = |change: fn(&mut BackwardArguments)| {
            let mut arguments = arguments();
            change(&mut arguments);
            BackwardCall::new(&arguments).expect("valid")
        };
        let on = |call: &BackwardCall, target| {
            call.plans.on(target).map(BackwardPlan::algorithm).map_err(|error| error.to_string())
        };
        let plain = call(|_| ());
        assert_eq!(on(&plain, Target::HOPPER).as_deref(), Ok("flash3"));
        assert_eq!(on(&call(|a| a.options.deterministic = true), Target::HOPPER).as_deref(), Ok("flash3"));
        assert_eq!(on(&plain, Target::OLDEST).as_deref(), Ok("flash2"));
        assert_eq!(on(&plain, Target::SIMULATOR).as_deref(), Ok("flash2"));
        let asked = call(|a| a.kernel = Kernel::Flash3);
        assert_eq!(on(&asked, Target::SIMULATOR).as_deref(), Ok("flash3"));
        let refused = on(&asked, Target::OLDEST).expect_err("no Hopper");
        let expected = "no flash3 kernel on the cuda backend for this problem: flash3: runs on sm_90, not on sm_80";
        assert_eq!(refused, expected);

        let refused = |change: fn(&mut BackwardArguments)| {
            let call = call(change);
            assert_eq!(on(&call, Target::HOPPER).as_deref(), Ok("flash2"));
            call.plans.newest.refused.join("; ")
        };
        let broadcast = refused(|a| {
            a.inputs.dout.layout = Layout::strided(DType::BF16, &[2, 8, 4, 64], &[0, 0, 64, 1]).expect("four strides");
        });
        let strides_of_0 = "flash3 backward: no kernel of bf16 and headdim 64 for strides of 0 or of 2^40 bytes and more; \
             allowed: strides of 1 element to 2^40 bytes";
        assert_eq!(broadcast, strides_of_0);
        let unaligned = refused(|a| a.gradients.dq.address += 8);
        let expected = "for addresses or strides that are no multiples of 16 bytes; allowed: multiples of 16 bytes";
        assert!(unaligned.ends_with(expected), "{unaligned}");
        let empty = refused(|a| {
            let of_queries = |address| tensor(DType::BF16, address, &[2, 0, 4, 64]);
            (a.inputs.forward.q, a.inputs.out) = (of_queries(0x1000), of_queries(0x4000));
            (a.inputs.dout, a.gradients.dq) = (of_queries(0x6000), of_queries(0x7000));
            a.inputs.softmax_lse = tensor(DType::F32, 0x5000, &[2, 4, 0]);
        });
        assert!(empty.ends_with("for seqlen_q 0; allowed: a seqlen_q of 1 or more"), "{empty}");
    }

    #[test]
    fn each_bad_argument_is_named() {
        let refused = |change: fn(&mut BackwardArguments)| {
            let mut arguments = arguments();
            change(&mut arguments);
            BackwardCall::new(&arguments).expect_err("bad").to_string()
        };
        let address = refused(|a| a.gradients.dq.address += 1);
        assert_eq!(address, "dq: address 0x7001; allowed: multiples of 2 bytes");
        let shape = refused(|a| a.gradients.dk.layout = a.gradients.dq.layout.clone());
        assert_eq!(shape, "dk: seqlen is 8; allowed: 5, as of k");
        let shape = refused(|a| a.inputs.dout.layout = a.inputs.forward.k.layout.clone());
        assert_eq!(shape, "dout: seqlen is 5; allowed: 8, as of q");
        let broadcast = |a: &mut BackwardArguments| {
            a.gradients.dv.layout =
                Layout::strided(DType::BF16, &[2, 5, 2, 64], &[0, 128, 64, 1]).expect("four strides");
        };
        assert!(refused(broadcast).starts_with("dv: strides [0, 128, 64, 1]; allowed: those with which no two"));
        let dsinks = refused(|a| a.gradients.dsinks = Some(tensor(DType::F32, 0xa000, &[4])));
        assert_eq!(dsinks, "dsinks: a tensor; allowed: none, as there are no sinks");
        let dbias = |a: &mut BackwardArguments| {
            a.inputs.forward.bias = Some(tensor(DType::BF16, 0xb000, &[1, 4, 8, 5]));
            a.gradients.dbias = Some(tensor(DType::BF16, 0xc000, &[2, 4, 8, 5]));
        };
        assert_eq!(refused(dbias), "dbias: batch is 2; allowed: 1, as of the bias");
        let standard = refused(|a| a.kernel = Kernel::Standard);
        assert!(standard.ends_with("standard has no backward pass; allowed: auto, flash2, flash3"), "{standard}");
    }
}
