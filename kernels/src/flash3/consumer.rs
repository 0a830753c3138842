//! Who multiplies: the algorithm itself.
use super::GROUP_ROWS;
use super::memory::Memory;
use super::schedule::{Place, Schedule, Tile, Tiles};
use super::splits::Parts;
use crate::attention::Attention;
use crate::mask::{Blocks, Mask};
use crate::online_softmax::OnlineSoftmax;
use crate::row_softmax::RowSoftmax;
use crate::schedule::QueryBlock;
use crate::scores::{Places, Scores};
use crate::spoiled_rows::attend_spoiled_rows;
use cuda_std::Element;
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
    const GENERAL: bool,
> {
    memory: Memory<T, HEADDIM, HEADDIM_V, QUERIES, BLOCK_N, STAGES>,
    group: u32,
    rows: Rows<CAUSAL, FEW, GENERAL>,
    queries: pipeline::Consumer<QUERIES>,
    /// Of the keys; the values are one stage behind.
    keys: pipeline::Consumer<STAGES>,
    /// What the softmax multiplies scores with, for log2 units.
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
    const GENERAL: bool,
> Consumer<T, HEADDIM, HEADDIM_V, GROUPS, QUERIES, BLOCK_N, STAGES, STEPS, S_COLUMNS, O_COLUMNS, CAUSAL, FEW, GENERAL>
{
    const TURN: Turns<1, GROUPS, WARPGROUP> = Turns;

    /// Whether a stage of Q may have the next tile's while this one's is needed; and whether there are stages for all of it.
    const MAY_BE_AHEAD: bool = QUERIES > GROUPS;
    const IS_AHEAD: bool = QUERIES >= 2 * GROUPS;

    /// Before the first tile.
    #[inline(always)]
    #[track_caller]
    pub fn new(
        memory: Memory<T, HEADDIM, HEADDIM_V, QUERIES, BLOCK_N, STAGES>,
        group: u32,
        a: &Attention<T>,
        schedule: Schedule<FEW>,
    ) -> Self {
        if group + 1 == GROUPS {
            Self::TURN.pass(group);
        }
        Consumer {
            memory,
            group,
            rows: Rows { schedule, first: group * GROUP_ROWS, block_n: BLOCK_N as u32 },
            queries: memory.queries.consumer_at(group),
            keys: memory.keys.consumer(),
            scale: Scores::relative_scale::<GENERAL>(a),
            softmax: RowSoftmax::EMPTY,
            p: Registers::zero(),
            o: Accumulator::zero(),
            spoiled: false,
        }
    }

    /// Algorithm 2 for each tile. S of a block of keys is in flight together with the O of the one before it, and S of the
    /// first block of a tile while the rows of the tile before it are stored: if all of its Q has stages of its own.
    #[inline(always)]
    #[track_caller]
    pub fn run(mut self, a: &Attention<T>, parts: &Parts, mut tiles: Tiles<CAUSAL, FEW, GENERAL>) {
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
            while (GENERAL || CAUSAL) && block > begin && (GENERAL || block > full_end) {
                block -= 1;
                self.step(a, &tile, block, true);
            }
            while !GENERAL && block > begin {
                block -= 1;
                self.step(a, &tile, block, false);
            }
            next = self.last(begin - tile.blocks.begin);
            s = if Self::IS_AHEAD {
                match next {
                    Some(next) => {
                        let s = self.first(a, next);
                        self.store(a, parts, place);
                        s.wait()
                    }
                    None => {
                        self.store(a, parts, place);
                        Accumulator::zero()
                    }
                }
            } else {
                self.store(a, parts, place);
                if !Self::MAY_BE_AHEAD {
                    next = self.next();
                }
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
        Place::of_words::<FEW>(words.map(|word: u32| shuffle(ALL, word, 0)))
    }

    /// The tile at a place.
    #[inline(always)]
    #[track_caller]
    fn tile(&self, a: &Attention<T>, place: Place) -> Tile {
        place.tile::<T, CAUSAL, FEW, GENERAL>(a, self.rows.schedule, GROUPS * GROUP_ROWS, BLOCK_N as u32)
    }

    /// S of the last block of keys that this warpgroup's rows of a tile see.
    #[inline(always)]
    #[track_caller]
    fn first(&mut self, a: &Attention<T>, place: Place) -> FirstScores<STAGES, S_COLUMNS> {
        let tile = &self.tile(a, place);
        for _ in self.rows.blocks(a, tile).end..tile.blocks.end {
            self.skip();
        }
        let k = self.keys.wait();
        self.keys.advance();
        Self::TURN.take(self.group);
        let s = self.product_with(k);
        Self::TURN.pass(self.group);
        FirstScores { s, k }
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

    /// O += P V of the last block. The next tile is asked for meanwhile, if its Q has a stage of its own. In a general kernel it is
    /// asked for later: behind this block there may be `unseen` ones, which only other warpgroups' rows see, and more of them
    /// than there are stages, so that V is handed back before them.
    #[inline(always)]
    #[track_caller]
    fn last(&mut self, unseen: u32) -> Option<Place> {
        // Each lane has read where the tile is.
        self.queries.slot().release();
        self.queries.advance_by(GROUPS);
        let v = self.values().wait();
        let o = wgmma::add_product(self.o, self.p, self.memory.v.stage(v.index).columns(0));
        if GENERAL {
            self.o = o.wait::<0>();
            release(v);
            for _ in 0..unseen {
                self.skip();
            }
            return if Self::MAY_BE_AHEAD { self.next() } else { None };
        }
        let next = if Self::MAY_BE_AHEAD { self.next() } else { None };
        self.o = o.wait::<0>();
        release(v);
        next
    }

    /// Writes O and LSE.
    #[inline(always)]
    #[track_caller]
    fn store(&mut self, a: &Attention<T>, parts: &Parts, place: Place) {
        let tile = self.tile(a, place.anew(self.keys.slot().index));
        self.spoiled |= self.rows.store(a, parts, &tile, self.softmax, &mut self.o);
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
struct FirstScores<const STAGES: u32, const N: usize> {
    s: InFlight<N>,
    /// The stage of the keys.
    k: Slot<STAGES>,
}

impl<const STAGES: u32, const N: usize> FirstScores<STAGES, N> {
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
struct Rows<const CAUSAL: bool, const FEW: bool, const GENERAL: bool> {
    schedule: Schedule<FEW>,
    first: u32,
    block_n: u32,
}

impl<const CAUSAL: bool, const FEW: bool, const GENERAL: bool> Rows<CAUSAL, FEW, GENERAL> {
    /// The blocks of keys that they need; one at least. Rows behind the last query need no more.
    #[inline(always)]
    fn blocks<T>(self, a: &Attention<T>, tile: &Tile) -> Blocks {
        let Tile { sequence, blocks, .. } = *tile;
        let first_query = self.schedule.packing.query(tile.first_row + self.first);
        if first_query >= sequence.seqlen_q {
            return Blocks { end: blocks.begin, ..blocks }.or_one();
        }
        if CAUSAL || GENERAL {
            let mask = Mask::of::<T, CAUSAL, GENERAL>(a, &sequence);
            let own = mask.key_blocks(first_query, self.schedule.packing.query(GROUP_ROWS), self.block_n).or_one();
            self.schedule.splits.within(blocks, own)
        } else {
            blocks
        }
    }

    /// Sets the scores of keys that rows do not see to -inf. In a general kernel scores become what the softmax takes for them.
    #[inline(always)]
    #[track_caller]
    fn hide<T: Element, const N: usize>(self, a: &Attention<T>, tile: &Tile, block: u32, s: &mut Accumulator<1, N>) {
        let is_partial = self.blocks(a, tile).is_partial(block);
        let mask = Mask::of::<T, CAUSAL, GENERAL>(a, &tile.sequence);
        let first_key = block * self.block_n;
        if GENERAL && Scores::are_changed(a) {
            let QueryBlock { first_row, head, sequence } = self.of_warp(tile);
            let (scores, packing) = (Scores::new(a, &sequence, head, mask), self.schedule.packing);
            let slope_of = |row| Scores::slope_of(a, &sequence, head + packing.head(row));
            let places = Places {
                query: |row| first_row + packing.query(row),
                slope: |row| if FEW { slope_of(row) } else { scores.slope },
                first_key,
            };
            scores.apply_relative(s, places, is_partial);
        } else if is_partial {
            let first_query = self.of_warp(tile).first_row;
            s.map(|row, key, s| {
                let sees = mask.sees(first_query + self.schedule.packing.query(row), first_key + key);
                if sees { s } else { f32::NEG_INFINITY }
            });
        }
    }

    /// O = diag(l)⁻¹ O and LSE = m + log(l), to global memory; where the tile has a part of the keys, to what
    /// [`combine`](super::combine) takes. Whether a value that these rows do not see may have spoiled them.
    #[inline(always)]
    #[track_caller]
    fn store<T: PackedElement, const O_COLUMNS: usize>(
        self,
        a: &Attention<T>,
        parts: &Parts,
        tile: &Tile,
        softmax: RowSoftmax<1>,
        o: &mut Accumulator<1, O_COLUMNS>,
    ) -> bool {
        let block = self.of_warp(tile);
        let QueryBlock { first_row, head, sequence } = block;
        let Schedule { packing, splits, .. } = self.schedule;
        let lse = if splits.are_divided() { parts.lse_of(tile.split) } else { a.softmax_lse };
        let head_row = a.first_row(&sequence, head);
        let lse = lse.offset(head_row);
        // Of a row whose keys are divided the sink is no part's: it is added where they are combined.
        let has_sink = GENERAL && !splits.are_divided();
        let sink = if has_sink && !FEW { a.sink(head) } else { f32::NEG_INFINITY };
        let sink_of = |m, half| {
            let row = Accumulator::<1, O_COLUMNS>::row(m, half);
            if has_sink && FEW { a.sink(head + packing.head(row)) } else { sink }
        };
        softmax.finish(o, sink_of, |row, state| {
            let (head, query) = (packing.head(row), first_row + packing.query(row));
            // The host packs no more rows than 32 bits count, and so little arithmetic needs no branch.
            let index = head * a.lse_head_stride as u32 + query;
            if lane_id().is_multiple_of(4) && query < sequence.seqlen_q {
                lse.store(index as usize, state.lse());
            }
        });
        if splits.are_divided() {
            let first = head_row + first_row as usize;
            let o_of = parts.o_of(tile.split, a.headdim_v).offset(first * a.headdim_v as usize);
            o.store_f32_rows_at(o_of, a.headdim_v, |row| {
                let (head, query) = (packing.head(row) as u64, packing.query(row));
                ((head * a.lse_head_stride + query as u64) * a.headdim_v as u64, query < block.rows())
            });
            return false;
        }
        let first = sequence.queries(&a.o, head, first_row);
        o.store_rows_at(first, a.headdim_v, |row| {
            let (head, query) = (packing.head(row) as u64, packing.query(row));
            (head * a.o.head_stride + query as u64 * a.o.row_stride, query < block.rows())
        });
        // Where all keys are seen, and what lies behind them is loaded as zeros, nothing spoils a row.
        (CAUSAL || GENERAL || !a.cu_seqlens_k.is_null()) && any(ALL, !o.is_finite())
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
        let (mask, scale) = (Mask::of::<T, CAUSAL, GENERAL>(a, &first.sequence), a.softmax_scale * LOG2_E);
        let (heads, queries) = (self.schedule.packing.heads().min(16), self.schedule.packing.query(16).max(1));
        for head in 0..heads {
            let block = QueryBlock { head: first.head + head, ..first };
            let o_rows = block.sequence.query_matrix(&a.o, block.head, block.first_row, a.headdim_v, true);
            let scores = if GENERAL { Some(Scores::new(a, &block.sequence, block.head, mask)) } else { None };
            let weight = |row, key, q_k: f32, softmax: OnlineSoftmax| match &scores {
                Some(scores) => scores.sees(row, key).then(|| softmax.weight(scores.score(row, key, q_k))),
                None => Some(softmax.weight(q_k * scale)),
            };
            attend_spoiled_rows::<T, HEADDIM, HEADDIM_V>(a, &block, mask, true, o_rows, 0..queries, weight);
        }
    }

    /// The query and the head of the first row of this warp, which has 16. A pack begins with the first, or has more heads
    /// than that: row r is [`head`](Packing::head) r heads and [`query`](Packing::query) r queries further on.
    #[inline(always)]
    fn of_warp(self, tile: &Tile) -> QueryBlock {
        let Tile { first_row, pack, sequence, .. } = *tile;
        let row = first_row + self.first + 16 * warp_in_group();
        let head = self.schedule.packing.first_head(pack) + self.schedule.packing.head(row);
        QueryBlock { first_row: self.schedule.packing.query(row), head, sequence }
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
