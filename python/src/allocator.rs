//! PyTorch's allocator in C: its stable functions for compiled programs, and the one that makes a Python object of a
//! tensor. Found in the libraries that PyTorch has loaded; nothing is linked.
use std::ffi::{c_int, c_void};
use std::ptr::null_mut;

use cuda_std::DType;
use libloading::os::unix::{Library, RTLD_LAZY};
use pyo3::ffi;
use pyo3::prelude::*;

use crate::place::Device;

/// `RTLD_NOLOAD`: finds a library only if it is loaded.
const LOADED: c_int = 4;

/// An `at::Tensor` on the heap.
type Tensor = *mut c_void;
type EmptyStrided = unsafe extern "C" fn(i64, *const i64, *const i64, i32, i32, i32, *mut Tensor) -> i32;
type Wrap = unsafe extern "C" fn(Tensor) -> *mut ffi::PyObject;
type Delete = unsafe extern "C" fn(Tensor) -> i32;
type Address = unsafe extern "C" fn(Tensor, *mut *mut c_void) -> i32;
type Constant = unsafe extern "C" fn() -> i32;

/// The most dimensions of what is allocated here.
const MOST_DIMENSIONS: usize = 4;

/// The functions, and what they call dtypes and devices.
pub struct Allocator {
    empty_strided: EmptyStrided,
    wrap: Wrap,
    delete: Delete,
    address: Address,
    f32: i32,
    f16: i32,
    bf16: i32,
    u8: i32,
    cpu: i32,
    cuda: i32,
}

impl Allocator {
    /// That of the PyTorch that is loaded, if it has these functions.
    pub fn find() -> Option<Self> {
        let torch = Library::loaded("libtorch_cpu.so")?;
        let python = Library::loaded("libtorch_python.so")?;
        let constant = |name: &str| {
            // SAFETY: the functions of torch/csrc/inductor/aoti_torch/c/shim.h that are named so have this type.
            unsafe { torch.get::<Constant>(name.as_bytes()).ok().map(|constant| constant()) }
        };
        // SAFETY: these are the types of all but the second in shim.h. That one is
        // `PyObject* THPVariable_Wrap(const at::TensorBase&)`, whose types are in its name; a reference is an address.
        unsafe {
            Some(Allocator {
                empty_strided: *torch.get::<EmptyStrided>(b"aoti_torch_empty_strided").ok()?,
                wrap: *python.get::<Wrap>(b"_Z16THPVariable_WrapRKN2at10TensorBaseE").ok()?,
                delete: *torch.get::<Delete>(b"aoti_torch_delete_tensor_object").ok()?,
                address: *torch.get::<Address>(b"aoti_torch_get_data_ptr").ok()?,
                f32: constant("aoti_torch_dtype_float32")?,
                f16: constant("aoti_torch_dtype_float16")?,
                bf16: constant("aoti_torch_dtype_bfloat16")?,
                u8: constant("aoti_torch_dtype_uint8")?,
                cpu: constant("aoti_torch_device_type_cpu")?,
                cuda: constant("aoti_torch_device_type_cuda")?,
            })
        }
    }

    /// A contiguous tensor, not yet written, and its address. None where PyTorch refuses, or for what it is not asked for.
    pub fn empty<'py>(
        &self,
        py: Python<'py>,
        dtype: DType,
        device: Device,
        shape: &[usize],
    ) -> Option<(Bound<'py, PyAny>, u64)> {
        let dtype = match dtype {
            DType::F32 => self.f32,
            DType::F16 => self.f16,
            DType::BF16 => self.bf16,
            DType::U8 => self.u8,
            DType::I32 => return None,
        };
        let (kind, index) = match device {
            Device::Cpu => (self.cpu, -1),
            Device::Cuda(ordinal) => (self.cuda, ordinal as i32),
            Device::Other => return None,
        };
        let (mut extents, mut strides, mut stride) = ([0; MOST_DIMENSIONS], [0; MOST_DIMENSIONS], 1);
        for (i, &extent) in shape.iter().enumerate().rev() {
            (*extents.get_mut(i)?, strides[i]) = (extent as i64, stride);
            stride *= extent.max(1) as i64;
        }
        let empty = || {
            let mut tensor = null_mut();
            let (extents, strides) = (extents.as_ptr(), strides.as_ptr());
            // SAFETY: there are as many extents and strides as is said, and a place for the result.
            let code =
                unsafe { (self.empty_strided)(shape.len() as i64, extents, strides, dtype, kind, index, &mut tensor) };
            Handle((code == 0).then_some(tensor))
        };
        // It may wait for the driver, and for threads that wait for Python.
        let tensor = py.detach(empty).0?;
        let mut address = null_mut();
        // SAFETY: the tensor is whole. The object holds it in common with the handle, which is deleted.
        unsafe {
            let code = (self.address)(tensor, &mut address);
            let object = (self.wrap)(tensor);
            (self.delete)(tensor);
            let object = Bound::from_owned_ptr_or_err(py, object).ok()?;
            (code == 0).then(|| (object, address.addr() as u64))
        }
    }
}

/// A tensor that leaves `Python::detach`.
struct Handle(Option<Tensor>);

// SAFETY: any thread may use a tensor of which it has the only handle.
unsafe impl Send for Handle {}

/// Finds libraries that are loaded.
trait Loaded: Sized {
    fn loaded(name: &str) -> Option<Self>;
}

impl Loaded for Library {
    fn loaded(name: &str) -> Option<Self> {
        // SAFETY: it is not loaded here, so that no initialisers run.
        unsafe { Library::open(Some(name), RTLD_LAZY | LOADED) }.ok()
    }
}
