//! Kernels, loaded when they are first launched.
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use driver::calls::{
    Code, Handle, JIT_ERROR_LOG_BUFFER, JIT_ERROR_LOG_BUFFER_SIZE_BYTES, MAX_DYNAMIC_SHARED_SIZE_BYTES,
    cuFuncSetAttribute, cuModuleGetFunction, cuModuleLoadDataEx,
};

use super::codes::{check, error};
use super::device::Device;
use crate::error::{Error, Result};
use crate::ptx::Entry;

/// The kernels that a device has loaded, by entry point: one module each, so that a program waits for the driver's
/// compiler only for what it launches. They stay loaded. A thread that waits for the compiler keeps no other waiting that
/// launches another kernel.
#[derive(Debug, Default)]
pub struct Modules(Mutex<HashMap<&'static str, Arc<Mutex<Option<Function>>>>>);

/// A kernel that has been loaded.
#[derive(Clone, Copy, Debug)]
pub struct Function {
    /// A `CUfunction`.
    pub handle: Handle,
    /// Whether it waits itself for the end of the kernel before it, so that it may begin earlier.
    pub waits: bool,
}

/// What such a kernel says. PTX ISA: `griddepcontrol`.
const WAIT: &[u8] = b"griddepcontrol.wait";

// SAFETY: a handle, which the driver lets any thread use.
unsafe impl Send for Function {}

impl Modules {
    /// The kernel `entry`, ready for `shared_bytes` of dynamic shared memory. The device's context is current.
    pub fn function(&self, device: &Device, entry: &'static str, shared_bytes: u32) -> Result<Function> {
        let place = Arc::clone(lock(&self.0).entry(entry).or_default());
        let mut place = lock(&place);
        if let Some(function) = *place {
            return Ok(function);
        }
        let info = device.info();
        if shared_bytes > info.shared_memory_per_block {
            let (device, available) = (info.name.clone(), info.shared_memory_per_block);
            return Err(Error::SharedMemory { entry, device, needed: shared_bytes, available });
        }
        let image = Entry::find(entry, &info.name, info.compute_capability)?.image()?;
        let handle = load(entry, &image, shared_bytes)?;
        let waits = image.windows(WAIT.len()).any(|said| said == WAIT);
        Ok(*place.insert(Function { handle, waits }))
    }
}

/// What a panic elsewhere left there is whole: nothing is half done while one of these is locked.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Has the driver compile PTX that ends with a NUL.
fn load(entry: &str, image: &[u8], shared_bytes: u32) -> Result<Handle> {
    let name = CString::new(entry).expect("names of Rust functions hold no NUL");
    let (mut module, mut function): (Handle, Handle) = (std::ptr::null_mut(), std::ptr::null_mut());

    let mut log = [0u8; 4096];
    let mut options = [JIT_ERROR_LOG_BUFFER, JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    // The size stands in the place of a pointer; the last byte of the log stays 0.
    let mut values = [log.as_mut_ptr().cast::<c_void>(), (log.len() - 1) as *mut c_void];
    // SAFETY: the image ends with a NUL, the options come with as many values, and the log is as large as is said.
    let code: Code = unsafe {
        let image = image.as_ptr().cast();
        cuModuleLoadDataEx(&mut module, image, options.len() as u32, options.as_mut_ptr(), values.as_mut_ptr())
    };
    if code != driver::SUCCESS {
        let log = CStr::from_bytes_until_nul(&log).unwrap_or_default().to_string_lossy();
        return Err(error("cuModuleLoadDataEx", code, format!("of {entry}: {}", log.trim())));
    }
    // SAFETY: the module is loaded, and the name ends with a NUL.
    check("cuModuleGetFunction", unsafe {
        cuModuleGetFunction(&mut function, module, name.as_ptr().cast::<c_char>())
    })?;
    // SAFETY: the function was found a moment ago.
    check("cuFuncSetAttribute", unsafe {
        cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes as c_int)
    })?;
    Ok(function)
}
