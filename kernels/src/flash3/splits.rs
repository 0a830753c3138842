//! Keys of a tile that are divided among blocks of threads.
//!
//! Source: Dao, Haziza, Massa, Sizov, "Flash-Decoding for long-context inference", 2023.
//!
//! Where there are fewer tiles than multiprocessors, as at a step of decoding one sequence, each walks over all keys while the
//! others idle. Divided, each of several blocks of threads takes a part of a tile's keys and leaves an O and an LSE of its own.
//! The softmax over these LSE says what each part weighs ([`combine`](super::combine)).
use crate::attention::divisor;
use crate::mask::Blocks;
use cuda_std::Global;

/// Into how many parts the blocks of keys of a tile are divided: as many, or one a block if these are fewer. Without `FEW` they
/// are not divided, and the compiler knows it.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Splits<const FEW: bool = true> {
    count: u32,
}

impl Splits {
    /// Nothing is divided.
    pub const ONE: Self = Splits { count: 1 };

    /// So many parts; one at least.
    pub const fn new(count: u32) -> Self {
        Splits { count: if count == 0 { 1 } else { count } }
    }

    /// As a kernel knows it.
    #[inline(always)]
    pub fn known<const FEW: bool>(self) -> Splits<FEW> {
        Splits { count: self.count }
    }
}

impl<const FEW: bool> Splits<FEW> {
    /// The most parts of a tile.
    #[inline(always)]
    pub fn count(self) -> u32 {
        if FEW { self.count } else { 1 }
    }

    /// Whether keys are divided.
    #[inline(always)]
    pub fn are_divided(self) -> bool {
        FEW && self.count > 1
    }

    /// How many parts these blocks have.
    #[inline(always)]
    pub fn of(self, blocks: Blocks) -> u32 {
        self.count().min(blocks.count())
    }

    /// One of the parts of these blocks.
    #[inline(always)]
    pub fn part(self, blocks: Blocks, split: u32) -> Blocks {
        if !FEW {
            return blocks;
        }
        let parts = divisor(self.of(blocks));
        let (each, more) = (blocks.count() / parts, blocks.count() % parts);
        let begin = |part: u32| blocks.begin + part * each + part.min(more);
        Blocks { begin: begin(split), end: begin(split + 1), ..blocks }
    }

    /// Those blocks of some rows of a tile that are in a part of the tile's; one at least.
    #[inline(always)]
    pub fn within(self, part: Blocks, rows: Blocks) -> Blocks {
        if !FEW {
            return rows;
        }
        Blocks { begin: part.begin, end: rows.end.min(part.end), ..rows }.or_one()
    }
}

/// What the parts leave behind. Rows are those of all heads and sequences, in the order of the LSE.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct Parts {
    /// O of each part as if there were no other keys: (splits, rows, headdim_v).
    pub o: Global<f32>,
    /// Its LSE: (splits, rows), natural logarithm; -inf for a row that sees no key of the part.
    pub lse: Global<f32>,
    /// How many rows there are.
    pub rows: u64,
}

impl Parts {
    /// None.
    pub const NONE: Self = Parts { o: Global::NULL, lse: Global::NULL, rows: 0 };

    /// The LSE of the rows of a part.
    #[inline(always)]
    pub fn lse_of(&self, split: u32) -> Global<f32> {
        self.lse.offset((split as u64 * self.rows) as usize)
    }

    /// The O of the rows of a part, of so many columns.
    #[inline(always)]
    pub fn o_of(&self, split: u32, columns: u32) -> Global<f32> {
        self.o.offset((split as u64 * self.rows * columns as u64) as usize)
    }
}
