//! A device's primary context.
use std::ffi::c_void;
use std::marker::PhantomData;

use cust::context::Context;
use driver::calls::{cuCtxGetCurrent, cuCtxPopCurrent_v2, cuCtxPushCurrent_v2, cuCtxSetCurrent};

use super::codes::{check, through_cust};
use crate::error::Result;

/// A primary context, retained.
#[derive(Debug)]
pub struct PrimaryContext(Context);

impl PrimaryContext {
    /// Retains the primary context of a device. The thread's current context stays as it is.
    pub fn retain(device: cust::device::Device) -> Result<Self> {
        let mut before = std::ptr::null_mut();
        // SAFETY: stores a handle, which may be null.
        check("cuCtxGetCurrent", unsafe { cuCtxGetCurrent(&mut before) })?;
        let context = through_cust("cuDevicePrimaryCtxRetain", Context::new(device))?;
        // SAFETY: it was current a moment ago. `Context::new` has put another in its place.
        check("cuCtxSetCurrent", unsafe { cuCtxSetCurrent(before) })?;
        Ok(PrimaryContext(context))
    }

    /// Makes it current on this thread, for as long as the guard lives.
    pub fn enter(&self) -> Result<Entered<'_>> {
        // SAFETY: the context is retained.
        check("cuCtxPushCurrent", unsafe { cuCtxPushCurrent_v2(self.0.as_raw().cast::<c_void>()) })?;
        Ok(Entered { context: PhantomData, thread: PhantomData })
    }
}

/// While this lives, a context is current on this thread.
#[derive(Debug)]
pub struct Entered<'a> {
    context: PhantomData<&'a PrimaryContext>,
    /// Stays on its thread.
    thread: PhantomData<*const ()>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut popped = std::ptr::null_mut();
        // SAFETY: pops what `enter` has pushed. It fails only if the context is gone, and then nothing is current.
        unsafe { cuCtxPopCurrent_v2(&mut popped) };
    }
}
