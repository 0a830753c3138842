//! What becomes of a score on its way from Q Kᵀ into the softmax: cap, ALiBi, bias, and masks of any shape.
//!
//! Score of query i and key j, with s = softmax_scale · q kᵀ: softcap · tanh(s / softcap), plus
//! -slope · |i + seqlen_k - seqlen_q - j|, plus the bias; -inf where the window or the mask hides the key. Sources: softcap:
//! Gemma 2; ALiBi: Press, Smith and Lewis, "Train short, test long", 2022.
use crate::attention::{Attention, Sequence};
use crate::mask::Mask;
use crate::stored::Stored;
use cuda_std::Element;
use cuda_std::fragment::Accumulator;
use cuda_std::math::{LOG2_E, fma, rcp, tanh, tanh_of_quarters, tanh_of_small_quarter, unknown_before};
use cuda_std::warp::{ALL, any};

/// The scores of one head of one sequence.
#[derive(Clone, Copy)]
pub struct Scores<T> {
    softmax_scale: f32,
    /// 0: no cap.
    pub softcap: f32,
    /// ALiBi's slope; 0: none.
    pub slope: f32,
    bias: Stored<T>,
    /// The mask: 0 where it hides a key.
    visible: Stored<u8>,
    /// Which keys queries see.
    pub mask: Mask,
}

/// Where the scores of a matrix are.
#[derive(Clone, Copy)]
pub struct Places<Q: Fn(u32) -> u32, S: Fn(u32) -> f32> {
    /// Which query a row is of.
    pub query: Q,
    /// ALiBi's slope of the head that a row is of; 0: none.
    pub slope: S,
    /// Its first key.
    pub first_key: u32,
}

impl<T: Element> Scores<T> {
    /// Those of `head`.
    #[inline(always)]
    #[track_caller]
    pub fn new(a: &Attention<T>, sequence: &Sequence, head: u32, mask: Mask) -> Self {
        Scores {
            softmax_scale: a.softmax_scale,
            softcap: a.softcap,
            slope: Self::slope_of(a, sequence, head),
            bias: Stored::of(&a.bias, sequence.batch, head),
            visible: Stored::of(&a.mask, sequence.batch, head),
            mask,
        }
    }

    /// The same with another window.
    #[inline(always)]
    pub fn of_mask(self, mask: Mask) -> Self {
        Scores { mask, ..self }
    }

    /// ALiBi's slope of a head; 0: none.
    #[inline(always)]
    #[track_caller]
    pub fn slope_of(a: &Attention<T>, sequence: &Sequence, head: u32) -> f32 {
        let at = sequence.batch as u64 * a.alibi_batch_stride + head as u64;
        if a.alibi_slopes.is_null() { 0.0 } else { a.alibi_slopes.load(at as usize) }
    }

    /// S = Q Kᵀ becomes softcap · tanh(softmax_scale · S / softcap), or without a cap softmax_scale · S.
    #[inline(always)]
    pub fn cap<const M: usize, const N: usize>(&self, s: &mut Accumulator<M, N>) {
        if self.softcap == 0.0 {
            s.map(|_, _, s| s * self.softmax_scale);
        } else {
            let scale = self.softmax_scale / self.softcap;
            s.map(|_, _, s| self.softcap * tanh(s * scale));
        }
    }

    /// The gradient of [`cap`](Self::cap), but for the scale: dS becomes dS · (1 - (capped / softcap)²).
    #[inline(always)]
    pub fn cap_gradient<const M: usize, const N: usize>(
        &self,
        d_s: &mut Accumulator<M, N>,
        capped: &Accumulator<M, N>,
    ) {
        if self.softcap != 0.0 {
            let inverse = 1.0 / self.softcap;
            d_s.zip(capped, |d_s, capped| d_s * (1.0 - capped * inverse * (capped * inverse)));
        }
    }

    /// Whether a capped score and what the softmax takes for it differ by where it is, in a block that the window shows whole.
    #[inline(always)]
    fn depend_on_place(&self) -> bool {
        self.slope != 0.0 || !self.bias.is_null() || !self.visible.is_null()
    }

    /// Whether scores are more than softmax_scale · Q Kᵀ, with a scale that is positive, and what the window hides: in kernels
    /// that know neither bias nor mask.
    #[inline(always)]
    pub fn are_changed(a: &Attention<T>) -> bool {
        a.softcap != 0.0 || a.softmax_scale <= 0.0 || !a.alibi_slopes.is_null()
    }

    /// What the softmax multiplies scores with for log2 units, positive: after [`apply_relative`](Self::apply_relative) log2(e)
    /// times the cap, or without one log2(e); where they are not changed, and are Q Kᵀ still, the softmax scale in log2 units.
    #[inline(always)]
    pub fn relative_scale<const GENERAL: bool>(a: &Attention<T>) -> f32 {
        if GENERAL && Self::are_changed(a) {
            if a.softcap == 0.0 { LOG2_E } else { a.softcap * LOG2_E }
        } else {
            a.softmax_scale * LOG2_E
        }
    }

    /// S = Q Kᵀ becomes what the softmax takes for it, but for bias and mask; as a part of the cap, if there is one, as the
    /// softmax multiplies in any case. `partial`: the window hides a part of it. A warp says this together.
    #[inline(always)]
    #[track_caller]
    pub fn apply_relative<const N: usize>(
        &self,
        s: &mut Accumulator<1, N>,
        places: Places<impl Fn(u32) -> u32, impl Fn(u32) -> f32>,
        partial: bool,
    ) {
        let sees = |row, column| self.mask.sees((places.query)(row), places.first_key + column);
        // A division that rounds correctly would be a call, for which registers are saved.
        let inverse = if self.softcap == 0.0 { 1.0 } else { rcp(self.softcap) };
        let scale = self.softmax_scale * inverse;
        if self.softcap == 0.0 {
            s.map(|_, _, s| s * scale);
        } else {
            s.map(|_, _, s| s * (4.0 * scale));
            if partial {
                // What is hidden, be it NaN, must not reach its neighbours.
                s.map(|row, column, s| if sees(row, column) { s } else { 0.0 });
            }
            // The highest bit of an exponent is set from 2 on, and in NaN.
            let or = |a: f32, b: f32| f32::from_bits(a.to_bits() | b.to_bits());
            let all = or(s.fold_row(0, 0, or), s.fold_row(0, 1, or));
            if any(ALL, all.to_bits() & 2f32.to_bits() != 0) {
                for half in 0..2 {
                    s.map_pairs(0, half, |_, s| tanh_of_quarters(s));
                }
            } else {
                s.map(|_, _, s| tanh_of_small_quarter(s));
            }
        }
        if partial {
            s.map(|row, column, s| if sees(row, column) { s } else { f32::NEG_INFINITY });
        }
        for half in 0..2 {
            let row = Accumulator::<1, N>::row(0, half);
            let (query, slope) = ((places.query)(row), (places.slope)(row));
            if slope != 0.0 {
                // The distance of the first of a lane's columns: conversions take longer than differences.
                let Mask { seqlen_q, seqlen_k, .. } = self.mask;
                let first = Accumulator::<1, N>::column(0, 0);
                let distance = (query + seqlen_k) as i32 - (seqlen_q + places.first_key + first) as i32;
                let slope = -slope * inverse;
                s.map_pairs(0, half, |column, s| {
                    let of = |i: u32| (distance as f32 - (column - first + i) as f32).abs();
                    [fma(of(0), slope, s[0]), fma(of(1), slope, s[1])]
                });
            }
        }
    }

    /// Whether query `row` sees key `key`; a bias of -inf hides it. Rows beyond the last query see nothing.
    #[inline(always)]
    #[track_caller]
    pub fn sees(&self, row: u32, key: u32) -> bool {
        row < self.mask.seqlen_q
            && self.mask.sees(row, key)
            && (self.bias.is_null() || self.bias.load(row, key).to_f32() != f32::NEG_INFINITY)
            && (self.visible.is_null() || self.visible.load(row, key) != 0)
    }

    /// Capped scores become those of the softmax, in log2 units: with ALiBi and bias added, and -inf where the key is hidden.
    /// The matrix begins at row `first_row` and key `first_key`; `partial`: the window hides a part of it. A pass for each thing
    /// that there may be.
    #[inline(always)]
    #[track_caller]
    pub fn finish<const M: usize, const N: usize>(
        &self,
        s: &mut Accumulator<M, N>,
        (first_row, first_key): (u32, u32),
        partial: bool,
    ) {
        let place = (first_row, first_key);
        let inside = !partial && first_row + 16 * M as u32 <= self.mask.seqlen_q;
        self.mask(s, inside || !partial && !self.depend_on_place(), |row, column| {
            (first_row + row, first_key + column)
        });
        if self.slope != 0.0 {
            for m in 0..M {
                for half in 0..2 {
                    let row = first_row + Accumulator::<M, N>::row(m, half);
                    self.add_alibi(
                        s,
                        (m, half),
                        self.mask.distance(row, first_key + Accumulator::<M, N>::column(0, 0)),
                        -1.0,
                    );
                }
            }
        }
        if !self.bias.is_null() {
            self.bias.zip(s, place, inside, &self.mask, add_bias);
        }
        if !self.visible.is_null() {
            self.visible.zip(s, place, inside, &self.mask, hide);
        }
    }

    /// As [`finish`](Self::finish) for a transposed matrix, whose rows are keys and whose columns are queries.
    #[inline(always)]
    #[track_caller]
    pub fn finish_transposed<const M: usize, const N: usize>(
        &self,
        s: &mut Accumulator<M, N>,
        (first_key, first_row): (u32, u32),
        partial: bool,
    ) {
        // A walk over queries meets the same keys in each step: what follows from them is found anew, and takes no registers.
        let first_key = unknown_before(first_key, first_row);
        let place = (first_key, first_row);
        // Keys beyond the last are seen whole, where there is no window: nobody needs their gradients.
        let Mask { seqlen_q, seqlen_k, .. } = self.mask;
        let inside = !partial && first_row + 8 * N as u32 <= seqlen_q && first_key + 16 * M as u32 <= seqlen_k;
        self.mask(s, inside || !partial && !self.depend_on_place(), |row, column| {
            (first_row + column, first_key + row)
        });
        if self.slope != 0.0 {
            for m in 0..M {
                for half in 0..2 {
                    let key = first_key + Accumulator::<M, N>::row(m, half);
                    self.add_alibi(
                        s,
                        (m, half),
                        self.mask.distance(first_row + Accumulator::<M, N>::column(0, 0), key),
                        1.0,
                    );
                }
            }
        }
        if !self.bias.is_null() {
            self.bias.zip_transposed(s, place, inside, &self.mask, add_bias);
        }
        if !self.visible.is_null() {
            self.visible.zip_transposed(s, place, inside, &self.mask, hide);
        }
    }

    /// What the softmax takes for the product `q_k` of query `row` and a key that it sees, in log2 units.
    #[inline(always)]
    #[track_caller]
    pub fn score(&self, row: u32, key: u32, q_k: f32) -> f32 {
        let mut s = Accumulator::<1, 1>::zero();
        s.map(|_, _, _| q_k);
        self.cap(&mut s);
        let mut s = *s.element_mut(0, 0, 0, 0) * LOG2_E;
        if self.slope != 0.0 {
            s -= self.slope * LOG2_E * (self.mask.distance(row, key) as f32).abs();
        }
        if self.bias.is_null() { s } else { add_bias(s, self.bias.load(row, key)) }
    }

    /// Capped scores in log2 units, and -inf where the window hides a key or a row is beyond the last; `shown`: nowhere.
    #[inline(always)]
    fn mask<const M: usize, const N: usize>(
        &self,
        s: &mut Accumulator<M, N>,
        shown: bool,
        place: impl Fn(u32, u32) -> (u32, u32),
    ) {
        if shown {
            s.map(|_, _, s| s * LOG2_E);
        } else {
            s.map(|row, column, s| {
                let (row, key) = place(row, column);
                let sees = (row < self.mask.seqlen_q) & (self.mask.begin(row) <= key) & (key < self.mask.end(row));
                if sees { s * LOG2_E } else { HIDDEN }
            });
        }
    }

    /// ALiBi for one of a lane's rows: `distance` is that of its first column, which from one column to the next grows by `step`.
    /// Distances are converted once a row: a conversion takes longer than a sum.
    #[inline(always)]
    fn add_alibi<const M: usize, const N: usize>(
        &self,
        s: &mut Accumulator<M, N>,
        (m, half): (usize, usize),
        distance: i32,
        step: f32,
    ) {
        let (distance, slope) = (distance as f32, -self.slope * LOG2_E);
        let first = Accumulator::<M, N>::column(0, 0);
        s.map_pairs(m, half, |column, s| {
            let of = |i: u32| (distance + step * (column - first + i) as f32).abs();
            [fma(of(0), slope, s[0]), fma(of(1), slope, s[1])]
        });
    }
}

/// The score of a key that is hidden, and stays so.
const HIDDEN: f32 = f32::NEG_INFINITY;

/// A score in log2 units with its bias.
#[inline(always)]
fn add_bias<T: Element>(s: f32, bias: T) -> f32 {
    if s == HIDDEN { s } else { fma(bias.to_f32(), LOG2_E, s) }
}

/// A score whose key a mask may hide.
#[inline(always)]
fn hide(s: f32, visible: u8) -> f32 {
    if visible != 0 { s } else { HIDDEN }
}
