//! The words of the device on the simulated GPU. What they mean is said where the public words stand.
mod access;
mod atomic;
mod copy;
mod hopper;
mod index;
pub(super) mod math;
mod matrix;
mod product;
mod tensor;
mod warp;
mod wgmma;

pub use access::Access;
pub(crate) use access::{dynamic_shared, static_shared};
pub(crate) use atomic::*;
pub(crate) use copy::*;
pub(crate) use hopper::*;
pub(crate) use index::*;
pub(crate) use math::{ex2, f16_to_f32, f32_to_bf16, f32_to_f16, fma, lg2, max, pack_bf16, pack_f16, rcp};
pub(crate) use math::{min_or_nan, round_to_tf32, unknown, unknown_before};
pub(crate) use matrix::{ldmatrix, stmatrix};
pub(crate) use product::{mma, mma_shared};
pub use tensor::MapAddress;
pub(crate) use tensor::*;
pub(crate) use warp::*;
pub use wgmma::{Flight, Sum};
pub(crate) use wgmma::{pin, wgmma_registers, wgmma_shared, wgmma_wait};
