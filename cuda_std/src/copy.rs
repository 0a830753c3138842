//! Asynchronous copies from global to shared memory that pass no register. PTX ISA: `cp.async`. sm_80.
//!
//! A copy is the issuing thread's own: after its [`wait`] that thread sees the data, and after a barrier the others do.
//! Until then the simulator holds the destination for uninitialised.
use crate::element::Scalar;
use crate::machine;
use crate::{Global, Shared};

/// Copies 16 bytes, past the L1 cache; if not `valid`, reads nothing and writes zeros. Both addresses are aligned to 16 bytes.
#[inline(always)]
#[track_caller]
pub fn copy_async<T: Scalar>(to: Shared<T>, from: Global<T>, valid: bool) {
    machine::copy_async_16(to.address(), from.address(), valid);
}

/// Makes a group of the thread's copies since the last commit.
#[inline(always)]
#[track_caller]
pub fn commit() {
    machine::copy_async_commit();
}

/// Waits until at most `PENDING` of the thread's last groups are unfinished.
#[inline(always)]
#[track_caller]
pub fn wait<const PENDING: usize>() {
    machine::copy_async_wait::<PENDING>();
}
