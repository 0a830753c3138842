//! Heads of Q that share a head of K and V, packed into the same tiles.
//!
//! With grouped queries K and V of one head are multiplied with the queries of several. Where these are few, as at a step of
//! decoding, the rows of a tile are mostly empty, and each head loads the same keys. Packed, the rows of a tile are the first
//! query of each of the heads, then the second of each, and so on: one walk over the keys serves all of them.

/// How many heads of Q lie in a tile together, a pack: a power of two, at most the rows of a warpgroup. Row r of a pack is
/// query r / heads of its head r % heads. Packs of one head: nothing is packed. Without `FEW` that is always so, and the
/// compiler knows it: rows are queries.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packing<const FEW: bool = true> {
    log2_heads: u32,
}

impl Packing {
    /// Packs of one head.
    pub const SINGLE: Self = Packing { log2_heads: 0 };

    /// The largest packs of heads that share one of K and V, of which there are `group`: its largest factor that is a power
    /// of two, but at most `most`.
    pub const fn of_group(group: u32, most: u32) -> Self {
        let (all, most) = (group.trailing_zeros(), most.ilog2());
        Packing { log2_heads: if all < most { all } else { most } }
    }

    /// As a kernel knows it.
    #[inline(always)]
    pub fn known<const FEW: bool>(self) -> Packing<FEW> {
        Packing { log2_heads: self.log2_heads }
    }
}

impl<const FEW: bool> Packing<FEW> {
    /// Heads of a pack.
    #[inline(always)]
    pub fn heads(self) -> u32 {
        1 << self.log2()
    }

    /// Packs of so many heads.
    #[inline(always)]
    pub fn packs(self, nheads: u32) -> u32 {
        nheads >> self.log2()
    }

    /// Rows of a pack that has so many queries.
    #[inline(always)]
    pub fn rows(self, queries: u32) -> u32 {
        queries << self.log2()
    }

    /// The query that a row is of; or how many queries so many rows have.
    #[inline(always)]
    pub fn query(self, row: u32) -> u32 {
        row >> self.log2()
    }

    /// Which head of its pack a row is of.
    #[inline(always)]
    pub fn head(self, row: u32) -> u32 {
        row & ((1 << self.log2()) - 1)
    }

    /// The first head of a pack, among those of Q and O.
    #[inline(always)]
    pub fn first_head(self, pack: u32) -> u32 {
        pack << self.log2()
    }

    #[inline(always)]
    fn log2(self) -> u32 {
        // Known to be less than 32: shifts take the number as it is.
        if FEW { self.log2_heads % 32 } else { 0 }
    }
}
