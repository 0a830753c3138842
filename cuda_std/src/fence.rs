//! Fences. The tensor copy engine and the tensor cores of Hopper reach shared memory through a path of their own, the
//! async proxy, which need not see what threads have written through the generic one. PTX ISA: `fence.proxy.async`.
//! sm_90.
use crate::machine;

/// Makes what this thread has written to shared memory visible to copies and matrix products that read it there. Said
/// by each thread that has written, before the barrier that orders the reader after it. PTX ISA:
/// `fence.proxy.async.shared::cta`.
#[inline(always)]
#[track_caller]
pub fn proxy_async() {
    machine::fence_proxy_async();
}

/// Makes the [initialisation](crate::mbarrier::Mbarrier::init) of barriers visible to copies, and to the other blocks
/// of the cluster. PTX ISA: `fence.mbarrier_init.release.cluster`.
#[inline(always)]
#[track_caller]
pub fn mbarrier_init() {
    machine::fence_mbarrier_init();
}
