//! What a CUDA kernel written in Rust may say to the machine: threads, warps, shared memory, copies, matrix units,
//! barriers. One vocabulary, two machines:
//!
//! - built for `nvptx64-nvidia-cuda`, each word is PTX (module `nvptx`: inline assembly and intrinsics);
//! - built for the host, each word acts on a simulated GPU (module [`sim`]), which runs the same kernel, line for line,
//!   and reports races, uninitialised reads, out-of-bounds accesses, divergent barriers, and every byte that moves.
//!
//! The names follow the Rust-CUDA crate of the same name ([`thread::thread_idx_x`], [`kernel`](macro@kernel), [`shared_array!`]), so
//! that a kernel can move between the two.
//!
//! # Safety of device code
//!
//! Words are safe to call. What makes them sound is promised once, when a kernel is launched: that each [`Global`] it is
//! given points to an allocation as large as the kernel's arguments say. The device checks no bounds; the simulator
//! checks every access.
#![cfg_attr(target_arch = "nvptx64", no_std)]
// Arrays are registers: only loops over constant indices are sure to be unrolled, iterators are not.
#![allow(clippy::needless_range_loop)]
#![cfg_attr(target_arch = "nvptx64", feature(asm_experimental_arch, link_llvm_intrinsics, stdarch_nvptx))]
#![cfg_attr(target_arch = "nvptx64", allow(internal_features))]

pub mod arrivals;
pub mod atomic;
pub mod barrier;
pub mod bulk;
pub mod cluster;
pub mod copy;
pub mod element;
pub mod fence;
pub mod fragment;
mod global;
mod global_matrix;
pub mod grid;
mod kernel;
pub mod math;
pub mod matrix;
pub mod mbarrier;
pub mod pipeline;
pub mod shared;
pub mod tensor;
pub mod thread;
mod tile;
pub mod warp;
pub mod warpgroup;
pub mod wgmma;

#[cfg(target_arch = "nvptx64")]
mod nvptx;
#[cfg(target_arch = "nvptx64")]
use nvptx as machine;

#[cfg(not(target_arch = "nvptx64"))]
pub mod sim;
#[cfg(not(target_arch = "nvptx64"))]
use sim::words as machine;

pub use cuda_std_macros::kernel;
pub use element::{DType, Element, Scalar};
pub use global::Global;
pub use global_matrix::GlobalMatrix;
pub use kernel::{HAS_SIMULATOR, Kernel, not_simulated};
pub use shared::{Shared, SharedArray};
pub use tile::{SmemTile, TileStream};

#[doc(hidden)]
pub mod entry {
    //! What the `#[kernel]` attribute expands to.
    #[cfg(target_arch = "nvptx64")]
    pub use core::arch::global_asm;
}
