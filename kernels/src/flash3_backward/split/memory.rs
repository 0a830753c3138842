//! What a block of threads of a cluster keeps in shared memory.
use super::{CLUSTER, WARPS};
use crate::flash3_backward::STAGES;
use crate::flash3_backward::memory::{Destinations, Inputs};
use cuda_std::SmemTile;
use cuda_std::element::f16;
use cuda_std::matrix::PackedElement;
use cuda_std::pipeline::Pipeline;
use cuda_std::shared::dynamic_shared;

/// `HALF` are the columns of dQ that the block finds.
#[derive(Clone, Copy)]
pub(super) struct Memory<T, const HEADDIM: usize, const HALF: usize, const BLOCK_M: usize, const BLOCK_N: usize> {
    pub inputs: Inputs<T, HEADDIM, BLOCK_M, BLOCK_N>,
    /// K of the other block's keys, in the columns of dQ that this one finds.
    pub other_k: SmemTile<T, BLOCK_N, HALF>,
    /// dS of the present step, and of the one before: a row a query.
    pub d_s: SmemTile<T, BLOCK_M, BLOCK_N>,
    /// The same of the other block's keys.
    pub other_d_s: SmemTile<T, BLOCK_M, BLOCK_N>,
    /// Pᵀ, from one warpgroup to the other. In f16, which is exacter than bf16 for what is at most 1.
    pub p: SmemTile<f16, BLOCK_N, BLOCK_M>,
    /// Of `other_k`.
    pub other_keys: Pipeline<1>,
    /// Of dS: a stage is full when the other block's has come, and empty when that has read what came from here.
    pub exchange: Pipeline<STAGES>,
    /// Where blocks of keys add to dQ in their order: what becomes of a warpgroup's part.
    pub destinations: Destinations,
}

impl<T: PackedElement, const HEADDIM: usize, const HALF: usize, const BLOCK_M: usize, const BLOCK_N: usize>
    Memory<T, HEADDIM, HALF, BLOCK_M, BLOCK_N>
{
    const TILE_BYTES: u32 = Inputs::<T, HEADDIM, BLOCK_M, BLOCK_N>::TILE_BYTES;
    pub const BYTES: u32 = Self::TILE_BYTES
        + SmemTile::<T, BLOCK_N, HALF>::BYTES
        + 2 * STAGES * SmemTile::<T, BLOCK_M, BLOCK_N>::BYTES
        + SmemTile::<f16, BLOCK_N, BLOCK_M>::BYTES
        + Inputs::<T, HEADDIM, BLOCK_M, BLOCK_N>::OTHER_BYTES
        + Pipeline::<1>::BYTES
        + Pipeline::<STAGES>::BYTES;

    #[inline(always)]
    pub fn of_block() -> Self {
        let bytes = dynamic_shared::<u8>();
        let other_k = SmemTile::at(bytes.offset(Self::TILE_BYTES).cast());
        let d_s = SmemTile::at(other_k.end());
        let other_d_s = SmemTile::at(d_s.stage(STAGES - 1).end());
        let p = SmemTile::at(other_d_s.stage(STAGES - 1).end());
        let inputs = Inputs::at(bytes.cast(), p.end());
        let other_keys = Pipeline::at(inputs.end());
        let exchange = Pipeline::at(other_keys.end());
        let destinations = Destinations::at(bytes.offset(const { Self::BYTES.next_multiple_of(16) }).cast());
        Memory { inputs, other_k, d_s, other_d_s, p, other_keys, exchange, destinations }
    }

    /// As [`Inputs::init_barriers`].
    #[inline(always)]
    #[track_caller]
    pub fn init_barriers(self) {
        self.inputs.init_barriers(CLUSTER);
        self.other_keys.init(1, 1);
        self.exchange.init(1, WARPS);
    }
}
