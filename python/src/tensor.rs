//! PyTorch's tensors, without its headers: where they are and how they lie.
use std::slice;

use cuda_std::DType;
use ferroflash::raw::RawTensor;
use ferroflash::{Datum, Error, Layout, TensorMut, TensorRef};
use half::{bf16, f16};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::pybacked::PyBackedStr;

use crate::error::exception;
use crate::place::Device;
use crate::torch::Torch;

/// A tensor that is not there yet, or none.
pub type Optional<'py> = Option<Bound<'py, PyAny>>;

/// Reads the tensors of a call, which are all on one device.
pub struct Reader<'a, 'py> {
    torch: &'a Torch,
    /// The first one, and its name.
    first: (&'static str, &'a Bound<'py, PyAny>),
    device: Device,
    /// Copies of tensors that kernels cannot read as they lie, kept until the launches are on the stream: what is freed
    /// after that is used again only after them.
    copies: Vec<Bound<'py, PyAny>>,
}

impl<'a, 'py> Reader<'a, 'py> {
    /// For tensors on the device of the first one.
    ///
    /// # Errors
    /// `ValueError` for a device that nothing here runs on, and those of [`tensor`](Self::tensor).
    pub fn new(torch: &'a Torch, argument: &'static str, tensor: &'a Bound<'py, PyAny>) -> PyResult<Self> {
        let (_, device) = read(argument, tensor, torch)?;
        if device == Device::Other {
            let found = tensor.getattr("device")?;
            return Err(PyValueError::new_err(format!("{argument}: on device {found}; allowed: cpu, cuda")));
        }
        Ok(Reader { torch, first: (argument, tensor), device, copies: Vec::new() })
    }

    /// Where the tensors are.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The address of a tensor, its dtype, shape and strides.
    ///
    /// # Errors
    /// `TypeError` for what is no tensor or has another dtype than kernels have, `ValueError` for one on another device
    /// than the first one; both with the name of the argument.
    pub fn tensor(&self, argument: &'static str, tensor: &Bound<'py, PyAny>) -> PyResult<RawTensor> {
        let (raw, device) = read(argument, tensor, self.torch)?;
        if device == self.device {
            return Ok(raw);
        }
        let (first, of_first) = self.first;
        let (found, allowed) = (tensor.getattr("device")?, of_first.getattr("device")?);
        Err(PyValueError::new_err(format!("{argument}: on device {found}; allowed: {allowed}, where {first} is")))
    }

    /// The same of a tensor whose last dimension kernels read as contiguous, or of such a copy of it.
    pub fn rows(&mut self, argument: &'static str, tensor: &Bound<'py, PyAny>) -> PyResult<RawTensor> {
        let has_rows = |layout: &Layout| match (layout.shape().last(), layout.strides().last()) {
            (Some(&extent), Some(&stride)) => extent <= 1 || stride == 1,
            _ => true,
        };
        self.or_copied(argument, tensor, has_rows)
    }

    /// The same of a tensor without gaps, or of such a copy of it.
    pub fn contiguous(&mut self, argument: &'static str, tensor: &Bound<'py, PyAny>) -> PyResult<RawTensor> {
        self.or_copied(argument, tensor, Layout::is_contiguous)
    }

    /// A contiguous tensor, not yet written, and where it is.
    pub fn empty(
        &self,
        argument: &'static str,
        dtype: DType,
        shape: &[usize],
    ) -> PyResult<(Bound<'py, PyAny>, RawTensor)> {
        let layout = Layout::contiguous(dtype, shape).map_err(exception)?;
        let allocated = self.torch.empty(self.first.1, self.device, dtype, shape);
        let (tensor, address) = allocated.map_err(|error| naming(self.first.1.py(), argument, error))?;
        Ok((tensor, RawTensor { address, layout }))
    }

    /// A tensor that is to be written, and where it is.
    pub fn given(&self, argument: &'static str, tensor: Bound<'py, PyAny>) -> PyResult<(Bound<'py, PyAny>, RawTensor)> {
        let raw = self.tensor(argument, &tensor)?;
        Ok((tensor, raw))
    }

    fn or_copied(
        &mut self,
        argument: &'static str,
        tensor: &Bound<'py, PyAny>,
        is_readable: impl Fn(&Layout) -> bool,
    ) -> PyResult<RawTensor> {
        let raw = self.tensor(argument, tensor)?;
        if is_readable(&raw.layout) {
            return Ok(raw);
        }
        let py = tensor.py();
        let copy = tensor.call_method0(intern!(py, "contiguous")).map_err(|error| naming(py, argument, error))?;
        let raw = self.tensor(argument, &copy)?;
        self.copies.push(copy);
        Ok(raw)
    }
}

/// An error of PyTorch's that names no argument, such as one of its allocator's, as one of the same type that does.
fn naming(py: Python, argument: &str, error: PyErr) -> PyErr {
    let message = format!("{argument}: {}", error.value(py));
    match error.get_type(py).call1((message,)) {
        Ok(named) => {
            let named = PyErr::from_value(named);
            named.set_cause(py, Some(error));
            named
        }
        Err(_) => error,
    }
}

/// A tensor, and where it is.
fn read(argument: &'static str, tensor: &Bound<PyAny>, torch: &Torch) -> PyResult<(RawTensor, Device)> {
    let (raw, device) = described(argument, tensor, torch)?;
    if device == Device::Cpu || device != Device::Other && raw.address < LOWEST_ADDRESS {
        check_storage(argument, tensor, &raw)?;
    }
    Ok((raw, device))
}

/// No memory of a CUDA device lies below: such an address is an offset into a storage that has been freed.
const LOWEST_ADDRESS: u64 = 1 << 32;

/// Checks that there is memory for all elements, and that they are aligned: PyTorch lets storages shrink under their
/// tensors, and takes buffers of others at any address.
fn check_storage(argument: &'static str, tensor: &Bound<PyAny>, raw: &RawTensor) -> PyResult<()> {
    let py = tensor.py();
    if raw.layout.is_empty() {
        return Ok(());
    }
    let storage = tensor.call_method0(intern!(py, "untyped_storage"))?;
    let found: u64 = storage.call_method0(intern!(py, "nbytes"))?.extract()?;
    let offset: u64 = tensor.call_method0(intern!(py, "storage_offset"))?.extract()?;
    let end = raw.layout.span().and_then(|span| (span as u64).checked_add(offset));
    let needed = end.and_then(|end| end.checked_mul(raw.layout.dtype().bytes() as u64));
    if needed.is_some_and(|needed| needed <= found) {
        let (found, allowed) = (raw.address, raw.layout.dtype().bytes());
        let is_aligned = found.is_multiple_of(allowed as u64);
        return if is_aligned { Ok(()) } else { Err(exception(Error::Alignment { argument, found, allowed })) };
    }
    let needed = needed.map_or_else(|| "more than an index can count".to_owned(), |needed| needed.to_string());
    Err(PyValueError::new_err(format!(
        "{argument}: a storage of {found} bytes; allowed: {needed}, which it reaches to"
    )))
}

/// A tensor, and where it is, as PyTorch says.
fn described(argument: &'static str, tensor: &Bound<PyAny>, torch: &Torch) -> PyResult<(RawTensor, Device)> {
    if let Some(exchange) = torch.exchange.as_ref().filter(|_| torch.is_own_tensor(tensor)) {
        // What DLPack does not describe may be described below, or refused in better words.
        if let Ok(described) = exchange.describe(tensor)
            && let Some(dtype) = described.dtype
        {
            let [shape, strides] = [described.shape, described.strides]
                .map(|extents| extents.iter().map(|&extent| extent as usize).collect::<Vec<_>>());
            let layout = Layout::strided(dtype, &shape, &strides).map_err(exception)?;
            return Ok((RawTensor { address: described.address, layout }, described.device));
        }
    }
    let py = tensor.py();
    let Ok(device) = tensor.getattr(intern!(py, "device")) else {
        let found = tensor.get_type();
        return Err(PyTypeError::new_err(format!("{argument}: {}; allowed: a torch.Tensor", found.name()?)));
    };
    let kind = device.getattr(intern!(py, "type"))?;
    let device = match kind.extract::<PyBackedStr>()?.as_ref() {
        "cpu" => Device::Cpu,
        "cuda" => Device::Cuda(device.getattr(intern!(py, "index"))?.extract()?),
        _ => {
            // Such a tensor may have no address.
            let layout = Layout::contiguous(DType::U8, &[0]).map_err(exception)?;
            return Ok((RawTensor { address: 0, layout }, Device::Other));
        }
    };
    let dtype = torch.dtype(argument, &tensor.getattr(intern!(py, "dtype"))?)?;
    let shape: Vec<usize> = tensor.getattr(intern!(py, "shape"))?.extract()?;
    let strides: Vec<usize> = tensor.call_method0(intern!(py, "stride"))?.extract()?;
    let address: u64 = tensor.call_method0(intern!(py, "data_ptr"))?.extract()?;
    Ok((RawTensor { address, layout: Layout::strided(dtype, &shape, &strides).map_err(exception)? }, device))
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
