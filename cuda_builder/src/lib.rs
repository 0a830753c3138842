//! Builds a Rust crate to PTX, NVIDIA's portable assembly, with rustc's own target `nvptx64-nvidia-cuda`.
//!
//! ```no_run
//! use cuda_builder::{Arch, CudaBuilder, check, ptx};
//!
//! let built = CudaBuilder::new("kernels").arch(Arch::Sm80).copy_to("target/kernels.ptx").build()?;
//! for entry in ptx::Module::parse(&built.text)?.entries()? {
//!     println!("{}: {:?}", entry.name, check::Census::of(&entry.text));
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! - [`CudaBuilder`] runs cargo; the vocabulary is that of Rust-CUDA's crate of the same name.
//! - [`Toolchain`] is the compiler: stable Rust, plus the source of `core`, which is built for the GPU.
//! - [`ptx`] splits a module into one small module for each entry point and sets the launch bounds, for which rustc has
//!   no attribute.
//! - [`check`] counts what a kernel should not have, or not have more of than its source: local memory, barriers ...
mod arch;
mod builder;
pub mod check;
pub mod ptx;
mod toolchain;

pub use arch::Arch;
pub use builder::{BuildError, CudaBuilder, Ptx};
pub use toolchain::{MissingToolchain, Toolchain};
