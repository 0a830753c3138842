//! Which keys the queries of a tile see: those that neither the window nor the boolean mask nor a bias of -inf hides.
use super::blocks::Place;
use super::tile::{BLOCK, KEYS, QUERIES};
use crate::element::Element;
use crate::operands::Operands;
use crate::problem::Problem;

/// What is seen of a tile of scores.
pub struct Seen {
    /// Not 0 where a query sees a key. Valid if something is hidden.
    tile: Vec<[u8; BLOCK]>,
    hides: bool,
}

impl Seen {
    pub const BYTES: usize = BLOCK * BLOCK;

    pub fn new() -> Self {
        Seen { tile: vec![[0; BLOCK]; BLOCK], hides: false }
    }

    /// The tile of what is seen, unless that is everything.
    #[inline(always)]
    pub fn hiding(&self) -> Option<&[[u8; BLOCK]]> {
        self.hides.then_some(&self.tile)
    }

    /// Finds out what is seen at a place; returns whether anything is. `softmax_lse` is that of its queries, if it is
    /// known: where it is -inf, no key takes part, whatever Q, K and V are.
    #[inline(always)]
    pub fn find<T: Element, const LANES: bool>(
        &mut self,
        problem: &Problem,
        operands: &Operands<T>,
        place: &Place,
        softmax_lse: Option<&[f32]>,
    ) -> bool {
        let Place { sequence, first_q, queries, first_k, keys, .. } = *place;
        // Both ends of what a query sees never fall from one query to the next.
        let first = sequence.visible(problem.window, first_q);
        let last = sequence.visible(problem.window, first_q + queries - 1);
        if first_k + keys <= first.start || last.end <= first_k {
            return false;
        }
        let window_hides = first_k < last.start || first.end < first_k + keys;
        let rows_hide =
            softmax_lse.is_some_and(|lse| lse.iter().fold(false, |hides, &lse| hides | (lse == f32::NEG_INFINITY)));
        let mask_hides = problem.mask.is_some() && mask_hides(operands, place);
        let bias_hides = problem.bias.is_some() && bias_hides(operands, place);
        self.hides = window_hides || rows_hide || mask_hides || bias_hides;
        if !self.hides {
            return true;
        }

        let (mut begin, mut end) = ([0; BLOCK], [0; BLOCK]);
        for i in 0..queries {
            if softmax_lse.is_none_or(|lse| lse[i] != f32::NEG_INFINITY) {
                let visible = sequence.visible(problem.window, first_q + i);
                // Nobody asks for keys beyond the tile.
                begin[i] = visible.start.saturating_sub(first_k).min(BLOCK) as u32;
                end[i] = visible.end.saturating_sub(first_k).min(keys) as u32;
            }
        }
        for (i, seen) in self.tile.iter_mut().enumerate() {
            for lane in 0..BLOCK {
                let (query, key) = if LANES == QUERIES { (lane, i as u32) } else { (i, lane as u32) };
                seen[lane] = u8::from((begin[query] <= key) & (key < end[query]));
            }
        }
        if mask_hides {
            self.apply::<LANES, _>(place, |i| mask_row(operands, place, i).iter().map(|&mask| mask != 0));
        }
        if bias_hides {
            self.apply::<LANES, _>(place, |i| bias_row(operands, place, i).iter().map(|&bias| !is_hiding(bias)));
        }
        let any = self.tile.iter().fold([0; BLOCK], |mut any, seen| {
            for lane in 0..BLOCK {
                any[lane] |= seen[lane];
            }
            any
        });
        any != [0; BLOCK]
    }

    /// Hides the keys of query `i` that `are_seen(i)` says no of.
    #[inline(always)]
    fn apply<const LANES: bool, S: Iterator<Item = bool>>(&mut self, place: &Place, are_seen: impl Fn(usize) -> S) {
        for i in 0..place.queries {
            for (key, is_seen) in are_seen(i).enumerate() {
                let seen = if LANES == KEYS { &mut self.tile[i][key] } else { &mut self.tile[key][i] };
                *seen &= u8::from(is_seen);
            }
        }
    }
}

/// Whether the mask hides any key of a tile from any query of it.
#[inline(always)]
fn mask_hides<T: Element>(operands: &Operands<T>, place: &Place) -> bool {
    (0..place.queries).any(|i| mask_row(operands, place, i).iter().fold(false, |hides, &mask| hides | (mask == 0)))
}

/// The mask of query `i` of a tile and its keys; empty, if there is none.
#[inline(always)]
fn mask_row<'a, T: Element>(operands: &Operands<'a, T>, place: &Place, i: usize) -> &'a [u8] {
    let mask = operands.mask(&place.sequence, place.head, place.first_q + i);
    mask.map_or(&[], |mask| &mask[place.first_k..place.first_k + place.keys])
}

/// Whether a bias of -inf hides any key of a tile from any query of it.
#[inline(always)]
fn bias_hides<T: Element>(operands: &Operands<T>, place: &Place) -> bool {
    (0..place.queries).any(|i| bias_row(operands, place, i).iter().fold(false, |hides, &bias| hides | is_hiding(bias)))
}

/// The bias of query `i` of a tile and its keys; empty, if there is none.
#[inline(always)]
fn bias_row<'a, T: Element>(operands: &Operands<'a, T>, place: &Place, i: usize) -> &'a [T] {
    let bias = operands.bias(&place.sequence, place.head, place.first_q + i);
    bias.map_or(&[], |bias| &bias[place.first_k..place.first_k + place.keys])
}

#[inline(always)]
fn is_hiding<T: Element>(bias: T) -> bool {
    bias.to_f32() == f32::NEG_INFINITY
}
