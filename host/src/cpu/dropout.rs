//! Dropout: what the elements of a tile of P are multiplied with.
use kernels::dropout::Dropout;

use super::blocks::Place;
use super::tile::{BLOCK, Lanes, QUERIES, Tile, tile};
use crate::problem::Problem;

/// Side of the blocks of P of which the generator's calls take an element each.
const SIDE: usize = 8;
/// Queries and keys that a group of such blocks spans: two blocks by four.
const GROUP: (usize, usize) = (2 * SIDE, 4 * SIDE);

/// The factors of a tile: 0 for what is dropped, the inverse of the probability to stay for what stays.
pub struct Factors {
    dropout: Option<Dropout>,
    /// Empty without dropout.
    tile: Tile,
}

impl Factors {
    /// None yet.
    pub fn new(problem: &Problem) -> Self {
        let dropout = problem.dropout.map(|dropout| Dropout::new(dropout.p, dropout.seed, dropout.offset));
        // A p that rounds to 0 drops nothing.
        let dropout = dropout.filter(Dropout::is_on);
        Factors { tile: tile(if dropout.is_some() { BLOCK } else { 0 }), dropout }
    }

    /// How many numbers it holds.
    pub fn len(problem: &Problem) -> usize {
        if problem.dropout.is_some() { BLOCK * BLOCK } else { 0 }
    }

    /// Those of a place, which begins at multiples of `BLOCK`. `None`: nothing is dropped.
    #[inline(always)]
    pub fn find<const LANES: bool>(&mut self, problem: &Problem, place: &Place) -> Option<&[Lanes]> {
        let dropout = self.dropout?;
        let head = (place.sequence.index * problem.nheads + place.head) as u32;
        for group_q in (0..place.queries).step_by(GROUP.0) {
            for group_k in (0..place.keys).step_by(GROUP.1) {
                for row in 0..SIDE {
                    // One call each for the elements at this row and all columns of the blocks.
                    let mut words = [[0; SIDE]; 4];
                    for column in 0..SIDE {
                        let (query, key) = if LANES == QUERIES { (column, row) } else { (row, column) };
                        let (query, key) = (place.first_q + group_q + query, place.first_k + group_k + key);
                        let bits = dropout.bits(head, query as u32, key as u32);
                        for word in 0..4 {
                            words[word][column] = bits[word];
                        }
                    }
                    for (index, half) in (0..8).map(|index| (index, index % 2 * 16)) {
                        let (query, key) = (group_q + index / 4 * SIDE, group_k + index % 4 * SIDE);
                        let (i, first) = if LANES == QUERIES { (key + row, query) } else { (query + row, key) };
                        let factors = &mut self.tile[i][first..first + SIDE];
                        for column in 0..SIDE {
                            let keeps = (words[index / 2][column] >> half & 0xffff) < dropout.keep_below;
                            factors[column] = if keeps { dropout.scale } else { 0.0 };
                        }
                    }
                }
            }
        }
        Some(&self.tile)
    }
}

/// Multiplies a tile with factors.
#[inline(always)]
pub fn drop_out(tile: &mut [Lanes], factors: &[Lanes]) {
    for (x, factors) in tile.iter_mut().zip(factors) {
        for lane in 0..BLOCK {
            x[lane] *= factors[lane];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tile::KEYS;
    use super::*;
    use crate::layout::Layout;
    use crate::options::AttentionOptions;
    use cuda_std::DType;

    #[test]
    fn factors_are_those_of_the_generator() {
        let layout = Layout::contiguous(DType::F32, &[2, 200, 3, 8]).expect("small");
        let options = AttentionOptions::new().dropout(0.3, 5, 7);
        let problem = Problem::new(&layout, &layout, &layout, &options).expect("valid");
        let sequence = problem.sequences()[1];
        let place = Place { sequence, head: 2, first_q: 64, queries: 50, first_k: 128, keys: 61 };
        let dropout = Dropout::new(0.3, 5, 7);
        let (mut by_keys, mut by_queries) = (Factors::new(&problem), Factors::new(&problem));
        by_keys.find::<KEYS>(&problem, &place);
        by_queries.find::<QUERIES>(&problem, &place);
        for (query, key) in (0..50).flat_map(|query| (0..61).map(move |key| (query, key))) {
            let expected = dropout.factor(5, 64 + query as u32, 128 + key as u32);
            assert_eq!(by_keys.tile[query][key], expected);
            assert_eq!(by_queries.tile[key][query], expected);
        }
    }
}
