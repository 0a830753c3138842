//! P of one head, recomputed from S and the LSE.
use crate::attention::{Attention, Sequence};
use crate::dropout::Dropout;
use crate::mask::Mask;
use crate::scores::Scores;
use cuda_std::Element;
use cuda_std::fragment::{Accumulator, ColumnVector, RowVector};
use cuda_std::math::{LOG2_E, ex2, fma, unknown_before};

/// What tells P of one head of one sequence from S = Q Kᵀ.
#[derive(Clone, Copy)]
pub(super) struct Probabilities<T> {
    mask: Mask,
    /// The softmax scale in log2 units.
    scale: f32,
    /// What becomes of the scores, in a kernel that is general.
    scores: Option<Scores<T>>,
    dropout: Dropout,
    /// The head, counted over all batches.
    head: u32,
}

/// What P = 2^(score - base) is taken relative to: the LSE in log2 units; infinity, which makes P 0, for a row that sees no
/// key.
#[inline(always)]
pub(super) fn exponent_base(lse: f32) -> f32 {
    if lse == f32::NEG_INFINITY { f32::INFINITY } else { lse * LOG2_E }
}

impl<T: Element> Probabilities<T> {
    /// Those of `head`.
    #[inline(always)]
    #[track_caller]
    pub fn new<const GENERAL: bool>(a: &Attention<T>, sequence: &Sequence, head: u32, mask: Mask) -> Self {
        // A walk over heads finds anew what follows from the batch, and keeps no registers for it.
        let sequence = Sequence { batch: unknown_before(sequence.batch, head), ..*sequence };
        Probabilities {
            mask,
            scale: a.softmax_scale * LOG2_E,
            scores: if GENERAL { Some(Scores::new(a, &sequence, head, mask)) } else { None },
            dropout: if GENERAL { a.dropout } else { Dropout::NONE },
            head: sequence.batch * a.nheads + head,
        }
    }

    /// S = Q Kᵀ becomes P, before dropout. The matrix begins at row `first_row` and key `first_key`; `partial`: some of it is
    /// masked. Returns what dS is a multiple of: P, times the gradient of the cap.
    #[inline(always)]
    #[track_caller]
    pub fn of_scores<const M: usize, const N: usize>(
        &self,
        s: &mut Accumulator<M, N>,
        bases: &RowVector<M>,
        (first_row, first_key): (u32, u32),
        partial: bool,
    ) -> Accumulator<M, N> {
        let Some(scores) = &self.scores else {
            if partial {
                self.mask.apply(s, first_row, first_key);
            }
            s.zip_rows(bases, |s, base| ex2(fma(s, self.scale, -base)));
            return *s;
        };
        scores.cap(s);
        let capped = *s;
        scores.finish(s, (first_row, first_key), partial);
        s.zip_rows(bases, |s, base| ex2(s - base));
        let mut weights = *s;
        scores.cap_gradient(&mut weights, &capped);
        weights
    }

    /// As [`of_scores`](Self::of_scores) for transposed matrices, whose rows are keys and whose columns are queries.
    #[inline(always)]
    #[track_caller]
    pub fn of_scores_transposed<const M: usize, const N: usize>(
        &self,
        s: &mut Accumulator<M, N>,
        bases: &ColumnVector<N>,
        (first_key, first_row): (u32, u32),
        partial: bool,
    ) -> Accumulator<M, N> {
        let Some(scores) = &self.scores else {
            if partial {
                self.mask.apply_transposed(s, first_key, first_row);
            }
            s.zip_columns(bases, |s, base| ex2(fma(s, self.scale, -base)));
            return *s;
        };
        scores.cap(s);
        let capped = *s;
        scores.finish_transposed(s, (first_key, first_row), partial);
        s.zip_columns(bases, |s, base| ex2(s - base));
        let mut weights = *s;
        scores.cap_gradient(&mut weights, &capped);
        weights
    }

    /// Whether query `row`, if there is one, sees key `key`.
    #[inline(always)]
    #[track_caller]
    pub fn sees(&self, row: u32, key: u32) -> bool {
        row < self.mask.seqlen_q
            && match &self.scores {
                Some(scores) => scores.sees(row, key),
                None => self.mask.sees(row, key),
            }
    }

    /// [`sees`](Self::sees) for rows and columns of a transposed matrix that begins there, to be said where it is asked: what
    /// follows from the keys is found anew, and takes no registers elsewhere.
    #[inline(always)]
    pub fn sees_from(&self, (first_key, first_row): (u32, u32)) -> impl Fn(u32, u32) -> bool {
        let anew = |n| unknown_before(n, first_row);
        let first_key = anew(first_key);
        let mask = Mask { seqlen_k: anew(self.mask.seqlen_k), ..self.mask };
        let probabilities = Probabilities { mask, scores: self.scores.map(|scores| scores.of_mask(mask)), ..*self };
        move |key, row| probabilities.sees(first_row + row, first_key + key)
    }

    /// Drops elements of P or dP, and scales the others.
    #[inline(always)]
    pub fn drop<const M: usize, const N: usize>(&self, x: &mut Accumulator<M, N>, (first_row, first_key): (u32, u32)) {
        if self.dropout.is_on() {
            self.dropout.apply(x, self.head, first_row, first_key);
        }
    }

    /// As [`drop`](Self::drop) for transposed matrices.
    #[inline(always)]
    pub fn drop_transposed<const M: usize, const N: usize>(
        &self,
        x: &mut Accumulator<M, N>,
        (first_key, first_row): (u32, u32),
    ) {
        if self.dropout.is_on() {
            self.dropout.apply_transposed(x, self.head, unknown_before(first_key, first_row), first_row);
        }
    }
}
