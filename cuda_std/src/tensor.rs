//! Tiles of tensors, moved by the tensor copy engine (TMA) between global and shared memory: one thread names a tile by
//! its coordinates; a tensor map, made by the host, says how the tensor lies in memory, how large a tile is, and how it
//! is swizzled. Elements outside of the tensor are loaded as zeros, and not stored. PTX ISA: `cp.async.bulk.tensor`.
//! sm_90.
use crate::cluster::Blocks;
use crate::element::Element;
use crate::mbarrier::Mbarrier;
use crate::{Shared, SmemTile, machine};
use core::marker::PhantomData;

#[cfg(not(target_arch = "nvptx64"))]
mod description;
#[cfg(not(target_arch = "nvptx64"))]
pub use description::{MOST_RANK, Swizzle, TensorMapDescription, TensorMapError};

/// A tensor map, as a field of the struct of parameters that a kernel takes by value.
///
/// For a GPU its 128 bytes are what `cuTensorMapEncodeTiled` makes of a description, for the simulated GPU the
/// description itself: a `TensorMapDescription` makes both. Fields of this type come first in the struct, so that they
/// lie at multiples of 64 bytes.
#[derive(Clone, Copy)]
#[repr(C, align(16))]
pub struct TensorMap(#[cfg_attr(target_arch = "nvptx64", allow(dead_code))] [u64; 16]);

#[cfg(not(target_arch = "nvptx64"))]
impl TensorMap {
    /// What a driver has encoded.
    pub const fn from_encoded(bits: [u64; 16]) -> Self {
        TensorMap(bits)
    }

    /// Its 128 bytes.
    pub const fn bits(&self) -> &[u64; 16] {
        &self.0
    }
}

/// Where a kernel finds a [`TensorMap`] among its parameters, and how its copies are cached.
#[derive(Clone, Copy)]
pub struct TensorMapRef<'a> {
    map: machine::MapAddress,
    policy: Option<CachePolicy>,
    of: PhantomData<&'a TensorMap>,
}

/// How long the L2 cache should keep what is copied.
#[derive(Clone, Copy)]
pub struct CachePolicy(u64);

impl CachePolicy {
    /// What is not used again soon. PTX ISA: `createpolicy.fractional.L2::evict_first`. sm_80.
    #[inline(always)]
    pub fn evict_first() -> Self {
        CachePolicy(machine::policy_evict_first())
    }

    /// What is used by many blocks. PTX ISA: `createpolicy.fractional.L2::evict_last`. sm_80.
    #[inline(always)]
    pub fn evict_last() -> Self {
        CachePolicy(machine::policy_evict_last())
    }

    #[inline(always)]
    pub(crate) fn bits(self) -> u64 {
        self.0
    }
}

impl<'a> TensorMapRef<'a> {
    /// The map that is the field `map` of `parameters`, the struct that the kernel took by value: the one itself, not a
    /// copy. On the device the distance of the two becomes a constant, and the map stays where the launch has put it.
    #[inline(always)]
    pub fn of<P>(parameters: &'a P, map: &'a TensorMap) -> Self {
        TensorMapRef { map: machine::map_address(parameters, map), policy: None, of: PhantomData }
    }

    /// The same map, for copies that the L2 cache treats by `policy`. PTX ISA: `.L2::cache_hint`.
    #[inline(always)]
    pub fn cached(self, policy: CachePolicy) -> Self {
        TensorMapRef { policy: Some(policy), ..self }
    }

    /// Fetches the map itself, which the first copy would wait for. PTX ISA: `prefetch.tensormap`.
    #[inline(always)]
    pub fn prefetch(self) {
        machine::prefetch_map(self.map);
    }

    /// Loads the box at coordinates `at`, the innermost dimension first, and tells `barrier` of its bytes: all of them,
    /// also where it lies outside of the tensor. `to` is aligned to eight rows of the swizzle, at least to 128 bytes.
    /// PTX ISA: `cp.async.bulk.tensor.{2,3,4,5}d.shared::cluster.global.mbarrier::complete_tx::bytes`.
    #[inline(always)]
    #[track_caller]
    pub fn load<T, const RANK: usize>(self, to: Shared<T>, at: [i32; RANK], barrier: Mbarrier) {
        self.load_box(to.address(), RANK, five(at), barrier, None);
    }

    /// As [`load`](Self::load), to the same place in each of the `blocks` of the cluster, each of whose barriers at the
    /// place of `barrier` is told. PTX ISA: `.multicast::cluster`.
    #[inline(always)]
    #[track_caller]
    pub fn load_multicast<T, const RANK: usize>(
        self,
        to: Shared<T>,
        at: [i32; RANK],
        barrier: Mbarrier,
        blocks: Blocks,
    ) {
        self.load_box(to.address(), RANK, five(at), barrier, Some(blocks));
    }

    /// Loads a tile, a panel at a time: the rows from `row` on, at coordinates `outer` in the dimensions beyond rows and
    /// columns. The map is one of [tiles](TensorMapDescription::of_tiles) of this type.
    #[inline(always)]
    #[track_caller]
    pub fn load_tile<T: Element, const R: usize, const C: usize, const OUTER: usize>(
        self,
        to: SmemTile<T, R, C>,
        row: i32,
        outer: [i32; OUTER],
        barrier: Mbarrier,
    ) {
        for panel in 0..SmemTile::<T, R, C>::PANELS {
            let (to, at) = (to.panel(panel).address(), of_panel::<T, R, C, OUTER>(panel, row, outer));
            self.load_box(to, 2 + OUTER, at, barrier, None);
        }
    }

    /// As [`load_tile`](Self::load_tile), to each of the `blocks` of the cluster.
    #[inline(always)]
    #[track_caller]
    pub fn load_tile_multicast<T: Element, const R: usize, const C: usize, const OUTER: usize>(
        self,
        to: SmemTile<T, R, C>,
        row: i32,
        outer: [i32; OUTER],
        barrier: Mbarrier,
        blocks: Blocks,
    ) {
        for panel in 0..SmemTile::<T, R, C>::PANELS {
            let (to, at) = (to.panel(panel).address(), of_panel::<T, R, C, OUTER>(panel, row, outer));
            self.load_box(to, 2 + OUTER, at, barrier, Some(blocks));
        }
    }

    #[inline(always)]
    #[track_caller]
    fn load_box(self, to: u32, rank: usize, at: [i32; 5], barrier: Mbarrier, blocks: Option<Blocks>) {
        let (policy, blocks) = (self.policy.map(|policy| policy.0), blocks.map(|blocks| blocks.0));
        machine::tensor_load(to, self.map, rank, at, barrier.address(), blocks, policy);
    }

    /// Stores the box at coordinates `at`. The thread commits and waits as for [`bulk::store`](crate::bulk::store).
    /// PTX ISA: `cp.async.bulk.tensor.{2,3,4,5}d.global.shared::cta.bulk_group`.
    #[inline(always)]
    #[track_caller]
    pub fn store<T, const RANK: usize>(self, from: Shared<T>, at: [i32; RANK]) {
        machine::tensor_store(self.map, RANK, five(at), from.address(), self.policy.map(|policy| policy.0));
    }

    /// Stores a tile, as [`load_tile`](Self::load_tile) loads one.
    #[inline(always)]
    #[track_caller]
    pub fn store_tile<T: Element, const R: usize, const C: usize, const OUTER: usize>(
        self,
        from: SmemTile<T, R, C>,
        row: i32,
        outer: [i32; OUTER],
    ) {
        let policy = self.policy.map(|policy| policy.0);
        for panel in 0..SmemTile::<T, R, C>::PANELS {
            let (from, at) = (from.panel(panel).address(), of_panel::<T, R, C, OUTER>(panel, row, outer));
            machine::tensor_store(self.map, 2 + OUTER, at, from, policy);
        }
    }

    /// Adds the box to the tensor, of f32, each element atomically: the sum of several depends on their order.
    /// PTX ISA: `cp.reduce.async.bulk.tensor.{2,3,4,5}d.global.shared::cta.add.bulk_group`.
    #[inline(always)]
    #[track_caller]
    pub fn add<const RANK: usize>(self, from: Shared<f32>, at: [i32; RANK]) {
        machine::tensor_add(self.map, RANK, five(at), from.address());
    }

    /// Adds a tile, as [`store_tile`](Self::store_tile) stores one.
    #[inline(always)]
    #[track_caller]
    pub fn add_tile<const R: usize, const C: usize, const OUTER: usize>(
        self,
        from: SmemTile<f32, R, C>,
        row: i32,
        outer: [i32; OUTER],
    ) {
        for panel in 0..SmemTile::<f32, R, C>::PANELS {
            let (from, at) = (from.panel(panel).address(), of_panel::<f32, R, C, OUTER>(panel, row, outer));
            machine::tensor_add(self.map, 2 + OUTER, at, from);
        }
    }
}

/// Coordinates of up to five dimensions.
#[inline(always)]
fn five<const RANK: usize>(at: [i32; RANK]) -> [i32; 5] {
    const { assert!(RANK >= 2 && RANK <= 5, "a tensor has two to five dimensions") };
    let mut all = [0; 5];
    all[..RANK].copy_from_slice(&at);
    all
}

/// The coordinates of a panel of a tile: its first column, the row, and the outer dimensions.
#[inline(always)]
fn of_panel<T: Element, const R: usize, const C: usize, const OUTER: usize>(
    panel: u32,
    row: i32,
    outer: [i32; OUTER],
) -> [i32; 5] {
    const { assert!(OUTER <= 3, "a tensor has at most three dimensions beyond those of its tiles") };
    let mut all = [(panel * SmemTile::<T, R, C>::PANEL_COLUMNS) as i32, row, 0, 0, 0];
    all[2..2 + OUTER].copy_from_slice(&outer);
    all
}
