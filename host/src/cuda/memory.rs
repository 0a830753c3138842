//! Device memory.
use cust::error::CudaError;
use cust::memory::{CopyDestination, DeviceBuffer, mem_get_info};

use super::codes::through_cust;
use super::device::Device;
use crate::error::{Error, Result};

/// An allocation on a device.
#[derive(Debug)]
pub struct DeviceMemory {
    /// `None` where there are no bytes, which the driver does not allocate.
    buffer: Option<DeviceBuffer<u8>>,
    device: &'static Device,
}

impl DeviceMemory {
    /// New memory of `len` elements, holding anything. `what` it is for, errors say.
    pub fn allocate<T>(device: &'static Device, what: &'static str, len: usize) -> Result<Self> {
        let asked = (len as u64).saturating_mul(size_of::<T>() as u64);
        let bytes = usize::try_from(asked).unwrap_or(usize::MAX);
        let _entered = device.enter()?;
        if bytes == 0 {
            return Ok(DeviceMemory { buffer: None, device });
        }
        // SAFETY: bytes may hold anything.
        match unsafe { DeviceBuffer::uninitialized(bytes) } {
            Ok(buffer) => Ok(DeviceMemory { buffer: Some(buffer), device }),
            Err(CudaError::OutOfMemory) => {
                let free = mem_get_info().map_or(0, |(free, _)| free as u64);
                Err(Error::OutOfMemory { what, asked, free })
            }
            Err(error) => through_cust("cuMemAlloc", Err(error)),
        }
    }

    /// Sets all bits.
    pub fn fill_with_ones(&mut self) -> Result<()> {
        let _entered = self.device.enter()?;
        self.buffer.as_mut().map_or(Ok(()), |buffer| through_cust("cuMemsetD8", buffer.set_8(0xff)))
    }

    /// Copies from the host; `bytes` are as many as it has.
    pub fn copy_from(&mut self, bytes: &[u8]) -> Result<()> {
        let _entered = self.device.enter()?;
        self.buffer.as_mut().map_or(Ok(()), |buffer| through_cust("cuMemcpyHtoD", buffer.copy_from(bytes)))
    }

    /// Copies to the host; `bytes` are as many as it has.
    pub fn copy_to(&self, bytes: &mut [u8]) -> Result<()> {
        let _entered = self.device.enter()?;
        self.buffer.as_ref().map_or(Ok(()), |buffer| through_cust("cuMemcpyDtoH", buffer.copy_to(bytes)))
    }

    /// Its address; 0 where there are no bytes.
    pub fn address(&self) -> u64 {
        self.buffer.as_ref().map_or(0, |buffer| buffer.as_device_ptr().as_raw())
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // Freed in its context. Without one the driver would refuse, and the memory would be lost: nothing to be done.
        let _entered = self.device.enter();
        self.buffer = None;
    }
}
