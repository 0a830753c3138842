//! Online softmax of the rows that a warp holds in registers.
use crate::online_softmax::OnlineSoftmax;
use cuda_std::fragment::Accumulator;
use cuda_std::math::{self, ex2, fma, unknown};
use cuda_std::warp::{ALL, any, reduce};

/// The states of the rows of an [`Accumulator`] of `M` row blocks: two rows a lane and row block.
///
/// The four lanes of a quad share a row: m is the same in all of them, l is each lane's own part of the sum until
/// [`finish`](Self::finish) adds them up.
#[derive(Clone, Copy)]
pub struct RowSoftmax<const M: usize>([[OnlineSoftmax; 2]; M]);

/// What [`RowSoftmax::raise_lazily`] asks of all that was weighted before: a factor alpha a row.
#[derive(Clone, Copy)]
pub struct Rescale<const M: usize> {
    alpha: [[f32; 2]; M],
    /// Whether a factor of the warp may not be 1.
    any: bool,
}

/// By how much more than its maximum a row's elements may be, in log2 units, until the maximum is raised lazily.
const SLACK: f32 = 8.0;

impl<const M: usize> RowSoftmax<M> {
    /// Rows of no elements.
    pub const EMPTY: Self = RowSoftmax([[OnlineSoftmax::EMPTY; 2]; M]);

    /// Takes a block of scores S, and turns it into the weights P = 2^(scale · S - m), with m the maximum so far. `scale` is
    /// the softmax scale in log2 units, positive.
    #[inline(always)]
    #[track_caller]
    pub fn take<const N: usize>(&mut self, s: &mut Accumulator<M, N>, scale: f32) {
        for m in 0..M {
            for half in 0..2 {
                let block_max = reduce::<4, f32>(s.fold_row(m, half, math::max), math::max);
                self.0[m][half].raise(block_max * scale);
            }
        }
        self.weigh(s, scale);
    }

    /// As [`take`](Self::take), with m as [`raise_lazily`](Self::raise_lazily) leaves it.
    #[inline(always)]
    #[track_caller]
    pub fn take_lazily<const N: usize>(&mut self, s: &mut Accumulator<M, N>, scale: f32) -> Rescale<M> {
        let rescale = self.raise_lazily(s, scale);
        self.weigh(s, scale);
        rescale
    }

    /// Raises m for a block of scores S, but of each row only once an element exceeds it by more than a factor of 2⁸: until then the
    /// weights are larger than 1, the sums no less exact, and nothing is to be rescaled. FlashAttention-4 does so. What a row
    /// becomes does not depend on others of its warp, which at the end of a sequence may be another's.
    #[inline(always)]
    #[track_caller]
    pub fn raise_lazily<const N: usize>(&mut self, s: &Accumulator<M, N>, scale: f32) -> Rescale<M> {
        let mut rescale = Rescale { alpha: [[1.0; 2]; M], any: any(ALL, self.is_exceeded(s, scale)) };
        if rescale.any {
            for m in 0..M {
                for half in 0..2 {
                    let state = &mut self.0[m][half];
                    let block_max = reduce::<4, f32>(s.fold_row(m, half, math::max), math::max) * scale;
                    let kept = if block_max > state.m + SLACK { block_max } else { state.m };
                    rescale.alpha[m][half] = state.raise(kept);
                }
            }
        }
        rescale
    }

    /// Whether one of this lane's scores exceeds m by more than a factor of 2⁸.
    #[inline(always)]
    fn is_exceeded<const N: usize>(&self, s: &Accumulator<M, N>, scale: f32) -> bool {
        let mut exceeds = false;
        for m in 0..M {
            for half in 0..2 {
                exceeds |= s.fold_row(m, half, math::max) * scale > self.0[m][half].m + SLACK;
            }
        }
        exceeds
    }

    /// Brings m to the maximum of a block of scores S, up or down, and rescales O to that, in the blocks of which it is the
    /// turn; in the others, only if an element exceeds m by more than a factor of 2⁸. `turn` counts the blocks of a row. It
    /// is the turn of each within the first 128 keys, and then of one within 96 keys: every block, every second or third.
    ///
    /// P is rounded to 16 bits, and the largest weights of a row decide how much that costs. Relative to the maximum of its
    /// own block the largest is 1, which is exact, and those next to it lie just below, where rounding is finest. Relative to
    /// the maximum of all blocks so far, as in Algorithm 1, that holds only where the maximum grows: so fewer blocks need be
    /// rescaled for an error that is no larger.
    #[inline(always)]
    #[track_caller]
    pub fn follow<const N: usize, const O_COLUMNS: usize>(
        &mut self,
        s: &Accumulator<M, N>,
        scale: f32,
        turn: u32,
        o: &mut Accumulator<M, O_COLUMNS>,
    ) {
        let (at_first, every) = const { ((128 / (8 * N)) as u32, 96_usize.div_ceil(8 * N) as u32) };
        // The very first block exceeds m in any case. Were the others' number known, they would be taken out of the loop.
        let is_early = at_first > every && turn < unknown(at_first);
        if is_early || turn % every == every - 1 || any(ALL, self.is_exceeded(s, scale)) {
            let mut rescale = Rescale { alpha: [[1.0; 2]; M], any: true };
            for m in 0..M {
                for half in 0..2 {
                    let state = &mut self.0[m][half];
                    let own_max = math::max(s.fold_row(m, half, math::max) * scale, state.lowest());
                    rescale.alpha[m][half] = state.rebase(reduce::<4, f32>(own_max, math::max));
                }
            }
            rescale.apply_if_any(o);
        }
    }

    /// Scores S become weights P = 2^(scale · S - m), for which m has been raised.
    #[inline(always)]
    pub fn weigh<const N: usize>(&mut self, s: &mut Accumulator<M, N>, scale: f32) {
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
    }

    /// O = diag(l)⁻¹ O, and gives each row with its final state to `row_state`. `sink(m, half)` is one more element of that row of
    /// the lane, with a weight but no value, in log2 units; -inf if there is none.
    #[inline(always)]
    #[track_caller]
    pub fn finish<const N: usize>(
        self,
        o: &mut Accumulator<M, N>,
        sink: impl Fn(usize, usize) -> f32,
        row_state: impl Fn(u32, OnlineSoftmax),
    ) {
        for m in 0..M {
            for half in 0..2 {
                let (mut state, sink) = (self.sum(m, half), sink(m, half));
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

impl<const M: usize> Rescale<M> {
    /// O = diag(alpha) O, if anything is to be rescaled: seldom.
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
}
