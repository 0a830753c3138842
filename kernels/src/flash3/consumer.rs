//! Who multiplies: the algorithm itself.
use super::GROUP_ROWS;
use super::memory::Memory;
use super::schedule::{Tile, Tiles};
use crate::attention::Attention;
use crate::mask::{Blocks, Mask};
use crate::online_softmax::OnlineSoftmax;
use crate::row_softmax::RowSoftmax;
use crate::schedule::QueryBlock;
use crate::spoiled_rows::attend_spoiled_rows;
use cuda_std::barrier::Turns;
use cuda_std::fragment::Accumulator;
use cuda_std::math::LOG2_E;
use cuda_std::matrix::PackedElement;
use cuda_std::pipeline::{self, Slot};
use cuda_std::thread::lane_id;
use cuda_std::warp::{ALL, any};
use cuda_std::warpgroup::{WARPGROUP, warp_in_group};
use cuda_std::wgmma::{self, InFlight, Registers};

/// A warpgroup of consumers, and what it has of its rows of a tile.
pub struct Consumer<
    T: PackedElement,
    const HEADDIM: usize,
    const HEADDIM_V: usize,
    const GROUPS: u32,
    const BLOCK_N: usize,
    const STAGES: u32,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const O_COLUMNS: usize,
    const CAUSAL: bool,
> {
    memory: Memory<T, HEADDIM, HEADDIM_V, GROUPS, BLOCK_N, STAGES>,
    group: u32,
    rows: Rows<CAUSAL>,
    queries: pipeline::Consumer<GROUPS>,
    keys: pipeline::Consumer<STAGES>,
    values: pipeline::Consumer<STAGES>,
    /// The softmax scale in log2 units.
    scale: f32,
    softmax: RowSoftmax<1>,
    p: Registers<T, STEPS>,
    o: Accumulator<1, O_COLUMNS>,
}

impl<
    T: PackedElement,
    const HEADDIM: usize,
    const HEADDIM_V: usize,
    const GROUPS: u32,
    const BLOCK_N: usize,
    const STAGES: u32,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const O_COLUMNS: usize,
    const CAUSAL: bool,
> Consumer<T, HEADDIM, HEADDIM_V, GROUPS, BLOCK_N, STAGES, STEPS, S_COLUMNS, O_COLUMNS, CAUSAL>
{
    const TURN: Turns<1, GROUPS, WARPGROUP> = Turns;

    /// Before the first tile.
    #[inline(always)]
    #[track_caller]
    pub fn new(memory: Memory<T, HEADDIM, HEADDIM_V, GROUPS, BLOCK_N, STAGES>, group: u32, softmax_scale: f32) -> Self {
        if group + 1 == GROUPS {
            Self::TURN.pass(group);
        }
        Consumer {
            memory,
            group,
            rows: Rows { first: group * GROUP_ROWS, block_n: BLOCK_N as u32 },
            queries: memory.queries.consumer_at(group),
            keys: memory.keys.consumer(),
            values: memory.values.consumer(),
            scale: softmax_scale * LOG2_E,
            softmax: RowSoftmax::EMPTY,
            p: Registers::zero(),
            o: Accumulator::zero(),
        }
    }

    /// Algorithm 2 for each tile. S of a block of keys is in flight together with the O of the one before it.
    #[inline(always)]
    #[track_caller]
    pub fn run(mut self, a: &Attention<T>, mut tiles: Tiles<CAUSAL>) {
        let mut next = tiles.next(a);
        while let Some(tile) = next {
            (self.softmax, self.o) = (RowSoftmax::EMPTY, Accumulator::zero());
            let Blocks { begin, full_end, end, .. } = tile.blocks;
            if begin < end {
                let mut block = end - 1;
                self.first(a, &tile, block);
                while CAUSAL && block > begin && block > full_end {
                    block -= 1;
                    self.step(a, &tile, block, true);
                }
                while block > begin {
                    block -= 1;
                    self.step(a, &tile, block, false);
                }
                next = self.last(a, &mut tiles);
            } else {
                next = tiles.next(a);
            }
            self.rows.store::<T, HEADDIM, HEADDIM_V, O_COLUMNS>(a, &tile, self.softmax, &mut self.o);
        }
        if self.group == 0 {
            Self::TURN.take(self.group);
        }
    }

    /// P of the first block.
    #[inline(always)]
    #[track_caller]
    fn first(&mut self, a: &Attention<T>, tile: &Tile, block: u32) {
        self.queries.wait();
        let k = self.keys.wait();
        self.keys.advance();
        Self::TURN.take(self.group);
        let s = self.product_with(k);
        Self::TURN.pass(self.group);
        let mut s = s.wait::<0>();
        release(k);
        self.rows.hide(a, tile, block, &mut s);
        self.softmax.take_lazily(&mut s, self.scale);
        self.p = Registers::of(&s);
    }

    /// O += P V of the block before, and P of this one.
    #[inline(always)]
    #[track_caller]
    fn step(&mut self, a: &Attention<T>, tile: &Tile, block: u32, is_partial: bool) {
        let k = self.keys.wait();
        self.keys.advance();
        Self::TURN.take(self.group);
        let s = self.product_with(k);
        let v = self.values.wait();
        let o = wgmma::add_product(self.o, self.p, self.memory.v.stage(v.index).columns(0));
        Self::TURN.pass(self.group);
        let mut s = s.wait::<1>();
        release(k);
        if is_partial {
            self.rows.hide(a, tile, block, &mut s);
        }
        let rescale = self.softmax.take_lazily(&mut s, self.scale);
        // The exponentials and their sums stay before the wait: the assembler moves it up to the next barrier, and sums
        // down below it. This is a barrier, and needs the sums.
        wgmma::pin(&mut s);
        self.values.wait_once(self.softmax.sums());
        self.values.advance();
        self.o = o.wait::<0>();
        wgmma::pin(&mut s);
        release(v);
        self.p = Registers::of(&s);
        rescale.apply_if_any(&mut self.o);
    }

    /// O += P V of the last block. The next tile is looked up meanwhile.
    #[inline(always)]
    #[track_caller]
    fn last(&mut self, a: &Attention<T>, tiles: &mut Tiles<CAUSAL>) -> Option<Tile> {
        release(self.queries.slot());
        self.queries.next_round();
        let v = self.values.wait();
        self.values.advance();
        let o = wgmma::add_product(self.o, self.p, self.memory.v.stage(v.index).columns(0));
        let next = tiles.next(a);
        self.o = o.wait::<0>();
        release(v);
        next
    }

    /// S = Q Kᵀ, in flight.
    #[inline(always)]
    #[track_caller]
    fn product_with(&self, k: Slot<STAGES>) -> InFlight<S_COLUMNS> {
        wgmma::product(self.memory.q.stage(self.group).rows(0), self.memory.k.stage(k.index).rows(0))
    }
}

/// The rows of a tile that a consumer warpgroup has, from `first` on.
#[derive(Clone, Copy)]
struct Rows<const CAUSAL: bool> {
    first: u32,
    block_n: u32,
}

impl<const CAUSAL: bool> Rows<CAUSAL> {
    /// Sets the scores of keys that rows do not see to -inf.
    #[inline(always)]
    #[track_caller]
    fn hide<T, const N: usize>(self, a: &Attention<T>, tile: &Tile, block: u32, s: &mut Accumulator<1, N>) {
        let mask = Mask::of::<T, CAUSAL, false>(a, &tile.sequence);
        let first_row = tile.first_row + self.first;
        if mask.key_blocks(first_row, GROUP_ROWS, self.block_n).is_partial(block) {
            mask.apply(s, first_row + 16 * warp_in_group(), block * self.block_n);
        }
    }

    /// O = diag(l)⁻¹ O and LSE = m + log(l), to global memory.
    #[inline(always)]
    #[track_caller]
    fn store<T: PackedElement, const HEADDIM: usize, const HEADDIM_V: usize, const O_COLUMNS: usize>(
        self,
        a: &Attention<T>,
        tile: &Tile,
        softmax: RowSoftmax<1>,
        o: &mut Accumulator<1, O_COLUMNS>,
    ) {
        let Tile { head, sequence, .. } = *tile;
        let first_row = tile.first_row + self.first + 16 * warp_in_group();
        let lse = a.softmax_lse.offset(a.first_row(&sequence, head));
        softmax.finish(o, f32::NEG_INFINITY, |row, state| {
            let row = first_row + row;
            if lane_id().is_multiple_of(4) && row < sequence.seqlen_q {
                lse.store(row as usize, state.lse());
            }
        });
        let o_rows = sequence.query_matrix(&a.o, head, first_row, a.headdim_v, true);
        o.store_rows(o_rows);
        // Where all keys are seen, and what lies behind them is loaded as zeros, nothing spoils a row.
        if (CAUSAL || !a.cu_seqlens_k.is_null()) && any(ALL, !o.is_finite()) {
            let (block, scale) = (QueryBlock { first_row, head, sequence }, a.softmax_scale * LOG2_E);
            let mask = Mask::of::<T, CAUSAL, false>(a, &sequence);
            let weight = |_, _, q_k: f32, softmax: OnlineSoftmax| Some(softmax.weight(q_k * scale));
            attend_spoiled_rows::<T, HEADDIM, HEADDIM_V>(a, &block, mask, true, o_rows, 0..16, weight);
        }
    }
}

/// This warp needs a stage no more.
#[inline(always)]
#[track_caller]
fn release<const STAGES: u32>(slot: Slot<STAGES>) {
    if lane_id() == 0 {
        slot.release();
    }
}
