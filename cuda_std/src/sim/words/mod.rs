//! The words of the device on the simulated GPU. What they mean is said where the public words stand.
mod access;
mod atomic;
mod copy;
mod index;
pub(super) mod math;
mod matrix;
mod product;
mod warp;

pub use access::Access;
pub(crate) use access::{dynamic_shared, static_shared};
pub(crate) use atomic::*;
pub(crate) use copy::*;
pub(crate) use index::*;
pub(crate) use math::{ex2, f16_to_f32, f32_to_bf16, f32_to_f16, fma, lg2, max, pack_bf16, pack_f16, rcp};
pub(crate) use math::{round_to_tf32, unknown};
pub(crate) use matrix::{ldmatrix, stmatrix};
pub(crate) use product::{mma, mma_shared};
pub(crate) use warp::*;
