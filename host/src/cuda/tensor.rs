//! Tensors on a device.
use std::marker::PhantomData;

use cust::stream::{Stream, StreamFlags};

use super::codes::through_cust;
use super::device::Device;
use super::memory::DeviceMemory;
use crate::element::Element;
use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::options::{AttentionOptions, Kernel};
use crate::raw::{self, RawTensor};
use crate::report::LaunchReport;
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

/// A result of attention on a device.
#[derive(Debug)]
#[non_exhaustive]
pub struct DeviceAttention<T> {
    /// O: (batch, seqlen_q, nheads, headdim).
    pub out: DeviceTensor<T>,
    /// LSE: (batch, nheads, seqlen_q).
    pub softmax_lse: DeviceTensor<f32>,
    /// The launches, in order.
    pub launches: Vec<LaunchReport>,
}

impl<T: Element> DeviceTensor<T> {
    /// A tensor that holds anything.
    ///
    /// # Errors
    /// [`Error::TooLarge`] or [`Error::OutOfMemory`].
    pub fn uninitialised(device: &'static Device, shape: &[usize]) -> Result<Self> {
        let layout = Layout::contiguous(T::DTYPE, shape)?;
        let memory = DeviceMemory::allocate::<T>(device, "a tensor", layout.len())?;
        Ok(DeviceTensor { memory, layout, device, element: PhantomData })
    }

    /// A copy of a host tensor.
    ///
    /// # Errors
    /// [`Error::DType`] if its dtype is not `T`, [`Error::OutOfMemory`] or [`Error::Driver`].
    pub fn from_host<'a>(device: &'static Device, tensor: impl Into<TensorRef<'a>>) -> Result<Self> {
        let tensor = tensor.into();
        let allowed = || T::DTYPE.name().to_owned();
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

    fn raw(&self) -> RawTensor {
        RawTensor { address: self.address(), layout: self.layout.clone() }
    }
}

impl Device {
    /// O = softmax(softmax_scale · Q Kᵀ + mask) V of tensors on this device. Returns when it is done.
    ///
    /// # Errors
    /// Those of [`Problem::new`](crate::Problem::new); [`Error::Unsupported`] if the kernel cannot run this problem;
    /// [`Error::OutOfMemory`]; [`Error::Device`] for a tensor of another device; [`Error::Driver`].
    pub fn attention<T: Element>(
        &'static self,
        q: &DeviceTensor<T>,
        k: &DeviceTensor<T>,
        v: &DeviceTensor<T>,
        options: &AttentionOptions,
        kernel: Kernel,
    ) -> Result<DeviceAttention<T>> {
        for (argument, tensor) in [("q", q), ("k", k), ("v", v)] {
            self.check_owns(argument, tensor)?;
        }
        let problem = crate::Problem::new(&q.layout, &k.layout, &v.layout, options)?;
        let out = DeviceTensor::uninitialised(self, &problem.out_shape())?;
        let softmax_lse = DeviceTensor::<f32>::uninitialised(self, &problem.lse_shape())?;
        let arguments = raw::Arguments {
            q: q.raw(),
            k: k.raw(),
            v: v.raw(),
            out: out.raw(),
            softmax_lse: softmax_lse.address(),
            options: options.clone(),
            kernel,
        };
        let call = raw::Call::new(&arguments)?;
        let workspace = DeviceMemory::allocate::<u8>(self, "the workspace", call.workspace_bytes() as usize)?;
        let _entered = self.enter()?;
        let stream = through_cust("cuStreamCreate", Stream::new(StreamFlags::DEFAULT, None))?;
        // SAFETY: all tensors are on this device and as large as their layouts say; the stream is waited for before any is
        // freed, also if a launch fails.
        let launched = unsafe { call.launch(self, workspace.address(), stream.as_inner().cast()) };
        through_cust("cuStreamSynchronize", stream.synchronize())?;
        Ok(DeviceAttention { out, softmax_lse, launches: launched? })
    }

    fn check_owns<T>(&self, argument: &'static str, tensor: &DeviceTensor<T>) -> Result<()> {
        let (found, allowed) = (tensor.device.info().ordinal, self.info().ordinal);
        if found == allowed { Ok(()) } else { Err(Error::Device { argument, found, allowed }) }
    }
}
