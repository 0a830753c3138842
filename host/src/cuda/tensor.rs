//! Tensors on a device.
use std::marker::PhantomData;

use cuda_std::DType;
use cust::stream::{Stream, StreamFlags};

use super::codes::through_cust;
use super::device::Device;
use super::memory::DeviceMemory;
use crate::element::{Datum, Element};
use crate::error::{Error, Result};
use crate::inputs::Inputs;
use crate::layout::Layout;
use crate::options::{AttentionOptions, Kernel};
use crate::problem::Problem;
use crate::raw::{self, RawTensor};
use crate::report::LaunchReport;
use crate::sequences::Sequences;
use crate::tensor::{Tensor, TensorRef};

mod backward;

pub use backward::DeviceGradients;

/// A contiguous tensor in the memory of a device.
#[derive(Debug)]
pub struct DeviceTensor<T> {
    memory: DeviceMemory,
    layout: Layout,
    device: &'static Device,
    element: PhantomData<T>,
}

/// A [`DeviceTensor`] of any dtype, to be read.
#[derive(Clone, Copy, Debug)]
pub struct DeviceTensorRef<'a> {
    memory: &'a DeviceMemory,
    layout: &'a Layout,
    device: &'static Device,
}

/// A result of attention on a device.
#[derive(Debug)]
#[non_exhaustive]
pub struct DeviceAttention<T> {
    /// O: (batch, seqlen_q, nheads, headdim_v), or (total_q, nheads, headdim_v).
    pub out: DeviceTensor<T>,
    /// LSE: (batch, nheads, seqlen_q), or (nheads, total_q).
    pub softmax_lse: DeviceTensor<f32>,
    /// The launches, in order.
    pub launches: Vec<LaunchReport>,
}

impl<T: Datum> DeviceTensor<T> {
    /// A tensor that holds anything.
    ///
    /// # Errors
    /// [`Error::TooLarge`] or [`Error::OutOfMemory`].
    pub fn uninitialised(device: &'static Device, shape: &[usize]) -> Result<Self> {
        let layout = Layout::contiguous(T::STORED, shape)?;
        let memory = DeviceMemory::allocate::<T>(device, "a tensor", layout.len())?;
        Ok(DeviceTensor { memory, layout, device, element: PhantomData })
    }

    /// A copy of a host tensor.
    ///
    /// # Errors
    /// [`Error::DType`] if its dtype is not `T`, [`Error::OutOfMemory`] or [`Error::Driver`].
    pub fn from_host<'a>(device: &'static Device, tensor: impl Into<TensorRef<'a>>) -> Result<Self> {
        let tensor = tensor.into();
        let allowed = || T::STORED.name().to_owned();
        let data = tensor.packed::<T>();
        let found = tensor.dtype().name();
        let data = data.ok_or_else(|| Error::DType { argument: "tensor", found, allowed: allowed() })?;
        let mut copy = DeviceTensor::uninitialised(device, tensor.shape())?;
        copy.memory.copy_from(bytemuck::cast_slice(&data))?;
        Ok(copy)
    }

    /// A copy in host memory.
    ///
    /// # Errors
    /// [`Error::Driver`], also for an earlier launch that failed.
    pub fn to_host(&self) -> Result<Tensor> {
        let mut data = vec![T::default(); self.layout.len()];
        self.memory.copy_to(bytemuck::cast_slice_mut(&mut data))?;
        Tensor::from_vec(data, self.layout.shape())
    }

    /// The extent of each dimension.
    pub fn shape(&self) -> &[usize] {
        self.layout.shape()
    }

    /// Its address on the device.
    pub fn address(&self) -> u64 {
        self.memory.address()
    }

    fn view(&self) -> DeviceTensorRef<'_> {
        DeviceTensorRef { memory: &self.memory, layout: &self.layout, device: self.device }
    }

    fn raw(&self) -> RawTensor {
        self.view().raw()
    }
}

impl<'a, T: Datum> From<&'a DeviceTensor<T>> for DeviceTensorRef<'a> {
    fn from(tensor: &'a DeviceTensor<T>) -> Self {
        tensor.view()
    }
}

impl DeviceTensorRef<'_> {
    /// The dtype of the elements.
    pub fn dtype(&self) -> DType {
        self.layout.dtype()
    }

    /// The extent of each dimension.
    pub fn shape(&self) -> &[usize] {
        self.layout.shape()
    }

    fn raw(&self) -> RawTensor {
        RawTensor { address: self.memory.address(), layout: self.layout.clone() }
    }

    /// The elements, copied to the host; none where they are of another type.
    fn read<T: Datum>(&self) -> Result<Vec<T>> {
        if self.dtype() != T::STORED {
            return Ok(Vec::new());
        }
        let mut data = vec![T::default(); self.layout.len()];
        self.memory.copy_to(bytemuck::cast_slice_mut(&mut data))?;
        Ok(data)
    }
}

impl Device {
    /// O = softmax(softmax_scale · Q Kᵀ + mask) V of tensors on this device. Returns when it is done.
    ///
    /// # Errors
    /// Those of [`Problem::new`]; [`Error::Unsupported`] if the kernel cannot run this problem; [`Error::OutOfMemory`];
    /// [`Error::Device`] for a tensor of another device; [`Error::Driver`].
    pub fn attention<T: Element>(
        &'static self,
        q: &DeviceTensor<T>,
        k: &DeviceTensor<T>,
        v: &DeviceTensor<T>,
        options: &AttentionOptions,
        kernel: Kernel,
    ) -> Result<DeviceAttention<T>> {
        self.attention_with(&Inputs::new(q, k, v), options, kernel)
    }

    /// The same of all the tensors that attention may take, as [`attention_with`](crate::attention_with()); T is the
    /// type of Q's elements. `cu_seqlens_q` and `cu_seqlens_k` are copied to the host, to be checked.
    ///
    /// # Errors
    /// As [`Device::attention`], and those of [`Sequences::new`]; [`Error::DType`] if Q has other elements.
    pub fn attention_with<T: Element>(
        &'static self,
        inputs: &Inputs<DeviceTensorRef>,
        options: &AttentionOptions,
        kernel: Kernel,
    ) -> Result<DeviceAttention<T>> {
        let (problem, options) = self.posed::<T>(inputs, options)?;
        let out = DeviceTensor::uninitialised(self, &problem.out_shape())?;
        let softmax_lse = DeviceTensor::<f32>::uninitialised(self, &problem.lse_shape())?;
        let call = raw::Call::new(&raw::Arguments {
            inputs: inputs.map(|_, tensor| tensor.raw()),
            out: out.raw(),
            softmax_lse: softmax_lse.raw(),
            options,
            kernel,
        })?;
        let launches = self.run(call.workspace_bytes(), |workspace, stream| {
            // SAFETY: all tensors are on this device and as large as their layouts say, where sequences begin has been
            // checked, and `run` waits for the stream before any is freed.
            unsafe { call.launch(self, workspace, stream) }
        })?;
        Ok(DeviceAttention { out, softmax_lse, launches })
    }

    /// The problem that tensors pose, of which Q has elements of type T, and the options, with the longest lengths.
    fn posed<T: Element>(
        &self,
        inputs: &Inputs<DeviceTensorRef>,
        options: &AttentionOptions,
    ) -> Result<(Problem, AttentionOptions)> {
        inputs.try_map(|argument, tensor| self.check_owns(argument, tensor))?;
        if inputs.q.dtype() != T::STORED {
            let (found, allowed) = (inputs.q.dtype().name(), T::STORED.name().to_owned());
            return Err(Error::DType { argument: "q", found, allowed });
        }
        let total = |tensor: &DeviceTensorRef| tensor.shape().first().copied().unwrap_or(0);
        let sequences = match (inputs.cu_seqlens_q, inputs.cu_seqlens_k) {
            (Some(q), Some(k)) => Some(Sequences::new(&q.read()?, total(&inputs.q), &k.read()?, total(&inputs.k))?),
            _ => None,
        };
        let problem = Problem::of(&inputs.map(|_, tensor| tensor.layout), sequences, options)?;
        let options = match problem.varlen {
            None => options.clone(),
            Some(_) => options.clone().max_seqlens(problem.seqlen_q, problem.seqlen_k),
        };
        Ok((problem, options))
    }

    /// Launches on a stream of its own, with a workspace of so many bytes, and waits, also if a launch fails.
    fn run(
        &'static self,
        workspace_bytes: u64,
        launch: impl FnOnce(u64, raw::Stream) -> Result<Vec<LaunchReport>>,
    ) -> Result<Vec<LaunchReport>> {
        let workspace = DeviceMemory::allocate::<u8>(self, "the workspace", workspace_bytes as usize)?;
        let _entered = self.enter()?;
        let stream = through_cust("cuStreamCreate", Stream::new(StreamFlags::DEFAULT, None))?;
        let launched = launch(workspace.address(), stream.as_inner().cast());
        through_cust("cuStreamSynchronize", stream.synchronize())?;
        launched
    }

    fn check_owns(&self, argument: &'static str, tensor: &DeviceTensorRef) -> Result<()> {
        let (found, allowed) = (tensor.device.info().ordinal, self.info().ordinal);
        if found == allowed { Ok(()) } else { Err(Error::Device { argument, found, allowed }) }
    }
}
