//! What PyTorch tells of its tensors in C, without a call into Python: the function table of DLPack's exchange
//! protocol, `torch.Tensor.__dlpack_c_exchange_api__`. PyTorch has it from 2.10 on.
use std::ffi::{CStr, c_int, c_void};
use std::ptr::{NonNull, null_mut};
use std::slice;

use cuda_std::DType;
use pyo3::ffi::PyObject;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyType};

use crate::place::Device;

/// The version of the table that is read here. Another major version lays it out otherwise.
const MAJOR_VERSION: u32 = 1;
const CAPSULE: &CStr = c"dlpack_exchange_api";

/// `DLDeviceType`.
const CPU: c_int = 1;
const CUDA: c_int = 2;

/// `DLDevice`.
#[repr(C)]
struct RawDevice {
    kind: c_int,
    index: i32,
}

/// `DLDataType`.
#[repr(C)]
struct RawDType {
    code: u8,
    bits: u8,
    lanes: u16,
}

/// `DLTensor`.
#[repr(C)]
struct RawTensor {
    data: *mut c_void,
    device: RawDevice,
    rank: i32,
    dtype: RawDType,
    shape: *const i64,
    strides: *const i64,
    byte_offset: u64,
}

/// `DLPackExchangeAPI`.
#[repr(C)]
struct Table {
    major: u32,
    minor: u32,
    previous: *const c_void,
    allocate: *const c_void,
    from_object: *const c_void,
    to_object: *const c_void,
    describe: Option<unsafe extern "C" fn(*mut PyObject, *mut RawTensor) -> c_int>,
    current_stream: Option<unsafe extern "C" fn(c_int, i32, *mut *mut c_void) -> c_int>,
}

/// The two functions that are used here.
#[derive(Clone, Copy)]
pub struct Exchange {
    describe: unsafe extern "C" fn(*mut PyObject, *mut RawTensor) -> c_int,
    current_stream: unsafe extern "C" fn(c_int, i32, *mut *mut c_void) -> c_int,
}

/// A tensor, as DLPack describes it; its shape and strides lie in the tensor.
pub struct Described<'a> {
    pub address: u64,
    pub device: Device,
    /// None for a dtype that no kernel has.
    pub dtype: Option<DType>,
    pub is_bool: bool,
    pub shape: &'a [i64],
    pub strides: &'a [i64],
}

impl Exchange {
    /// That of `torch.Tensor`, if it has one.
    pub fn of(tensor: &Bound<PyType>) -> Option<Self> {
        let capsule = tensor.getattr("__dlpack_c_exchange_api__").ok()?.cast_into::<PyCapsule>().ok()?;
        let table: NonNull<Table> = capsule.pointer_checked(Some(CAPSULE)).ok()?.cast();
        // SAFETY: a capsule of this name holds such a table, which lives as long as the process. Of another major
        // version only the first field is read.
        let (describe, current_stream) = unsafe {
            if (*table.as_ptr()).major != MAJOR_VERSION {
                return None;
            }
            ((*table.as_ptr()).describe?, (*table.as_ptr()).current_stream?)
        };
        Some(Exchange { describe, current_stream })
    }

    /// Where a tensor is, its dtype, shape and strides. `tensor` is one of `torch.Tensor`'s.
    ///
    /// # Errors
    /// PyTorch's, for a tensor without strides or memory.
    pub fn describe<'a>(&self, tensor: &'a Bound<PyAny>) -> PyResult<Described<'a>> {
        let mut raw = RawTensor {
            data: null_mut(),
            device: RawDevice { kind: 0, index: 0 },
            rank: 0,
            dtype: RawDType { code: 0, bits: 0, lanes: 0 },
            shape: null_mut(),
            strides: null_mut(),
            byte_offset: 0,
        };
        // SAFETY: the object is a tensor, and the other is filled.
        if unsafe { (self.describe)(tensor.as_ptr(), &mut raw) } != 0 {
            return Err(PyErr::fetch(tensor.py()));
        }
        let extents = |first: *const i64| match raw.rank {
            rank if rank > 0 && !first.is_null() => {
                // SAFETY: there are so many, in the tensor, which is borrowed; nobody resizes it while its thread is
                // attached to Python.
                unsafe { slice::from_raw_parts(first, rank as usize) }
            }
            _ => &[],
        };
        let device = match raw.device {
            RawDevice { kind: CPU, .. } => Device::Cpu,
            RawDevice { kind: CUDA, index } => Device::Cuda(index as u32),
            _ => Device::Other,
        };
        let (dtype, is_bool) = dtype(&raw.dtype);
        Ok(Described {
            address: (raw.data.addr() as u64).wrapping_add(raw.byte_offset),
            device,
            dtype,
            is_bool,
            shape: extents(raw.shape),
            strides: extents(raw.strides),
        })
    }

    /// PyTorch's current stream of a CUDA device.
    ///
    /// # Errors
    /// PyTorch's.
    pub fn current_stream(&self, py: Python, device: u32) -> PyResult<*mut c_void> {
        let mut stream = null_mut();
        // SAFETY: stores a handle.
        if unsafe { (self.current_stream)(CUDA, device as i32, &mut stream) } != 0 {
            return Err(PyErr::fetch(py));
        }
        Ok(stream)
    }
}

/// A dtype by `DLDataTypeCode` and bits, and whether it is bool.
fn dtype(dtype: &RawDType) -> (Option<DType>, bool) {
    match *dtype {
        RawDType { code: 0, bits: 32, lanes: 1 } => (Some(DType::I32), false),
        RawDType { code: 1, bits: 8, lanes: 1 } => (Some(DType::U8), false),
        RawDType { code: 2, bits: 16, lanes: 1 } => (Some(DType::F16), false),
        RawDType { code: 2, bits: 32, lanes: 1 } => (Some(DType::F32), false),
        RawDType { code: 4, bits: 16, lanes: 1 } => (Some(DType::BF16), false),
        RawDType { code: 6, bits: 8, lanes: 1 } => (Some(DType::U8), true),
        _ => (None, false),
    }
}
