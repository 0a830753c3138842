//! The walk over the queries that see a block of keys.
use super::probabilities::exponent_base;
use super::{Params, STAGES};
use crate::attention::{Attention, Sequence, Tensor, divisor};
use crate::mask::Blocks;
use crate::schedule::KeyBlock;
use cuda_std::fragment::MatrixElement;
use cuda_std::shared::Shared;
use cuda_std::thread::{sync_threads, thread_idx_x};
use cuda_std::{Global, SmemTile, TileStream, copy};

/// The blocks of Q and dO that a block of keys needs, of all heads of Q that share the head of K and V, one after the other;
/// with what P and dS need of each row: the base of its exponents and D.
pub(super) struct QueryWalk<
    'a,
    T,
    const HEADDIM: usize,
    const HEADDIM_V: usize,
    const BLOCK_M: usize,
    const GENERAL: bool,
> {
    a: &'a Attention<T>,
    d_o: Tensor<T>,
    row_sums: Global<f32>,
    sequence: Sequence,
    blocks: Blocks,
    /// The step that comes next: a head and a block of it.
    head: u32,
    block: u32,
    /// One past the last head.
    end_head: u32,
    /// Where in shared memory that step is.
    stage: u32,
    /// This thread's row of that step: the base of its exponents, and D.
    row: (f32, f32),
    threads: u32,
    q_tile: SmemTile<T, BLOCK_M, HEADDIM>,
    d_o_tile: SmemTile<T, BLOCK_M, HEADDIM_V>,
    bases: Shared<f32>,
    sums: Shared<f32>,
}

/// One step of the walk: a block of queries that has come in.
pub(super) struct Step<T, const HEADDIM: usize, const HEADDIM_V: usize, const BLOCK_M: usize> {
    pub q: SmemTile<T, BLOCK_M, HEADDIM>,
    pub d_o: SmemTile<T, BLOCK_M, HEADDIM_V>,
    /// What the exponents of each row subtract.
    pub bases: Shared<f32>,
    /// D of each row.
    pub sums: Shared<f32>,
    /// The head of Q.
    pub head: u32,
    pub first_row: u32,
    /// Whether the mask hides a part of it.
    pub partial: bool,
}

impl<'a, T: MatrixElement, const HEADDIM: usize, const HEADDIM_V: usize, const BLOCK_M: usize, const GENERAL: bool>
    QueryWalk<'a, T, HEADDIM, HEADDIM_V, BLOCK_M, GENERAL>
{
    /// What [`new`](Self::new) takes of shared memory.
    pub const BYTES: usize =
        STAGES as usize * BLOCK_M * ((HEADDIM + HEADDIM_V) * size_of::<T>() + 2 * size_of::<f32>());

    /// Begins the walk over `blocks`, by all `threads` of the block, through shared memory from `at` on.
    #[inline(always)]
    pub fn new(p: &Params, a: &'a Attention<T>, block: &KeyBlock, blocks: Blocks, threads: u32, at: Shared<T>) -> Self {
        let heads = a.nheads / divisor(a.nheads_k);
        let q_tile = SmemTile::at(at);
        let d_o_tile = SmemTile::at(q_tile.stage(STAGES - 1).end());
        let bases = d_o_tile.stage(STAGES - 1).end();
        let mut walk = QueryWalk {
            a,
            d_o: p.d_o.cast(),
            row_sums: p.row_sums,
            sequence: block.sequence,
            blocks,
            head: if blocks.count() > 0 { block.head_k * heads } else { (block.head_k + 1) * heads },
            block: blocks.begin,
            end_head: (block.head_k + 1) * heads,
            stage: 0,
            row: (f32::INFINITY, 0.0),
            threads,
            q_tile,
            d_o_tile,
            bases,
            sums: bases.offset(STAGES * BLOCK_M as u32),
        };
        walk.load();
        walk
    }

    /// Waits for a step, and begins to load the one after it: no warp reads the one before any more, whose stage that
    /// takes. After the last step it waits too: nothing that a thread has copied is then read or under way.
    #[inline(always)]
    #[track_caller]
    pub fn advance(&mut self) -> Option<Step<T, HEADDIM, HEADDIM_V, BLOCK_M>> {
        self.store_statistics();
        copy::wait::<0>();
        sync_threads();
        if self.head == self.end_head {
            return None;
        }
        let first_of_stage = self.stage * BLOCK_M as u32;
        let step = Step {
            q: self.q_tile.stage(self.stage),
            d_o: self.d_o_tile.stage(self.stage),
            bases: self.bases.offset(first_of_stage),
            sums: self.sums.offset(first_of_stage),
            head: self.head,
            first_row: self.block * BLOCK_M as u32,
            partial: self.blocks.is_partial(self.block),
        };
        self.stage = (self.stage + 1) % STAGES;
        self.block += 1;
        if self.block == self.blocks.end {
            self.block = self.blocks.begin;
            self.head += 1;
        }
        self.load();
        Some(step)
    }

    #[inline(always)]
    #[track_caller]
    fn load(&mut self) {
        if self.head == self.end_head {
            return;
        }
        let (head, first_row) = (self.head, self.block * BLOCK_M as u32);
        let aligned = self.a.is_aligned::<GENERAL>();
        let q_rows = self.sequence.query_matrix(&self.a.q, head, first_row, self.a.headdim, aligned);
        let d_o_rows = self.sequence.query_matrix(&self.d_o, head, first_row, self.a.headdim_v, aligned);
        TileStream::new(self.threads, q_rows).copy_async(self.q_tile.stage(self.stage));
        TileStream::new(self.threads, d_o_rows).copy_async(self.d_o_tile.stage(self.stage));
        copy::commit();
        // A row that is not there has P = 0.
        self.row = (f32::INFINITY, 0.0);
        let row = first_row + thread_idx_x();
        if thread_idx_x() < BLOCK_M as u32 && row < self.sequence.seqlen_q {
            let at = self.a.first_row(&self.sequence, head) + row as usize;
            self.row = (exponent_base(self.a.softmax_lse.load(at)), self.row_sums.load(at));
        }
    }

    #[inline(always)]
    #[track_caller]
    fn store_statistics(&self) {
        if thread_idx_x() < BLOCK_M as u32 && self.head < self.end_head {
            let at = self.stage * BLOCK_M as u32 + thread_idx_x();
            self.bases.store(at, self.row.0);
            self.sums.store(at, self.row.1);
        }
    }
}
