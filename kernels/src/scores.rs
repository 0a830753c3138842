//! What becomes of a score on its way from Q Kᵀ into the softmax: cap, ALiBi, bias, and masks of any shape.
//!
//! Score of query i and key j, with s = softmax_scale · q kᵀ: softcap · tanh(s / softcap), plus
//! -slope · |i + seqlen_k - seqlen_q - j|, plus the bias; -inf where the window or the mask hides the key. Sources: softcap:
//! Gemma 2; ALiBi: Press, Smith and Lewis, "Train short, test long", 2022.
use crate::attention::{Attention, Sequence};
use crate::mask::Mask;
use cuda_std::fragment::Accumulator;
use cuda_std::math::{LOG2_E, fma, rcp, tanh, tanh_of_quarters, tanh_of_small_quarter, unknown_before};
use cuda_std::warp::{ALL, any};
use cuda_std::{Element, Global};

/// The scores of one head of one sequence.
#[derive(Clone, Copy)]
pub struct Scores<T> {
    softmax_scale: f32,
    /// 0: no cap.
    pub softcap: f32,
    /// ALiBi's slope; 0: none.
    pub slope: f32,
    /// The bias of query 0 and key 0; null: none.
    bias: Global<T>,
    bias_stride: u64,
    /// The mask of query 0 and key 0; null: none.
    visible: Global<u8>,
    visible_stride: u64,
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
            bias: if a.bias.data.is_null() { Global::NULL } else { a.bias.row(sequence.batch, head, 0) },
            bias_stride: a.bias.row_stride,
            visible: if a.mask.data.is_null() { Global::NULL } else { a.mask.row(sequence.batch, head, 0) },
            visible_stride: a.mask.row_stride,
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
            && (self.bias.is_null() || self.bias_of(row, key) != f32::NEG_INFINITY)
            && (self.visible.is_null() || self.is_visible(row, key))
    }

    /// Capped scores become those of the softmax, in log2 units: with ALiBi and bias added, and -inf where the key is hidden.
    /// The matrix begins at row `first_row` and key `first_key`; `partial`: the window hides a part of it.
    #[inline(always)]
    #[track_caller]
    pub fn finish<const M: usize, const N: usize>(
        &self,
        s: &mut Accumulator<M, N>,
        (first_row, first_key): (u32, u32),
        partial: bool,
    ) {
        self.finish_at(s, partial, |row, column| (first_row + row, first_key + column));
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
        self.finish_at(s, partial, |row, column| (first_row + column, first_key + row));
    }

    /// What the softmax takes for one product `q_k` of query `row` and key `key`, in log2 units.
    #[inline(always)]
    #[track_caller]
    pub fn score(&self, row: u32, key: u32, q_k: f32) -> f32 {
        let mut s = Accumulator::<1, 1>::zero();
        s.map(|_, _, _| q_k);
        self.cap(&mut s);
        self.finish_at(&mut s, true, |_, _| (row, key));
        *s.element_mut(0, 0, 0, 0)
    }

    /// A pass for each thing that there may be. What is hidden stays so. Beyond the last query and the last key neither bias
    /// nor mask are in memory: there the last ones' are loaded, since a branch would make each load wait for the one before.
    #[inline(always)]
    #[track_caller]
    fn finish_at<const M: usize, const N: usize>(
        &self,
        s: &mut Accumulator<M, N>,
        partial: bool,
        place: impl Fn(u32, u32) -> (u32, u32),
    ) {
        if !partial && !self.depend_on_place() {
            s.map(|_, _, s| s * LOG2_E);
            return;
        }
        const HIDDEN: f32 = f32::NEG_INFINITY;
        let Mask { seqlen_q, seqlen_k, .. } = self.mask;
        let last = |x: u32, count: u32| if x < count { x } else { count - 1 };
        let stored = |(row, key): (u32, u32)| (last(row, seqlen_q), last(key, seqlen_k));
        s.map(|row, column, s| {
            let (row, key) = place(row, column);
            if row < seqlen_q && self.mask.sees(row, key) { s * LOG2_E } else { HIDDEN }
        });
        if self.slope != 0.0 {
            let slope = self.slope * LOG2_E;
            s.map(|row, column, s| {
                let (row, key) = place(row, column);
                let distance = (row + seqlen_k) as i32 - (seqlen_q + key) as i32;
                s - slope * distance.unsigned_abs() as f32
            });
        }
        if !self.bias.is_null() {
            s.map(|row, column, s| {
                let (row, key) = stored(place(row, column));
                let bias = self.bias_of(row, key);
                if s == HIDDEN { s } else { s + bias * LOG2_E }
            });
        }
        if !self.visible.is_null() {
            s.map(|row, column, s| {
                let (row, key) = stored(place(row, column));
                if self.is_visible(row, key) { s } else { HIDDEN }
            });
        }
    }

    #[inline(always)]
    #[track_caller]
    fn bias_of(&self, row: u32, key: u32) -> f32 {
        self.bias.load((row as u64 * self.bias_stride + key as u64) as usize).to_f32()
    }

    #[inline(always)]
    #[track_caller]
    fn is_visible(&self, row: u32, key: u32) -> bool {
        self.visible.load((row as u64 * self.visible_stride + key as u64) as usize) != 0
    }
}
