//! Host tensors in, host tensors out, on a backend of the caller's choice.
use std::sync::Arc;
use std::time::Instant;

use crate::backend::{Backend, BackendChoice};
use crate::cpu;
use crate::cuda::{Device, Gpu};
use crate::dispatch::Plan;
use crate::element::{Element, with_element};
use crate::error::{Error, Result};
use crate::heads::HeadsMut;
use crate::inputs::Inputs;
use crate::machine::{self, Repetitions};
use crate::operands::Operands;
use crate::options::{AttentionOptions, Kernel, SoftmaxMethod};
use crate::parameters::Access;
use crate::problem::Problem;
use crate::report::{LaunchReport, Report};
use crate::sequences::Sequences;
use crate::simulator::{self, Progress, Simulator, SimulatorOptions};
use crate::target::Target;
use crate::tensor::{Tensor, TensorMut, TensorRef};
use crate::tune::Flash3Variant;

mod backward;
#[cfg(test)]
mod tests;

pub use backward::{Gradients, attention_backward, attention_backward_with};

/// What computes: a backend, a kernel, and how often to run.
#[derive(Clone, Debug)]
pub struct Session {
    executor: Executor,
    kernel: Kernel,
    /// Instead of an entry point of FlashAttention-3's table.
    variant: Option<Flash3Variant>,
    /// The most shared memory of a block that kernels are chosen for, in bytes.
    shared_memory: u32,
    repetitions: Repetitions,
    reason: String,
    simulator: SimulatorOptions,
}

#[derive(Clone, Copy, Debug)]
enum Executor {
    Cuda(&'static Device),
    Cpu,
    Simulator,
}

/// A result of attention.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Attention {
    /// O: (batch, seqlen_q, nheads, headdim_v), in the dtype of Q; with `cu_seqlens_q` (total_q, nheads, headdim_v).
    pub out: Tensor,
    /// log Σ e^score, natural logarithm, the sink among the scores: (batch, nheads, seqlen_q), f32; with `cu_seqlens_q`
    /// (nheads, total_q). -inf for a row that sees no key and has no sink.
    pub softmax_lse: Tensor,
    /// What ran.
    pub report: Report,
}

/// A result of softmax.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Softmax {
    /// softmax(x): the shape and the dtype of x.
    pub y: Tensor,
    /// What ran.
    pub report: Report,
}

/// O = softmax(softmax_scale · Q Kᵀ + mask) V, on the backend that [`Backend::auto`] chooses.
///
/// Q has shape (batch, seqlen_q, nheads, headdim), K (batch, seqlen_k, nheads_k, headdim) and V (batch, seqlen_k,
/// nheads_k, headdim_v); nheads is a multiple of nheads_k (grouped queries). Their dtype is f32, f16 or bf16.
/// [`attention_with`] takes more tensors.
///
/// # Errors
/// Those of [`Problem::new`] for arguments that do not fit together, and those of the backend.
pub fn attention<'a>(
    q: impl Into<TensorRef<'a>>,
    k: impl Into<TensorRef<'a>>,
    v: impl Into<TensorRef<'a>>,
    options: &AttentionOptions,
) -> Result<Attention> {
    Session::auto()?.attention(q, k, v, options)
}

/// The same of all the tensors that attention may take: a bias, a mask, ALiBi slopes, sinks, and sequences of different
/// lengths.
///
/// ```
/// use ferroflash::{AttentionOptions, Inputs, Tensor, attention_with};
///
/// # fn main() -> Result<(), ferroflash::Error> {
/// // Two sequences, of 40 and of 24 tokens.
/// let x = Tensor::from_vec(vec![0.5f32; 64 * 4 * 64], &[64, 4, 64])?;
/// let starts = Tensor::from_vec(vec![0, 40, 64], &[3])?;
/// let inputs = Inputs::new(&x, &x, &x).cu_seqlens(&starts, &starts);
/// let result = attention_with(&inputs, &AttentionOptions::new().causal(true))?;
/// assert_eq!(result.out.shape(), [64, 4, 64]);
/// assert_eq!(result.softmax_lse.shape(), [4, 64]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Those of [`Problem::of`] and of [`Sequences::new`] for arguments that do not fit together, and those of the backend.
pub fn attention_with(inputs: &Inputs<TensorRef>, options: &AttentionOptions) -> Result<Attention> {
    Session::auto()?.attention_with(inputs, options)
}

/// Softmax over the last dimension, on the backend that [`Backend::auto`] chooses.
///
/// # Errors
/// [`Error::Rank`] for a tensor without dimensions, and those of the backend.
pub fn softmax<'a>(x: impl Into<TensorRef<'a>>, method: SoftmaxMethod) -> Result<Softmax> {
    Session::auto()?.softmax(x, method)
}

impl Session {
    /// On the backend that [`Backend::auto`] chooses.
    ///
    /// # Errors
    /// Those of [`Session::new`].
    pub fn auto() -> Result<Self> {
        let BackendChoice { backend, reason } = Backend::auto();
        Ok(Session { reason, ..Session::new(backend)? })
    }

    /// On this backend.
    ///
    /// # Errors
    /// Why it cannot run here, as [`Backend::availability`]: it is never replaced by another.
    pub fn new(backend: Backend) -> Result<Self> {
        let executor = match backend {
            Backend::Cuda => Executor::Cuda(Device::get(0)?),
            Backend::Cpu => Executor::Cpu,
            Backend::Simulator => simulator::availability().map(|()| Executor::Simulator)?,
        };
        Ok(Session {
            executor,
            kernel: Kernel::Auto,
            variant: None,
            shared_memory: u32::MAX,
            repetitions: Repetitions { warmup: 0, timed: 1 },
            reason: format!("{backend} was asked for"),
            simulator: SimulatorOptions::default(),
        })
    }

    /// With this kernel family instead of the best that can run the problem. The CPU has one algorithm, and no kernels.
    pub fn kernel(mut self, kernel: Kernel) -> Self {
        self.kernel = kernel;
        self
    }

    /// With this entry point of FlashAttention-3 forward, which runs on CUDA alone. A kernel that was asked for makes no
    /// difference then.
    #[doc(hidden)]
    pub fn flash3_variant(mut self, variant: Flash3Variant) -> Self {
        self.variant = Some(variant);
        self
    }

    /// With the kernels of a GPU whose blocks may have at most so many bytes of shared memory each, even where there is more.
    /// Every GPU that kernels run on has [`SHARED_BYTES_OF_EVERY_GPU`](crate::SHARED_BYTES_OF_EVERY_GPU): with these the
    /// kernels can be tried that the smallest GPUs run.
    pub fn shared_memory(mut self, bytes: u32) -> Self {
        self.shared_memory = bytes;
        self
    }

    /// On CUDA device `ordinal` instead of 0. Other backends have one device.
    ///
    /// # Errors
    /// Why that device cannot run; [`Error::NoDevice`] where there is none of that number.
    pub fn device(mut self, ordinal: u32) -> Result<Self> {
        match &mut self.executor {
            Executor::Cuda(device) => *device = Device::get(ordinal)?,
            _ if ordinal == 0 => (),
            _ => return Err(Error::NoDevice { ordinal, found: 1 }),
        }
        Ok(self)
    }

    /// Runs everything `warmup` + `timed` times; reports say the median time of the last `timed`. By default once.
    pub fn repetitions(mut self, warmup: usize, timed: usize) -> Self {
        self.repetitions = Repetitions { warmup, timed: timed.max(1) };
        self
    }

    /// How the simulator runs, where that is the backend.
    pub fn simulator_options(mut self, options: SimulatorOptions) -> Self {
        self.simulator = SimulatorOptions { progress: self.simulator.progress, ..options };
        self
    }

    /// Is told how far each launch on the simulator has come.
    pub fn progress(mut self, progress: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        self.simulator.progress = Some(Arc::new(progress));
        self
    }

    /// Where it computes.
    pub fn backend(&self) -> Backend {
        match self.executor {
            Executor::Cuda(_) => Backend::Cuda,
            Executor::Cpu => Backend::Cpu,
            Executor::Simulator => Backend::Simulator,
        }
    }

    /// The name of the device that computes.
    pub fn device_name(&self) -> String {
        match self.executor {
            Executor::Cuda(device) => device.info().name.clone(),
            Executor::Cpu => cpu::device_name(),
            Executor::Simulator => simulator::device_name(),
        }
    }

    /// The kernel families that run there, the oldest first. The CPU has none.
    pub fn kernels(&self) -> Vec<Kernel> {
        let Some(target) = self.target() else { return Vec::new() };
        let families = Kernel::ALL.iter().copied().filter(|&kernel| kernel != Kernel::Auto);
        families.filter(|&kernel| kernel != Kernel::Flash3 || target.allow_hopper(kernel).is_ok()).collect()
    }

    /// The machine that kernels are chosen for; `None`: the CPU.
    fn target(&self) -> Option<Target> {
        match self.executor {
            Executor::Cpu => None,
            Executor::Cuda(device) => Some(device.target().with_at_most(self.shared_memory)),
            Executor::Simulator => Some(Target::SIMULATOR.with_at_most(self.shared_memory)),
        }
    }

    /// Why it computes there.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// O = softmax(softmax_scale · Q Kᵀ + mask) V, as [`attention`](crate::attention()).
    ///
    /// # Errors
    /// As [`attention`](crate::attention()); [`Error::Unsupported`] if the kernel cannot run this problem.
    pub fn attention<'a>(
        &self,
        q: impl Into<TensorRef<'a>>,
        k: impl Into<TensorRef<'a>>,
        v: impl Into<TensorRef<'a>>,
        options: &AttentionOptions,
    ) -> Result<Attention> {
        self.attention_with(&Inputs::new(q, k, v), options)
    }

    /// The same of all the tensors that attention may take, as [`attention_with`](crate::attention_with()).
    ///
    /// # Errors
    /// As [`attention_with`](crate::attention_with()); [`Error::Unsupported`] if the kernel cannot run this problem.
    pub fn attention_with(&self, inputs: &Inputs<TensorRef>, options: &AttentionOptions) -> Result<Attention> {
        let problem = posed(inputs, options)?;
        let mut out = Tensor::zeros(problem.dtype, &problem.out_shape())?;
        let mut lse = vec![0.0; problem.rows()];
        let report = self.compute(&problem, inputs, out.view_mut(), &mut lse)?;
        Ok(Attention { out, softmax_lse: Tensor::from_vec(lse, &problem.lse_shape())?, report })
    }

    /// The same, into tensors that are there: `out` (batch, seqlen_q, nheads, headdim_v) with any strides but of the
    /// last dimension, `softmax_lse` batch x nheads x seqlen_q numbers. After an error they are as they were, or, if a
    /// backend failed while it ran, hold anything.
    ///
    /// # Errors
    /// As [`Session::attention`]; also if `out` or `softmax_lse` do not fit the problem.
    pub fn attention_into<'a, 'o>(
        &self,
        q: impl Into<TensorRef<'a>>,
        k: impl Into<TensorRef<'a>>,
        v: impl Into<TensorRef<'a>>,
        options: &AttentionOptions,
        out: impl Into<TensorMut<'o>>,
        softmax_lse: &mut [f32],
    ) -> Result<Report> {
        self.attention_into_with(&Inputs::new(q, k, v), options, out, softmax_lse)
    }

    /// The same of all the tensors that attention may take. With `cu_seqlens_q` `out` is (total_q, nheads, headdim_v),
    /// and `softmax_lse` has nheads x total_q numbers.
    ///
    /// # Errors
    /// As [`Session::attention_with`]; also if `out` or `softmax_lse` do not fit the problem.
    pub fn attention_into_with<'o>(
        &self,
        inputs: &Inputs<TensorRef>,
        options: &AttentionOptions,
        out: impl Into<TensorMut<'o>>,
        softmax_lse: &mut [f32],
    ) -> Result<Report> {
        let out = out.into();
        let problem = posed(inputs, options)?;
        problem.check_outputs(out.layout(), Some(softmax_lse.len()))?;
        self.compute(&problem, inputs, out, softmax_lse)
    }

    fn compute(
        &self,
        problem: &Problem,
        inputs: &Inputs<TensorRef>,
        out: TensorMut,
        softmax_lse: &mut [f32],
    ) -> Result<Report> {
        let (algorithm, reason, extra_bytes, (launches, seconds));
        match self.target() {
            None => {
                self.refuse_kernels_on_cpu()?;
                algorithm = "tiled online softmax";
                reason = "the CPU has one algorithm".to_owned();
                extra_bytes = (problem.rows() * size_of::<f32>()) as u64 + cpu::extra_bytes(problem);
                (launches, seconds) = with_element!("q", problem.dtype, T => {
                    self.on_cpu::<T>(problem, inputs, out, softmax_lse)?
                });
            }
            Some(target) => {
                let access = Access::on_machine(inputs, TensorRef::layout);
                let plan = match self.variant {
                    None => Plan::new(problem, access, self.kernel, target)?,
                    Some(variant) => Plan::of_variant(problem, access, variant, target)?,
                };
                let lse = TensorMut::new(softmax_lse, &problem.lse_shape())?;
                let times = self.repetitions;
                (launches, seconds) = match self.executor {
                    Executor::Cuda(device) => {
                        machine::attention(&Gpu::new(device)?, problem, &plan, times, inputs, out, lse)?
                    }
                    _ => {
                        let simulator = Simulator::new(&self.simulator);
                        machine::attention(&simulator, problem, &plan, times, inputs, out, lse)?
                    }
                };
                algorithm = plan.algorithm();
                extra_bytes = plan.extra_bytes(problem);
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
            flops: problem.flops(),
            extra_bytes,
            launches,
        })
    }

    fn refuse_kernels_on_cpu(&self) -> Result<()> {
        if self.kernel == Kernel::Auto && self.variant.is_none() {
            return Ok(());
        }
        let reasons = vec!["the CPU backend has one algorithm of its own, and no kernels".to_owned()];
        Err(Error::Unsupported { kernel: self.kernel, backend: Backend::Cpu, reasons })
    }

    fn on_cpu<T: Element>(
        &self,
        problem: &Problem,
        inputs: &Inputs<TensorRef>,
        out: TensorMut,
        softmax_lse: &mut [f32],
    ) -> Result<(Vec<LaunchReport>, f64)> {
        // Without rows there may be more sequences than memory could list.
        if problem.rows() == 0 {
            return Ok((Vec::new(), 0.0));
        }
        let operands = Operands::<T>::new(problem, inputs);
        let layout = out.layout().clone();
        let out = out.into_slice::<T>().unwrap_or_default();
        self.repetitions.run(|| {
            let start = Instant::now();
            cpu::attention(problem, &operands, HeadsMut::new(&mut *out, &layout), softmax_lse);
            Ok((Vec::new(), start.elapsed().as_secs_f64()))
        })
    }

    /// Softmax over the last dimension of x, of any rank but 0. A row of nothing but -inf becomes 0.
    ///
    /// # Errors
    /// [`Error::Rank`] for a tensor without dimensions, [`Error::TooLarge`] for more rows or columns than a kernel counts,
    /// and those of the backend.
    pub fn softmax<'a>(&self, x: impl Into<TensorRef<'a>>, method: SoftmaxMethod) -> Result<Softmax> {
        let x = x.into();
        let mut y = Tensor::zeros(x.dtype(), x.shape())?;
        let report =
            with_element!("x", x.dtype(), T => self.softmax_of::<T>(&x, method, y.as_mut_slice().unwrap_or_default())?);
        Ok(Softmax { y, report })
    }

    /// The same, into a contiguous tensor that is there, of the shape and the dtype of x.
    ///
    /// # Errors
    /// As [`Session::softmax`]; [`Error::DType`], [`Error::Argument`] or [`Error::Stride`] if `y` is another.
    pub fn softmax_into<'a, 'o>(
        &self,
        x: impl Into<TensorRef<'a>>,
        method: SoftmaxMethod,
        y: impl Into<TensorMut<'o>>,
    ) -> Result<Report> {
        let (x, y) = (x.into(), y.into());
        y.layout().check_like_x("y", x.layout())?;
        with_element!("x", x.dtype(), T => {
            let elements = x.layout().len();
            let y = y.into_slice::<T>().unwrap_or_default();
            self.softmax_of::<T>(&x, method, &mut y[..elements])
        })
    }

    /// `y` has as many elements as x.
    fn softmax_of<T: Element>(&self, x: &TensorRef, method: SoftmaxMethod, y: &mut [T]) -> Result<Report> {
        let Some(&columns) = x.shape().last() else {
            return Err(Error::Rank { argument: "x", found: 0, allowed: "1 or more" });
        };
        let data = x.packed::<T>().unwrap_or_default();
        let (launches, seconds) = if data.is_empty() {
            (Vec::new(), 0.0)
        } else {
            match self.executor {
                Executor::Cuda(device) => {
                    machine::softmax(&Gpu::new(device)?, &data, columns, method, self.repetitions, y)?
                }
                Executor::Simulator => {
                    let simulator = Simulator::new(&self.simulator);
                    machine::softmax(&simulator, &data, columns, method, self.repetitions, y)?
                }
                Executor::Cpu => self.repetitions.run(|| {
                    let start = Instant::now();
                    cpu::softmax(&data, y, columns, method);
                    Ok((Vec::new(), start.elapsed().as_secs_f64()))
                })?,
            }
        };
        Ok(Report {
            backend: self.backend(),
            device: self.device_name(),
            algorithm: match method {
                SoftmaxMethod::TwoPass => "softmax two-pass",
                SoftmaxMethod::Online => "softmax online",
            },
            reason: self.reason.clone(),
            dtype: T::DTYPE,
            shape: format!("rows {}, columns {columns}", data.len().checked_div(columns).unwrap_or(0)),
            seconds,
            // x - m, its exponential, the sum, the quotient.
            flops: 4 * data.len() as u64,
            extra_bytes: 0,
            launches,
        })
    }
}

/// The problem that inputs in host memory pose.
fn posed(inputs: &Inputs<TensorRef>, options: &AttentionOptions) -> Result<Problem> {
    Problem::of(&inputs.map(|_, tensor| tensor.layout()), Sequences::read(inputs)?, options)
}
