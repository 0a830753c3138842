//! What a block of threads keeps in shared memory.
use super::GROUP_ROWS;
use super::order::{self, Order};
use cuda_std::SmemTile;
use cuda_std::matrix::PackedElement;
use cuda_std::pipeline::Pipeline;
use cuda_std::shared::{Shared, dynamic_shared};
use cuda_std::warpgroup::WARPGROUP;

/// Tiles, and the pipelines that they come through.
#[derive(Clone, Copy)]
pub struct Memory<
    T,
    const HEADDIM: usize,
    const HEADDIM_V: usize,
    const QUERIES: u32,
    const BLOCK_N: usize,
    const STAGES: u32,
> {
    /// Q: for each warpgroup of consumers a stage, or two, of this tile and of the next; or one stage more than warpgroups.
    pub q: SmemTile<T, { GROUP_ROWS as usize }, HEADDIM>,
    /// Blocks of K.
    pub k: SmemTile<T, BLOCK_N, HEADDIM>,
    /// Blocks of V.
    pub v: SmemTile<T, BLOCK_N, HEADDIM_V>,
    /// Q's: each warpgroup has stages of its own, which it alone empties.
    pub queries: Pipeline<QUERIES>,
    /// K's: all warpgroups empty each stage.
    pub keys: Pipeline<STAGES>,
    /// V's, likewise.
    pub values: Pipeline<STAGES>,
    /// Where the tile is that each stage of Q is of: [`Place::words`](super::schedule::Place::words).
    pub places: Shared<u32>,
    /// In which order sequences of different lengths come.
    pub order: Order,
}

/// Warps of a warpgroup: of each, one thread releases a stage of keys or values. One of queries all release, as all read where their
/// tile is.
const WARPS: u32 = 4;

impl<
    T: PackedElement,
    const HEADDIM: usize,
    const HEADDIM_V: usize,
    const QUERIES: u32,
    const BLOCK_N: usize,
    const STAGES: u32,
> Memory<T, HEADDIM, HEADDIM_V, QUERIES, BLOCK_N, STAGES>
{
    /// How many sequences of different lengths it has room to put into order.
    pub const SEQUENCES: u32 = order::room(HEADDIM as u32, QUERIES);

    /// What it takes.
    pub const BYTES: u32 = QUERIES * SmemTile::<T, { GROUP_ROWS as usize }, HEADDIM>::BYTES
        + STAGES * (SmemTile::<T, BLOCK_N, HEADDIM>::BYTES + SmemTile::<T, BLOCK_N, HEADDIM_V>::BYTES)
        + Pipeline::<QUERIES>::BYTES
        + 2 * Pipeline::<STAGES>::BYTES
        + QUERIES * size_of::<[u32; 4]>() as u32
        + Order::bytes(Self::SEQUENCES);

    /// The block's dynamic shared memory.
    #[inline(always)]
    pub fn of_block() -> Self {
        let q = SmemTile::at(dynamic_shared());
        let k = SmemTile::at(q.stage(QUERIES - 1).end());
        let v = SmemTile::at(k.stage(STAGES - 1).end());
        let queries = Pipeline::at(v.stage(STAGES - 1).end());
        let keys = Pipeline::at(queries.end());
        let values = Pipeline::at(keys.end());
        let places = values.end().cast();
        let order = Order::at(places.offset(4 * QUERIES), k.start());
        Memory { q, k, v, queries, keys, values, places, order }
    }

    /// For so many warpgroups of consumers. Said by one thread, before a fence and a barrier of the block.
    #[inline(always)]
    #[track_caller]
    pub fn init_barriers(self, groups: u32) {
        self.queries.init(1, WARPGROUP);
        self.keys.init(1, WARPS * groups);
        self.values.init(1, WARPS * groups);
    }
}
