//! Who multiplies: the algorithm itself.
use super::GROUP_ROWS;
use super::memory::Memory;
use super::packing::Packing;
use super::schedule::{Place, Tile, Tiles};
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
use cuda_std::warp::{ALL, any, shuffle};
use cuda_std::warpgroup::{WARPGROUP, warp_in_group};
use cuda_std::wgmma::{self, InFlight, Registers};

/// A warpgroup of consumers, and what it has of its rows of a tile.
pub struct Consumer<
    T: PackedElement,
    const HEADDIM: usize,
    const HEADDIM_V: usize,
    const GROUPS: u32,
    const QUERIES: u32,
    const BLOCK_N: usize,
    const STAGES: u32,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const O_COLUMNS: usize,
    const CAUSAL: bool,
    const FEW: bool,
> {
    memory: Memory<T, HEADDIM, HEADDIM_V, QUERIES, BLOCK_N, STAGES>,
    group: u32,
    rows: Rows<CAUSAL, FEW>,
    queries: pipeline::Consumer<QUERIES>,
    /// Of the keys; the values are one stage behind.
    keys: pipeline::Consumer<STAGES>,
    /// The softmax scale in log2 units.
    scale: f32,
    softmax: RowSoftmax<1>,
    p: Registers<T, STEPS>,
    o: Accumulator<1, O_COLUMNS>,
    /// Whether rows of this warp, of any tile so far, are not finite, which what they do not see may have done.
    spoiled: bool,
}

impl<
    T: PackedElement,
    const HEADDIM: usize,
    const HEADDIM_V: usize,
    const GROUPS: u32,
    const QUERIES: u32,
    const BLOCK_N: usize,
    const STAGES: u32,
    const STEPS: usize,
    const S_COLUMNS: usize,
    const O_COLUMNS: usize,
    const CAUSAL: bool,
    const FEW: bool,
> Consumer<T, HEADDIM, HEADDIM_V, GROUPS, QUERIES, BLOCK_N, STAGES, STEPS, S_COLUMNS, O_COLUMNS, CAUSAL, FEW>
{
    const TURN: Turns<1, GROUPS, WARPGROUP> = Turns;

    /// Before the first tile.
    #[inline(always)]
    #[track_caller]
    pub fn new(
        memory: Memory<T, HEADDIM, HEADDIM_V, QUERIES, BLOCK_N, STAGES>,
        group: u32,
        softmax_scale: f32,
        packing: Packing<FEW>,
    ) -> Self {
        if group + 1 == GROUPS {
            Self::TURN.pass(group);
        }
        Consumer {
            memory,
            group,
            rows: Rows { packing, first: group * GROUP_ROWS, block_n: BLOCK_N as u32 },
            queries: memory.queries.consumer_at(group),
            keys: memory.keys.consumer(),
            scale: softmax_scale * LOG2_E,
            softmax: RowSoftmax::EMPTY,
            p: Registers::zero(),
            o: Accumulator::zero(),
            spoiled: false,
        }
    }

    /// Algorithm 2 for each tile. S of a block of keys is in flight together with the O of the one before it, and S of the
    /// first block of a tile while the rows of the tile before it are stored: if their Q has a stage of its own.
    #[inline(always)]
    #[track_caller]
    pub fn run(mut self, a: &Attention<T>, mut tiles: Tiles<CAUSAL, FEW>) {
        let mut next = self.next();
        let mut s = match next {
            Some(place) => self.first(a, place).wait(),
            None => Accumulator::zero(),
        };
        while let Some(place) = next {
            (self.softmax, self.o) = (RowSoftmax::EMPTY, Accumulator::zero());
            let tile = self.tile(a, place);
            let Blocks { begin, full_end, end, .. } = self.rows.blocks(a, &tile);
            let mut block = end - 1;
            self.rows.hide(a, &tile, block, &mut s);
            self.softmax.take_lazily(&mut s, self.scale);
            self.p = Registers::of(&s);
            while CAUSAL && block > begin && block > full_end {
                block -= 1;
                self.step(a, &tile, block, true);
            }
            while block > begin {
                block -= 1;
                self.step(a, &tile, block, false);
            }
            next = self.last();
            s = if const { QUERIES > GROUPS } {
                match next {
                    Some(next) => {
                        let s = self.first(a, next);
                        self.store(a, place);
                        s.wait()
                    }
                    None => {
                        self.store(a, place);
                        Accumulator::zero()
                    }
                }
            } else {
                self.store(a, place);
                next = self.next();
                match next {
                    Some(next) => self.first(a, next).wait(),
                    None => Accumulator::zero(),
                }
            };
        }
        if self.group == 0 {
            Self::TURN.take(self.group);
        }
        if self.spoiled {
            while let Some(place) = tiles.next(a) {
                let tile = self.tile(a, place);
                self.rows.attend_spoiled::<T, HEADDIM, HEADDIM_V>(a, &tile);
            }
        }
    }

    /// Waits for Q of the next tile, if there is one.
    #[inline(always)]
    #[track_caller]
    fn next(&mut self) -> Option<Place> {
        let words = self.memory.places.load_vector(4 * self.queries.wait().index);
        // All lanes have read the same; from a shuffle the compiler knows it, and what follows takes no register a lane.
        Place::of_words(words.map(|word: u32| shuffle(ALL, word, 0)))
    }

    /// The tile at a place.
    #[inline(always)]
    #[track_caller]
    fn tile(&self, a: &Attention<T>, place: Place) -> Tile {
        place.tile::<T, CAUSAL, FEW>(a, self.rows.packing, GROUPS * GROUP_ROWS, BLOCK_N as u32)
    }

    /// S of the last block of keys that this warpgroup's rows of a tile see.
    #[inline(always)]
    #[track_caller]
    fn first(&mut self, a: &Attention<T>, place: Place) -> Scores<STAGES, S_COLUMNS> {
        let tile = &self.tile(a, place);
        for _ in self.rows.blocks(a, tile).end..tile.blocks.end {
            self.skip();
        }
        let k = self.keys.wait();
        self.keys.advance();
        Self::TURN.take(self.group);
        let s = self.product_with(k);
        Self::TURN.pass(self.group);
        Scores { s, k }
    }

    /// Hands back a block of keys that only other warpgroups' rows see.
    #[inline(always)]
    #[track_caller]
    fn skip(&mut self) {
        release(self.keys.wait());
        self.keys.advance();
        Self::TURN.take(self.group);
        Self::TURN.pass(self.group);
        release(self.values().wait());
    }

    /// O += P V of the block before, and P of this one.
    #[inline(always)]
    #[track_caller]
    fn step(&mut self, a: &Attention<T>, tile: &Tile, block: u32, is_partial: bool) {
        let values = self.values();
        let k = self.keys.wait();
        self.keys.advance();
        Self::TURN.take(self.group);
        let s = self.product_with(k);
        let v = values.wait();
        let o = wgmma::add_product(self.o, self.p, self.memory.v.stage(v.index).columns(0));
        Self::TURN.pass(self.group);
        let mut s = s.wait::<1>();
        release(k);
        if is_partial {
            self.rows.hide(a, tile, block, &mut s);
        }
        let rescale = self.softmax.raise_lazily(&s, self.scale);
        // The exponentials stay behind this wait: they fall under the products of the other warpgroups.
        self.o = o.wait::<0>();
        wgmma::pin(&mut s);
        release(v);
        self.softmax.weigh(&mut s, self.scale);
        self.p = Registers::of(&s);
        rescale.apply_if_any(&mut self.o);
    }

    /// O += P V of the last block. The next tile is asked for meanwhile, if its Q has a stage of its own.
    #[inline(always)]
    #[track_caller]
    fn last(&mut self) -> Option<Place> {
        release(self.queries.slot());
        self.queries.advance_by(GROUPS);
        let v = self.values().wait();
        let o = wgmma::add_product(self.o, self.p, self.memory.v.stage(v.index).columns(0));
        let next = if const { QUERIES > GROUPS } { self.next() } else { None };
        self.o = o.wait::<0>();
        release(v);
        next
    }

    /// Writes O and LSE.
    #[inline(always)]
    #[track_caller]
    fn store(&mut self, a: &Attention<T>, place: Place) {
        let tile = self.tile(a, place.anew(self.keys.slot().index));
        self.spoiled |= self.rows.store(a, &tile, self.softmax, &mut self.o);
    }

    /// Where this is in the pipeline of values.
    #[inline(always)]
    fn values(&self) -> pipeline::Consumer<STAGES> {
        self.keys.behind(self.memory.values)
    }

    /// S = Q Kᵀ, in flight.
    #[inline(always)]
    #[track_caller]
    fn product_with(&self, k: Slot<STAGES>) -> InFlight<S_COLUMNS> {
        wgmma::product(self.memory.q.stage(self.queries.slot().index).rows(0), self.memory.k.stage(k.index).rows(0))
    }
}

/// S of a block of keys, in flight.
struct Scores<const STAGES: u32, const N: usize> {
    s: InFlight<N>,
    /// The stage of the keys.
    k: Slot<STAGES>,
}

impl<const STAGES: u32, const N: usize> Scores<STAGES, N> {
    /// Waits for it. The keys are needed no more.
    #[inline(always)]
    #[track_caller]
    fn wait(self) -> Accumulator<1, N> {
        let s = self.s.wait::<0>();
        release(self.k);
        s
    }
}

/// The rows of a tile that a consumer warpgroup has, from `first` on.
#[derive(Clone, Copy)]
struct Rows<const CAUSAL: bool, const FEW: bool> {
    packing: Packing<FEW>,
    first: u32,
    block_n: u32,
}

impl<const CAUSAL: bool, const FEW: bool> Rows<CAUSAL, FEW> {
    /// The blocks of keys that they need; one at least. Rows behind the last query need no more.
    #[inline(always)]
    fn blocks<T>(self, a: &Attention<T>, tile: &Tile) -> Blocks {
        let Tile { sequence, blocks, .. } = *tile;
        let first_query = self.packing.query(tile.first_row + self.first);
        if first_query >= sequence.seqlen_q {
            return Blocks { end: blocks.begin, ..blocks }.or_one();
        }
        if CAUSAL {
            let mask = Mask::of::<T, CAUSAL, false>(a, &sequence);
            mask.key_blocks(first_query, self.packing.query(GROUP_ROWS), self.block_n).or_one()
        } else {
            blocks
        }
    }

    /// Sets the scores of keys that rows do not see to -inf.
    #[inline(always)]
    #[track_caller]
    fn hide<T, const N: usize>(self, a: &Attention<T>, tile: &Tile, block: u32, s: &mut Accumulator<1, N>) {
        if self.blocks(a, tile).is_partial(block) {
            let mask = Mask::of::<T, CAUSAL, false>(a, &tile.sequence);
            let (first_query, first_key) = (self.of_warp(tile).first_row, block * self.block_n);
            s.map(|row, key, s| {
                let sees = mask.sees(first_query + self.packing.query(row), first_key + key);
                if sees { s } else { f32::NEG_INFINITY }
            });
        }
    }

    /// O = diag(l)⁻¹ O and LSE = m + log(l), to global memory. Whether a value that these rows do not see may have spoiled
    /// them.
    #[inline(always)]
    #[track_caller]
    fn store<T: PackedElement, const O_COLUMNS: usize>(
        self,
        a: &Attention<T>,
        tile: &Tile,
        softmax: RowSoftmax<1>,
        o: &mut Accumulator<1, O_COLUMNS>,
    ) -> bool {
        let block = self.of_warp(tile);
        let QueryBlock { first_row, head, sequence } = block;
        let lse = a.softmax_lse.offset(a.first_row(&sequence, head));
        softmax.finish(o, f32::NEG_INFINITY, |row, state| {
            let (head, query) = (self.packing.head(row), first_row + self.packing.query(row));
            // The host packs no more rows than 32 bits count, and so little arithmetic needs no branch.
            let index = head * a.lse_head_stride as u32 + query;
            if lane_id().is_multiple_of(4) && query < sequence.seqlen_q {
                lse.store(index as usize, state.lse());
            }
        });
        let first = sequence.queries(&a.o, head, first_row);
        o.store_rows_at(first, a.headdim_v, |row| {
            let (head, query) = (self.packing.head(row) as u64, self.packing.query(row));
            (head * a.o.head_stride + query as u64 * a.o.row_stride, query < block.rows())
        });
        // Where all keys are seen, and what lies behind them is loaded as zeros, nothing spoils a row.
        (CAUSAL || !a.cu_seqlens_k.is_null()) && any(ALL, !o.is_finite())
    }

    /// Computes again which of these rows, stored, are not finite.
    #[inline(always)]
    #[track_caller]
    fn attend_spoiled<T: PackedElement, const HEADDIM: usize, const HEADDIM_V: usize>(
        self,
        a: &Attention<T>,
        tile: &Tile,
    ) {
        let first = self.of_warp(tile);
        let (mask, scale) = (Mask::of::<T, CAUSAL, false>(a, &first.sequence), a.softmax_scale * LOG2_E);
        let (heads, queries) = (self.packing.heads().min(16), self.packing.query(16).max(1));
        for head in 0..heads {
            let block = QueryBlock { head: first.head + head, ..first };
            let o_rows = block.sequence.query_matrix(&a.o, block.head, block.first_row, a.headdim_v, true);
            let weight = |_, _, q_k: f32, softmax: OnlineSoftmax| Some(softmax.weight(q_k * scale));
            attend_spoiled_rows::<T, HEADDIM, HEADDIM_V>(a, &block, mask, true, o_rows, 0..queries, weight);
        }
    }

    /// The query and the head of the first row of this warp, which has 16. A pack begins with the first, or has more heads
    /// than that: row r is [`head`](Packing::head) r heads and [`query`](Packing::query) r queries further on.
    #[inline(always)]
    fn of_warp(self, tile: &Tile) -> QueryBlock {
        let Tile { first_row, pack, sequence, .. } = *tile;
        let row = first_row + self.first + 16 * warp_in_group();
        let head = self.packing.first_head(pack) + self.packing.head(row);
        QueryBlock { first_row: self.packing.query(row), head, sequence }
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
