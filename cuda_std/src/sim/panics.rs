//! Panics of kernels become findings: the hook keeps what it is told instead of printing it.
use super::block;
use std::cell::Cell;
use std::panic::{self, Location, PanicHookInfo};
use std::sync::Once;

/// What a kernel's panic said, and where.
pub(super) struct KernelPanic {
    pub message: String,
    pub location: &'static Location<'static>,
}

thread_local! {
    static LAST: Cell<Option<KernelPanic>> = const { Cell::new(None) };
}

/// Makes panics inside kernels silent; others go where they went before.
pub(super) fn install_hook() {
    static INSTALLED: Once = Once::new();
    INSTALLED.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| if block::in_kernel() { keep(info) } else { before(info) }));
    });
}

/// Runs `body`; its panic, if it ends in one. Without a location if someone has replaced the hook.
pub(super) fn catch(body: impl FnOnce()) -> Result<(), Option<KernelPanic>> {
    panic::catch_unwind(panic::AssertUnwindSafe(body)).map_err(|_| LAST.take())
}

fn keep(info: &PanicHookInfo) {
    let message = info.payload_as_str().unwrap_or("a panic without a message").to_owned();
    let location = info.location().map(|location| {
        // SAFETY: the location of a panic is that of its `#[track_caller]` caller: a constant of the program.
        unsafe { std::mem::transmute::<&Location<'_>, &'static Location<'static>>(location) }
    });
    LAST.set(location.map(|location| KernelPanic { message, location }));
}
