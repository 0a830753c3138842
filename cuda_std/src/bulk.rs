//! Copies of whole stretches of memory by the tensor copy engine (TMA): one thread says what is copied, and no register
//! holds it. PTX ISA: `cp.async.bulk`, `cp.reduce.async.bulk`. sm_90. Tiles of tensors: [`tensor`](crate::tensor).
//!
//! Loads complete on an [`Mbarrier`]. Stores are the issuing thread's own: it makes groups of them ([`commit`]), and
//! waits until these have read shared memory ([`wait_read`]), which it must before it exits, or have ended ([`wait`]).
//! What threads wrote to shared memory is stored only after [`fence::proxy_async`](crate::fence::proxy_async).
use crate::element::Scalar;
use crate::mbarrier::Mbarrier;
use crate::tensor::CachePolicy;
use crate::{Global, Shared, machine};

/// Copies `elements` from global to shared memory, and tells `barrier` of their bytes. Both addresses and the bytes are
/// multiples of 16. PTX ISA: `cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes`.
#[inline(always)]
#[track_caller]
pub fn load<T: Scalar>(to: Shared<T>, from: Global<T>, elements: u32, barrier: Mbarrier) {
    machine::bulk_load(to.address(), from.address(), elements * size_of::<T>() as u32, barrier.address());
}

/// Copies `elements` from shared memory to that of block `rank` of the cluster, and tells the barrier that this has at the
/// place of `barrier` of their bytes: `to` and `barrier` are as that block has them. What threads wrote is copied only
/// after [`fence::proxy_async`](crate::fence::proxy_async). As for [`load`]. PTX ISA: `mapa`,
/// `cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes`.
#[inline(always)]
#[track_caller]
pub fn send<T: Scalar>(to: Shared<T>, from: Shared<T>, elements: u32, barrier: Mbarrier, rank: u32) {
    machine::bulk_send(to.address(), from.address(), elements * size_of::<T>() as u32, barrier.address(), rank);
}

/// Copies `elements` from shared to global memory. As for [`load`]. PTX ISA:
/// `cp.async.bulk.global.shared::cta.bulk_group`.
#[inline(always)]
#[track_caller]
pub fn store<T: Scalar>(to: Global<T>, from: Shared<T>, elements: u32) {
    machine::bulk_store(to.address(), from.address(), elements * size_of::<T>() as u32);
}

/// Adds `elements` in shared memory to those in global memory, each atomically: the sum of several depends on their
/// order. As for [`load`]. PTX ISA: `cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32`.
#[inline(always)]
#[track_caller]
pub fn add(to: Global<f32>, from: Shared<f32>, elements: u32) {
    machine::bulk_add(to.address(), from.address(), elements * 4);
}

/// As [`load`], of what the L2 cache treats by `policy`. PTX ISA: `.L2::cache_hint`.
#[inline(always)]
#[track_caller]
pub fn load_cached<T: Scalar>(to: Shared<T>, from: Global<T>, elements: u32, barrier: Mbarrier, policy: CachePolicy) {
    let bytes = elements * size_of::<T>() as u32;
    machine::bulk_load_cached(to.address(), from.address(), bytes, barrier.address(), policy.bits());
}

/// As [`store`], of what the L2 cache treats by `policy`. PTX ISA: `.L2::cache_hint`.
#[inline(always)]
#[track_caller]
pub fn store_cached<T: Scalar>(to: Global<T>, from: Shared<T>, elements: u32, policy: CachePolicy) {
    machine::bulk_store_cached(to.address(), from.address(), elements * size_of::<T>() as u32, policy.bits());
}

/// As [`add`], to what the L2 cache treats by `policy`. PTX ISA: `.L2::cache_hint`.
#[inline(always)]
#[track_caller]
pub fn add_cached(to: Global<f32>, from: Shared<f32>, elements: u32, policy: CachePolicy) {
    machine::bulk_add_cached(to.address(), from.address(), elements * 4, policy.bits());
}

/// Makes a group of the thread's stores since the last commit. PTX ISA: `cp.async.bulk.commit_group`.
#[inline(always)]
#[track_caller]
pub fn commit() {
    machine::bulk_commit();
}

/// Waits until all but the thread's last `PENDING` groups have read shared memory, which may then be written again.
/// PTX ISA: `cp.async.bulk.wait_group.read`.
#[inline(always)]
#[track_caller]
pub fn wait_read<const PENDING: usize>() {
    machine::bulk_wait_read::<PENDING>();
}

/// Waits until all but the thread's last `PENDING` groups have ended. PTX ISA: `cp.async.bulk.wait_group`.
#[inline(always)]
#[track_caller]
pub fn wait<const PENDING: usize>() {
    machine::bulk_wait::<PENDING>();
}
