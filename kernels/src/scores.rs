//! What becomes of a score on its way from Q Kᵀ into the softmax: cap, ALiBi, bias, and masks of any shape.
//!
//! Score of query i and key j, with s = softmax_scale · q kᵀ: softcap · tanh(s / softcap), plus
//! -slope · |i + seqlen_k - seqlen_q - j|, plus the bias; -inf where the window or the mask hides the key. Sources: softcap:
//! Gemma 2; ALiBi: Press, Smith and Lewis, "Train short, test long", 2022.
use crate::attention::{Attention, Sequence};
use crate::mask::Mask;
use cuda_std::fragment::Accumulator;
use cuda_std::math::{LOG2_E, tanh};
use cuda_std::{Element, Global};

/// The scores of one head of one sequence.
#[derive(Clone, Copy)]
pub struct Scores<T> {
    softmax_scale: f32,
    /// 0: no cap.
    softcap: f32,
    /// ALiBi's slope; 0: none.
    slope: f32,
    /// The bias of query 0 and key 0; null: none.
    bias: Global<T>,
    bias_stride: u64,
    /// The mask of query 0 and key 0; null: none.
    visible: Global<u8>,
    visible_stride: u64,
    mask: Mask,
}

impl<T: Element> Scores<T> {
    /// Those of `head`.
    #[inline(always)]
    #[track_caller]
    pub fn new(a: &Attention<T>, sequence: &Sequence, head: u32, mask: Mask) -> Self {
        let slope_at = sequence.batch as u64 * a.alibi_batch_stride + head as u64;
        Scores {
            softmax_scale: a.softmax_scale,
            softcap: a.softcap,
            slope: if a.alibi_slopes.is_null() { 0.0 } else { a.alibi_slopes.load(slope_at as usize) },
            bias: if a.bias.data.is_null() { Global::NULL } else { a.bias.row(sequence.batch, head, 0) },
            bias_stride: a.bias.row_stride,
            visible: if a.mask.data.is_null() { Global::NULL } else { a.mask.row(sequence.batch, head, 0) },
            visible_stride: a.mask.row_stride,
            mask,
        }
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

    /// Capped scores become those of the softmax, in log2 units: with ALiBi and bias added, and -inf where the key is hidden.
    /// The matrix begins at row `first_row` and key `first_key`.
    #[inline(always)]
    #[track_caller]
    pub fn finish<const M: usize, const N: usize>(&self, s: &mut Accumulator<M, N>, first_row: u32, first_key: u32) {
        s.map(|row, column, s| self.finished(first_row + row, first_key + column, s));
    }

    /// As [`finish`](Self::finish) for a transposed matrix, whose rows are keys and whose columns are queries.
    #[inline(always)]
    #[track_caller]
    pub fn finish_transposed<const M: usize, const N: usize>(
        &self,
        s: &mut Accumulator<M, N>,
        first_key: u32,
        first_row: u32,
    ) {
        s.map(|row, column, s| self.finished(first_row + column, first_key + row, s));
    }

    #[inline(always)]
    #[track_caller]
    fn finished(&self, row: u32, key: u32, capped: f32) -> f32 {
        let Mask { seqlen_q, seqlen_k, .. } = self.mask;
        // Rows beyond the last query have neither bias nor mask in memory.
        if row >= seqlen_q || !self.mask.sees(row, key) {
            return f32::NEG_INFINITY;
        }
        let mut s = capped;
        let distance = (row + seqlen_k) as i32 - (seqlen_q + key) as i32;
        s -= self.slope * distance.unsigned_abs() as f32;
        if !self.bias.is_null() {
            s += self.bias.load((row as u64 * self.bias_stride + key as u64) as usize).to_f32();
        }
        if !self.visible.is_null() && self.visible.load((row as u64 * self.visible_stride + key as u64) as usize) == 0 {
            s = f32::NEG_INFINITY;
        }
        s * LOG2_E
    }
}
