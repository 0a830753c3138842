//! The CUDA driver, loaded when it is first used.
//!
//! [`cust`](https://docs.rs/cust) links `libcuda` at build time, so that a program that uses it neither builds nor starts
//! on a machine without CUDA. This crate takes libcuda's place. It defines every driver function that `cust` may call
//! as a trampoline, which on its first call loads `libcuda.so.1`, looks the function up there, and from then on only
//! jumps. Where the driver is missing each function returns `CUDA_ERROR_NO_DEVICE` (100), where only the function is,
//! `CUDA_ERROR_NOT_FOUND` (500): ordinary results, which `cust` reports as `CudaError::NoDevice` and
//! `CudaError::NotFound`.
//!
//! The build script of `cust` still looks for a `libcuda` to hand to the linker: `stub/lib64/libcuda.so` here is an empty
//! linker script. Point `CUDA_LIBRARY_PATH` at `stub`, in `.cargo/config.toml`, and make sure that this crate is linked
//! (`use driver as _;` is enough).

#[cfg(not(all(target_os = "linux", any(target_arch = "x86_64", target_arch = "aarch64"))))]
compile_error!("ferroflash loads the CUDA driver on Linux (x86_64 or aarch64) only");

pub mod calls;
mod library;
mod symbols;
mod trampoline;

pub use library::{Status, status};

/// `CUDA_SUCCESS`.
pub const SUCCESS: u32 = 0;
/// `CUDA_ERROR_NO_DEVICE`: what every function returns where there is no driver.
pub const NO_DEVICE: u32 = 100;
/// `CUDA_ERROR_NOT_FOUND`: what a function returns that the installed driver does not have.
pub const NOT_FOUND: u32 = 500;
