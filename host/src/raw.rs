//! Attention on plain pointers: addresses, strides and a CUDA stream, from any framework.
//!
//! ```no_run
//! # use ferroflash::{AttentionOptions, DType, Kernel, Layout, cuda, raw};
//! # fn main() -> ferroflash::Result<()> {
//! # let (q, k, v, out, softmax_lse, stream) = (0, 0, 0, 0, 0, std::ptr::null_mut());
//! # let allocate = |_bytes: u64| 0;
//! let tensor = |address| raw::RawTensor { address, layout: Layout::contiguous(DType::BF16, &[2, 4096, 16, 128]).unwrap() };
//! let call = raw::Call::new(&raw::Arguments {
//!     q: tensor(q),
//!     k: tensor(k),
//!     v: tensor(v),
//!     out: tensor(out),
//!     softmax_lse,
//!     options: AttentionOptions::new().causal(true),
//!     kernel: Kernel::Auto,
//! })?;
//! let workspace = allocate(call.workspace_bytes());
//! // SAFETY: the tensors live on this device until the stream has got here.
//! unsafe { call.launch(cuda::Device::get(0)?, workspace, stream)? };
//! # Ok(())
//! # }
//! ```
use std::ffi::c_void;

use cuda_std::Global;
use driver::calls::{cuMemsetD2D8Async, cuMemsetD32Async};
use kernels::attention::{Attention, Tensor, Untyped};

use crate::backend::Backend;
use crate::cuda::{Device, check};
use crate::dispatch::Plan;
use crate::error::{Error, Result};
use crate::launch::{Launch, Workspace};
use crate::layout::Layout;
use crate::machine::arguments as machine_arguments;
use crate::options::{AttentionOptions, Kernel};
use crate::problem::Problem;
use crate::report::LaunchReport;

mod backward;

pub use backward::{BackwardArguments, BackwardCall};

/// A `CUstream`; null for the default one.
pub type Stream = *mut c_void;

/// What addresses and strides of tensors are multiples of, in bytes: the widest access of a kernel.
pub const ALIGNMENT: usize = 16;

/// What the address of a workspace is a multiple of, in bytes.
pub const WORKSPACE_ALIGNMENT: u64 = 256;

/// A tensor in device memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawTensor {
    /// The address of its first element.
    pub address: u64,
    /// Its dtype, shape and strides.
    pub layout: Layout,
}

/// The arguments of attention.
#[derive(Clone, Debug, PartialEq)]
pub struct Arguments {
    /// Q: (batch, seqlen_q, nheads, headdim).
    pub q: RawTensor,
    /// K: (batch, seqlen_k, nheads_k, headdim).
    pub k: RawTensor,
    /// V: (batch, seqlen_k, nheads_k, headdim).
    pub v: RawTensor,
    /// O, which is written: (batch, seqlen_q, nheads, headdim). Overlaps none of the others.
    pub out: RawTensor,
    /// The address of the LSE, which is written: batch x nheads x seqlen_q numbers, f32, contiguous.
    pub softmax_lse: u64,
    /// Scale and mask.
    pub options: AttentionOptions,
    /// Which kernel family.
    pub kernel: Kernel,
}

/// A call whose arguments fit together, ready to be launched.
#[derive(Clone, Debug)]
pub struct Call {
    problem: Problem,
    plan: Plan,
    attention: Attention,
    out: RawTensor,
}

impl Call {
    /// Checks the arguments and chooses the kernels.
    ///
    /// # Errors
    /// Those of [`Problem::new`]; [`Error::Alignment`] and [`Error::Stride`] for addresses and strides that are no multiple
    /// of [`ALIGNMENT`]; [`Error::Unsupported`] if the kernel cannot run this problem.
    pub fn new(arguments: &Arguments) -> Result<Self> {
        let Arguments { q, k, v, out, softmax_lse, options, kernel } = arguments;
        let problem = Problem::new(&q.layout, &k.layout, &v.layout, options)?;
        problem.check_outputs(&out.layout, None)?;
        out.check_distinct("out")?;
        for (argument, tensor) in [("q", q), ("k", k), ("v", v), ("out", out)] {
            tensor.check_alignment(argument)?;
        }
        check_address("softmax_lse", *softmax_lse, align_of::<f32>())?;
        let plan = Plan::new(&problem, *kernel, Backend::Cuda)?;
        // SAFETY: what is at the address `launch` asks its caller about.
        let lse = unsafe { Global::from_address(*softmax_lse) };
        let attention = Attention {
            q: q.tensor(),
            k: k.tensor(),
            v: v.tensor(),
            o: out.tensor(),
            ..machine_arguments(&problem, lse)
        };
        Ok(Call { problem, plan, attention, out: out.clone() })
    }

    /// The problem.
    pub fn problem(&self) -> &Problem {
        &self.problem
    }

    /// The kernel family that will run.
    pub fn algorithm(&self) -> &'static str {
        self.plan.algorithm()
    }

    /// Device memory that the kernels work in, in bytes; none for FlashAttention-2.
    pub fn workspace_bytes(&self) -> u64 {
        self.workspace_offsets().1
    }

    /// Where each part of the workspace begins, and where the last ends.
    fn workspace_offsets(&self) -> (Vec<u64>, u64) {
        let mut end = 0u64;
        let begin = |workspace: &Workspace| {
            let begin = end;
            end = end.saturating_add(workspace.bytes()).next_multiple_of(WORKSPACE_ALIGNMENT);
            begin
        };
        (self.plan.workspace.iter().map(begin).collect(), end)
    }

    /// Puts the launches on a stream. Returns at once; what is in the workspace afterwards means nothing.
    ///
    /// `workspace` is the address of [`workspace_bytes`](Self::workspace_bytes) bytes, a multiple of
    /// [`WORKSPACE_ALIGNMENT`]. The device's primary context is current during the call, and afterwards the one that was.
    ///
    /// # Errors
    /// [`Error::Alignment`] for the workspace; [`Error::MissingKernel`]; [`Error::UnsupportedArchitecture`];
    /// [`Error::Driver`]. A kernel that fails while it runs shows at the next synchronisation.
    ///
    /// # Safety
    /// The tensors, the LSE and the workspace lie in memory of `device`, as large as their layouts say, until the stream has
    /// done the launches; outputs and workspace overlap nothing else, and nothing else uses them meanwhile. `stream` is a
    /// stream of the device's primary context, or null.
    pub unsafe fn launch(&self, device: &'static Device, workspace: u64, stream: Stream) -> Result<Vec<LaunchReport>> {
        let (offsets, _) = self.workspace_offsets();
        if !offsets.is_empty() {
            check_address("workspace", workspace, WORKSPACE_ALIGNMENT as usize)?;
        }
        let entered = device.enter()?;
        if self.problem.rows() == 0 {
            return Ok(Vec::new());
        }
        if self.problem.seqlen_k == 0 {
            // SAFETY: as the caller promises.
            unsafe { self.fill_without_keys(stream)? };
            return Ok(Vec::new());
        }
        // SAFETY: as the caller promises.
        let addresses: Vec<_> =
            offsets.iter().map(|offset| unsafe { Global::<Untyped>::from_address(workspace + offset) }).collect();
        let launches = self.plan.launches(&self.problem, self.attention, &addresses)?;
        device.load(&launches, &entered)?;
        for launch in &launches {
            // SAFETY: as the caller promises.
            unsafe { device.launch(launch, stream, &entered)? };
        }
        Ok(launches.iter().map(Launch::report).collect())
    }

    /// O = 0 and LSE = -inf.
    ///
    /// # Safety
    /// As [`Call::launch`], and the device's context is current.
    unsafe fn fill_without_keys(&self, stream: Stream) -> Result<()> {
        // SAFETY: as the caller promises.
        unsafe { self.out.fill_with_zeros(stream)? };
        let (lse, minus_infinity) = (self.attention.softmax_lse.address(), f32::NEG_INFINITY.to_bits());
        // SAFETY: the LSE has as many elements, as the caller promises.
        check("cuMemsetD32Async", unsafe { cuMemsetD32Async(lse, minus_infinity, self.problem.rows(), stream) })
    }
}

impl RawTensor {
    fn check_alignment(&self, argument: &'static str) -> Result<()> {
        if self.layout.is_empty() {
            return Ok(());
        }
        check_address(argument, self.address, ALIGNMENT)?;
        let outer = self.layout.shape().iter().zip(self.layout.strides()).take(3);
        let element = self.layout.dtype().bytes();
        if outer.into_iter().any(|(&extent, &stride)| extent > 1 && !(stride * element).is_multiple_of(ALIGNMENT)) {
            let allowed = "multiples of 16 bytes, but for headdim";
            return Err(Error::Stride { argument, found: self.layout.strides().to_vec(), allowed });
        }
        Ok(())
    }

    fn check_distinct(&self, argument: &'static str) -> Result<()> {
        if self.layout.is_distinct() {
            return Ok(());
        }
        let allowed = "those with which no two elements share memory";
        Err(Error::Stride { argument, found: self.layout.strides().to_vec(), allowed })
    }

    /// Sets all elements to 0, head by head: what lies between them stays.
    ///
    /// # Safety
    /// The tensor lies in memory of the device whose context is current and is not used until the stream has done it; the
    /// stream is one of that context, or null.
    unsafe fn fill_with_zeros(&self, stream: Stream) -> Result<()> {
        if self.layout.is_empty() {
            return Ok(());
        }
        let element = self.layout.dtype().bytes();
        let [batches, rows, heads, headdim] = [0, 1, 2, 3].map(|i| self.layout.shape()[i]);
        let [batch_stride, row_stride, head_stride] = [0, 1, 2].map(|i| self.layout.strides()[i] * element);
        let width = headdim * element;
        let pitch = if rows > 1 { row_stride } else { width };
        for (batch, head) in (0..batches).flat_map(|batch| (0..heads).map(move |head| (batch, head))) {
            let address = self.address + (batch * batch_stride + head * head_stride) as u64;
            // SAFETY: the rows of one head, as the caller promises.
            check("cuMemsetD2D8Async", unsafe { cuMemsetD2D8Async(address, pitch, 0, width, rows, stream) })?;
        }
        Ok(())
    }

    fn tensor(&self) -> Tensor<Untyped> {
        let strides = self.layout.strides();
        let [batch_stride, row_stride, head_stride] = [0, 1, 2].map(|i| strides[i] as u64);
        // SAFETY: what is at the address `launch` asks its caller about.
        let data = unsafe { Global::from_address(self.address) };
        Tensor { data, batch_stride, row_stride, head_stride }
    }
}

fn check_address(argument: &'static str, found: u64, allowed: usize) -> Result<()> {
    if found != 0 && found.is_multiple_of(allowed as u64) {
        return Ok(());
    }
    Err(Error::Alignment { argument, found, allowed })
}

#[cfg(test)]
mod tests {
    use super::*;
    use cuda_std::DType;

    fn arguments() -> Arguments {
        let layout = Layout::contiguous(DType::F16, &[1, 8, 2, 64]).expect("small");
        let tensor = |address| RawTensor { address, layout: layout.clone() };
        let (options, kernel) = (AttentionOptions::new(), Kernel::Auto);
        let (q, k, v, out) = (tensor(0x1000), tensor(0x2000), tensor(0x3000), tensor(0x4000));
        Arguments { q, k, v, out, softmax_lse: 0x5000, options, kernel }
    }

    #[test]
    fn addresses_and_strides_must_be_aligned() {
        let refused = |change: fn(&mut Arguments)| {
            let mut arguments = arguments();
            change(&mut arguments);
            Call::new(&arguments).expect_err("bad").to_string()
        };
        assert_eq!(refused(|a| a.k.address += 8), "k: address 0x2008; allowed: multiples of 16 bytes");
        assert_eq!(refused(|a| a.softmax_lse = 0), "softmax_lse: address 0x0; allowed: multiples of 4 bytes");
        let strides = |a: &mut Arguments| {
            a.v.layout = Layout::strided(DType::F16, &[1, 8, 2, 64], &[1, 132, 64, 1]).expect("four strides");
        };
        assert_eq!(refused(strides), "v: strides [1, 132, 64, 1]; allowed: multiples of 16 bytes, but for headdim");
        let overlap = |a: &mut Arguments| {
            a.out.layout = Layout::strided(DType::F16, &[1, 8, 2, 64], &[0, 0, 64, 1]).expect("four strides");
        };
        assert!(refused(overlap).starts_with("out: strides [0, 0, 64, 1]; allowed: those with which no two"));
    }

    #[test]
    fn the_workspace_holds_what_the_kernel_keeps_in_hbm() {
        let bytes = |kernel| Call::new(&Arguments { kernel, ..arguments() }).expect("valid").workspace_bytes();
        // O in f32, l and m; S and P of 64 columns.
        assert_eq!(bytes(Kernel::Flash1), 8 * 2 * 64 * 4 + 2 * 256);
        assert_eq!(bytes(Kernel::Standard), 2 * (8 * 2 * 64 * 2));
        assert_eq!(bytes(Kernel::Flash2), 0);
    }
}
