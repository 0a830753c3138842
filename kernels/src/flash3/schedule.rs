//! Which tiles of queries a persistent block of threads takes, and in which order.
//!
//! Walkers, blocks of threads, are dealt [units](super::units) of work until there are none: all end together, but for a unit.
//! Where some units are shorter than others they are dealt there and back, from the first walker to the last and from the last to
//! the first, so that nobody gets the short ones time and again; where all are alike always from the first walker on, so that
//! each does the same tiles of every head: 4 % faster at 512 tokens, causal, headdim 128. Where units are long, a unit is much:
//! there the last heads are left to blocks that take one tile each, the longest first, and that the GPU starts as walkers end.
//! Where sequences differ in length, the longest come first ([`Order`]). Where not all walkers would have a unit of the last turn its
//! tiles are dealt out one by one, the longest first: all have some, and end with a short one.
//!
//! What runs at the same time is of few heads, whose K and V stay in the L2 cache.
use super::order::Order;
use super::packing::Packing;
use super::splits::Splits;
use super::units::{dealt, tiles_of_pack, units_of_pack};
use crate::attention::{Attention, Sequence, divisor};
use crate::mask::{Blocks, Mask};
use crate::schedule::head_of;
use cuda_std::math::unknown_before;
use cuda_std::thread::{block_idx_x, grid_dim_x};

/// Where a tile of queries is: what a block of threads needs to know of it, and the rest follows from.
#[derive(Clone, Copy)]
pub struct Place {
    /// Its first row.
    pub first_row: u32,
    /// The pack of heads of Q and O.
    pub pack: u32,
    /// The sequence.
    pub batch: u32,
    /// Which part of the keys.
    pub split: u32,
}

/// A tile of queries, rows of one pack of heads of one sequence, and the blocks of keys that they see.
#[derive(Clone, Copy)]
pub struct Tile {
    /// Its first row.
    pub first_row: u32,
    /// The pack of heads of Q and O.
    pub pack: u32,
    /// The sequence.
    pub sequence: Sequence,
    /// Which part of the keys that its rows see it has.
    pub split: u32,
    /// The blocks of keys.
    pub blocks: Blocks,
}

/// The blocks of keys that a tile of `block_m` rows from `first_row` on needs. If they see no key, it has one of `block_n`
/// nevertheless, which they do not see.
#[inline(always)]
pub fn key_blocks<const FEW: bool>(
    mask: Mask,
    packing: Packing<FEW>,
    first_row: u32,
    block_m: u32,
    block_n: u32,
) -> Blocks {
    mask.key_blocks(packing.query(first_row), packing.query(block_m), block_n).or_one()
}

impl Place {
    /// Nowhere, in [`words`](Self::of_words).
    pub const NOWHERE: [u32; 4] = [u32::MAX; 4];

    /// As words.
    #[inline(always)]
    pub fn words(self) -> [u32; 4] {
        [self.first_row, self.pack, self.batch, self.split]
    }

    /// The place of these words, if they are one's.
    #[inline(always)]
    pub fn of_words<const FEW: bool>([first_row, pack, batch, split]: [u32; 4]) -> Option<Self> {
        let split = if FEW { split } else { 0 };
        (batch != u32::MAX).then_some(Place { first_row, pack, batch, split })
    }

    /// The same, but what follows from it is found anew once `x` is known, and takes no registers until then.
    #[inline(always)]
    pub fn anew(self, x: u32) -> Self {
        Place { batch: unknown_before(self.batch, x), first_row: unknown_before(self.first_row, x), ..self }
    }

    /// The tile of `block_m` rows that is there, with its part of their [`key_blocks`].
    #[inline(always)]
    #[track_caller]
    pub fn tile<T, const CAUSAL: bool, const FEW: bool, const GENERAL: bool>(
        self,
        a: &Attention<T>,
        schedule: Schedule<FEW>,
        block_m: u32,
        block_n: u32,
    ) -> Tile {
        let Place { first_row, pack, batch, split } = self;
        let sequence = a.sequence(batch);
        let mask = Mask::of::<T, CAUSAL, GENERAL>(a, &sequence);
        let blocks = key_blocks(mask, schedule.packing, first_row, block_m, block_n);
        Tile { first_row, pack, sequence, split, blocks: schedule.splits.part(blocks, split) }
    }
}

/// Who does what: part of a kernel's parameters. Tiles of packs that are not walked are left to blocks of threads of their own, behind
/// the walkers; if the grid has none, to the walkers, at their end. Without `FEW` as kernels know it that are not for few queries.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Schedule<const FEW: bool = true> {
    /// Blocks of threads that take units: the first of the grid. Each of the others, if there are any, takes a tile.
    pub walkers: u32,
    /// The packs of heads, counted over all batches, that the walkers do: the first ones.
    pub walked_packs: u32,
    /// Which heads of Q are packed.
    pub packing: Packing<FEW>,
    /// 1 if a unit is two tiles, else 0. Only under a causal mask, or another window, it may be.
    pub paired: u32,
    /// Into how many parts keys are divided, each of which is a unit of its own. Divided, nothing is paired, and walkers do all.
    pub splits: Splits<FEW>,
}

impl Schedule {
    /// As a kernel knows it.
    #[inline(always)]
    pub fn known<const FEW: bool>(self) -> Schedule<FEW> {
        let Schedule { walkers, walked_packs, packing, paired, splits } = self;
        Schedule { walkers, walked_packs, packing: packing.known(), paired, splits: splits.known() }
    }
}

impl<const FEW: bool> Schedule<FEW> {
    /// Whether a unit is two tiles.
    #[inline(always)]
    pub fn is_paired<const CAUSAL: bool, const GENERAL: bool>(&self) -> bool {
        (CAUSAL || GENERAL) && (!(FEW || GENERAL) || self.paired != 0)
    }

    /// How many units the tiles of a pack make.
    #[inline(always)]
    pub fn units_of_pack<const CAUSAL: bool, const GENERAL: bool>(&self, tiles: u32) -> u32 {
        units_of_pack(tiles, self.is_paired::<CAUSAL, GENERAL>()) * self.splits.count()
    }
}

/// The tiles of a block of threads.
#[derive(Clone, Copy)]
pub struct Tiles<const CAUSAL: bool, const FEW: bool, const GENERAL: bool> {
    schedule: Schedule<FEW>,
    order: Order,
    /// Which tile of its units comes next, as many a unit as may be.
    next: u32,
    /// The place in the order of the sequence that its last unit was of.
    rank: u32,
    /// How many tiles it has been dealt one by one.
    singles: u32,
    block_m: u32,
    block_n: u32,
}

impl<const CAUSAL: bool, const FEW: bool, const GENERAL: bool> Tiles<CAUSAL, FEW, GENERAL> {
    /// Those of this block of threads. A tile has `block_m` rows, a block of keys `block_n`. The order is that of sequences of
    /// different lengths; others need none.
    #[inline(always)]
    pub fn new(schedule: Schedule<FEW>, order: Order, block_m: u32, block_n: u32) -> Self {
        Tiles { schedule, order, next: 0, rank: 0, singles: 0, block_m, block_n }
    }

    /// The tile at a place.
    #[inline(always)]
    #[track_caller]
    pub fn tile<T>(&self, a: &Attention<T>, place: Place) -> Tile {
        place.tile::<T, CAUSAL, FEW, GENERAL>(a, self.schedule, self.block_m, self.block_n)
    }

    /// Which heads of Q are packed.
    #[inline(always)]
    pub fn packing(&self) -> Packing<FEW> {
        self.schedule.packing
    }

    /// Where the next tile is.
    #[inline(always)]
    #[track_caller]
    pub fn next<T>(&mut self, a: &Attention<T>) -> Option<Place> {
        loop {
            let next = if block_idx_x() < self.schedule.walkers { self.walk(a) } else { self.only(a) };
            if !FEW || next.is_none_or(|place| self.is_there(a, place)) {
                return next;
            }
        }
    }

    /// Whether the keys of a tile have that part: of few blocks each is one.
    #[inline(always)]
    #[track_caller]
    fn is_there<T>(&self, a: &Attention<T>, Place { first_row, batch, split, .. }: Place) -> bool {
        if split == 0 {
            return true;
        }
        let Schedule { packing, splits, .. } = self.schedule;
        let mask = Mask::of::<T, CAUSAL, GENERAL>(a, &a.sequence(batch));
        split < splits.of(key_blocks(mask, packing, first_row, self.block_m, self.block_n))
    }

    /// The next tile of a walker.
    #[inline(always)]
    #[track_caller]
    fn walk<T>(&mut self, a: &Attention<T>) -> Option<Place> {
        let (seqlen_q, batch) = (self.anew(a.seqlen_q), self.anew(a.batch));
        let Schedule { packing, splits, .. } = self.schedule;
        let is_paired = self.schedule.is_paired::<CAUSAL, GENERAL>();
        let turn = if is_paired { self.next / 2 } else { self.next };
        let is_second = is_paired && self.next % 2 == 1;
        let (tiles, pack, index, sequence);
        if a.cu_seqlens_q.is_null() {
            tiles = tiles_of_pack(packing.rows(seqlen_q), self.block_m);
            let unit = self.dealt(turn, FEW || GENERAL || is_paired && tiles % 2 == 1);
            let units = divisor(self.schedule.units_of_pack::<CAUSAL, GENERAL>(tiles));
            if unit / units >= self.schedule.walked_packs {
                return if is_paired && !FEW { self.rest(a) } else { None };
            }
            index = unit % units;
            (pack, sequence) = head_of(unit / units, self.anew(packing.packs(a.nheads)));
        } else {
            let unit = self.dealt(turn, true);
            let first;
            (sequence, first) = self.order.sequence_of(unit, batch, &mut self.rank)?;
            tiles = tiles_of_pack(packing.rows(a.sequence(sequence).seqlen_q), self.block_m);
            let units = divisor(self.schedule.units_of_pack::<CAUSAL, GENERAL>(tiles));
            (pack, index) = ((unit - first) / units, (unit - first) % units);
        }
        let (index, split) = (index / divisor(splits.count()), index % divisor(splits.count()));
        // The last rows first. Of a unit that is the tile in the middle there is no second one.
        let from_end = tiles - 1 - index;
        self.next += if is_paired && !is_second && from_end == index { 2 } else { 1 };
        Some(Place { first_row: self.block_m * if is_second { index } else { from_end }, pack, batch: sequence, split })
    }

    /// What follows from `x` is found anew for each tile, and takes no register of the few that a producer has.
    #[inline(always)]
    fn anew(&self, x: u32) -> u32 {
        unknown_before(x, self.next)
    }

    /// What a walker is [`dealt`] in a turn.
    #[inline(always)]
    fn dealt(&self, turn: u32, back: bool) -> u32 {
        dealt(turn, self.anew(block_idx_x()), self.schedule.walkers, back)
    }

    /// The next of the tiles that a walker is dealt once it has no more units: where no other blocks take what is left.
    #[inline(always)]
    #[track_caller]
    fn rest<T>(&mut self, a: &Attention<T>) -> Option<Place> {
        if self.anew(grid_dim_x()) > self.schedule.walkers {
            return None;
        }
        let tile = self.dealt(self.singles, true);
        self.singles += 1;
        self.single(a, tile)
    }

    /// The tile of a block that is no walker: its only one.
    #[inline(always)]
    #[track_caller]
    fn only<T>(&mut self, a: &Attention<T>) -> Option<Place> {
        let is_first = self.next == 0;
        self.next = 1;
        if is_first { self.single(a, self.anew(block_idx_x()) - self.schedule.walkers) } else { None }
    }

    /// A tile of the packs that are not walked, if there are so many and its sequence has so many rows: the last of each pack come
    /// first.
    #[inline(always)]
    #[track_caller]
    fn single<T>(&self, a: &Attention<T>, tile: u32) -> Option<Place> {
        let Schedule { walked_packs, packing, .. } = self.schedule;
        let all = self.anew(packing.packs(a.nheads));
        let packs = all * a.batch - walked_packs;
        let tiles = tiles_of_pack(packing.rows(self.anew(a.seqlen_q)), self.block_m);
        if tile >= packs * tiles {
            return None;
        }
        let (pack, batch) = head_of(walked_packs + tile % divisor(packs), all);
        let first_row = (tiles - 1 - tile / divisor(packs)) * self.block_m;
        let is_there = packing.query(first_row) < a.sequence(batch).seqlen_q;
        is_there.then_some(Place { first_row, pack, batch, split: 0 })
    }
}
