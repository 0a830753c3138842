//! PyTorch's tensors, without its headers: what their methods say of where they are and how they lie.
use std::slice;

use cuda_std::DType;
use ferroflash::raw::RawTensor;
use ferroflash::{Datum, Layout, TensorMut, TensorRef};
use half::{bf16, f16};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::error::exception;

/// A tensor that is not there yet, or none.
pub type Optional<'py> = Option<Bound<'py, PyAny>>;

/// The dtypes that both sides have, by the names of their attributes in torch.
const DTYPES: [(&str, DType); 6] = [
    ("float32", DType::F32),
    ("float16", DType::F16),
    ("bfloat16", DType::BF16),
    ("int32", DType::I32),
    ("uint8", DType::U8),
    ("bool", DType::U8),
];

/// Where a tensor is, its dtype, shape and strides.
///
/// # Errors
/// `TypeError` for what is no tensor or has another dtype, `ValueError` for one on another device than `device`; both
/// with the name of the argument.
pub fn read(argument: &'static str, tensor: &Bound<PyAny>, device: &Bound<PyAny>) -> PyResult<RawTensor> {
    let py = tensor.py();
    let found = tensor.getattr(intern!(py, "device"))?;
    if !found.eq(device)? {
        let message = format!("{argument}: on device {found}; allowed: {device}, where q is");
        return Err(PyValueError::new_err(message));
    }
    let dtype = dtype(argument, &tensor.getattr(intern!(py, "dtype"))?)?;
    let shape: Vec<usize> = tensor.getattr(intern!(py, "shape"))?.extract()?;
    let strides: Vec<usize> = tensor.call_method0(intern!(py, "stride"))?.extract()?;
    let address: u64 = tensor.call_method0(intern!(py, "data_ptr"))?.extract()?;
    Ok(RawTensor { address, layout: Layout::strided(dtype, &shape, &strides).map_err(exception)? })
}

fn dtype(argument: &str, found: &Bound<PyAny>) -> PyResult<DType> {
    static KNOWN: PyOnceLock<Vec<(Py<PyAny>, DType)>> = PyOnceLock::new();
    let known = KNOWN.get_or_try_init(found.py(), || {
        let torch = found.py().import("torch")?;
        DTYPES.iter().map(|&(name, dtype)| Ok((torch.getattr(name)?.unbind(), dtype))).collect::<PyResult<_>>()
    })?;
    match known.iter().find(|(known, _)| found.is(known)) {
        Some(&(_, dtype)) => Ok(dtype),
        None => {
            let message = format!("{argument}: dtype {found}; allowed: torch.float32, torch.float16, torch.bfloat16");
            Err(PyTypeError::new_err(message))
        }
    }
}

/// A tensor in host memory, to be read.
///
/// # Safety
/// The memory is there for as long as `'a`, and nobody writes to it.
pub unsafe fn view<'a>(tensor: &RawTensor) -> ferroflash::Result<TensorRef<'a>> {
    unsafe fn of<'a, T: Datum>(RawTensor { address, layout }: &RawTensor) -> ferroflash::Result<TensorRef<'a>> {
        let data: &[T] = match elements(layout) {
            0 => &[],
            // SAFETY: torch's tensors are aligned for their elements and lie within their storage, which the caller
            // promises to keep; any bits are an element.
            len => unsafe { slice::from_raw_parts(*address as *const T, len) },
        };
        TensorRef::with_strides(data, layout.shape(), layout.strides())
    }
    // SAFETY: as the caller promises.
    unsafe {
        match tensor.layout.dtype() {
            DType::F32 => of::<f32>(tensor),
            DType::F16 => of::<f16>(tensor),
            DType::BF16 => of::<bf16>(tensor),
            DType::I32 => of::<i32>(tensor),
            DType::U8 => of::<u8>(tensor),
        }
    }
}

/// A tensor in host memory, to be written.
///
/// # Safety
/// The memory is there for as long as `'a`, and nobody else uses it.
pub unsafe fn view_mut<'a>(tensor: &RawTensor) -> ferroflash::Result<TensorMut<'a>> {
    unsafe fn of<'a, T: Datum>(RawTensor { address, layout }: &RawTensor) -> ferroflash::Result<TensorMut<'a>> {
        let data: &mut [T] = match elements(layout) {
            0 => &mut [],
            // SAFETY: as in `view`; the caller promises that nobody else uses it.
            len => unsafe { slice::from_raw_parts_mut(*address as *mut T, len) },
        };
        TensorMut::with_strides(data, layout.shape(), layout.strides())
    }
    // SAFETY: as the caller promises.
    unsafe {
        match tensor.layout.dtype() {
            DType::F32 => of::<f32>(tensor),
            DType::F16 => of::<f16>(tensor),
            DType::BF16 => of::<bf16>(tensor),
            DType::I32 => of::<i32>(tensor),
            DType::U8 => of::<u8>(tensor),
        }
    }
}

/// Elements of memory from the first to the last of a tensor. A span that no index counts is no tensor of torch's, and
/// left for the views to refuse.
fn elements(layout: &Layout) -> usize {
    layout.span().unwrap_or(0)
}
