//! `libcuda.so.1`, loaded once.
use std::ffi::{CStr, c_void};
use std::sync::OnceLock;

use libloading::Library;

/// What the driver library is called by the driver's own installer, on every distribution.
const NAME: &str = "libcuda.so.1";

static LIBRARY: OnceLock<Result<Library, String>> = OnceLock::new();

/// Whether the CUDA driver library could be loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// The library is loaded. It may still find no device, which `cuInit` tells.
    Loaded,
    /// There is no library, or it does not load.
    Missing {
        /// What the dynamic loader said.
        reason: String,
    },
}

/// Loads the driver library, unless that has been tried, and says whether it is there.
pub fn status() -> Status {
    match library() {
        Ok(_) => Status::Loaded,
        Err(reason) => Status::Missing { reason: reason.clone() },
    }
}

/// The address of a function of the driver, or the code that a call of it returns instead.
pub(crate) fn find(name: &CStr) -> Result<*const c_void, u32> {
    let library = library().as_ref().map_err(|_| crate::NO_DEVICE)?;
    // SAFETY: the type is that of an address, as dlsym returns it; the trampoline keeps the caller's arguments.
    let symbol = unsafe { library.get::<*const c_void>(name.to_bytes_with_nul()) };
    symbol.map(|address| *address).map_err(|_| crate::NOT_FOUND)
}

fn library() -> &'static Result<Library, String> {
    LIBRARY.get_or_init(|| {
        // SAFETY: the driver's initialisers may run at any time before its first call; nothing unloads it.
        unsafe { Library::new(NAME) }.map_err(|error| error.to_string())
    })
}
