//! The backward pass on plain pointers.
use cuda_std::Global;
use kernels::attention::Attention;
use kernels::flash2_backward::Params;

use super::{RawTensor, Stream, WORKSPACE_ALIGNMENT, check_address};
use crate::backend::Backend;
use crate::cuda::Device;
use crate::dispatch::BackwardPlan;
use crate::error::Result;
use crate::launch::Launch;
use crate::machine::{arguments as machine_arguments, nowhere};
use crate::options::{AttentionOptions, Kernel};
use crate::problem::Problem;
use crate::report::LaunchReport;

/// The arguments of a backward pass.
#[derive(Clone, Debug, PartialEq)]
pub struct BackwardArguments {
    /// Q: (batch, seqlen_q, nheads, headdim).
    pub q: RawTensor,
    /// K: (batch, seqlen_k, nheads_k, headdim).
    pub k: RawTensor,
    /// V: (batch, seqlen_k, nheads_k, headdim).
    pub v: RawTensor,
    /// O of the forward pass: (batch, seqlen_q, nheads, headdim).
    pub out: RawTensor,
    /// The address of the LSE of the forward pass: batch x nheads x seqlen_q numbers, f32, contiguous.
    pub softmax_lse: u64,
    /// dO: shaped like O.
    pub dout: RawTensor,
    /// dQ, which is written: shaped like Q. The gradients overlap none of the others.
    pub dq: RawTensor,
    /// dK, which is written: shaped like K.
    pub dk: RawTensor,
    /// dV, which is written: shaped like V.
    pub dv: RawTensor,
    /// Scale and mask: those of the forward pass.
    pub options: AttentionOptions,
    /// Which kernel family.
    pub kernel: Kernel,
}

/// A backward pass whose arguments fit together, ready to be launched.
#[derive(Clone, Debug)]
pub struct BackwardCall {
    problem: Problem,
    plan: BackwardPlan,
    /// All but the address of D, which comes with the workspace.
    parameters: Params,
    gradients: [RawTensor; 3],
}

impl BackwardCall {
    /// Checks the arguments and chooses the kernels.
    ///
    /// # Errors
    /// As [`Call::new`](super::Call::new), for these arguments.
    pub fn new(arguments: &BackwardArguments) -> Result<Self> {
        let BackwardArguments { q, k, v, out, softmax_lse, dout, dq, dk, dv, options, kernel } = arguments;
        let problem = Problem::new(&q.layout, &k.layout, &v.layout, options)?;
        let (of_queries, of_keys) = (problem.out_shape(), problem.k_shape());
        for (argument, tensor, shape, of) in [
            ("out", out, &of_queries, "q"),
            ("dout", dout, &of_queries, "q"),
            ("dq", dq, &problem.q_shape(), "q"),
            ("dk", dk, &of_keys, "k"),
            ("dv", dv, &problem.v_shape(), "v"),
        ] {
            problem.check_like(argument, &tensor.layout, shape, of)?;
            tensor.check_alignment(argument)?;
        }
        for (argument, tensor) in [("q", q), ("k", k), ("v", v)] {
            tensor.check_alignment(argument)?;
        }
        for (argument, gradient) in [("dq", dq), ("dk", dk), ("dv", dv)] {
            gradient.check_distinct(argument)?;
        }
        check_address("softmax_lse", *softmax_lse, align_of::<f32>())?;
        let plan = BackwardPlan::new(&problem, *kernel, Backend::Cuda)?;
        // SAFETY: what is at the address `launch` asks its caller about.
        let lse = unsafe { Global::from_address(*softmax_lse) };
        let attention = Attention {
            q: q.tensor(),
            k: k.tensor(),
            v: v.tensor(),
            o: out.tensor(),
            ..machine_arguments(&problem, lse)
        };
        let parameters = Params {
            attention,
            d_o: dout.tensor(),
            d_q: dq.tensor(),
            d_k: dk.tensor(),
            d_v: dv.tensor(),
            d_lse: Global::NULL,
            row_sums: Global::NULL,
            d_bias: nowhere(),
            bias_batch: 1,
            bias_heads: 1,
            bias_rows: 1,
            d_sinks: Global::NULL,
        };
        Ok(BackwardCall { problem, plan, parameters, gradients: [dq, dk, dv].map(Clone::clone) })
    }

    /// The problem.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// The kernel family that will run.
    pub fn algorithm(&self) -> &'static str {
        self.plan.algorithm()
    }

    /// Device memory that the kernels work in, in bytes: D = rowsum(dO ∘ O), batch x nheads x seqlen_q numbers in f32.
    pub fn workspace_bytes(&self) -> u64 {
        self.plan.workspace(&self.problem).bytes().next_multiple_of(WORKSPACE_ALIGNMENT)
    }

    /// Puts the launches on a stream. Returns at once; what is in the workspace afterwards means nothing.
    ///
    /// `workspace` is the address of [`workspace_bytes`](Self::workspace_bytes) bytes, a multiple of
    /// [`WORKSPACE_ALIGNMENT`]. The device's primary context is current during the call, and afterwards the one that was.
    ///
    /// # Errors
    /// As [`Call::launch`](super::Call::launch).
    ///
    /// # Safety
    /// The tensors, the LSE and the workspace lie in memory of `device`, as large as their layouts say, until the stream has
    /// done the launches; gradients and workspace overlap nothing else, and nothing else uses them meanwhile. `stream` is a
    /// stream of the device's primary context, or null.
    pub unsafe fn launch(&self, device: &'static Device, workspace: u64, stream: Stream) -> Result<Vec<LaunchReport>> {
        let entered = device.enter()?;
        if self.problem.rows() == 0 || self.problem.seqlen_k == 0 {
            for gradient in &self.gradients {
                // SAFETY: as the caller promises.
                unsafe { gradient.fill_with_zeros(stream)? };
            }
            return Ok(Vec::new());
        }
        check_address("workspace", workspace, WORKSPACE_ALIGNMENT as usize)?;
        // SAFETY: as the caller promises.
        let row_sums = unsafe { Global::from_address(workspace) };
        let launches = self.plan.launches(&self.problem, Params { row_sums, ..self.parameters })?;
        device.load(&launches, &entered)?;
        for launch in &launches {
            // SAFETY: as the caller promises.
            unsafe { device.launch(launch, stream, &entered)? };
        }
        Ok(launches.iter().map(Launch::report).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layout;
    use cuda_std::DType;

    fn arguments() -> BackwardArguments {
        let tensor = |address, shape: [usize; 4]| RawTensor {
            address,
            layout: Layout::contiguous(DType::BF16, &shape).expect("small"),
        };
        let (of_queries, of_keys) = ([2, 8, 4, 64], [2, 5, 2, 64]);
        BackwardArguments {
            q: tensor(0x1000, of_queries),
            k: tensor(0x2000, of_keys),
            v: tensor(0x3000, of_keys),
            out: tensor(0x4000, of_queries),
            softmax_lse: 0x5000,
            dout: tensor(0x6000, of_queries),
            dq: tensor(0x7000, of_queries),
            dk: tensor(0x8000, of_keys),
            dv: tensor(0x9000, of_keys),
            options: AttentionOptions::new(),
            kernel: Kernel::Auto,
        }
    }

    #[test]
    fn the_workspace_holds_a_number_for_each_row() {
        let call = BackwardCall::new(&arguments()).expect("valid");
        assert_eq!((call.workspace_bytes(), call.algorithm()), (2 * 4 * 8 * 4, "flash2"));
    }

    #[test]
    fn each_bad_argument_is_named() {
        let refused = |change: fn(&mut BackwardArguments)| {
            let mut arguments = arguments();
            change(&mut arguments);
            BackwardCall::new(&arguments).expect_err("bad").to_string()
        };
        assert_eq!(refused(|a| a.dq.address += 2), "dq: address 0x7002; allowed: multiples of 16 bytes");
        assert_eq!(refused(|a| a.dk.layout = a.dq.layout.clone()), "dk: seqlen is 8; allowed: 5, as of k");
        assert_eq!(refused(|a| a.dout.layout = a.k.layout.clone()), "dout: seqlen is 5; allowed: 8, as of q");
        let broadcast = |a: &mut BackwardArguments| {
            a.dv.layout = Layout::strided(DType::BF16, &[2, 5, 2, 64], &[0, 128, 64, 1]).expect("four strides");
        };
        assert!(refused(broadcast).starts_with("dv: strides [0, 128, 64, 1]; allowed: those with which no two"));
        let standard = refused(|a| a.kernel = Kernel::Standard);
        assert!(standard.ends_with("standard has no backward pass; allowed: auto, flash2"), "{standard}");
    }
}
