//! Driver calls that `cust` lacks, or of which it hides what is needed here.
//!
//! They return the driver's code as it is: `cust_raw`'s enum of the codes ends with CUDA 11, and a newer driver may
//! return others.
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};

/// A `CUresult`: 0 for success.
pub type Code = u32;
/// A `CUstream`, `CUmodule` or `CUfunction`: opaque.
pub type Handle = *mut c_void;

/// `CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES`.
pub const MAX_DYNAMIC_SHARED_SIZE_BYTES: c_int = 8;
/// `CU_JIT_ERROR_LOG_BUFFER`: its value is a `*mut c_char`.
pub const JIT_ERROR_LOG_BUFFER: c_uint = 5;
/// `CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES`: its value is a `c_uint`, passed in place of a pointer.
pub const JIT_ERROR_LOG_BUFFER_SIZE_BYTES: c_uint = 6;

/// `CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN`, in bytes.
pub const MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: c_int = 97;

/// `CU_TENSOR_MAP_DATA_TYPE_UINT8`.
pub const TENSOR_MAP_UINT8: c_int = 0;
/// `CU_TENSOR_MAP_DATA_TYPE_INT32`.
pub const TENSOR_MAP_INT32: c_int = 3;
/// `CU_TENSOR_MAP_DATA_TYPE_FLOAT16`.
pub const TENSOR_MAP_FLOAT16: c_int = 6;
/// `CU_TENSOR_MAP_DATA_TYPE_FLOAT32`.
pub const TENSOR_MAP_FLOAT32: c_int = 7;
/// `CU_TENSOR_MAP_DATA_TYPE_BFLOAT16`.
pub const TENSOR_MAP_BFLOAT16: c_int = 9;
/// `CU_TENSOR_MAP_L2_PROMOTION_L2_256B`: what a copy misses in the L2 cache comes in pieces of so many bytes.
pub const TENSOR_MAP_L2_PROMOTION_256B: c_int = 3;

/// How a kernel is launched: a `CUlaunchConfig`.
#[repr(C)]
#[derive(Debug)]
pub struct LaunchConfig {
    /// Blocks of threads.
    pub grid: [c_uint; 3],
    /// Threads of a block.
    pub block: [c_uint; 3],
    /// Dynamic shared memory, in bytes.
    pub shared_bytes: c_uint,
    /// Where the launch is put.
    pub stream: Handle,
    /// So many attributes.
    pub attributes: *mut LaunchAttribute,
    /// How many.
    pub attributes_len: c_uint,
}

/// A `CUlaunchAttribute` whose value is an int.
#[repr(C)]
#[derive(Debug)]
pub struct LaunchAttribute {
    /// Which one.
    pub id: c_int,
    padding: [u8; 4],
    value: c_int,
    rest: [u8; 60],
}

impl LaunchAttribute {
    /// `CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION`: the kernel may begin when the one before it in the stream says
    /// so, and waits itself for its end.
    pub const PROGRAMMATIC_STREAM_SERIALIZATION: Self =
        LaunchAttribute { id: 6, padding: [0; 4], value: 1, rest: [0; 60] };
}

unsafe extern "C" {
    /// Reads an attribute of a device.
    pub fn cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, device: c_int) -> Code;
    /// Loads a module from NUL-terminated PTX; options as pairs of a number and a value.
    pub fn cuModuleLoadDataEx(
        module: *mut Handle,
        image: *const c_void,
        options_len: c_uint,
        options: *mut c_uint,
        values: *mut *mut c_void,
    ) -> Code;
    /// Unloads a module.
    pub fn cuModuleUnload(module: Handle) -> Code;
    /// Looks a kernel up by name.
    pub fn cuModuleGetFunction(function: *mut Handle, module: Handle, name: *const c_char) -> Code;
    /// Changes an attribute of a kernel.
    pub fn cuFuncSetAttribute(function: Handle, attribute: c_int, value: c_int) -> Code;
    /// Launches a kernel; `parameters` points to one pointer to each parameter.
    pub fn cuLaunchKernel(
        function: Handle,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        shared_bytes: c_uint,
        stream: Handle,
        parameters: *mut *mut c_void,
        extra: *mut *mut c_void,
    ) -> Code;
    /// The same with attributes. Drivers older than CUDA 12 do not have it.
    pub fn cuLaunchKernelEx(
        config: *const LaunchConfig,
        function: Handle,
        parameters: *mut *mut c_void,
        extra: *mut *mut c_void,
    ) -> Code;
    /// Encodes a tensor map of tiles, 128 bytes at a multiple of 64. `interleave` and `fill` 0: none, and zeros. Drivers
    /// older than CUDA 12 do not have it.
    pub fn cuTensorMapEncodeTiled(
        map: *mut c_void,
        dtype: c_int,
        rank: c_uint,
        address: *mut c_void,
        dimensions: *const u64,
        strides: *const u64,
        tile: *const c_uint,
        element_strides: *const c_uint,
        interleave: c_int,
        swizzle: c_int,
        l2_promotion: c_int,
        fill: c_int,
    ) -> Code;
    /// Makes a context current, above the one that is.
    pub fn cuCtxPushCurrent_v2(context: Handle) -> Code;
    /// Makes the context current that was before the last push.
    pub fn cuCtxPopCurrent_v2(context: *mut Handle) -> Code;
    /// The current context, or null.
    pub fn cuCtxGetCurrent(context: *mut Handle) -> Code;
    /// Makes a context current, in place of the one that is.
    pub fn cuCtxSetCurrent(context: Handle) -> Code;
    fn cuGetErrorName(code: Code, name: *mut *const c_char) -> Code;
}

/// The driver's name for a code: `CUDA_ERROR_INVALID_PTX`. Only its number where there is no driver to ask.
pub fn error_name(code: Code) -> String {
    let mut name = std::ptr::null();
    // SAFETY: the driver stores a pointer to a static string, or null.
    unsafe {
        if cuGetErrorName(code, &mut name) == crate::SUCCESS && !name.is_null() {
            return CStr::from_ptr(name).to_string_lossy().into_owned();
        }
    }
    match code {
        crate::NO_DEVICE => "CUDA_ERROR_NO_DEVICE".to_owned(),
        _ => format!("CUDA error {code}"),
    }
}
