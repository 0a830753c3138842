//! Online softmax of the rows that a warp holds in registers.
use crate::online_softmax::OnlineSoftmax;
use cuda_std::fragment::Accumulator;
use cuda_std::math::{self, ex2, fma};
use cuda_std::warp::{ALL, any, reduce};

/// The states of the rows of an [`Accumulator`] of `M` row blocks: two rows a lane and row block.
///
/// The four lanes of a quad share a row: m is the same in all of them, l is each lane's own part of the sum until
/// [`finish`](Self::finish) adds them up.
#[derive(Clone, Copy)]
pub struct RowSoftmax<const M: usize>([[OnlineSoftmax; 2]; M]);

/// What [`RowSoftmax::take`] asks of all that was weighted before: a factor alpha a row.
#[derive(Clone, Copy)]
pub struct Rescale<const M: usize> {
    alpha: [[f32; 2]; M],
    /// Whether a factor of this lane is not 1.
    any: bool,
}

impl<const M: usize> RowSoftmax<M> {
    /// Rows of no elements.
    pub const EMPTY: Self = RowSoftmax([[OnlineSoftmax::EMPTY; 2]; M]);

    /// Takes a block of scores S, and turns it into the weights P = 2^(scale · S - m). `scale` is the softmax scale in log2
    /// units, positive.
    #[inline(always)]
    #[track_caller]
    pub fn take<const N: usize>(&mut self, s: &mut Accumulator<M, N>, scale: f32) -> Rescale<M> {
        let mut rescale = Rescale { alpha: [[0.0; 2]; M], any: false };
        for m in 0..M {
            for half in 0..2 {
                let state = &mut self.0[m][half];
                let block_max = reduce::<4, f32>(s.fold_row(m, half, math::max), math::max);
                let alpha = state.raise(block_max * scale);
                let base = -state.base();
                s.map_row(m, half, |s| ex2(fma(s, scale, base)));
                state.l += s.fold_row(m, half, |x, y| x + y);
                rescale.alpha[m][half] = alpha;
                rescale.any |= alpha != 1.0;
            }
        }
        rescale
    }

    /// As [`take`](Self::take), but m follows only once an element exceeds it by more than a factor of 2⁸: until then the
    /// weights are larger than 1, the sums no less exact, and nothing is to be rescaled. FlashAttention-4 does so.
    #[inline(always)]
    #[track_caller]
    pub fn take_lazily<const N: usize>(&mut self, s: &mut Accumulator<M, N>, scale: f32) -> Rescale<M> {
        const SLACK: f32 = 8.0;
        let mut rescale = Rescale { alpha: [[1.0; 2]; M], any: false };
        let mut block_max = [[0.0; 2]; M];
        for m in 0..M {
            for half in 0..2 {
                block_max[m][half] = s.fold_row(m, half, math::max) * scale;
                rescale.any |= block_max[m][half] > self.0[m][half].m + SLACK;
            }
        }
        rescale.any = any(ALL, rescale.any);
        if rescale.any {
            for m in 0..M {
                for half in 0..2 {
                    rescale.alpha[m][half] = self.0[m][half].raise(reduce::<4, f32>(block_max[m][half], math::max));
                }
            }
        }
        let mut base = [[0.0; 2]; M];
        for m in 0..M {
            for half in 0..2 {
                base[m][half] = -self.0[m][half].base();
            }
        }
        let sums = s.map_and_fold_rows(|m, half, s| ex2(fma(s, scale, base[m][half])), |x, y| x + y);
        for m in 0..M {
            for half in 0..2 {
                self.0[m][half].l += sums[m][half];
            }
        }
        rescale
    }

    /// O = diag(l)⁻¹ O, and gives each row with its final state to `row_state`. `sink` is one more element of each row, with
    /// a weight but no value, in log2 units; -inf if there is none.
    #[inline(always)]
    #[track_caller]
    pub fn finish<const N: usize>(self, o: &mut Accumulator<M, N>, sink: f32, row_state: impl Fn(u32, OnlineSoftmax)) {
        for m in 0..M {
            for half in 0..2 {
                let mut state = self.sum(m, half);
                let alpha = state.raise(sink);
                state.l += state.weight(sink);
                let factor = alpha * state.inverse();
                o.map_row(m, half, |o| o * factor);
                row_state(Accumulator::<M, N>::row(m, half), state);
            }
        }
    }

    /// The state of one of this lane's rows, with the sum of all four lanes.
    #[inline(always)]
    #[track_caller]
    pub fn sum(&self, m: usize, half: usize) -> OnlineSoftmax {
        let state = self.0[m][half];
        OnlineSoftmax { l: reduce::<4, f32>(state.l, |x, y| x + y), ..state }
    }
}

impl RowSoftmax<1> {
    /// A number that is known once the sums are; not negative.
    #[inline(always)]
    pub fn sums(&self) -> f32 {
        self.0[0][0].l + self.0[0][1].l
    }
}

impl<const M: usize> Rescale<M> {
    /// O = diag(alpha) O, if [`RowSoftmax::take_lazily`] asks for it: seldom.
    #[inline(always)]
    pub fn apply_if_any<const N: usize>(self, o: &mut Accumulator<M, N>) {
        if self.any {
            for m in 0..M {
                for half in 0..2 {
                    o.map_row(m, half, |o| o * self.alpha[m][half]);
                }
            }
        }
    }

    /// O = diag(alpha) O.
    ///
    /// Later blocks seldom bring a new maximum, and then alpha is 1. To ask first is worth it where O is wide: on an H100 it
    /// gains 4 % at headdim 128, and loses 5 % at 64.
    #[inline(always)]
    #[track_caller]
    pub fn apply<const N: usize>(self, o: &mut Accumulator<M, N>) {
        if const { N < 16 } || any(ALL, self.any) {
            for m in 0..M {
                for half in 0..2 {
                    o.map_row(m, half, |o| o * self.alpha[m][half]);
                }
            }
        }
    }
}
