//! Softmax on plain pointers.
use cuda_std::DType;

use super::{RawTensor, Stream, launch_all};
use crate::cuda::Device;
use crate::dispatch;
use crate::element::no_element;
use crate::error::{Error, Result};
use crate::options::SoftmaxMethod;
use crate::parameters;
use crate::report::LaunchReport;

/// Softmax over the last dimension, whose arguments fit together, ready to be launched.
#[derive(Clone, Debug)]
pub struct SoftmaxCall {
    x: u64,
    y: u64,
    dtype: DType,
    rows: usize,
    columns: usize,
    method: SoftmaxMethod,
}

impl SoftmaxCall {
    /// Checks the arguments: `x`, of any rank but 0, and `y`, which is written, of its shape and dtype. Both are
    /// contiguous, and `y` is `x` or overlaps it nowhere.
    ///
    /// # Errors
    /// [`Error::Rank`] for a tensor without dimensions; [`Error::DType`], [`Error::Argument`], [`Error::Stride`] or
    /// [`Error::Alignment`], with the tensor that is at fault.
    pub fn new(x: &RawTensor, y: &RawTensor, method: SoftmaxMethod) -> Result<Self> {
        let (shape, dtype) = (x.layout.shape(), x.layout.dtype());
        let Some(&columns) = shape.last() else {
            return Err(Error::Rank { argument: "x", found: 0, allowed: "1 or more" });
        };
        if !matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
            return Err(no_element("x", dtype));
        }
        y.layout.check_like_x("y", &x.layout)?;
        for (argument, tensor) in [("x", x), ("y", y)] {
            if !tensor.layout.is_empty() {
                tensor.check_contiguous(argument)?;
            }
        }
        let rows = x.layout.len().checked_div(columns).unwrap_or(0);
        Ok(SoftmaxCall { x: x.address, y: y.address, dtype, rows, columns, method })
    }

    /// Puts the launch on a stream, if there are elements. Returns at once. The device's primary context is current
    /// during the call, and afterwards the one that was.
    ///
    /// # Errors
    /// [`Error::TooLarge`] for more rows or columns than a kernel counts; else as
    /// [`Call::launch`](super::Call::launch).
    ///
    /// # Safety
    /// As [`Call::launch`](super::Call::launch), of these tensors; the output is `y`.
    pub unsafe fn launch(&self, device: &'static Device, stream: Stream) -> Result<Vec<LaunchReport>> {
        let SoftmaxCall { x, y, dtype, rows, columns, method } = *self;
        if rows == 0 {
            return Ok(Vec::new());
        }
        let launch = dispatch::softmax(dtype, method, (rows, columns), parameters::global(x), parameters::global(y))?;
        // SAFETY: as the caller promises.
        unsafe { launch_all(&[launch], device, stream, &device.enter()?) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layout;

    #[test]
    fn each_bad_argument_is_named() {
        let tensor = |dtype, address, shape: &[usize]| RawTensor {
            address,
            layout: Layout::contiguous(dtype, shape).expect("small"),
        };
        let x = tensor(DType::F16, 0x1000, &[2, 3]);
        let refused =
            |x: &RawTensor, y: &RawTensor| SoftmaxCall::new(x, y, SoftmaxMethod::Online).expect_err("bad").to_string();
        assert_eq!(refused(&tensor(DType::F32, 0x1000, &[]), &x), "x: 0 dimensions; allowed: 1 or more");
        assert_eq!(refused(&x, &tensor(DType::F32, 0x2000, &[2, 3])), "y: dtype f32; allowed: f16, as of x");
        assert_eq!(refused(&x, &tensor(DType::F16, 0x2000, &[3, 2])), "y: shape [3, 2]; allowed: [2, 3], as of x");
        assert_eq!(
            refused(&x, &tensor(DType::F16, 0x2001, &[2, 3])),
            "y: address 0x2001; allowed: multiples of 2 bytes"
        );
        let indices = tensor(DType::I32, 0x1000, &[2, 3]);
        assert_eq!(refused(&indices, &indices), "x: dtype i32; allowed: f32, f16, bf16");
        let layout = Layout::strided(DType::F16, &[2, 3], &[4, 1]).expect("two strides");
        let gaps = RawTensor { address: 0x1000, layout };
        assert_eq!(refused(&gaps, &x), "x: strides [4, 1]; allowed: those of a contiguous tensor");
    }
}
