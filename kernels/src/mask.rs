//! Which keys a query sees. Every mask here is an interval: query i sees the keys `begin(i)` to `end(i)`, and neither falls as
//! i grows. Masks of another shape are a tensor ([`Scores`](crate::scores::Scores)).
use crate::attention::{Attention, Sequence};
use cuda_std::fragment::Accumulator;

/// A side of the window on which a query sees all keys.
pub const UNBOUNDED: u32 = u32::MAX;

/// A window around each query's own place, which is aligned to the bottom right corner: `left` keys before and `right` keys
/// after key i + seqlen_k - seqlen_q; and the ends of the sequences, which mask too.
#[derive(Clone, Copy, Debug)]
pub struct Mask {
    /// Tokens of Q.
    pub seqlen_q: u32,
    /// Tokens of K and V.
    pub seqlen_k: u32,
    /// Keys to the left, or [`UNBOUNDED`].
    pub left: u32,
    /// Keys to the right, or [`UNBOUNDED`]; 0: a causal mask.
    pub right: u32,
}

/// The blocks that a walk over keys or queries meets. Those outside `begin..end` are seen by nobody; those in
/// `full_begin..full_end` whole by everybody: no element needs a mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// The first block of which a part is seen.
    pub begin: u32,
    /// The first block that is seen whole.
    pub full_begin: u32,
    /// One past the last block that is seen whole.
    pub full_end: u32,
    /// One past the last block of which a part is seen; `begin` or more.
    pub end: u32,
}

impl Blocks {
    /// Whether a block is seen in part.
    #[inline(always)]
    pub fn is_partial(&self, block: u32) -> bool {
        block < self.full_begin || block >= self.full_end
    }

    /// How many there are.
    #[inline(always)]
    pub fn count(&self) -> u32 {
        self.end - self.begin
    }

    /// These, or `begin` alone if there are none.
    #[inline(always)]
    pub fn or_one(self) -> Self {
        Blocks { end: if self.begin < self.end { self.end } else { self.begin + 1 }, ..self }
    }
}

impl Mask {
    /// The mask of a kernel that is built for a causal mask, or for none, or that is `GENERAL` and asks its arguments.
    #[inline(always)]
    pub fn of<T, const CAUSAL: bool, const GENERAL: bool>(a: &Attention<T>, sequence: &Sequence) -> Self {
        let (left, right) = match (GENERAL, CAUSAL) {
            (true, _) => (a.window_left, a.window_right),
            (false, true) => (UNBOUNDED, 0),
            (false, false) => (UNBOUNDED, UNBOUNDED),
        };
        Mask { seqlen_q: sequence.seqlen_q, seqlen_k: sequence.seqlen_k, left, right }
    }

    /// The first key that query `row` sees, if it sees any.
    #[inline(always)]
    pub fn begin(self, row: u32) -> u32 {
        // row + seqlen_k - seqlen_q - left
        (row + self.seqlen_k).saturating_sub(self.left.saturating_add(self.seqlen_q))
    }

    /// One past the last key that query `row` sees.
    #[inline(always)]
    pub fn end(self, row: u32) -> u32 {
        // row + seqlen_k - seqlen_q + right + 1, between 0 and seqlen_k.
        let beyond = self.seqlen_q.saturating_sub(self.right.saturating_add(row + 1));
        self.seqlen_k.saturating_sub(beyond)
    }

    /// Whether query `row` sees key `key`.
    #[inline(always)]
    pub fn sees(self, row: u32, key: u32) -> bool {
        self.begin(row) <= key && key < self.end(row)
    }

    /// How far the place of query `row` is to the right of key `key`.
    #[inline(always)]
    pub fn distance(self, row: u32, key: u32) -> i32 {
        (row + self.seqlen_k) as i32 - (self.seqlen_q + key) as i32
    }

    /// Whether a query sees a key, if there is one, at such a [distance](Self::distance).
    #[inline(always)]
    pub fn sees_at(self, distance: i32) -> bool {
        let side = |side: u32| if side < i32::MAX as u32 { side as i32 } else { i32::MAX };
        -side(self.right) <= distance && distance <= side(self.left)
    }

    /// The blocks of `block_n` keys that the queries `first_row` to `first_row + block_m` need.
    #[inline(always)]
    pub fn key_blocks(self, first_row: u32, block_m: u32, block_n: u32) -> Blocks {
        let last_row = first_row + block_m - 1;
        let (begin, end) = (self.begin(first_row) / block_n, self.end(last_row).div_ceil(block_n));
        Blocks {
            begin: if begin < end { begin } else { end },
            full_begin: self.begin(last_row).div_ceil(block_n),
            full_end: self.end(first_row) / block_n,
            end,
        }
    }

    /// The first query that sees key `key`, of those that there may be.
    #[inline(always)]
    pub(crate) fn first_query(self, key: u32) -> u32 {
        // row + seqlen_k - seqlen_q + right >= key
        (key + self.seqlen_q).saturating_sub(self.right.saturating_add(self.seqlen_k))
    }

    /// One past the last query that sees key `key`.
    #[inline(always)]
    fn end_query(self, key: u32) -> u32 {
        // row + seqlen_k - seqlen_q - left <= key
        let end = self.left.saturating_add(key + self.seqlen_q + 1).saturating_sub(self.seqlen_k);
        if end < self.seqlen_q { end } else { self.seqlen_q }
    }

    /// The blocks of `block_m` queries that the keys `first_key` to `first_key + block_n` need. Rows beyond the last query
    /// count as seen whole: their P is 0 by their LSE.
    #[inline(always)]
    pub fn query_blocks(self, first_key: u32, block_n: u32, block_m: u32) -> Blocks {
        let last_key = first_key + block_n - 1;
        let (begin, end) = (self.first_query(first_key) / block_m, self.end_query(last_key).div_ceil(block_m));
        let full_end = self.end_query(first_key);
        Blocks {
            begin: if begin < end { begin } else { end },
            full_begin: self.first_query(last_key).div_ceil(block_m),
            full_end: if full_end == self.seqlen_q { full_end.div_ceil(block_m) } else { full_end / block_m },
            end,
        }
    }

    /// Sets the scores of keys that a row does not see to -inf. The matrix begins at row `first_row` and key `first_key`.
    #[inline(always)]
    pub fn apply<const M: usize, const N: usize>(self, s: &mut Accumulator<M, N>, first_row: u32, first_key: u32) {
        s.map(|row, column, s| if self.sees(first_row + row, first_key + column) { s } else { f32::NEG_INFINITY });
    }

    /// As [`apply`](Self::apply) for a transposed matrix, whose rows are keys and whose columns are queries.
    #[inline(always)]
    pub fn apply_transposed<const M: usize, const N: usize>(
        self,
        s: &mut Accumulator<M, N>,
        first_key: u32,
        first_row: u32,
    ) {
        s.map(|row, column, s| if self.sees(first_row + column, first_key + row) { s } else { f32::NEG_INFINITY });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::ops::Range;

    const SIDES: [u32; 7] = [0, 1, 15, 16, 17, 40, UNBOUNDED];
    const LENGTHS: [u32; 7] = [1, 15, 16, 17, 33, 48, 65];
    const TILES: [(u32, u32); 4] = [(16, 16), (16, 32), (48, 16), (32, 48)];

    impl Mask {
        /// What [`sees`](Self::sees) says, as the window is defined: key i + seqlen_k - seqlen_q, `left` before and `right` after.
        fn plainly_sees(self, row: u32, key: u32) -> bool {
            let place = i64::from(row) + i64::from(self.seqlen_k) - i64::from(self.seqlen_q);
            let (left, right) = (place - i64::from(key), i64::from(key) - place);
            let within = |distance, side: u32| side == UNBOUNDED || distance <= i64::from(side);
            key < self.seqlen_k && within(left, self.left) && within(right, self.right)
        }
    }

    /// All pairs.
    fn pairs<const N: usize>(of: [u32; N]) -> impl Iterator<Item = (u32, u32)> {
        of.into_iter().flat_map(move |a| of.into_iter().map(move |b| (a, b)))
    }

    /// All windows and lengths.
    fn for_all(check: impl Fn(Mask)) {
        for (left, right) in pairs(SIDES) {
            for (seqlen_q, seqlen_k) in pairs(LENGTHS) {
                check(Mask { seqlen_q, seqlen_k, left, right });
            }
        }
    }

    /// Whether some row of a tile sees some key of it, and whether all see all.
    fn seen(mask: Mask, rows: Range<u32>, keys: Range<u32>) -> (bool, bool) {
        let (mut some, mut all) = (false, true);
        for (row, key) in rows.flat_map(|row| keys.clone().map(move |key| (row, key))) {
            let sees = mask.plainly_sees(row, key);
            assert_eq!(mask.sees(row, key), sees, "{mask:?}: row {row}, key {key}");
            let sees_at = key < mask.seqlen_k && mask.sees_at(mask.distance(row, key));
            assert_eq!(sees_at, sees, "{mask:?}: row {row}, key {key}");
            (some, all) = (some || sees, all && sees);
        }
        (some, all)
    }

    /// Whether a block is walked where some pair of it is seen, and masked where not all are. Where a tile ends behind the last
    /// row or key, so that it is not `whole`, it may be masked although all are seen that are there.
    fn suits(blocks: Blocks, block: u32, (some, all): (bool, bool), whole: bool) -> bool {
        let (is_met, is_partial) = ((blocks.begin..blocks.end).contains(&block), blocks.is_partial(block));
        is_met == some && (!is_met || is_partial != all || is_partial && !whole)
    }

    #[test]
    fn blocks_of_keys_are_as_rows_see_them() {
        for_all(|mask| {
            for (block_m, block_n) in TILES {
                for first_row in (0..mask.seqlen_q).step_by(block_m as usize) {
                    let blocks = mask.key_blocks(first_row, block_m, block_n);
                    let end = mask.seqlen_q.min(first_row + block_m);
                    for block in 0..mask.seqlen_k.div_ceil(block_n) {
                        // Keys that are not there are seen by nobody.
                        let seen = seen(mask, first_row..end, block * block_n..(block + 1) * block_n);
                        let suits = suits(blocks, block, seen, end == first_row + block_m);
                        assert!(suits, "{mask:?}, {block_m} x {block_n}, row {first_row}, block {block} of {blocks:?}");
                    }
                }
            }
        });
    }

    #[test]
    fn blocks_of_queries_are_as_they_see_keys() {
        for_all(|mask| {
            for (block_m, block_n) in TILES {
                for first_key in (0..mask.seqlen_k).step_by(block_n as usize) {
                    let blocks = mask.query_blocks(first_key, block_n, block_m);
                    let end = mask.seqlen_k.min(first_key + block_n);
                    for block in 0..mask.seqlen_q.div_ceil(block_m) {
                        let rows = block * block_m..mask.seqlen_q.min((block + 1) * block_m);
                        let suits = suits(blocks, block, seen(mask, rows, first_key..end), end == first_key + block_n);
                        assert!(suits, "{mask:?}, {block_m} x {block_n}, key {first_key}, block {block} of {blocks:?}");
                    }
                }
            }
        });
    }
}
