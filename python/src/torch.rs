//! PyTorch's types and functions, looked up once.
use cuda_std::DType;
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyDict, PyTuple, PyType};
use pyo3::{IntoPyObjectExt, intern};

use crate::allocator::Allocator;
use crate::exchange::Exchange;
use crate::place::Device;

/// The dtypes that both sides have, by the names of their attributes in torch.
const DTYPES: [(&str, DType); 6] = [
    ("float32", DType::F32),
    ("float16", DType::F16),
    ("bfloat16", DType::BF16),
    ("int32", DType::I32),
    ("uint8", DType::U8),
    ("bool", DType::U8),
];

/// What is used of PyTorch.
pub struct Torch {
    tensor: Py<PyType>,
    parameter: Py<PyType>,
    dtypes: Vec<(Py<PyAny>, DType)>,
    empty_strided: Py<PyAny>,
    zeros_like: Py<PyAny>,
    is_grad_enabled: Py<PyAny>,
    /// How it allocates without Python, if it does.
    pub allocator: Option<Allocator>,
    /// How it describes tensors without Python, if it does.
    pub exchange: Option<Exchange>,
}

impl Torch {
    /// PyTorch, imported when this is first asked for.
    pub fn get(py: Python<'_>) -> PyResult<&'static Self> {
        static TORCH: PyOnceLock<Torch> = PyOnceLock::new();
        TORCH.get_or_try_init(py, || {
            let torch = py.import("torch")?;
            let tensor = torch.getattr("Tensor")?.cast_into::<PyType>()?;
            let dtypes = DTYPES.iter().map(|&(name, dtype)| Ok((torch.getattr(name)?.unbind(), dtype)));
            Ok(Torch {
                dtypes: dtypes.collect::<PyResult<_>>()?,
                parameter: torch.getattr("nn")?.getattr("Parameter")?.cast_into::<PyType>()?.unbind(),
                empty_strided: torch.getattr("empty_strided")?.unbind(),
                zeros_like: torch.getattr("zeros_like")?.unbind(),
                is_grad_enabled: torch.getattr("is_grad_enabled")?.unbind(),
                allocator: Allocator::find(),
                exchange: Exchange::of(&tensor),
                tensor: tensor.unbind(),
            })
        })
    }

    /// Whether this is a tensor of PyTorch's own type, whose methods nobody has overridden.
    pub fn is_own_tensor(&self, x: &Bound<PyAny>) -> bool {
        let of = x.get_type();
        of.is(&self.tensor) || of.is(&self.parameter)
    }

    /// Whether this is a view whose elements are those in memory, negated.
    pub fn is_negated(&self, x: &Bound<PyAny>) -> PyResult<bool> {
        x.call_method0(intern!(x.py(), "is_neg"))?.is_truthy()
    }

    /// Whether autograd records what is done.
    pub fn is_grad_enabled(&self, py: Python) -> PyResult<bool> {
        self.is_grad_enabled.bind(py).call0()?.is_truthy()
    }

    /// Whether a gradient of this is wanted.
    pub fn requires_grad(&self, x: &Bound<PyAny>) -> PyResult<bool> {
        x.getattr(intern!(x.py(), "requires_grad"))?.is_truthy()
    }

    /// A dtype.
    pub fn dtype(&self, argument: &str, found: &Bound<PyAny>) -> PyResult<DType> {
        match self.dtypes.iter().find(|(known, _)| found.is(known)) {
            Some(&(_, dtype)) => Ok(dtype),
            None => {
                let allowed = "torch.float32, torch.float16, torch.bfloat16";
                Err(PyTypeError::new_err(format!("{argument}: dtype {found}; allowed: {allowed}")))
            }
        }
    }

    /// A contiguous tensor, not yet written, on the device of `x`, which is this one; and its address.
    pub fn empty<'py>(
        &self,
        x: &Bound<'py, PyAny>,
        device: Device,
        dtype: DType,
        shape: &[usize],
    ) -> PyResult<(Bound<'py, PyAny>, u64)> {
        let py = x.py();
        let allocated = self.allocator.as_ref().and_then(|allocator| allocator.empty(py, dtype, device, shape));
        if let Some(allocated) = allocated {
            return Ok(allocated);
        }
        // Also if there was no memory: this raises the error that PyTorch has for it.
        let strides = (0..shape.len()).map(|i| shape[i + 1..].iter().map(|&extent| extent.max(1)).product::<usize>());
        let strides = PyTuple::new(py, strides.collect::<Vec<_>>())?;
        let options = PyDict::new(py);
        let of_dtype = self.dtypes.iter().find(|(_, known)| *known == dtype).map(|(name, _)| name);
        options.set_item(intern!(py, "dtype"), of_dtype)?;
        options.set_item(intern!(py, "device"), x.getattr(intern!(py, "device"))?)?;
        let tensor = self.empty_strided.bind(py).call((PyTuple::new(py, shape)?, strides), Some(&options))?;
        let address = tensor.call_method0(intern!(py, "data_ptr"))?.extract()?;
        Ok((tensor, address))
    }

    /// Zeros, like `x`.
    pub fn zeros_like<'py>(&self, x: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        self.zeros_like.bind(x.py()).call1((x,))
    }

    /// The current stream of a CUDA device, for which PyTorch's own compiler asks in this way.
    pub fn current_stream(&self, py: Python, device: u32) -> PyResult<usize> {
        let function = py.import("torch._C")?.getattr(intern!(py, "_cuda_getCurrentRawStream"))?;
        function.call1((device.into_bound_py_any(py)?,))?.extract()
    }
}
