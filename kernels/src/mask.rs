//! Which keys a query sees. Every mask here is a prefix: query i sees the keys 0 to `visible(i)`.

use cuda_std::fragment::Accumulator;

/// The causal mask, aligned to the bottom right corner, or none; and the end of the sequences, which masks too.
#[derive(Clone, Copy, Debug)]
pub struct Mask {
    /// Tokens of Q.
    pub seqlen_q: u32,
    /// Tokens of K and V.
    pub seqlen_k: u32,
    /// Whether query i sees only the keys j <= i + seqlen_k - seqlen_q.
    pub causal: bool,
}

/// The blocks of keys that a block of queries needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyBlocks {
    /// Blocks 0 to `full` are seen whole by every row: no element needs a mask.
    pub full: u32,
    /// Blocks `full` to `end` are seen in part. Those from `end` on are seen by no row.
    pub end: u32,
}

/// The blocks of queries that a block of keys needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueryBlocks {
    /// Blocks before `begin` see none of the keys.
    pub begin: u32,
    /// Blocks `begin` to `full` see them in part. From `full` on every row sees them all.
    pub full: u32,
}

impl Mask {
    /// How many keys query `row` sees: the first ones.
    #[inline(always)]
    pub fn visible(self, row: u32) -> u32 {
        if !self.causal {
            return self.seqlen_k;
        }
        // row + 1 + seqlen_k - seqlen_q, between 0 and seqlen_k.
        let beyond = self.seqlen_q.saturating_sub(row + 1);
        self.seqlen_k.saturating_sub(beyond)
    }

    /// The blocks of `block_n` keys that the queries `first_row` to `first_row + block_m` need.
    #[inline(always)]
    pub fn key_blocks(self, first_row: u32, block_m: u32, block_n: u32) -> KeyBlocks {
        let last_row = first_row + block_m - 1;
        KeyBlocks { full: self.visible(first_row) / block_n, end: self.visible(last_row).div_ceil(block_n) }
    }

    /// The first query that sees key `key`, of those that there may be.
    #[inline(always)]
    fn first_query(self, key: u32) -> u32 {
        if !self.causal {
            return 0;
        }
        // row + seqlen_k - seqlen_q >= key
        (key + self.seqlen_q).saturating_sub(self.seqlen_k)
    }

    /// The blocks of `block_m` queries that the keys `first_key` to `first_key + block_n` need.
    #[inline(always)]
    pub fn query_blocks(self, first_key: u32, block_n: u32, block_m: u32) -> QueryBlocks {
        let last_key = first_key + block_n - 1;
        QueryBlocks { begin: self.first_query(first_key) / block_m, full: self.first_query(last_key).div_ceil(block_m) }
    }

    /// Sets the scores of keys that a row does not see to -inf. The matrix begins at row `first_row` and key `first_key`.
    #[inline(always)]
    pub fn apply<const M: usize, const N: usize>(self, s: &mut Accumulator<M, N>, first_row: u32, first_key: u32) {
        s.map(|row, column, s| if first_key + column < self.visible(first_row + row) { s } else { f32::NEG_INFINITY });
    }

    /// As [`apply`](Self::apply) for a transposed matrix, whose rows are keys and whose columns are queries.
    #[inline(always)]
    pub fn apply_transposed<const M: usize, const N: usize>(
        self,
        s: &mut Accumulator<M, N>,
        first_key: u32,
        first_row: u32,
    ) {
        s.map(|row, column, s| if first_key + row < self.visible(first_row + column) { s } else { f32::NEG_INFINITY });
    }
}
