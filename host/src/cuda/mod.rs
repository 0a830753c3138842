//! The CUDA backend: devices, device tensors, and launches through `cust`.
//!
//! Contexts are primary ones, the same that PyTorch and the CUDA runtime use. Each call makes its device's context current
//! and afterwards the one that was before, so any thread may call, and a failed call leaves nothing behind.

mod codes;
mod context;
mod device;
mod gpu;
mod memory;
mod modules;
mod tensor;
mod tensor_map;
#[cfg(test)]
mod tests;

pub(crate) use context::Entered;
pub use device::{Device, DeviceInfo, devices, driver_version};
pub(crate) use gpu::Gpu;
pub use tensor::{DeviceAttention, DeviceGradients, DeviceTensor, DeviceTensorRef};
