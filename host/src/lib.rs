//! Exact attention whose GPU kernels are written in Rust, forward and backward, and which can be run and checked without a
//! GPU.
//!
//! O = softmax(softmax_scale · Q Kᵀ + mask) V, without S and P ever being whole in memory. The kernels are embedded as PTX:
//! an application needs stable Rust and NVIDIA's driver, and where there is no GPU, nothing.
//!
//! ```
//! use ferroflash::{AttentionOptions, Tensor, attention};
//!
//! # fn main() -> Result<(), ferroflash::Error> {
//! // (batch, seqlen, nheads, headdim)
//! let q = Tensor::from_vec(vec![0.5f32; 2 * 128 * 4 * 64], &[2, 128, 4, 64])?;
//! let result = attention(&q, &q, &q, &AttentionOptions::new().causal(true))?;
//! assert_eq!(result.out.shape(), [2, 128, 4, 64]);
//! assert_eq!(result.softmax_lse.shape(), [2, 4, 128]);
//! println!("{} on {}: {}", result.report.algorithm, result.report.device, result.report.reason);
//! # Ok(())
//! # }
//! ```
//!
//! # Three levels
//!
//! - **Host tensors** in and out: [`attention`], [`attention_backward`], [`softmax`], or a [`Session`] to choose backend and
//!   kernel, on the GPU, on the CPU or on a simulated GPU.
//! - **Device tensors**: [`cuda::DeviceTensor`], [`cuda::Device::attention`] and [`cuda::Device::attention_backward`], to
//!   keep data on the GPU.
//! - **Pointers**: [`raw::Call`], [`raw::BackwardCall`] and [`raw::SoftmaxCall`] take addresses, strides and a CUDA stream
//!   from any framework, and only launch.
//!
//! Each level has short forms that take Q, K and V, and forms that take [`Inputs`]: besides these a bias, a boolean
//! mask, ALiBi slopes, attention sinks, and where sequences of different lengths begin. [`AttentionOptions`] has
//! windows, a cap of the scores, dropout, and the rest that is a number. What runs where,
//! [`combinations`](mod@combinations) says.
//!
//! # Words
//!
//! Those of FlashAttention: tensors are (batch, seqlen, nheads, headdim); `nheads_k` heads of K and V may serve a multiple
//! of them of Q; a causal mask is aligned to the bottom right corner; `softmax_lse` is log Σ e^score of each row; a row that
//! sees no key has O = 0 and LSE = -inf.
//!
//! # Backends
//!
//! [`Backend::auto`] takes the GPU where there is one that the kernels run on, and else the CPU, and says why. Nothing falls
//! back from a GPU that failed: that is an error. [`Backend::Simulator`] runs the GPU's kernels on the CPU, and reports each
//! race, each uninitialised read, and every byte that moves.
//!
//! # Features
//!
//! Both are there by default, and an application may leave out both.
//!
//! - `cli`: the command `ferroflash`.
//! - `simulator`: [`Backend::Simulator`]. Without it no kernel is compiled for the CPU, which is most of the time of a build.

pub mod accuracy;
mod backend;
pub mod combinations;
mod cpu;
pub mod cuda;
mod dispatch;
mod element;
mod error;
pub mod explanation;
mod families;
mod features;
mod heads;
mod inputs;
mod launch;
mod layout;
mod machine;
mod operands;
mod options;
mod parameters;
mod problem;
pub mod ptx;
pub mod raw;
pub mod reference;
mod report;
mod sequences;
mod session;
mod simulator;
mod target;
mod tensor;
pub mod traffic;
#[doc(hidden)]
pub mod tune;

pub use backend::{Backend, BackendChoice};
pub use cuda_std::{DType, sim};
pub use driver;
pub use element::{Datum, Element};
pub use error::{Error, Result};
pub use inputs::{BackwardInputs, GradientOutputs, Inputs};
pub use kernels::SHARED_BYTES_OF_EVERY_GPU;
pub use layout::Layout;
pub use options::{AttentionOptions, Dropout, Kernel, SoftmaxMethod, WindowSize};
pub use problem::{Problem, Varlen};
pub use report::{LaunchReport, Report};
pub use sequences::Sequences;
pub use session::{
    Attention, Gradients, Session, Softmax, attention, attention_backward, attention_backward_with, attention_with,
    softmax,
};
pub use simulator::{Progress, SimulatorOptions};
pub use tensor::{Tensor, TensorMut, TensorRef};
