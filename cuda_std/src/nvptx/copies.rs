//! Asynchronous copies. PTX ISA: `cp.async`.
use core::arch::asm;

#[inline(always)]
pub fn copy_async_16(to: u32, from: u64, valid: bool) {
    let bytes: u32 = if valid { 16 } else { 0 };
    // SAFETY: the launch promised the memory (crate documentation); with 0 bytes nothing is read.
    unsafe {
        asm!("cp.async.cg.shared.global [{to}], [{from}], 16, {bytes};",
            to = in(reg32) to, from = in(reg64) from, bytes = in(reg32) bytes, options(nostack))
    }
}

#[inline(always)]
pub fn copy_async_commit() {
    // SAFETY: orders copies.
    unsafe { asm!("cp.async.commit_group;", options(nostack)) }
}

#[inline(always)]
pub fn copy_async_wait<const PENDING: usize>() {
    // SAFETY: orders copies.
    unsafe { asm!("cp.async.wait_group {0};", const PENDING, options(nostack)) }
}
