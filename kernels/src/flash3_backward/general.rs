//! P where the arguments ask for a window, a cap, ALiBi, or any scale ([`scores`](crate::scores)).
//!
//! An element at a time, so that one matrix takes the place of another: all of S, dP, P and dS at once are more than the registers
//! hold beside the sums.
use crate::scores::Scores;
use cuda_std::Shared;
use cuda_std::fragment::Accumulator;
use cuda_std::math::{LOG2_E, ex2, fma, rcp};
use cuda_std::matrix::PackedElement;
use cuda_std::wgmma::Registers;

/// What is to be asked of each element, as a constant.
mod case {
    /// Nothing: all queries see all keys.
    pub const WHOLE: u32 = 0;
    /// Whether the window hides it.
    pub const PARTIAL: u32 = 1;
    /// That, and ALiBi.
    pub const PLACED: u32 = 2;
}

/// Pᵀ of a matrix of capped scores Sᵀ.
#[derive(Clone, Copy)]
pub(super) struct Probabilities<'a, T> {
    pub scores: &'a Scores<T>,
    /// Where the matrix begins.
    pub first_key: u32,
    pub first_row: u32,
    /// The window hides a part of it.
    pub is_partial: bool,
    /// What the exponents of its columns subtract.
    pub bases: Shared<f32>,
}

impl<T: PackedElement> Probabilities<'_, T> {
    /// Pᵀ, rounded, and in the place of Sᵀ what dSᵀ is a multiple of: Pᵀ times the gradient of the cap.
    #[inline(always)]
    #[track_caller]
    pub fn with_weights<const N: usize, const STEPS: usize>(self, s: &mut Accumulator<1, N>) -> Registers<T, STEPS> {
        match self.case() {
            case::WHOLE => Registers::apart(s, |key, row, s| self.of_pair::<{ case::WHOLE }>(key, row, s)),
            case::PARTIAL => Registers::apart(s, |key, row, s| self.of_pair::<{ case::PARTIAL }>(key, row, s)),
            _ => Registers::apart(s, |key, row, s| self.of_pair::<{ case::PLACED }>(key, row, s)),
        }
    }

    /// Pᵀ and dSᵀ, rounded, of Sᵀ and dPᵀ, with D of the columns.
    #[inline(always)]
    #[track_caller]
    pub fn with_gradients<const N: usize, const STEPS: usize>(
        self,
        s: &Accumulator<1, N>,
        d_p: &Accumulator<1, N>,
        sums: Shared<f32>,
    ) -> [Registers<T, STEPS>; 2] {
        match self.case() {
            case::WHOLE => self.with_gradients_in::<N, STEPS, { case::WHOLE }>(s, d_p, sums),
            case::PARTIAL => self.with_gradients_in::<N, STEPS, { case::PARTIAL }>(s, d_p, sums),
            _ => self.with_gradients_in::<N, STEPS, { case::PLACED }>(s, d_p, sums),
        }
    }

    #[inline(always)]
    #[track_caller]
    fn with_gradients_in<const N: usize, const STEPS: usize, const CASE: u32>(
        self,
        s: &Accumulator<1, N>,
        d_p: &Accumulator<1, N>,
        sums: Shared<f32>,
    ) -> [Registers<T, STEPS>; 2] {
        Registers::pair_of(s, d_p, |key, row, s, d_p| {
            let [p, weights] = self.of_pair::<CASE>(key, row, s);
            let sums = sums.load_vector::<2>(row);
            [p, [weights[0] * (d_p[0] - sums[0]), weights[1] * (d_p[1] - sums[1])]]
        })
    }

    #[inline(always)]
    fn case(&self) -> u32 {
        match (self.scores.slope != 0.0, self.is_partial) {
            (true, _) => case::PLACED,
            (false, true) => case::PARTIAL,
            (false, false) => case::WHOLE,
        }
    }

    /// P of a key and two queries, and what dS is a multiple of.
    #[inline(always)]
    #[track_caller]
    fn of_pair<const CASE: u32>(&self, key: u32, row: u32, s: [f32; 2]) -> [[f32; 2]; 2] {
        let Scores { mask, softcap, slope, .. } = *self.scores;
        let bases = self.bases.load_vector::<2>(row);
        let is_there = self.first_key + key < mask.seqlen_k;
        let inverse = if softcap == 0.0 { 0.0 } else { rcp(softcap) };
        let (mut p, mut weights) = ([0.0; 2], [0.0; 2]);
        for i in 0..2 {
            // The distance of the first column is the same for all pairs of a row.
            let distance = mask.distance(self.first_row, self.first_key + key) + (row + i as u32) as i32;
            let is_seen = CASE == case::WHOLE || is_there && mask.sees_at(distance);
            let mut score = fma(if is_seen { s[i] } else { f32::NEG_INFINITY }, LOG2_E, -bases[i]);
            if CASE == case::PLACED {
                score = fma(distance.unsigned_abs() as f32, -slope * LOG2_E, score);
            }
            p[i] = ex2(score);
            // Without a cap a score may be infinite, and P is what counts.
            let part = s[i] * inverse;
            weights[i] = if softcap == 0.0 { p[i] } else { p[i] * fma(-part, part, 1.0) };
        }
        [p, weights]
    }
}
