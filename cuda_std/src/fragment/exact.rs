//! Products in f32, exact but for the rounding of each multiply-add.
use super::{Accumulator, LeftOperand, MatrixElement};
use crate::warp::{self, ALL};
use crate::{SmemTile, math};

/// Eight columns a step. `Left` holds rows g and g + 8 whole: every lane of a quad has the same.
impl MatrixElement for f32 {
    const DEPTH: usize = 8;
    const TENSOR_CORES: bool = false;
    type Left = [[f32; 8]; 2];

    #[inline(always)]
    #[track_caller]
    fn load<const M: usize, const R: usize, const C: usize>(
        tile: SmemTile<Self, R, C>,
        row: u32,
        step: usize,
    ) -> LeftOperand<Self, M> {
        let mut a = [[[0.0; 8]; 2]; M];
        for m in 0..M {
            for half in 0..2 {
                a[m][half] = eight(tile, row + math::unknown_before(Accumulator::<M, 1>::row(m, half), row), step);
            }
        }
        LeftOperand(a)
    }

    #[inline(always)]
    #[track_caller]
    fn operand<const M: usize, const N: usize>(p: &[[[f32; 4]; N]; M], step: usize) -> LeftOperand<Self, M> {
        let mut a = [[[0.0; 8]; 2]; M];
        for m in 0..M {
            for i in 0..4 {
                for q in 0..4 {
                    a[m][i / 2][2 * q + i % 2] = warp::shuffle_quad(ALL, p[m][step][i], q as u32);
                }
            }
        }
        LeftOperand(a)
    }

    #[inline(always)]
    #[track_caller]
    fn add_product_transposed<const M: usize, const N: usize, const R: usize, const C: usize>(
        d: &mut [[[f32; 4]; N]; M],
        a: &LeftOperand<Self, M>,
        tile: SmemTile<Self, R, C>,
        row: u32,
        step: usize,
    ) {
        for n in 0..N {
            for i in 0..2 {
                let b = eight(tile, row + Accumulator::<M, N>::column(n, i), step);
                for m in 0..M {
                    for half in 0..2 {
                        let x = &mut d[m][n][2 * half + i];
                        for k in 0..8 {
                            *x = math::fma(a.0[m][half][k], b[k], *x);
                        }
                    }
                }
            }
        }
    }

    #[inline(always)]
    #[track_caller]
    fn add_product<const M: usize, const N: usize, const R: usize, const C: usize>(
        d: &mut [[[f32; 4]; N]; M],
        a: &LeftOperand<Self, M>,
        tile: SmemTile<Self, R, C>,
        step: usize,
        column: u32,
    ) {
        for k in 0..8 {
            for n in 0..N {
                let b = pair(tile, step as u32, k as u32, column + 8 * n as u32);
                for m in 0..M {
                    for i in 0..4 {
                        d[m][n][i] = math::fma(a.0[m][i / 2][k], b[i % 2], d[m][n][i]);
                    }
                }
            }
        }
    }

    #[inline(always)]
    #[track_caller]
    fn add_kept_product<const M: usize, const R: usize, const C: usize>(
        d: &mut [[[f32; 4]; 2]; M],
        a: &LeftOperand<Self, M>,
        keep: impl Fn(u32, u32) -> bool,
        tile: SmemTile<Self, R, C>,
        step: u32,
        column: u32,
    ) {
        // A loop, as the ones around it: whether a key is kept is a branch or more, and eight of each were no little code.
        let mut a = a.0;
        for k in 0..math::unknown(8) {
            let b = [0, 1].map(|n| pair(tile, step, k, column + 8 * n));
            for m in 0..M {
                for half in 0..2 {
                    if keep(Accumulator::<M, 2>::row(m, half), k) {
                        for n in 0..2 {
                            for i in 0..2 {
                                let x = &mut d[m][n][2 * half + i];
                                *x = math::fma(a[m][half][0], b[n][i], *x);
                            }
                        }
                    }
                    let [a0, a1, a2, a3, a4, a5, a6, a7] = a[m][half];
                    a[m][half] = [a1, a2, a3, a4, a5, a6, a7, a0];
                }
            }
        }
    }
}

/// This lane's two elements of a column block that begins at `column`, in row `k` of a step.
#[inline(always)]
#[track_caller]
fn pair<const R: usize, const C: usize>(tile: SmemTile<f32, R, C>, step: u32, k: u32, column: u32) -> [f32; 2] {
    let first =
        tile.element(k, math::unknown_before(Accumulator::<1, 1>::column(0, 0), tile.start::<f32>().address() + step));
    SmemTile::<f32, R, C>::beyond(first, 8 * step, column / 4).load_vector(0)
}

/// Eight elements of a row of a tile: chunks `2 step` and `2 step + 1`.
#[inline(always)]
#[track_caller]
fn eight<const R: usize, const C: usize>(tile: SmemTile<f32, R, C>, row: u32, step: usize) -> [f32; 8] {
    let [a, b, c, d] = tile.chunk(row, 2 * step as u32).load_vector::<4>(0);
    let [e, f, g, h] = tile.chunk(row, 2 * step as u32 + 1).load_vector::<4>(0);
    [a, b, c, d, e, f, g, h]
}
