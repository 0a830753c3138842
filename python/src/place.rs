//! Where a call runs.
use std::ptr::null_mut;

use ferroflash::cuda::Device;
use ferroflash::raw::Stream;
use pyo3::prelude::*;

use crate::error::exception;

/// A CUDA device and one of its streams, as Python passes them: two numbers.
#[derive(FromPyObject)]
pub struct Place(u32, usize);

impl Place {
    /// The device, which must run kernels.
    pub fn device(&self) -> PyResult<&'static Device> {
        Device::get(self.0).map_err(exception)
    }

    /// The stream.
    pub fn stream(&self) -> Stream {
        null_mut::<u8>().with_addr(self.1).cast()
    }
}

/// Device memory to work in, of torch's allocator.
pub struct Workspace<'py> {
    /// Kept until the launches are on the stream: what is freed after that is used again only after them.
    tensor: Option<Bound<'py, PyAny>>,
}

impl<'py> Workspace<'py> {
    /// Memory of so many bytes, from `allocate`, a function of their number that returns a tensor.
    pub fn new(allocate: &Bound<'py, PyAny>, bytes: u64) -> PyResult<Self> {
        let tensor = if bytes == 0 { None } else { Some(allocate.call1((bytes,))?) };
        Ok(Workspace { tensor })
    }

    /// Its address.
    pub fn address(&self) -> PyResult<u64> {
        self.tensor.as_ref().map_or(Ok(0), |tensor| tensor.call_method0("data_ptr")?.extract())
    }
}
