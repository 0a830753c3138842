//! Clusters: neighbouring blocks that run at the same time and reach each other's shared memory. PTX ISA:
//! `%cluster_ctarank`, `barrier.cluster`, `mapa`. sm_90.
use crate::element::Scalar;
use crate::{Shared, machine};
use core::marker::PhantomData;

/// The block's index in its cluster; 0 if the launch makes no clusters.
#[inline(always)]
pub fn block_rank() -> u32 {
    machine::cluster_rank()
}

/// Blocks a cluster; 1 if the launch makes none.
#[inline(always)]
pub fn size() -> u32 {
    machine::cluster_size()
}

/// A set of blocks of a cluster, a bit a rank: those that a copy goes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Blocks(pub u16);

impl Blocks {
    /// The first `count`.
    pub const fn first(count: u32) -> Self {
        Blocks(((1u32 << count) - 1) as u16)
    }
}

/// Waits until all threads of the cluster are here, and orders their accesses to memory: [`arrive`], then [`wait`].
#[inline(always)]
#[track_caller]
pub fn sync() {
    arrive();
    wait();
}

/// Arrives without waiting; what the thread wrote before is seen by those that [`wait`]. Said by whole warps.
/// PTX ISA: `barrier.cluster.arrive.release.aligned`.
#[inline(always)]
#[track_caller]
pub fn arrive() {
    machine::cluster_arrive();
}

/// Waits until all threads of the cluster that have not exited have arrived. Each thread says it once after each
/// [`arrive`]. PTX ISA: `barrier.cluster.wait.acquire.aligned`.
#[inline(always)]
#[track_caller]
pub fn wait() {
    machine::cluster_wait();
}

/// A typed address in the shared memory of a block of the cluster.
pub struct ClusterShared<T> {
    address: u32,
    of: PhantomData<*mut T>,
}

impl<T> Clone for ClusterShared<T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for ClusterShared<T> {}

/// Where block `rank` has what this block has at `address`. PTX ISA: `mapa.shared::cluster.u32`.
#[inline(always)]
pub fn map<T>(address: Shared<T>, rank: u32) -> ClusterShared<T> {
    ClusterShared { address: machine::map_to_rank(address.address(), rank), of: PhantomData }
}

impl<T: Scalar<Bits = u32>> ClusterShared<T> {
    /// Loads element `index`. PTX ISA: `ld.shared::cluster`.
    #[inline(always)]
    #[track_caller]
    pub fn load(self, index: u32) -> T {
        T::from_bits(machine::load_cluster(self.address + index * size_of::<T>() as u32))
    }

    /// Stores element `index`. PTX ISA: `st.shared::cluster`.
    #[inline(always)]
    #[track_caller]
    pub fn store(self, index: u32, value: T) {
        machine::store_cluster(self.address + index * size_of::<T>() as u32, value.to_bits());
    }
}
