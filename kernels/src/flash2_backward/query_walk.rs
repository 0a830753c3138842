//! The walk of a block of keys over the queries that see it.
use super::probabilities::exponent_base;
use super::{Params, STAGES};
use crate::attention::{Attention, Sequence, Tensor, divisor};
use crate::mask::{Blocks, Mask};
use crate::schedule::{KeyBlock, key_block_anew};
use cuda_std::fragment::MatrixElement;
use cuda_std::math::unknown_before;
use cuda_std::shared::Shared;
use cuda_std::thread::{sync_threads, sync_threads_or, thread_idx_x};
use cuda_std::{Global, GlobalMatrix, SmemTile, TileStream, copy};

/// A block of K and V, and the walk over the blocks of Q and dO that it needs: of all heads of Q that share its head, one
/// after the other; with what P and dS need of each row, the base of its exponents and D.
pub(super) struct QueryWalk<
    'a,
    T,
    const HEADDIM: usize,
    const HEADDIM_V: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const CAUSAL: bool,
    const GENERAL: bool,
> {
    a: &'a Attention<T>,
    d_o: Tensor<T>,
    row_sums: Global<f32>,
    key_block: KeyBlock,
    blocks: Blocks,
    threads: u32,
    /// K, dK in the end.
    pub k: SmemTile<T, BLOCK_N, HEADDIM>,
    /// V, dV in the end.
    pub v: SmemTile<T, BLOCK_N, HEADDIM_V>,
    q: SmemTile<T, BLOCK_M, HEADDIM>,
    d_o_tile: SmemTile<T, BLOCK_M, HEADDIM_V>,
    bases: Shared<f32>,
    sums: Shared<f32>,
    /// Steps that are to come. Counted down to 0, they take one register, and tell the stages too.
    steps: u32,
    /// The step that comes next: a head, and the rows that it has from the step's first on. Counted down to its end, they take
    /// one register, where a block would take a second for how many there are.
    head: u32,
    rows: u32,
    /// Its rows of Q and dO. The addresses run along: to find them anew in each step would take some hundred instructions that
    /// wait for each other, and more registers.
    q_rows: TileStream<T, BLOCK_M, HEADDIM>,
    d_o_rows: TileStream<T, BLOCK_M, HEADDIM_V>,
    /// Where the LSE of its first row is, and its D; a general kernel, which has the head at hand, finds it anew.
    statistic: u64,
    /// This thread's row of that step: its LSE, and D.
    row: (f32, f32),
    /// Whether what this thread copied of K and V is not finite; not known yet at first.
    keys_nonfinite: Option<bool>,
    /// Of the step that was waited for: see [`Step`].
    partial: bool,
    poisonous: bool,
}

/// A row that is not there has P = 0.
const NO_ROW: (f32, f32) = (f32::NEG_INFINITY, 0.0);

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
    /// Whether the window hides a part of it.
    pub partial: bool,
    /// Whether a part is hidden, and something is NaN or infinite: then products must leave out what is hidden.
    pub poisonous: bool,
}

impl<
    'a,
    T: MatrixElement,
    const HEADDIM: usize,
    const HEADDIM_V: usize,
    const BLOCK_M: usize,
    const BLOCK_N: usize,
    const CAUSAL: bool,
    const GENERAL: bool,
> QueryWalk<'a, T, HEADDIM, HEADDIM_V, BLOCK_M, BLOCK_N, CAUSAL, GENERAL>
{
    /// What [`new`](Self::new) takes of shared memory.
    pub const BYTES: usize = (BLOCK_N + STAGES as usize * BLOCK_M) * (HEADDIM + HEADDIM_V) * size_of::<T>()
        + STAGES as usize * BLOCK_M * 2 * size_of::<f32>();

    /// Barriers where [`wait`](Self::wait) is said once.
    pub const BARRIERS: u32 = if CAUSAL || GENERAL { 2 } else { 1 };

    /// Begins the walk of a block of keys over `blocks`, by all `threads` of the block, through shared memory from `at` on.
    #[inline(always)]
    #[track_caller]
    pub fn new(
        p: &Params,
        a: &'a Attention<T>,
        key_block: KeyBlock,
        blocks: Blocks,
        threads: u32,
        at: Shared<T>,
    ) -> Self {
        let heads = a.nheads / divisor(a.nheads_k);
        let first_head = key_block.head_k * heads;
        let (first_row, aligned) = (blocks.begin * BLOCK_M as u32, a.is_aligned::<GENERAL>());
        let rows_of =
            |tensor, columns| key_block.sequence.query_matrix(tensor, first_head, first_row, columns, aligned);
        let d_o = p.d_o.cast();
        let k = SmemTile::at(at);
        let v = SmemTile::at(k.end());
        let q = SmemTile::at(v.end());
        let d_o_tile = SmemTile::at(q.stage(STAGES - 1).end());
        let bases = d_o_tile.stage(STAGES - 1).end();
        let mut walk = QueryWalk {
            a,
            d_o,
            row_sums: p.row_sums,
            key_block,
            blocks,
            threads,
            k,
            v,
            q,
            d_o_tile,
            bases,
            sums: bases.offset(STAGES * BLOCK_M as u32),
            steps: blocks.count() * heads,
            head: first_head,
            rows: key_block.sequence.seqlen_q.wrapping_sub(first_row),
            q_rows: TileStream::new(threads, rows_of(&a.q, a.headdim)),
            d_o_rows: TileStream::new(threads, rows_of(&d_o, a.headdim_v)),
            statistic: a.first_row(&key_block.sequence, first_head) as u64 + first_row as u64,
            row: NO_ROW,
            keys_nonfinite: None,
            partial: false,
            poisonous: false,
        };
        TileStream::new(threads, walk.keys(&a.k, a.headdim)).copy_async(k);
        TileStream::new(threads, walk.keys(&a.v, a.headdim_v)).copy_async(v);
        copy::commit();
        walk.load();
        walk
    }

    /// The block's rows of a tensor that is shaped like K or V.
    #[inline(always)]
    fn keys(&self, tensor: &Tensor<T>, columns: u32) -> GlobalMatrix<T> {
        let KeyBlock { first_key, head_k, sequence } = self.key_block;
        sequence.key_matrix(tensor, head_k, first_key, columns, self.a.is_aligned::<GENERAL>())
    }

    /// The same, to be said after the walk: they are found anew once `x` is known, and take no registers in it.
    #[inline(always)]
    #[track_caller]
    pub fn keys_anew(&self, tensor: &Tensor<T>, columns: u32, x: u32) -> GlobalMatrix<T> {
        let KeyBlock { first_key, head_k, sequence } = key_block_anew(self.a, BLOCK_N as u32, x);
        sequence.key_matrix(tensor, head_k, first_key, columns, self.a.is_aligned::<GENERAL>())
    }

    /// The blocks of each head. Where there is a mask, they are found anew from what it takes.
    #[inline(always)]
    fn blocks(&self) -> Blocks {
        if !(CAUSAL || GENERAL) {
            return self.blocks;
        }
        let anew = |n| unknown_before(n, self.rows);
        let KeyBlock { first_key, sequence, .. } = self.key_block;
        let mask = Mask::of::<T, CAUSAL, GENERAL>(self.a, &sequence);
        let mask = Mask { seqlen_q: anew(mask.seqlen_q), ..mask };
        mask.query_blocks(anew(first_key), BLOCK_N as u32, BLOCK_M as u32)
    }

    /// Waits for a step; whether there is one more. After the last step it waits too: nothing that a thread has copied is then
    /// read or under way.
    #[inline(always)]
    #[track_caller]
    pub fn wait(&mut self) -> bool {
        self.store_statistics();
        copy::wait::<0>();
        // Without a window to the left all queries from some block on see all keys. Keys that are not there hide nothing: their
        // gradients go nowhere.
        self.partial = match (GENERAL, CAUSAL) {
            (true, _) => self.blocks().is_partial(self.block()),
            (false, true) => self.block() < self.blocks().full_begin,
            (false, false) => false,
        };
        let hides = self.steps > 0 && (self.partial || self.a.may_hide::<GENERAL>());
        self.poisonous = if (CAUSAL || GENERAL) && hides {
            sync_threads_or(self.copied_nonfinite())
        } else {
            sync_threads();
            false
        };
        self.steps > 0
    }

    /// The step that was waited for. Begins to load the one after it: no warp reads the one before any more, whose stage that
    /// takes.
    #[inline(always)]
    #[track_caller]
    pub fn step(&mut self) -> Step<T, HEADDIM, HEADDIM_V, BLOCK_M> {
        let first_of_stage = self.stage() * BLOCK_M as u32;
        let step = Step {
            q: self.q.stage(self.stage()),
            d_o: self.d_o_tile.stage(self.stage()),
            bases: self.bases.offset(first_of_stage),
            sums: self.sums.offset(first_of_stage),
            head: self.head,
            first_row: self.first_row(),
            partial: self.partial,
            poisonous: self.poisonous,
        };
        self.steps -= 1;
        self.statistic += BLOCK_M as u64;
        // Where all queries to the last are seen, that takes no register of its own.
        let is_end = if GENERAL { self.block() + 1 == self.blocks().end } else { self.rows <= BLOCK_M as u32 };
        if !is_end {
            self.rows -= BLOCK_M as u32;
        } else if self.steps > 0 {
            self.go_to_next_head();
        }
        self.load();
        step
    }

    /// From the last block of a head to the first of the next. Seldom, and all is found anew each time.
    #[inline(always)]
    #[track_caller]
    fn go_to_next_head(&mut self) {
        let anew = |x| unknown_before(x, self.rows);
        let seqlen_q = if CAUSAL || GENERAL {
            self.key_block.sequence.seqlen_q
        } else {
            key_block_anew(self.a, BLOCK_N as u32, self.rows).sequence.seqlen_q
        };
        let first_row = self.blocks().begin * BLOCK_M as u32;
        let end = (anew(seqlen_q) - self.rows) + BLOCK_M as u32;
        let rows = end - anew(first_row);
        let way = |tensor: &Tensor<T>| tensor.head_stride.wrapping_sub(rows as u64 * tensor.row_stride);
        self.q_rows.skip(way(&self.a.q));
        self.d_o_rows.skip(way(&self.d_o));
        self.statistic = self.statistic.wrapping_add(self.a.lse_head_stride.wrapping_sub(rows as u64));
        self.rows = seqlen_q - first_row;
        self.head += 1;
    }

    /// Whether what this thread has copied or loaded for the next step is not finite.
    #[inline(always)]
    #[track_caller]
    fn copied_nonfinite(&mut self) -> bool {
        let of_keys = match self.keys_nonfinite {
            Some(nonfinite) => nonfinite,
            None => {
                let (a, threads) = (self.a, self.threads);
                TileStream::new(threads, self.keys(&a.k, a.headdim)).copied_nonfinite(self.k)
                    | TileStream::new(threads, self.keys(&a.v, a.headdim_v)).copied_nonfinite(self.v)
            }
        };
        self.keys_nonfinite = Some(of_keys);
        of_keys
            | self.q_rows.copied_nonfinite(self.q.stage(self.stage()))
            | self.d_o_rows.copied_nonfinite(self.d_o_tile.stage(self.stage()))
            | self.row.0.is_nan()
            | !self.row.1.is_finite()
    }

    /// Starts to load the next step, if there is one.
    #[inline(always)]
    #[track_caller]
    fn load(&mut self) {
        if self.steps == 0 {
            return;
        }
        let (a, sequence) = (self.a, &self.key_block.sequence);
        let stage = self.stage();
        self.q_rows.copy_async_anew(self.q.stage(stage), self.rows, a.headdim);
        self.d_o_rows.copy_async_anew(self.d_o_tile.stage(stage), self.rows, a.headdim_v);
        copy::commit();
        self.row = NO_ROW;
        let thread = self.thread();
        if thread < BLOCK_M as u32 && thread < self.rows {
            let first = if GENERAL {
                let sequence = Sequence { batch: unknown_before(sequence.batch, self.rows), ..*sequence };
                a.first_row(&sequence, self.head) as u64 + self.first_row() as u64
            } else {
                self.statistic
            };
            let at = (first + thread as u64) as usize;
            self.row = (a.softmax_lse.load(at), self.row_sums.load(at));
        }
    }

    #[inline(always)]
    #[track_caller]
    fn store_statistics(&self) {
        let thread = self.thread();
        if thread < BLOCK_M as u32 && self.steps > 0 {
            let at = self.stage() * BLOCK_M as u32 + thread;
            // Not where it is loaded, or the warp would wait for it there.
            self.bases.store(at, exponent_base(self.row.0));
            self.sums.store(at, self.row.1);
        }
    }

    /// Where in shared memory the step that comes next is.
    #[inline(always)]
    fn stage(&self) -> u32 {
        // What follows from it is found anew too: run along, each address would take a register of its own.
        if GENERAL { self.steps % STAGES } else { unknown_before(self.steps, self.rows) % STAGES }
    }

    /// The first row of the step that comes next.
    #[inline(always)]
    fn first_row(&self) -> u32 {
        unknown_before(self.key_block.sequence.seqlen_q, self.rows).wrapping_sub(self.rows)
    }

    /// Its block.
    #[inline(always)]
    fn block(&self) -> u32 {
        self.first_row() / BLOCK_M as u32
    }

    /// This thread, found anew in each step: what follows from it takes no registers from one to the next.
    #[inline(always)]
    fn thread(&self) -> u32 {
        unknown_before(thread_idx_x(), self.rows)
    }
}
