//! What a block of threads keeps in shared memory.
use crate::flash3_backward::finisher::Finisher;
use crate::flash3_backward::memory::{Inputs, Outgoing};
use cuda_std::SmemTile;
use cuda_std::matrix::PackedElement;
use cuda_std::shared::dynamic_shared;

/// All of it.
#[derive(Clone, Copy)]
pub(super) struct Memory<T, const HEADDIM: usize, const BLOCK_M: usize, const BLOCK_N: usize> {
    pub inputs: Inputs<T, HEADDIM, BLOCK_M, BLOCK_N>,
    /// dS of the present step, and of the one before: a row a query.
    pub d_s: SmemTile<T, BLOCK_M, BLOCK_N>,
    pub outgoing: Outgoing<HEADDIM, BLOCK_M>,
}

impl<T: PackedElement, const HEADDIM: usize, const BLOCK_M: usize, const BLOCK_N: usize>
    Memory<T, HEADDIM, BLOCK_M, BLOCK_N>
{
    const TILE_BYTES: u32 = Inputs::<T, HEADDIM, BLOCK_M, BLOCK_N>::TILE_BYTES;
    const D_S_BYTES: u32 = 2 * SmemTile::<T, BLOCK_M, BLOCK_N>::BYTES;
    pub const BYTES: u32 = Self::TILE_BYTES
        + Self::D_S_BYTES
        + Outgoing::<HEADDIM, BLOCK_M>::PART_BYTES
        + Outgoing::<HEADDIM, BLOCK_M>::DESTINATION_BYTES
        + Inputs::<T, HEADDIM, BLOCK_M, BLOCK_N>::OTHER_BYTES
        + Outgoing::<HEADDIM, BLOCK_M>::BARRIER_BYTES;

    #[inline(always)]
    pub fn of_block() -> Self {
        let bytes = dynamic_shared::<u8>();
        let d_s = SmemTile::at(bytes.offset(Self::TILE_BYTES).cast());
        let d_q = d_s.stage(1).end();
        let outgoing_bytes = Outgoing::<HEADDIM, BLOCK_M>::PART_BYTES + Outgoing::<HEADDIM, BLOCK_M>::DESTINATION_BYTES;
        let others = d_q.cast::<u8>().offset(outgoing_bytes);
        let inputs = Inputs::at(bytes.cast(), others.cast());
        Memory { inputs, d_s, outgoing: Outgoing::at(d_q, inputs.end()) }
    }

    /// What warp `warp` of those that finish dQ has, where some do: behind all else.
    #[inline(always)]
    pub fn finisher(self, warp: u32) -> Finisher<T, HEADDIM> {
        Finisher::at(dynamic_shared::<u8>().offset(const { Self::BYTES.next_multiple_of(16) }), warp)
    }
}
