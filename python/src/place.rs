//! Where a call runs.
use std::ffi::c_void;
use std::ptr::null_mut;

use ferroflash::cuda;
use ferroflash::raw::Stream;
use pyo3::prelude::*;

use crate::error::exception;
use crate::torch::Torch;

/// A device of PyTorch's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    Cpu,
    Cuda(u32),
    /// One that nothing here runs on.
    Other,
}

/// A CUDA device, which runs kernels, and PyTorch's current stream there.
pub struct Place {
    pub device: &'static cuda::Device,
    stream: *mut c_void,
}

impl Place {
    /// Of CUDA device `ordinal`.
    pub fn new(py: Python, torch: &Torch, ordinal: u32) -> PyResult<Self> {
        let stream = match &torch.exchange {
            Some(exchange) => exchange.current_stream(py, ordinal)?,
            None => null_mut::<u8>().with_addr(torch.current_stream(py, ordinal)?).cast(),
        };
        Ok(Place { device: cuda::Device::get(ordinal).map_err(exception)?, stream })
    }

    /// The stream.
    pub fn stream(&self) -> Stream {
        self.stream
    }
}

// SAFETY: a handle, which the driver lets any thread use. It leaves its thread nowhere: `Python::detach` asks for it.
unsafe impl Send for Place {}
// SAFETY: likewise.
unsafe impl Sync for Place {}
