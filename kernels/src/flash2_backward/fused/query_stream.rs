//! The queries that a block of keys needs, on their way to shared memory.
use super::places::{ROWS, first_place, places_of_head, statistic_at};
use crate::attention::{Attention, Sequence, Tensor};
use crate::flash2_backward::{Params, STAGES};
use crate::mask::Blocks;
use cuda_std::fragment::MatrixElement;
use cuda_std::math::unknown_before;
use cuda_std::shared::Shared;
use cuda_std::thread::thread_idx_x;
use cuda_std::{SmemTile, TileStream, copy};

/// A block of queries.
#[derive(Clone, Copy)]
pub(super) struct Place {
    /// Rows of its head from its first on.
    pub rows: u32,
    /// Where its first row is in the order of statistics and sums.
    pub place: u32,
}

impl Place {
    /// Before the first block.
    pub const NOWHERE: Place = Place { rows: 0, place: u32::MAX };
}

/// The blocks of queries that a block of keys needs, of all heads of Q that share its head of K and V, one after the
/// other: Q, dO and statistics, in stages in shared memory.
///
/// The addresses run along: to find them anew in each step would take some hundred instructions that wait for each other, and
/// a warp multiplies nothing meanwhile.
pub(super) struct QueryStream<T, const BLOCK_M: usize, const HEADDIM: usize> {
    q: SmemTile<T, BLOCK_M, HEADDIM>,
    d_o: SmemTile<T, BLOCK_M, HEADDIM>,
    /// In each stage what the exponents of its rows subtract, then D.
    statistics: Shared<f32>,
    /// The block of this step.
    pub place: Place,
    q_rows: TileStream<T, BLOCK_M, HEADDIM>,
    d_o_rows: TileStream<T, BLOCK_M, HEADDIM>,
}

impl<T: MatrixElement, const BLOCK_M: usize, const HEADDIM: usize> QueryStream<T, BLOCK_M, HEADDIM> {
    /// What the stages take of shared memory, with their statistics.
    pub const BYTES: usize = STAGES as usize * 2 * BLOCK_M * (HEADDIM * size_of::<T>() + size_of::<f32>());

    /// The blocks of `head` of Q and of those after it. `statistics` is where those of the stages go.
    #[inline(always)]
    pub fn new(
        p: &Params,
        threads: u32,
        (sequence, head): (Sequence, u32),
        blocks: &Blocks,
        q: SmemTile<T, BLOCK_M, HEADDIM>,
        d_o: SmemTile<T, BLOCK_M, HEADDIM>,
        statistics: Shared<f32>,
    ) -> Self {
        let begin = blocks.begin;
        let a: Attention<T> = p.attention.of();
        let rows = |tensor: &Tensor<T>, columns| {
            TileStream::new(threads, sequence.query_matrix(tensor, head, begin * BLOCK_M as u32, columns, true))
        };
        let (q_rows, d_o_rows) = (rows(&a.q, a.headdim), rows(&p.d_o.cast(), a.headdim_v));
        let place = first_place(&a, &sequence, head, ROWS) + begin * BLOCK_M as u32;
        QueryStream {
            q,
            d_o,
            statistics,
            place: Place { rows: sequence.seqlen_q.wrapping_sub(begin * BLOCK_M as u32), place },
            q_rows,
            d_o_rows,
        }
    }

    /// Starts to copy the first block, as one group.
    #[inline(always)]
    #[track_caller]
    pub fn copy_async(&mut self, p: &Params, stage: u32) {
        self.copy_block_async(p, self.place, stage);
    }

    /// Starts to copy the block after this one, and returns its place. `first_anew(x)` is how many tokens Q has, and the first
    /// block of each head, found anew once `x` is known. After it all blocks to the end of the head are needed.
    #[inline(always)]
    #[track_caller]
    pub fn copy_next_async(&mut self, p: &Params, stage: u32, first_anew: impl FnOnce(u32) -> (u32, u32)) -> Place {
        let next = Self::next(p, self.place, first_anew, |rows| {
            let way = |tensor: &Tensor<T>| tensor.head_stride.wrapping_sub(rows as u64 * tensor.row_stride);
            self.q_rows.skip(way(&p.attention.q.cast()));
            self.d_o_rows.skip(way(&p.d_o.cast()));
        });
        self.copy_block_async(p, next, stage);
        next
    }

    /// Goes on to the next block. Its place is found once more: from its copy to this it takes no registers.
    #[inline(always)]
    #[track_caller]
    pub fn advance(&mut self, p: &Params, first_anew: impl FnOnce(u32) -> (u32, u32)) {
        let Place { rows, place } = self.place;
        let anew = |n| unknown_before(n, rows);
        self.place = Self::next(p, Place { rows: anew(rows), place: anew(place) }, first_anew, |_| ());
    }

    /// The place after this one. At the end of a head `skip(rows)`: the next begins so many rows further up.
    #[inline(always)]
    #[track_caller]
    fn next(
        p: &Params,
        Place { rows, place }: Place,
        first_anew: impl FnOnce(u32) -> (u32, u32),
        skip: impl FnOnce(u32),
    ) -> Place {
        let place = place + BLOCK_M as u32;
        if rows > BLOCK_M as u32 {
            return Place { rows: rows - BLOCK_M as u32, place };
        }
        // Seldom, and all is found anew each time.
        let anew = |x| unknown_before(x, place);
        let (seqlen_q, begin) = first_anew(place);
        let rows = (seqlen_q.div_ceil(BLOCK_M as u32) - begin) * BLOCK_M as u32;
        skip(rows);
        let a = Attention { batch: anew(p.attention.batch), seqlen_q: anew(p.attention.seqlen_q), ..p.attention };
        let place = place + places_of_head(&a, ROWS) - rows;
        Place { rows: seqlen_q - begin * BLOCK_M as u32, place }
    }

    /// Starts to copy the block at `place`, to which the addresses have run, as one group.
    #[inline(always)]
    #[track_caller]
    fn copy_block_async(&mut self, p: &Params, Place { rows, place }: Place, stage: u32) {
        self.q_rows.copy_async_anew(self.q.stage(stage), rows, p.attention.headdim);
        self.d_o_rows.copy_async_anew(self.d_o.stage(stage), rows, p.attention.headdim_v);
        let quads = const { BLOCK_M as u32 / 4 };
        let thread = unknown_before(thread_idx_x(), place);
        if thread < 2 * quads {
            let (part, row) = (thread / quads, thread % quads * 4);
            let from = p.statistics.offset(statistic_at(place + row, part, ROWS));
            copy::copy_async(self.bases(stage).offset(part * BLOCK_M as u32 + row), from, true);
        }
        copy::commit();
    }

    /// What the exponents of the rows of a stage subtract.
    #[inline(always)]
    pub fn bases(&self, stage: u32) -> Shared<f32> {
        self.statistics.offset(stage * 2 * BLOCK_M as u32)
    }

    /// D of the rows of a stage.
    #[inline(always)]
    pub fn sums(&self, stage: u32) -> Shared<f32> {
        self.bases(stage).offset(BLOCK_M as u32)
    }
}
