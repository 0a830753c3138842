//! What runs kernels: a GPU, or a simulated one. Host tensors in, host tensors out, the same way on both.
use cuda_std::Global;
use kernels::attention::Untyped;

use crate::dispatch::{self, BackwardPlan, Plan};
use crate::element::{Datum, Element};
use crate::error::Result;
use crate::inputs::{BackwardInputs, GradientOutputs, Inputs};
use crate::launch::{Launch, Workspace};
use crate::options::SoftmaxMethod;
use crate::parameters;
use crate::problem::Problem;
use crate::report::LaunchReport;
use crate::target::Resources;
use crate::tensor::{TensorMut, TensorRef};

mod placed;

use placed::Placed;

/// A machine with a memory of its own.
pub(crate) trait Machine {
    /// An allocation in its memory, which ends with this.
    type Buffer<T: Datum>: 'static;

    /// A new allocation that holds `data`. `name` is what the algorithm calls it.
    fn upload<T: Datum>(&self, name: &'static str, data: &[T]) -> Result<Self::Buffer<T>>;

    /// A new allocation of `len` elements, for the kernels to work in. Nothing has been written to it.
    fn allocate<T: Datum>(&self, name: &'static str, len: usize) -> Result<Self::Buffer<T>>;

    /// A new allocation of `len` elements, for a result. An element that no kernel writes is all ones: NaN.
    fn output<T: Datum>(&self, name: &'static str, len: usize) -> Result<Self::Buffer<T>>;

    /// The address of an allocation.
    fn global<T: Datum>(&self, buffer: &Self::Buffer<T>) -> Global<T>;

    /// Copies an allocation, all of it, to host memory.
    fn download<T: Datum>(&self, buffer: &Self::Buffer<T>, to: &mut [T]) -> Result<()>;

    /// What launches need to know of it.
    fn resources(&self) -> Resources;

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

/// Computes attention. The tensors are those of the problem.
pub(crate) fn attention<M: Machine>(
    machine: &M,
    problem: &Problem,
    plan: &Plan,
    repetitions: Repetitions,
    inputs: &Inputs<TensorRef>,
    out: TensorMut,
    softmax_lse: TensorMut,
) -> Result<(Vec<LaunchReport>, f64)> {
    let inputs = inputs.try_map(|name, tensor| Placed::upload(machine, name, tensor))?;
    let placed_out = Placed::output(machine, "out", out.layout())?;
    let placed_lse = Placed::output(machine, "softmax_lse", softmax_lse.layout())?;
    let (_workspace, addresses) = allocate_all(machine, &plan.workspace)?;

    let located = inputs.map(|_, tensor| tensor.located());
    let attention = parameters::attention(problem, &located, &placed_out.located(), placed_lse.address());
    let launches = plan.launches(problem, attention, &addresses, &machine.resources())?;
    let done = repetitions.run(|| machine.run(&launches))?;
    placed_out.download(out)?;
    placed_lse.download(softmax_lse)?;
    Ok(done)
}

/// Computes gradients. The tensors are those of the problem.
pub(crate) fn attention_backward<M: Machine>(
    machine: &M,
    problem: &Problem,
    plan: &BackwardPlan,
    repetitions: Repetitions,
    inputs: &BackwardInputs<TensorRef>,
    gradients: GradientOutputs<TensorMut>,
) -> Result<(Vec<LaunchReport>, f64)> {
    let inputs = inputs.try_map(|name, tensor| Placed::upload(machine, name, tensor))?;
    let placed = gradients.try_map(|name, gradient| Placed::output(machine, name, gradient.layout()))?;
    let (_workspace, addresses) = allocate_all(machine, plan.workspace())?;

    let located = (inputs.map(|_, tensor| tensor.located()), placed.map(|_, gradient| gradient.located()));
    let parameters = parameters::backward(problem, &located.0, &located.1);
    let launches = plan.launches(problem, parameters, &addresses, &machine.resources())?;
    let done = repetitions.run(|| machine.run(&launches))?;
    placed.into_each().zip(gradients.into_each()).try_for_each(|(placed, to)| placed.download(to))?;
    Ok(done)
}

/// Allocations for a plan to work in, and their addresses.
fn allocate_all<'m, M: Machine>(
    machine: &'m M,
    workspace: &[Workspace],
) -> Result<(Vec<Placed<'m>>, Vec<Global<Untyped>>)> {
    let workspace: Vec<_> = workspace.iter().map(|part| Placed::workspace(machine, part)).collect::<Result<_>>()?;
    let addresses = workspace.iter().map(|part| parameters::global(part.address())).collect();
    Ok((workspace, addresses))
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
