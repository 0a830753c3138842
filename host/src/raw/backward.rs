//! The backward pass on plain pointers.
use cuda_std::sim;
use kernels::flash2_backward::Params;

use super::{RawTensor, Stream, check_inputs, launch_all, workspace_addresses, workspace_offsets};
use crate::backend::Backend;
use crate::cuda::Device;
use crate::dispatch::{BackwardPlan, Optional};
use crate::error::Result;
use crate::inputs::{BackwardInputs, GradientOutputs};
use crate::options::{AttentionOptions, Kernel};
use crate::parameters;
use crate::problem::Problem;
use crate::report::LaunchReport;
use crate::simulator::{self, SimulatorOptions};

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
    plan: BackwardPlan,
    /// All but the addresses of the workspace.
    parameters: Params,
}

impl BackwardCall {
    /// Checks the arguments and chooses the kernels.
    ///
    /// # Errors
    /// As [`Call::new`](super::Call::new), for these arguments.
    pub fn new(arguments: &BackwardArguments) -> Result<Self> {
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
        let aligned = parameters.attention.aligned == 1;
        let plan = BackwardPlan::new(&problem, Optional::of(gradients), aligned, *kernel, Backend::Cuda)?;
        Ok(BackwardCall { problem, plan, parameters })
    }

    /// The problem.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// The kernel family that will run.
    pub fn algorithm(&self) -> &'static str {
        self.plan.algorithm()
    }

    /// Device memory that the kernels work in, in bytes. For each row of Q the kernels that
    /// [`deterministic`](AttentionOptions::deterministic) asks for keep D = rowsum(dO ∘ O) in f32; the others keep dQ too.
    pub fn workspace_bytes(&self) -> u64 {
        workspace_offsets(&self.plan.workspace).1
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
        let addresses = workspace_addresses(&self.plan.workspace, workspace)?;
        let launches = self.plan.launches(&self.problem, self.parameters, &addresses, &device.resources())?;
        // SAFETY: as the caller promises.
        unsafe { launch_all(&launches, device, stream) }
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
        let addresses = workspace_addresses(&self.plan.workspace, workspace)?;
        let launches = self.plan.launches(&self.problem, self.parameters, &addresses, &simulator::RESOURCES)?;
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
        let call = |deterministic| {
            let options = AttentionOptions::new().deterministic(deterministic);
            BackwardCall::new(&BackwardArguments { options, ..arguments() }).expect("valid")
        };
        assert_eq!((call(true).workspace_bytes(), call(true).algorithm()), (2 * 4 * 8 * 4, "flash2"));
        // 64 rows instead of 8.
        assert_eq!((call(false).workspace_bytes(), call(false).algorithm()), (2 * 4 * 64 * (64 + 2) * 4, "flash2"));
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
        assert!(standard.ends_with("standard has no backward pass; allowed: auto, flash2"), "{standard}");
    }
}
