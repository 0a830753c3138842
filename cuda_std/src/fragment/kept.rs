//! Products of which not all terms count: what a tile holds where nothing keeps it, be it NaN, must not be seen.
use super::{Accumulator, LeftOperand, MatrixElement};
use crate::matrix::{self, TensorCoreElement};
use crate::{SmemTile, math};

impl<const M: usize, const N: usize> Accumulator<M, N> {
    /// `self += A B` without the terms that are not kept: A is `weights`, B the rows 0 to 8 `K` of `tile` at columns `column`
    /// to `column + 8 N`, and element (row, k) of A takes part if `keep(row, k)`. The terms that do are as in IEEE 754,
    /// 0 · ∞ = NaN, but that ∞ · ∞ may be NaN. N is even.
    ///
    /// For the rare tile that is not finite: slow, with few registers and little code. Loops stay loops in which the blocks
    /// move through the registers, since registers have no index.
    #[inline(always)]
    #[track_caller]
    pub fn add_kept_product<T: MatrixElement, const K: usize, const R: usize, const C: usize>(
        &mut self,
        weights: &Accumulator<M, K>,
        keep: impl Fn(u32, u32) -> bool,
        tile: SmemTile<T, R, C>,
        column: u32,
    ) {
        let steps = 8 * K / T::DEPTH;
        // SAFETY: numbers.
        let mut a: [LeftOperand<T, M>; K] = unsafe { core::mem::zeroed() };
        for step in 0..steps {
            a[step] = weights.operand(step);
        }
        // Without tensor cores an operand takes four times the registers of what it is made of: it is made when needed.
        let mut weights = *weights;
        for pair in 0..math::unknown(N as u32 / 2) {
            let mut d = [[[0.0; 4]; 2]; M];
            for m in 0..M {
                d[m] = [self.0[m][0], self.0[m][1]];
            }
            for step in 0..math::unknown(steps as u32) {
                let keep = |row, k| keep(row, step * T::DEPTH as u32 + k);
                let first = if T::TENSOR_CORES { a[0] } else { weights.operand(0) };
                T::add_kept_product(&mut d, &first, keep, tile, step, column + 16 * pair);
                for i in 1..steps {
                    a[i - 1] = a[i];
                }
                a[steps - 1] = first;
                if !T::TENSOR_CORES {
                    weights.rotate();
                }
            }
            for m in 0..M {
                for n in 2..N {
                    self.0[m][n - 2] = self.0[m][n];
                }
                [self.0[m][N - 2], self.0[m][N - 1]] = d[m];
            }
        }
    }
}

impl<const M: usize, const N: usize> Accumulator<M, N> {
    /// Moves every column block one place to the left, and the first to the end.
    #[inline(always)]
    fn rotate(&mut self) {
        for m in 0..M {
            let first = self.0[m][0];
            for n in 1..N {
                self.0[m][n - 1] = self.0[m][n];
            }
            self.0[m][N - 1] = first;
        }
    }
}

/// `D += A B`, with `keep(row, chunk, i)` for element `i` of a register of A, at the lane's bytes of one of two chunks.
///
/// What is not finite becomes 0 in B, and then products of zeros and ones count, for each element of D, the terms that are
/// +∞ and those that are -∞: NaN, and 0 · ∞, are both.
#[inline(always)]
#[track_caller]
pub(super) fn add_product<T: TensorCoreElement, const M: usize>(
    d: &mut [[[f32; 4]; 2]; M],
    a: &[[u32; 4]; M],
    b: &[[u32; 2]; 2],
    keep: impl Fn(u32, usize, usize) -> bool,
) {
    let (mut kept, mut positive, mut negative) = ([[0; 4]; M], [[0; 4]; M], [[0; 4]; M]);
    for m in 0..M {
        for register in 0..4 {
            let row = Accumulator::<M, 2>::row(m, register % 2);
            let mut flags = 0;
            for i in 0..4 / size_of::<T>() {
                let flag = 1 << (8 * size_of::<T>() * (i + 1) - 1);
                flags |= if keep(row, register / 2, i) { flag } else { 0 };
            }
            let word = Word::<T>::new(a[m][register]);
            kept[m][register] = word.bits & Word::<T>::spread(flags);
            positive[m][register] = Word::<T>::ones(flags & (word.zeros() | word.nans() | !word.bits));
            negative[m][register] = Word::<T>::ones(flags & (word.zeros() | word.nans() | word.bits));
        }
    }
    let (mut finite, mut plus, mut minus) = ([[0; 2]; 2], [[0; 2]; 2], [[0; 2]; 2]);
    for n in 0..2 {
        for chunk in 0..2 {
            let word = Word::<T>::new(b[n][chunk]);
            let nonfinite = word.nonfinite();
            finite[n][chunk] = word.bits & !Word::<T>::spread(nonfinite);
            plus[n][chunk] = Word::<T>::ones(nonfinite & (word.nans() | !word.bits));
            minus[n][chunk] = Word::<T>::ones(nonfinite & (word.nans() | word.bits));
        }
    }
    matrix::mma::<T, M, 2>(d, &kept, &finite);
    add_infinities::<T, M>(d, [&positive, &negative], [&plus, &minus], f32::INFINITY);
    add_infinities::<T, M>(d, [&positive, &negative], [&minus, &plus], f32::NEG_INFINITY);
}

/// Adds `infinity` where one of the products A B has a term.
#[inline(always)]
#[track_caller]
fn add_infinities<T: TensorCoreElement, const M: usize>(
    d: &mut [[[f32; 4]; 2]; M],
    a: [&[[u32; 4]; M]; 2],
    b: [&[[u32; 2]; 2]; 2],
    infinity: f32,
) {
    let mut count = [[[0.0; 4]; 2]; M];
    matrix::mma::<T, M, 2>(&mut count, a[0], b[0]);
    matrix::mma::<T, M, 2>(&mut count, a[1], b[1]);
    for m in 0..M {
        for n in 0..2 {
            for i in 0..4 {
                d[m][n][i] += if count[m][n][i] > 0.0 { infinity } else { 0.0 };
            }
        }
    }
}

/// The elements of a register, all at once. What is asked of each is answered in the place of its sign.
struct Word<T> {
    bits: u32,
    magnitudes: u32,
    of: core::marker::PhantomData<T>,
}

impl<T: TensorCoreElement> Word<T> {
    const LOWEST: u32 = T::SIGNS >> (8 * size_of::<T>() - 1);

    #[inline(always)]
    fn new(bits: u32) -> Self {
        Word { bits, magnitudes: bits & !T::SIGNS, of: core::marker::PhantomData }
    }

    /// Magnitudes of `least` and more: they carry into the sign.
    #[inline(always)]
    fn at_least(&self, least: u32) -> u32 {
        (self.magnitudes + (T::SIGNS - least)) & T::SIGNS
    }

    #[inline(always)]
    fn zeros(&self) -> u32 {
        T::SIGNS & !self.at_least(Self::LOWEST)
    }

    #[inline(always)]
    fn nonfinite(&self) -> u32 {
        T::nonfinite(self.bits)
    }

    #[inline(always)]
    fn nans(&self) -> u32 {
        self.at_least(T::INFINITIES + Self::LOWEST)
    }

    /// All bits of the elements whose signs are among the flags.
    #[inline(always)]
    fn spread(flags: u32) -> u32 {
        flags | (flags - (flags >> (8 * size_of::<T>() - 1)))
    }

    /// 1 where there is a flag, else 0.
    #[inline(always)]
    fn ones(flags: u32) -> u32 {
        Self::spread(flags) & T::ONES
    }
}
