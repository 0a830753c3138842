//! Barriers in shared memory, and fences. PTX ISA: `mbarrier`, `fence.proxy`.
use core::arch::asm;

#[inline(always)]
pub fn mbarrier_init(address: u32, count: u32) {
    // SAFETY: the launch promised the memory (crate documentation).
    unsafe { asm!("mbarrier.init.shared::cta.b64 [{0}], {1};", in(reg32) address, in(reg32) count, options(nostack)) }
}

#[inline(always)]
pub fn mbarrier_arrive(address: u32) {
    // SAFETY: as above.
    unsafe { asm!("mbarrier.arrive.shared::cta.b64 _, [{0}];", in(reg32) address, options(nostack)) }
}

#[inline(always)]
pub fn mbarrier_arrive_expect(address: u32, bytes: u32) {
    // SAFETY: as above.
    unsafe {
        asm!("mbarrier.arrive.expect_tx.shared::cta.b64 _, [{0}], {1};",
            in(reg32) address, in(reg32) bytes, options(nostack))
    }
}

/// Without `.release.cluster`, which costs a fence of the whole GPU: the default is the same order within the cluster.
#[inline(always)]
pub fn mbarrier_arrive_at(address: u32, rank: u32) {
    // SAFETY: as above, in another block of the cluster.
    unsafe {
        asm!("{{ .reg .b32 there; mapa.shared::cluster.u32 there, {0}, {1};",
            "mbarrier.arrive.shared::cluster.b64 _, [there]; }}",
            in(reg32) address, in(reg32) rank, options(nostack))
    }
}

#[inline(always)]
#[allow(named_asm_labels, reason = "PTX labels are local to their braces")]
pub fn mbarrier_wait(address: u32, parity: u32) {
    // SAFETY: as above.
    unsafe {
        asm!("{{ .reg .pred complete;",
            "again: mbarrier.try_wait.parity.shared::cta.b64 complete, [{0}], {1};",
            "@!complete bra again; }}",
            in(reg32) address, in(reg32) parity, options(nostack))
    }
}

#[inline(always)]
pub fn fence_proxy_async() {
    // SAFETY: orders memory.
    unsafe { asm!("fence.proxy.async.shared::cta;", options(nostack)) }
}

#[inline(always)]
pub fn fence_mbarrier_init() {
    // SAFETY: orders memory.
    unsafe { asm!("fence.mbarrier_init.release.cluster;", options(nostack)) }
}
