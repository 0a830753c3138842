//! Tensors in the memory of a machine, of any dtype.
use std::borrow::Cow;

use super::Machine;
use crate::element::{Datum, with_dtype};
use crate::error::Result;
use crate::launch::Workspace;
use crate::layout::Layout;
use crate::raw::RawTensor;
use crate::tensor::{TensorMut, TensorRef};

/// The tensors that kernels take with any strides; they take others without gaps.
const STRIDED: [&str; 7] = ["q", "k", "v", "bias", "mask", "out", "dout"];

/// A tensor in the memory of a machine.
pub(super) struct Placed<'m> {
    allocation: Box<dyn Allocation + 'm>,
    address: u64,
    layout: Layout,
}

/// An allocation of a machine, whatever its elements.
trait Allocation {
    /// Copies it to a tensor in host memory, of its dtype and as many elements.
    fn download(&self, to: TensorMut) -> Result<()>;
}

struct Typed<'m, M: Machine, T: Datum> {
    machine: &'m M,
    buffer: M::Buffer<T>,
    len: usize,
}

impl<M: Machine, T: Datum> Allocation for Typed<'_, M, T> {
    fn download(&self, to: TensorMut) -> Result<()> {
        let mut packed = vec![T::default(); self.len];
        self.machine.download(&self.buffer, &mut packed)?;
        to.fill(&packed);
        Ok(())
    }
}

impl<'m> Placed<'m> {
    /// A copy of a tensor in host memory, without gaps; what it repeats by strides of 0 is there once, where kernels
    /// take strides. `argument` is the name that the caller knows it by.
    pub fn upload<M: Machine>(machine: &'m M, argument: &'static str, tensor: &TensorRef) -> Result<Self> {
        let once = if STRIDED.contains(&argument) { tensor.without_repetitions() } else { tensor.clone() };
        let packed = Layout::contiguous(tensor.dtype(), once.shape())?;
        let repeats = |i: usize| once.shape()[i] != tensor.shape()[i];
        let strides: Vec<_> =
            packed.strides().iter().enumerate().map(|(i, &s)| if repeats(i) { 0 } else { s }).collect();
        let layout = Layout::strided(tensor.dtype(), tensor.shape(), &strides)?;
        with_dtype!(tensor.dtype(), T => {
            let data: Cow<[T]> = once.packed().unwrap_or_default();
            Ok(Self::of(machine, machine.upload(in_papers(argument), &data)?, data.len(), layout))
        })
    }

    /// A tensor without gaps, for a result of this dtype and shape.
    pub fn output<M: Machine>(machine: &'m M, argument: &'static str, of: &Layout) -> Result<Self> {
        let layout = Layout::contiguous(of.dtype(), of.shape())?;
        with_dtype!(of.dtype(), T => {
            let buffer = machine.output::<T>(in_papers(argument), layout.len())?;
            Ok(Self::of(machine, buffer, layout.len(), layout))
        })
    }

    /// Memory for kernels to work in.
    pub fn workspace<M: Machine>(machine: &'m M, workspace: &Workspace) -> Result<Self> {
        let Workspace { name, dtype, len } = *workspace;
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        with_dtype!(dtype, T => {
            let buffer = machine.allocate::<T>(name, len)?;
            Ok(Self::of(machine, buffer, len, Layout::contiguous(dtype, &[len])?))
        })
    }

    fn of<M: Machine, T: Datum>(machine: &'m M, buffer: M::Buffer<T>, len: usize, layout: Layout) -> Self {
        let address = machine.global(&buffer).address();
        Placed { allocation: Box::new(Typed { machine, buffer, len }), address, layout }
    }

    /// Its address.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Where kernels find it.
    pub fn located(&self) -> RawTensor {
        RawTensor { address: self.address, layout: self.layout.clone() }
    }

    /// Copies it, a result, to a tensor in host memory.
    pub fn download(&self, to: TensorMut) -> Result<()> {
        self.allocation.download(to)
    }
}

/// What the papers call a tensor.
fn in_papers(argument: &'static str) -> &'static str {
    match argument {
        "q" => "Q",
        "k" => "K",
        "v" => "V",
        "out" => "O",
        "softmax_lse" => "LSE",
        "dout" => "dO",
        "dlse" => "dLSE",
        "dq" => "dQ",
        "dk" => "dK",
        "dv" => "dV",
        other => other,
    }
}
