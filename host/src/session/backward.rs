//! The backward pass: gradients of Q, K and V, of the bias and of the sinks, from that of O.
use std::time::Instant;

use cuda_std::DType;

use super::{Executor, Session, posed};
use crate::cpu;
use crate::cuda::Gpu;
use crate::dispatch::{BackwardPlan, Optional};
use crate::element::{Element, with_element};
use crate::error::Result;
use crate::heads::{Heads, HeadsMut};
use crate::inputs::{BackwardInputs, GradientOutputs, Inputs};
use crate::machine;
use crate::operands::Operands;
use crate::options::AttentionOptions;
use crate::parameters::Access;
use crate::problem::Problem;
use crate::report::{LaunchReport, Report};
use crate::simulator::Simulator;
use crate::tensor::{Tensor, TensorMut, TensorRef};

/// Gradients of attention.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Gradients {
    /// dQ: (batch, seqlen_q, nheads, headdim), in the dtype of Q. 0 in a row that sees no key.
    pub dq: Tensor,
    /// dK: (batch, seqlen_k, nheads_k, headdim), in the dtype of K, summed over the heads of Q that read the head.
    pub dk: Tensor,
    /// dV: (batch, seqlen_k, nheads_k, headdim_v), in the dtype of V, summed likewise.
    pub dv: Tensor,
    /// The gradient of the bias, if there is one: of its shape and dtype, summed over what it is broadcast to.
    pub dbias: Option<Tensor>,
    /// The gradient of the sinks, if there are any: (nheads), f32.
    pub dsinks: Option<Tensor>,
    /// What ran.
    pub report: Report,
}

/// dQ, dK and dV, the gradients of a loss whose gradient with respect to O is dO, on the backend that
/// [`Backend::auto`](crate::Backend::auto) chooses.
///
/// `out` and `softmax_lse` are what [`attention`](crate::attention()) returned for the same Q, K, V and options; `dout`, dO,
/// has the shape and the dtype of `out`. [`attention_backward_with`] takes more tensors.
///
/// ```
/// use ferroflash::{AttentionOptions, Tensor, attention, attention_backward};
///
/// # fn main() -> Result<(), ferroflash::Error> {
/// let (x, options) = (Tensor::from_vec(vec![0.5f32; 128 * 64], &[1, 128, 1, 64])?, AttentionOptions::new());
/// let forward = attention(&x, &x, &x, &options)?;
/// let dout = &x;
/// let gradients = attention_backward(&x, &x, &x, &forward.out, &forward.softmax_lse, dout, &options)?;
/// assert_eq!(gradients.dk.shape(), x.shape());
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Those of [`Problem::new`], and [`Error::Rank`](crate::Error::Rank), [`Error::DType`](crate::Error::DType),
/// [`Error::Shape`](crate::Error::Shape) or [`Error::Stride`](crate::Error::Stride) for `out`, `softmax_lse` and `dout` that
/// do not go with Q; [`Error::Unsupported`](crate::Error::Unsupported) if no kernel can run this problem; and those of the
/// backend.
pub fn attention_backward<'a>(
    q: impl Into<TensorRef<'a>>,
    k: impl Into<TensorRef<'a>>,
    v: impl Into<TensorRef<'a>>,
    out: impl Into<TensorRef<'a>>,
    softmax_lse: impl Into<TensorRef<'a>>,
    dout: impl Into<TensorRef<'a>>,
    options: &AttentionOptions,
) -> Result<Gradients> {
    Session::auto()?.attention_backward(q, k, v, out, softmax_lse, dout, options)
}

/// The same of all the tensors that attention may take, and of a loss that may depend on the LSE too. There are
/// gradients of the bias and of the sinks if there are these.
///
/// # Errors
/// As [`attention_backward`](crate::attention_backward()), for these tensors.
pub fn attention_backward_with(inputs: &BackwardInputs<TensorRef>, options: &AttentionOptions) -> Result<Gradients> {
    Session::auto()?.attention_backward_with(inputs, options)
}

impl Session {
    /// dQ, dK and dV, as [`attention_backward`](crate::attention_backward()).
    ///
    /// # Errors
    /// As [`attention_backward`](crate::attention_backward()).
    #[expect(clippy::too_many_arguments, reason = "the tensors of FlashAttention's backward pass")]
    pub fn attention_backward<'a>(
        &self,
        q: impl Into<TensorRef<'a>>,
        k: impl Into<TensorRef<'a>>,
        v: impl Into<TensorRef<'a>>,
        out: impl Into<TensorRef<'a>>,
        softmax_lse: impl Into<TensorRef<'a>>,
        dout: impl Into<TensorRef<'a>>,
        options: &AttentionOptions,
    ) -> Result<Gradients> {
        let inputs = BackwardInputs::new(Inputs::new(q, k, v), out, softmax_lse, dout);
        self.attention_backward_with(&inputs, options)
    }

    /// All gradients, as [`attention_backward_with`](crate::attention_backward_with()).
    ///
    /// # Errors
    /// As [`attention_backward_with`](crate::attention_backward_with()).
    pub fn attention_backward_with(
        &self,
        inputs: &BackwardInputs<TensorRef>,
        options: &AttentionOptions,
    ) -> Result<Gradients> {
        let problem = posed_backward(inputs, options)?;
        let zeros = |shape: &[usize]| Tensor::zeros(problem.dtype, shape);
        let (mut dq, mut dk) = (zeros(&problem.q_shape())?, zeros(&problem.k_shape())?);
        let mut dv = zeros(&problem.v_shape())?;
        let mut dbias = problem.bias.map(|shape| zeros(&shape)).transpose()?;
        let mut dsinks = problem.sinks.then(|| Tensor::zeros(DType::F32, &[problem.nheads])).transpose()?;
        let gradients = GradientOutputs {
            dbias: dbias.as_mut().map(Tensor::view_mut),
            dsinks: dsinks.as_mut().map(Tensor::view_mut),
            ..GradientOutputs::new(&mut dq, &mut dk, &mut dv)
        };
        let report = self.compute_gradients(&problem, inputs, gradients)?;
        Ok(Gradients { dq, dk, dv, dbias, dsinks, report })
    }

    /// The gradients that are asked for, into tensors that are there, with any strides but of the last dimension.
    /// After an error they are as they were, or, if a backend failed while it ran, hold anything.
    ///
    /// # Errors
    /// As [`Session::attention_backward_with`]; also if the gradients do not fit the problem.
    pub fn attention_backward_into_with(
        &self,
        inputs: &BackwardInputs<TensorRef>,
        options: &AttentionOptions,
        gradients: GradientOutputs<TensorMut>,
    ) -> Result<Report> {
        let problem = posed_backward(inputs, options)?;
        problem.check_gradients(&gradients.map(|_, gradient| gradient.layout()))?;
        self.compute_gradients(&problem, inputs, gradients)
    }

    fn compute_gradients(
        &self,
        problem: &Problem,
        inputs: &BackwardInputs<TensorRef>,
        gradients: GradientOutputs<TensorMut>,
    ) -> Result<Report> {
        let row_sums = (problem.rows() * size_of::<f32>()) as u64;
        let (algorithm, reason, extra_bytes, (launches, seconds));
        match self.target() {
            None => {
                self.refuse_kernels_on_cpu()?;
                algorithm = "tiled recomputation";
                reason = "the CPU has one algorithm".to_owned();
                extra_bytes = row_sums + cpu::backward_extra_bytes(problem);
                (launches, seconds) = with_element!("q", problem.dtype, T => {
                    self.gradients_on_cpu::<T>(problem, inputs, gradients)?
                });
            }
            Some(target) => {
                let access = Access::of_backward_on_machine(inputs, TensorRef::layout);
                let plan = BackwardPlan::new(problem, Optional::of(&gradients), access, self.kernel, target)?;
                let times = self.repetitions;
                (launches, seconds) = match self.executor {
                    Executor::Cuda(device) => {
                        machine::attention_backward(&Gpu::new(device)?, problem, &plan, times, inputs, gradients)?
                    }
                    _ => {
                        let simulator = Simulator::new(&self.simulator);
                        machine::attention_backward(&simulator, problem, &plan, times, inputs, gradients)?
                    }
                };
                algorithm = plan.algorithm();
                extra_bytes = plan.extra_bytes();
                reason = plan.reason();
            }
        }
        Ok(Report {
            backend: self.backend(),
            device: self.device_name(),
            algorithm,
            reason: format!("{}; {reason}", self.reason),
            dtype: problem.dtype,
            shape: problem.to_string(),
            seconds,
            flops: problem.backward_flops(),
            extra_bytes,
            launches,
        })
    }

    fn gradients_on_cpu<T: Element>(
        &self,
        problem: &Problem,
        inputs: &BackwardInputs<TensorRef>,
        gradients: GradientOutputs<TensorMut>,
    ) -> Result<(Vec<LaunchReport>, f64)> {
        let forward = Operands::<T>::new(problem, &inputs.forward);
        let dlse = inputs.dlse.as_ref().map(|dlse| dlse.packed().unwrap_or_default());
        let operands = cpu::BackwardOperands {
            forward: &forward,
            out: Heads::of(&inputs.out),
            dout: Heads::of(&inputs.dout),
            softmax_lse: &inputs.softmax_lse.packed().unwrap_or_default(),
            dlse: dlse.as_deref(),
        };
        let GradientOutputs { dq, dk, dv, dbias, dsinks } = gradients;
        // Without tokens there may be more sequences than memory could list.
        let has_tokens = problem.rows() > 0 || !dk.layout().is_empty();
        let mut packed_dbias = dbias.as_ref().map(|dbias| vec![T::default(); dbias.layout().len()]);
        let mut packed_dsinks = dsinks.as_ref().map(|dsinks| vec![0.0; dsinks.layout().len()]);
        let mut heads = cpu::GradientHeads {
            dq: HeadsMut::of(dq),
            dk: HeadsMut::of(dk),
            dv: HeadsMut::of(dv),
            dbias: packed_dbias.as_deref_mut(),
            dsinks: packed_dsinks.as_deref_mut(),
        };
        let done = self.repetitions.run(|| {
            let start = Instant::now();
            if has_tokens {
                cpu::attention_backward(problem, &operands, &mut heads);
            }
            Ok((Vec::new(), start.elapsed().as_secs_f64()))
        })?;
        if let (Some(dbias), Some(packed)) = (dbias, packed_dbias) {
            dbias.fill(&packed);
        }
        if let (Some(dsinks), Some(packed)) = (dsinks, packed_dsinks) {
            dsinks.fill(&packed);
        }
        Ok(done)
    }
}

/// The problem that inputs in host memory pose to a backward pass.
fn posed_backward(inputs: &BackwardInputs<TensorRef>, options: &AttentionOptions) -> Result<Problem> {
    let problem = posed(&inputs.forward, options)?;
    problem.check_backward(&inputs.map(|_, tensor| tensor.layout()))?;
    Ok(problem)
}
