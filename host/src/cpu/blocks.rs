//! Who computes what: blocks of queries, or of keys, that tasks own, and what they see.
use std::ops::Range;

use rayon::prelude::*;

use super::rows::Rows;
use super::tile::BLOCK;
use crate::options::WindowSize;
use crate::problem::Problem;
use crate::sequences::Sequence;

/// `len` queries, or keys, of one head of a sequence, from `first` on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Block {
    pub sequence: Sequence,
    /// Of Q where these are queries, of K where they are keys.
    pub head: usize,
    pub first: usize,
    pub len: usize,
}

/// All blocks of queries, or of keys.
pub struct Blocks {
    /// Each with the number of blocks up to its end.
    sequences: Vec<(Sequence, usize)>,
    nheads: usize,
    seqlen: fn(&Sequence) -> usize,
}

impl Blocks {
    /// Those of the queries of each head of Q.
    pub fn of_queries(problem: &Problem) -> Self {
        Self::new(problem, problem.nheads, |sequence| sequence.seqlen_q)
    }

    /// Those of the keys of each head of K.
    pub fn of_keys(problem: &Problem) -> Self {
        Self::new(problem, problem.nheads_k, |sequence| sequence.seqlen_k)
    }

    fn new(problem: &Problem, nheads: usize, seqlen: fn(&Sequence) -> usize) -> Self {
        let mut end = 0;
        let count = |sequence: Sequence| {
            end += nheads * seqlen(&sequence).div_ceil(BLOCK);
            (sequence, end)
        };
        Blocks { sequences: problem.sequences().into_iter().map(count).collect(), nheads, seqlen }
    }

    /// The bytes that they take.
    pub fn bytes(problem: &Problem) -> u64 {
        (problem.batch * size_of::<(Sequence, usize)>()) as u64
    }

    /// All of them, each of which a task may own.
    pub fn par_iter(&self) -> impl IndexedParallelIterator<Item = Block> {
        let blocks = self.sequences.last().map_or(0, |&(_, end)| end);
        (0..blocks).into_par_iter().map(|i| self.get(i))
    }

    fn get(&self, i: usize) -> Block {
        let (sequence, end) = self.sequences[self.sequences.partition_point(|&(_, end)| end <= i)];
        let seqlen = (self.seqlen)(&sequence);
        let blocks = seqlen.div_ceil(BLOCK);
        let i = i + self.nheads * blocks - end;
        let first = i % blocks * BLOCK;
        Block { sequence, head: i / blocks, first, len: BLOCK.min(seqlen - first) }
    }
}

/// A tile of scores: queries and keys of one head of Q of a sequence.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    pub sequence: Sequence,
    pub head: usize,
    pub first_q: usize,
    pub queries: usize,
    pub first_k: usize,
    pub keys: usize,
}

impl Place {
    /// Its rows of Q, O and dO.
    pub fn q_rows(&self) -> Rows {
        let Sequence { batch, first_q, .. } = self.sequence;
        Rows { batch, head: self.head, first: first_q + self.first_q, len: self.queries }
    }

    /// Its rows of K and V.
    pub fn k_rows(&self, problem: &Problem) -> Rows {
        let Sequence { batch, first_k, .. } = self.sequence;
        let head = self.head / (problem.nheads / problem.nheads_k);
        Rows { batch, head, first: first_k + self.first_k, len: self.keys }
    }
}

/// The keys from the first to the last that one of some queries, which are not none, sees through the window.
pub fn keys_seen(window: WindowSize, sequence: &Sequence, queries: Range<usize>) -> Range<usize> {
    sequence.visible(window, queries.start).start..sequence.visible(window, queries.end - 1).end
}

/// The queries from the first to the last that see one of some keys, which are not none, through the window: as if they
/// were keys, and the window mirrored.
pub fn queries_that_see(window: WindowSize, sequence: &Sequence, keys: Range<usize>) -> Range<usize> {
    let mirrored = Sequence { seqlen_q: sequence.seqlen_k, seqlen_k: sequence.seqlen_q, ..*sequence };
    keys_seen(WindowSize { left: window.right, right: window.left }, &mirrored, keys)
}

/// The steps of a walk over a range: where each begins, at a multiple of `BLOCK`, and how long it is.
pub fn steps(range: Range<usize>) -> impl Iterator<Item = (usize, usize)> {
    let begin = range.start / BLOCK * BLOCK;
    (begin..range.end).step_by(BLOCK).map(move |first| (first, BLOCK.min(range.end - first)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn nothing_that_is_seen_is_left_out(
            (seqlen_q, seqlen_k) in (1..40usize, 1..40usize),
            left in prop::option::of(0..30usize),
            right in prop::option::of(0..30usize),
            (first, len) in (0..40usize, 1..10usize),
        ) {
            let window = WindowSize { left, right };
            let sequence = Sequence { index: 0, batch: 0, first_q: 0, seqlen_q, first_k: 0, seqlen_k };
            let sees = |query: usize, key: usize| sequence.visible(window, query).contains(&key);
            let part = |seqlen: usize| first.min(seqlen - 1)..(first + len).min(seqlen);
            let exactly = |found: Range<usize>, expected: Vec<usize>| match (expected.first(), expected.last()) {
                (Some(&first), Some(&last)) => found == (first..last + 1),
                _ => found.is_empty(),
            };
            let queries = part(seqlen_q);
            let keys: Vec<_> = (0..seqlen_k).filter(|&key| queries.clone().any(|query| sees(query, key))).collect();
            prop_assert!(exactly(keys_seen(window, &sequence, queries), keys));
            let keys = part(seqlen_k);
            let queries: Vec<_> = (0..seqlen_q).filter(|&query| keys.clone().any(|key| sees(query, key))).collect();
            prop_assert!(exactly(queries_that_see(window, &sequence, keys), queries));
        }
    }
}
