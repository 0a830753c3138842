//! What a block of threads keeps in shared memory.
use super::{GROUPS, STAGES};
use cuda_std::matrix::PackedElement;
use cuda_std::pipeline::Pipeline;
use cuda_std::{Shared, SmemTile};

/// What comes in: tiles, and the pipelines that they come through.
#[derive(Clone, Copy)]
pub(super) struct Inputs<T, const HEADDIM: usize, const BLOCK_M: usize, const BLOCK_N: usize> {
    /// The keys of the block.
    pub k: SmemTile<T, BLOCK_N, HEADDIM>,
    /// Their values.
    pub v: SmemTile<T, BLOCK_N, HEADDIM>,
    /// Blocks of Q.
    pub q: SmemTile<T, BLOCK_M, HEADDIM>,
    /// Blocks of dO: [`D_O_TILES`](Self::D_O_TILES).
    pub d_o: SmemTile<T, BLOCK_M, HEADDIM>,
    /// What the exponents of a block of queries subtract, a stage after the other; then their D.
    statistics: Shared<f32>,
    /// Of K and V: when they may be loaded. They come with the first Q and dO, and their products wait for these.
    pub keys: Pipeline<1>,
    /// Of Q, with what its exponents subtract.
    pub queries: Pipeline<STAGES>,
    /// Of dO, with D.
    pub d_outputs: Pipeline<STAGES>,
    /// Tokens of Q and of K, where they come with K and V.
    pub lengths: Shared<u32>,
}

/// Warps of a warpgroup: of each, one thread arrives.
const WARPS: u32 = 4;

impl<T: PackedElement, const HEADDIM: usize, const BLOCK_M: usize, const BLOCK_N: usize>
    Inputs<T, HEADDIM, BLOCK_M, BLOCK_N>
{
    /// Tiles of dO: where heads are wide there is no room for one a stage.
    pub const D_O_TILES: u32 = if HEADDIM > 128 { 1 } else { STAGES };

    /// What the tiles take.
    pub const TILE_BYTES: u32 = 2 * SmemTile::<T, BLOCK_N, HEADDIM>::BYTES
        + (STAGES + Self::D_O_TILES) * SmemTile::<T, BLOCK_M, HEADDIM>::BYTES;

    /// What the statistics and the barriers take.
    pub const OTHER_BYTES: u32 =
        4 * 2 * STAGES * BLOCK_M as u32 + Pipeline::<1>::BYTES + 2 * Pipeline::<STAGES>::BYTES + 8;

    /// The tiles from `tiles` on, aligned to 1024 bytes; statistics and barriers from `others` on, aligned to 16.
    #[inline(always)]
    pub fn at(tiles: Shared<T>, others: Shared<f32>) -> Self {
        let k = SmemTile::at(tiles);
        let v = SmemTile::at(k.end());
        let q = SmemTile::at(v.end());
        let d_o = SmemTile::at(q.stage(STAGES - 1).end());
        let keys = Pipeline::at(others.offset(2 * STAGES * BLOCK_M as u32).cast());
        let queries = Pipeline::at(keys.end());
        let d_outputs = Pipeline::at(queries.end());
        let lengths = d_outputs.end().cast();
        Inputs { k, v, q, d_o, statistics: others, keys, queries, d_outputs, lengths }
    }

    /// The first address after the barriers.
    #[inline(always)]
    pub fn end(self) -> Shared<u64> {
        self.d_outputs.end().offset(1)
    }

    /// Said by one thread, before a fence and a barrier of the block, or of the `cluster` of blocks that have the same
    /// queries.
    #[inline(always)]
    #[track_caller]
    pub fn init_barriers(self, cluster: u32) {
        self.keys.init(1, WARPS * GROUPS);
        self.queries.init(1, cluster * WARPS * GROUPS);
        self.d_outputs.init(1, cluster * WARPS * GROUPS);
    }

    /// The tile of dO of a stage.
    #[inline(always)]
    pub fn d_o_at(self, stage: u32) -> SmemTile<T, BLOCK_M, HEADDIM> {
        if const { Self::D_O_TILES == STAGES } { self.d_o.stage(stage) } else { self.d_o }
    }

    /// What the exponents of the queries of a stage subtract.
    #[inline(always)]
    pub fn bases(self, stage: u32) -> Shared<f32> {
        self.statistics.offset(stage * BLOCK_M as u32)
    }

    /// D of the queries of a stage.
    #[inline(always)]
    pub fn sums(self, stage: u32) -> Shared<f32> {
        self.statistics.offset((STAGES + stage) * BLOCK_M as u32)
    }
}

/// What the warpgroups add to dQ, on its way to global memory.
#[derive(Clone, Copy)]
pub(super) struct Outgoing<const HEADDIM: usize, const BLOCK_M: usize> {
    /// A part for each warpgroup, in the order of its registers.
    d_q: Shared<f32>,
    /// Each warpgroup fills a stage of its own.
    pub parts: Pipeline<GROUPS>,
    /// Where its part goes.
    pub destinations: Destinations,
}

/// What becomes of a part of dQ. Who copies for a warpgroup knows, and tells it.
#[derive(Clone, Copy)]
pub(super) struct Destination {
    /// Rows of dQ that are finished; 0: the part goes to the sums.
    pub rows: u32,
    /// Whether there are sums of others to add it to.
    pub has_sums: bool,
    /// Where the first row begins in dQ, in elements.
    pub first: u64,
}

impl Destination {
    /// The sums of dQ, from others.
    pub const SUMS: Destination = Destination { rows: 0, has_sums: true, first: 0 };
    /// The sums of dQ, of which this is the first.
    pub const FIRST: Destination = Destination { has_sums: false, ..Self::SUMS };

    /// Words of shared memory.
    const WORDS: u32 = 4;
}

/// A destination for each warpgroup.
#[derive(Clone, Copy)]
pub(super) struct Destinations {
    words: Shared<u32>,
}

impl Destinations {
    /// What they take.
    pub const BYTES: u32 = 4 * GROUPS * Destination::WORDS;

    /// Those from `words` on, aligned to 16 bytes.
    #[inline(always)]
    pub fn at(words: Shared<u32>) -> Self {
        Destinations { words }
    }

    /// Says what becomes of a warpgroup's next part.
    #[inline(always)]
    #[track_caller]
    pub fn set(self, group: u32, to: Destination) {
        let words = [to.rows, to.has_sums as u32, to.first as u32, (to.first >> 32) as u32];
        self.words.offset(group * Destination::WORDS).store_vector(0, words);
    }

    /// What becomes of a warpgroup's part.
    #[inline(always)]
    #[track_caller]
    pub fn of(self, group: u32) -> Destination {
        let [rows, has_sums, low, high] = self.words.offset(group * Destination::WORDS).load_vector(0);
        Destination { rows, has_sums: has_sums != 0, first: low as u64 | (high as u64) << 32 }
    }
}

impl<const HEADDIM: usize, const BLOCK_M: usize> Outgoing<HEADDIM, BLOCK_M> {
    /// Elements of a part.
    pub const PART: u32 = (BLOCK_M * HEADDIM) as u32 / GROUPS;

    /// What the parts take.
    pub const PART_BYTES: u32 = 4 * GROUPS * Self::PART;

    /// What the destinations take.
    pub const DESTINATION_BYTES: u32 = Destinations::BYTES;

    /// What the barriers take.
    pub const BARRIER_BYTES: u32 = Pipeline::<GROUPS>::BYTES;

    /// The parts from `d_q` on, aligned to 128 bytes, which is what the copy engine reads and adds to at a time, and the
    /// destinations after them.
    #[inline(always)]
    pub fn at(d_q: Shared<f32>, barriers: Shared<u64>) -> Self {
        Outgoing {
            d_q,
            parts: Pipeline::at(barriers),
            destinations: Destinations::at(d_q.offset(GROUPS * Self::PART).cast()),
        }
    }

    /// As [`Inputs::init_barriers`]. The first parts go to the sums.
    #[inline(always)]
    #[track_caller]
    pub fn init(self) {
        self.parts.init(WARPS, 1);
        for group in 0..GROUPS {
            self.destinations.set(group, Destination::SUMS);
        }
    }

    /// Where a warpgroup puts its part.
    #[inline(always)]
    pub fn part(self, group: u32) -> Shared<f32> {
        self.d_q.offset(group * Self::PART)
    }
}
