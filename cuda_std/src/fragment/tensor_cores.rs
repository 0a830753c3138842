//! Products on the tensor cores: `ldmatrix` and `mma.sync`, two chunks of 16 bytes a step.
use super::{Accumulator, LeftOperand, MatrixElement, kept};
use crate::element::tf32;
use crate::matrix::{self, PackedElement, TensorCoreElement};
use crate::{Element, SmemTile, math, thread};
use half::{bf16, f16};

/// A lane's part of 16 rows of a left operand: of rows g and g + 8 the bytes 4q to 4q + 4 of one chunk, then of the other.
type Fragment = [u32; 4];

#[inline(always)]
#[track_caller]
fn load<T, const M: usize, const R: usize, const C: usize>(
    tile: SmemTile<T, R, C>,
    row: u32,
    step: usize,
) -> LeftOperand<T, M>
where
    T: MatrixElement<Left = Fragment>,
{
    // Matrices 0 to 3: the upper and lower eight rows of the first chunk, then of the second.
    let lane = thread::lane_id();
    let first = tile.chunk(row + lane % 16, lane / 16);
    let mut rows = [0; M];
    for m in 0..M {
        rows[m] = SmemTile::<T, R, C>::beyond(first, 16 * m as u32, 2 * step as u32).address();
    }
    LeftOperand(matrix::ldmatrix(rows))
}

#[inline(always)]
#[track_caller]
fn add_product_transposed<T, const M: usize, const N: usize, const R: usize, const C: usize>(
    d: &mut [[[f32; 4]; N]; M],
    a: &LeftOperand<T, M>,
    tile: SmemTile<T, R, C>,
    row: u32,
    step: usize,
) where
    T: TensorCoreElement + MatrixElement<Left = Fragment>,
{
    // Matrices 0 to 3: both chunks of eight rows of the tile, then of the next eight.
    let lane = thread::lane_id();
    let first = tile.chunk(row + lane % 8 + lane / 16 * 8, lane / 8 % 2);
    matrix::mma_shared::<T, M, N, false>(d, &a.0, |i| {
        SmemTile::<T, R, C>::beyond(first, 16 * i, 2 * step as u32).address()
    });
}

/// The row that this lane gives the address of, for column blocks 2 `pair` and 2 `pair` + 1 of a right operand of 16-bit
/// elements. Matrices 0 to 3: one chunk of both eights of rows, then the next chunk, each transposed on its way.
#[inline(always)]
fn pair_of_columns<T: PackedElement, const R: usize, const C: usize>(
    tile: SmemTile<T, R, C>,
    step: u32,
    column: u32,
    pair: u32,
) -> u32 {
    let lane = thread::lane_id();
    SmemTile::<T, R, C>::beyond(tile.chunk(lane % 16, lane / 16), 16 * step, column / 8 + 2 * pair).address()
}

/// An element of 16 bits of such matrices: the transpose of a tile can be a left operand.
pub trait PackedMatrixElement: PackedElement + MatrixElement<Left = Fragment> {}

impl<T: PackedElement + MatrixElement<Left = Fragment>> PackedMatrixElement for T {}

impl<T: PackedMatrixElement, const M: usize> LeftOperand<T, M> {
    /// The transpose of columns `column` to `column + 16 M` of a tile, at rows `step * T::DEPTH` and on.
    #[inline(always)]
    #[track_caller]
    pub fn load_transposed<const R: usize, const C: usize>(tile: SmemTile<T, R, C>, column: u32, step: usize) -> Self {
        // Matrices 0 to 3: two chunks of eight rows, which become upper and lower, then of the next eight rows.
        let lane = thread::lane_id();
        let first = tile.chunk(lane % 8 + lane / 16 * 8, lane / 8 % 2);
        let mut rows = [0; M];
        for m in 0..M {
            let chunks = column / 8 + 2 * m as u32;
            rows[m] = SmemTile::<T, R, C>::beyond(first, 16 * step as u32, chunks).address();
        }
        LeftOperand(matrix::ldmatrix_trans(rows))
    }
}

/// 16-bit elements: 16 columns a step.
macro_rules! packed {
    ($($t:ty),*) => {$(
        impl MatrixElement for $t {
            const DEPTH: usize = 16;
            const TENSOR_CORES: bool = true;
            type Left = Fragment;

            #[inline(always)]
            #[track_caller]
            fn load<const M: usize, const R: usize, const C: usize>(
                tile: SmemTile<Self, R, C>,
                row: u32,
                step: usize,
            ) -> LeftOperand<Self, M> {
                load(tile, row, step)
            }

            #[inline(always)]
            fn operand<const M: usize, const N: usize>(p: &[[[f32; 4]; N]; M], step: usize) -> LeftOperand<Self, M> {
                // An accumulator's blocks lie in the lanes as the blocks of a left operand do.
                let mut a = [[0; 4]; M];
                for m in 0..M {
                    for i in 0..4 {
                        let block = &p[m][2 * step + i / 2];
                        a[m][i] = Self::pack(block[2 * (i % 2)], block[2 * (i % 2) + 1]);
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
                add_product_transposed(d, a, tile, row, step);
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
                matrix::mma_shared::<Self, M, N, true>(d, &a.0, |i| pair_of_columns(tile, step as u32, column, i));
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
                let [[w, x, y, z]] = matrix::ldmatrix_trans([pair_of_columns(tile, step, column, 0)]);
                let k = |chunk: usize, i: usize| Accumulator::<M, 2>::column(chunk, i);
                kept::add_product::<Self, M>(d, &a.0, &[[w, x], [y, z]], |row, chunk, i| keep(row, k(chunk, i)));
            }
        }
    )*};
}
packed!(f16, bf16);

/// Eight columns a step. In products with rows of a tile ([`add_product`](MatrixElement::add_product)) column 2q of the
/// left operand takes the tensor cores' place q and column 2q + 1 their place q + 4, and so do the rows of the tile: so the
/// blocks of an accumulator serve as they are.
impl MatrixElement for tf32 {
    const DEPTH: usize = 8;
    const TENSOR_CORES: bool = true;
    const TF32: bool = true;
    type Left = Fragment;

    #[inline(always)]
    #[track_caller]
    fn load<const M: usize, const R: usize, const C: usize>(
        tile: SmemTile<Self, R, C>,
        row: u32,
        step: usize,
    ) -> LeftOperand<Self, M> {
        let mut a = load(tile, row, step);
        for m in 0..M {
            for i in 0..4 {
                a.0[m][i] = rounded(f32::from_bits(a.0[m][i]));
            }
        }
        a
    }

    #[inline(always)]
    fn operand<const M: usize, const N: usize>(p: &[[[f32; 4]; N]; M], step: usize) -> LeftOperand<Self, M> {
        let mut a = [[0; 4]; M];
        for m in 0..M {
            for i in 0..4 {
                a[m][i] = rounded(p[m][step][2 * (i % 2) + i / 2]);
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
        add_product_transposed(d, a, tile, row, step);
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
        let mut b = [[0; 2]; N];
        for n in 0..N {
            b[n] = column_of_tf32(tile, step as u32, column + 8 * n as u32);
        }
        matrix::mma::<Self, M, N>(d, &a.0, &b);
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
        let b = [column_of_tf32(tile, step, column), column_of_tf32(tile, step, column + 8)];
        let k = |chunk: usize| Accumulator::<M, 2>::column(0, chunk);
        kept::add_product::<Self, M>(d, &a.0, &b, |row, chunk, _| keep(row, k(chunk)));
    }
}

/// Rows 2q and 2q + 1 of a step of a right operand, at the lane's column of the block that begins at `column`.
#[inline(always)]
#[track_caller]
fn column_of_tf32<const R: usize, const C: usize>(tile: SmemTile<tf32, R, C>, step: u32, column: u32) -> [u32; 2] {
    let (row, own_column) = (thread::lane_id() % 4 * 2, thread::lane_id() / 4);
    [0, 1].map(|i| {
        let first = tile.element(row + i, own_column);
        rounded(SmemTile::<tf32, R, C>::beyond(first, 8 * step, column / 4).load(0).to_f32())
    })
}

#[inline(always)]
fn rounded(x: f32) -> u32 {
    math::round_to_tf32(x).to_bits()
}
