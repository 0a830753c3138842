//! What runs kernels: a GPU, or a simulated one. Host tensors in, host tensors out, the same way on both.
use cuda_std::{DType, Global};
use kernels::attention::{Attention, Tensor, Untyped};
use kernels::dropout::Dropout;
use kernels::mask::UNBOUNDED;

use crate::dispatch::{self, Plan};
use crate::element::Element;
use crate::error::Result;
use crate::launch::{Launch, Workspace};
use crate::options::SoftmaxMethod;
use crate::problem::Problem;
use crate::report::LaunchReport;

mod backward;

pub(crate) use backward::{BackwardInputs, GradientsMut, attention_backward};

/// A machine with a memory of its own.
pub(crate) trait Machine {
    /// An allocation in its memory, which ends with this.
    type Buffer<T: Element>;

    /// A new allocation that holds `data`. `name` is what the algorithm calls it.
    fn upload<T: Element>(&self, name: &'static str, data: &[T]) -> Result<Self::Buffer<T>>;

    /// A new allocation of `len` elements, for the kernels to work in. Nothing has been written to it.
    fn allocate<T: Element>(&self, name: &'static str, len: usize) -> Result<Self::Buffer<T>>;

    /// A new allocation of `len` elements, for a result. An element that no kernel writes is all ones: NaN.
    fn output<T: Element>(&self, name: &'static str, len: usize) -> Result<Self::Buffer<T>>;

    /// The address of an allocation.
    fn global<T: Element>(&self, buffer: &Self::Buffer<T>) -> Global<T>;

    /// Copies an allocation, all of it, to host memory.
    fn download<T: Element>(&self, buffer: &Self::Buffer<T>, to: &mut [T]) -> Result<()>;

    /// Runs launches one after the other, and waits for them: what came of each, and the seconds they took together.
    fn run(&self, launches: &[Launch]) -> Result<(Vec<LaunchReport>, f64)>;
}

/// How often to run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Repetitions {
    /// Runs before those that are timed.
    pub warmup: usize,
    /// Runs that are timed: one at least.
    pub timed: usize,
}

impl Repetitions {
    /// Runs `once` so often. Returns what it did the last time, and the median of its times.
    pub fn run<R>(self, mut once: impl FnMut() -> Result<(R, f64)>) -> Result<(R, f64)> {
        for _ in 0..self.warmup {
            once()?;
        }
        let (mut last, seconds) = once()?;
        let mut times = vec![seconds];
        for _ in 1..self.timed {
            let (result, seconds) = once()?;
            last = result;
            times.push(seconds);
        }
        times.sort_by(f64::total_cmp);
        Ok((last, times[times.len() / 2]))
    }
}

/// Q, K and V in host memory, in row-major order without gaps.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<'a, T> {
    pub q: &'a [T],
    pub k: &'a [T],
    pub v: &'a [T],
}

/// Computes attention. No extent of the problem is 0; `out` and `softmax_lse` have the problem's sizes.
pub(crate) fn attention<M: Machine, T: Element>(
    machine: &M,
    problem: &Problem,
    plan: &Plan,
    repetitions: Repetitions,
    inputs: Inputs<T>,
    out: &mut [T],
    softmax_lse: &mut [f32],
) -> Result<(Vec<LaunchReport>, f64)> {
    let (q, k, v) = (machine.upload("Q", inputs.q)?, machine.upload("K", inputs.k)?, machine.upload("V", inputs.v)?);
    let o = machine.output::<T>("O", out.len())?;
    let lse = machine.output::<f32>("LSE", softmax_lse.len())?;
    let workspace = plan.workspace.iter().map(|w| AnyBuffer::allocate(machine, w)).collect::<Result<Vec<_>>>()?;
    let addresses: Vec<_> = workspace.iter().map(|buffer| buffer.global(machine)).collect();

    let Problem { nheads, nheads_k, headdim, .. } = *problem;
    let (len_q, len_k) = (problem.seqlen_q, problem.seqlen_k);
    let attention = Attention {
        q: contiguous(machine.global(&q), len_q, nheads, headdim),
        k: contiguous(machine.global(&k), len_k, nheads_k, headdim),
        v: contiguous(machine.global(&v), len_k, nheads_k, headdim),
        o: contiguous(machine.global(&o), len_q, nheads, headdim),
        ..arguments(problem, machine.global(&lse))
    };
    let launches = plan.launches(problem, attention, &addresses)?;
    let done = repetitions.run(|| machine.run(&launches))?;
    machine.download(&o, out)?;
    machine.download(&lse, softmax_lse)?;
    Ok(done)
}

/// Computes softmax over rows of `columns` elements. Neither is `x` empty.
pub(crate) fn softmax<M: Machine, T: Element>(
    machine: &M,
    x: &[T],
    columns: usize,
    method: SoftmaxMethod,
    repetitions: Repetitions,
    y: &mut [T],
) -> Result<(Vec<LaunchReport>, f64)> {
    let (input, output) = (machine.upload("x", x)?, machine.output::<T>("y", y.len())?);
    let (input_at, output_at) = (machine.global(&input).cast(), machine.global(&output).cast());
    let launch = dispatch::softmax(T::DTYPE, method, (x.len() / columns, columns), input_at, output_at)?;
    let done = repetitions.run(|| machine.run(std::slice::from_ref(&launch)))?;
    machine.download(&output, y)?;
    Ok(done)
}

/// A tensor that is not there.
pub(crate) fn nowhere<T>() -> Tensor<T> {
    Tensor { data: Global::NULL, batch_stride: 0, row_stride: 0, head_stride: 0 }
}

/// The arguments of a problem, but for its tensors.
pub(crate) fn arguments(problem: &Problem, softmax_lse: Global<f32>) -> Attention {
    let side = |keys: Option<usize>| keys.map_or(UNBOUNDED, |keys| keys as u32);
    let (lse_batch_stride, lse_head_stride) = match &problem.varlen {
        None => ((problem.nheads * problem.seqlen_q) as u64, problem.seqlen_q as u64),
        Some(varlen) => (0, varlen.total_q as u64),
    };
    Attention {
        q: nowhere(),
        k: nowhere(),
        v: nowhere(),
        o: nowhere(),
        bias: nowhere(),
        mask: nowhere(),
        alibi_slopes: Global::NULL,
        alibi_batch_stride: 0,
        sinks: Global::NULL,
        softmax_lse,
        lse_batch_stride,
        lse_head_stride,
        cu_seqlens_q: Global::NULL,
        cu_seqlens_k: Global::NULL,
        dropout: problem.dropout.map_or(Dropout::NONE, |dropout| Dropout::new(dropout.p, dropout.seed, dropout.offset)),
        batch: problem.batch as u32,
        nheads: problem.nheads as u32,
        nheads_k: problem.nheads_k as u32,
        seqlen_q: problem.seqlen_q as u32,
        seqlen_k: problem.seqlen_k as u32,
        headdim: problem.headdim as u32,
        headdim_v: problem.headdim_v as u32,
        softmax_scale: problem.softmax_scale,
        softcap: problem.softcap.unwrap_or(0.0),
        window_left: side(problem.window.left),
        window_right: side(problem.window.right),
        aligned: 1,
    }
}

fn contiguous<T>(data: Global<T>, seqlen: usize, nheads: usize, headdim: usize) -> Tensor<Untyped> {
    let row = (nheads * headdim) as u64;
    Tensor { data: data.cast(), batch_stride: seqlen as u64 * row, row_stride: row, head_stride: headdim as u64 }
}

/// An allocation of a workspace, of any dtype.
enum AnyBuffer<M: Machine> {
    F32(M::Buffer<f32>),
    F16(M::Buffer<half::f16>),
    BF16(M::Buffer<half::bf16>),
}

impl<M: Machine> AnyBuffer<M> {
    fn allocate(machine: &M, workspace: &Workspace) -> Result<Self> {
        let Workspace { name, dtype, len } = *workspace;
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        Ok(match dtype {
            DType::F32 => AnyBuffer::F32(machine.allocate(name, len)?),
            DType::F16 => AnyBuffer::F16(machine.allocate(name, len)?),
            DType::BF16 => AnyBuffer::BF16(machine.allocate(name, len)?),
            DType::I32 | DType::U8 => unreachable!("a workspace holds numbers that attention is computed on"),
        })
    }

    fn global(&self, machine: &M) -> Global<Untyped> {
        match self {
            AnyBuffer::F32(buffer) => machine.global(buffer).cast(),
            AnyBuffer::F16(buffer) => machine.global(buffer).cast(),
            AnyBuffer::BF16(buffer) => machine.global(buffer).cast(),
        }
    }
}
