//! The backward pass: gradients of Q, K and V from that of O.
use std::time::Instant;

use super::{Executor, Session};
use crate::cpu;
use crate::cuda::Gpu;
use crate::dispatch::BackwardPlan;
use crate::element::{Element, with_element};
use crate::error::Result;
use crate::heads::{Heads, HeadsMut};
use crate::inputs::{BackwardInputs, Inputs};
use crate::layout::Layout;
use crate::machine::{self, GradientsMut, Machine};
use crate::operands::Operands;
use crate::options::AttentionOptions;
use crate::problem::Problem;
use crate::report::{LaunchReport, Report};
use crate::simulator::Simulator;
use crate::tensor::{Tensor, TensorRef};

/// Gradients of attention.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Gradients {
    /// dQ: (batch, seqlen_q, nheads, headdim), in the dtype of Q. 0 in a row that sees no key.
    pub dq: Tensor,
    /// dK: (batch, seqlen_k, nheads_k, headdim), in the dtype of K, summed over the heads of Q that read the head.
    pub dk: Tensor,
    /// dV: (batch, seqlen_k, nheads_k, headdim), in the dtype of V, summed likewise.
    pub dv: Tensor,
    /// The gradient of the bias, if there is one, in its shape and dtype.
    pub dbias: Option<Tensor>,
    /// That of the sinks, if there are any: (nheads), f32.
    pub dsinks: Option<Tensor>,
    /// What ran.
    pub report: Report,
}

/// dQ, dK and dV, the gradients of a loss whose gradient with respect to O is dO, on the backend that [`Backend::auto`](crate::Backend::auto)
/// chooses.
///
/// `out` and `softmax_lse` are what [`attention`](crate::attention()) returned for the same Q, K, V and options; `dout`, dO,
/// has the shape and the dtype of `out`. The result is the same in every run, bit for bit.
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

/// The tensors that gradients are computed from.
struct Tensors<'a> {
    q: TensorRef<'a>,
    k: TensorRef<'a>,
    v: TensorRef<'a>,
    out: TensorRef<'a>,
    softmax_lse: TensorRef<'a>,
    dout: TensorRef<'a>,
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
        let (q, k, v) = (q.into(), k.into(), v.into());
        let (out, softmax_lse, dout) = (out.into(), softmax_lse.into(), dout.into());
        let problem = Problem::new(q.layout(), k.layout(), v.layout(), options)?;
        let layouts = BackwardInputs::new(
            Inputs::new(q.layout(), k.layout(), v.layout()),
            out.layout(),
            softmax_lse.layout(),
            dout.layout(),
        );
        problem.check_backward(&layouts)?;
        let inputs = Tensors { q, k, v, out, softmax_lse, dout };
        with_element!("q", problem.dtype, T => self.gradients_of::<T>(&problem, &inputs))
    }

    fn gradients_of<T: Element>(&self, problem: &Problem, inputs: &Tensors) -> Result<Gradients> {
        let queries = problem.rows() * problem.headdim;
        let keys: usize = problem.k_shape().iter().product();
        let (mut dq, mut dk, mut dv) =
            (vec![T::default(); queries], vec![T::default(); keys], vec![T::default(); keys]);
        let gradients = GradientsMut { dq: &mut dq, dk: &mut dk, dv: &mut dv };

        let row_sums = (problem.rows() * size_of::<f32>()) as u64;
        let (algorithm, reason, extra_bytes, (launches, seconds));
        match self.executor {
            Executor::Cpu => {
                self.refuse_kernels_on_cpu()?;
                algorithm = "tiled recomputation";
                reason = "the CPU has one algorithm";
                extra_bytes = row_sums + cpu::backward_extra_bytes(problem);
                (launches, seconds) = self.gradients_on_cpu(problem, inputs, gradients)?;
            }
            Executor::Cuda(_) | Executor::Simulator => {
                let plan = BackwardPlan::new(problem, self.kernel, self.backend())?;
                (launches, seconds) = match self.executor {
                    Executor::Cuda(device) => {
                        self.gradients_on(&Gpu::new(device)?, problem, &plan, inputs, gradients)?
                    }
                    _ => self.gradients_on(&Simulator::new(&self.simulator), problem, &plan, inputs, gradients)?,
                };
                algorithm = plan.algorithm();
                reason = plan.reason();
                extra_bytes = plan.workspace(problem).bytes();
            }
        }
        let report = Report {
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
        };
        let of_keys = |gradient| Tensor::from_vec(gradient, &problem.k_shape());
        let (dq, dk, dv) = (Tensor::from_vec(dq, &problem.out_shape())?, of_keys(dk)?, of_keys(dv)?);
        Ok(Gradients { dq, dk, dv, dbias: None, dsinks: None, report })
    }

    fn gradients_on<M: Machine, T: Element>(
        &self,
        machine: &M,
        problem: &Problem,
        plan: &BackwardPlan,
        inputs: &Tensors,
        gradients: GradientsMut<T>,
    ) -> Result<(Vec<LaunchReport>, f64)> {
        if problem.rows() == 0 || problem.seqlen_k == 0 {
            // Nothing to launch: no row sees a key, and the gradients are the zeros that they were made with.
            return Ok((Vec::new(), 0.0));
        }
        let Tensors { q, k, v, out, softmax_lse, dout } = inputs;
        let [q, k, v, out, dout] = [q, k, v, out, dout].map(|tensor| tensor.packed::<T>().unwrap_or_default());
        let softmax_lse = softmax_lse.packed().unwrap_or_default();
        let inputs = machine::BackwardInputs { q: &q, k: &k, v: &v, out: &out, softmax_lse: &softmax_lse, dout: &dout };
        machine::attention_backward(machine, problem, plan, self.repetitions, inputs, gradients)
    }

    fn gradients_on_cpu<T: Element>(
        &self,
        problem: &Problem,
        inputs: &Tensors,
        gradients: GradientsMut<T>,
    ) -> Result<(Vec<LaunchReport>, f64)> {
        let forward = Operands::new(problem, &Inputs::new(&inputs.q, &inputs.k, &inputs.v));
        let operands = cpu::BackwardOperands {
            forward: &forward,
            out: Heads::of(&inputs.out),
            dout: Heads::of(&inputs.dout),
            softmax_lse: &inputs.softmax_lse.packed().unwrap_or_default(),
            dlse: None,
        };
        let of = |shape: &[usize]| Layout::contiguous(problem.dtype, shape);
        let mut gradients = cpu::GradientHeads {
            dq: HeadsMut::new(gradients.dq, &of(&problem.q_shape())?),
            dk: HeadsMut::new(gradients.dk, &of(&problem.k_shape())?),
            dv: HeadsMut::new(gradients.dv, &of(&problem.v_shape())?),
            dbias: None,
            dsinks: None,
        };
        self.repetitions.run(|| {
            let start = Instant::now();
            cpu::attention_backward(problem, &operands, &mut gradients);
            Ok((Vec::new(), start.elapsed().as_secs_f64()))
        })
    }
}
