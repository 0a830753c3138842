//! Matrices in the registers of a warp, and their products with tiles in shared memory.
//!
//! f16, bf16 and tf32 are multiplied on the tensor cores (`mma.sync`), f32 exactly, with fused multiply-adds; a kernel is
//! the same for all. Positions follow the tensor cores: with g = lane / 4 and q = lane % 4, a lane holds of each 16 x 8
//! block of an accumulator the rows g and g + 8 at columns 2q and 2q + 1.
mod exact;
mod kept;
mod rows;
mod tensor_cores;

pub use tensor_cores::PackedMatrixElement;

use crate::element::Element;
use crate::{Global, Shared, SmemTile, atomic, math, thread};

/// A matrix of f32 in the registers of one warp: 16 `M` rows, 8 `N` columns; 4 `M N` registers a lane.
///
/// A lane's rows are numbered by `m` in 0..M and `half` in 0..2: row 16 m + 8 half + lane / 4.
#[derive(Clone, Copy)]
pub struct Accumulator<const M: usize, const N: usize>(pub(crate) [[[f32; 4]; N]; M]);

impl<const M: usize, const N: usize> Accumulator<M, N> {
    /// All zeros.
    #[inline(always)]
    pub fn zero() -> Self {
        // SAFETY: numbers; an array expression would be a loop that stays one, and keep the array in local memory.
        unsafe { core::mem::zeroed() }
    }

    /// The row of this lane's `half` of row block `m`.
    #[inline(always)]
    pub fn row(m: usize, half: usize) -> u32 {
        16 * m as u32 + 8 * half as u32 + thread::lane_id() / 4
    }

    /// The column of this lane's element `i` in 0..2 of column block `n`.
    #[inline(always)]
    pub fn column(n: usize, i: usize) -> u32 {
        8 * n as u32 + 2 * (thread::lane_id() % 4) + i as u32
    }

    /// Element (row `half` of row block `m`, column `i` of column block `n`) of this lane.
    #[inline(always)]
    pub fn element_mut(&mut self, m: usize, n: usize, half: usize, i: usize) -> &mut f32 {
        &mut self.0[m][n][2 * half + i]
    }

    /// Folds this lane's elements of a row, in two chains, that their latencies overlap.
    #[inline(always)]
    pub fn fold_row(&self, m: usize, half: usize, combine: impl Fn(f32, f32) -> f32) -> f32 {
        let mut chains = [self.0[m][0][2 * half], self.0[m][0][2 * half + 1]];
        for n in 1..N {
            for i in 0..2 {
                chains[i] = combine(chains[i], self.0[m][n][2 * half + i]);
            }
        }
        combine(chains[0], chains[1])
    }

    /// Whether all of this lane's elements are finite. A NaN or an infinity makes NaN of the sum of all, times 0.
    #[inline(always)]
    pub fn is_finite(&self) -> bool {
        let mut chains = [0.0; 4];
        for m in 0..M {
            for n in 0..N {
                for i in 0..4 {
                    chains[i] = math::fma(self.0[m][n][i], 0.0, chains[i]);
                }
            }
        }
        chains[0] + chains[1] + (chains[2] + chains[3]) == 0.0
    }

    /// Replaces this lane's elements of a row by `f` of them.
    #[inline(always)]
    pub fn map_row(&mut self, m: usize, half: usize, f: impl Fn(f32) -> f32) {
        for n in 0..N {
            for i in 0..2 {
                self.0[m][n][2 * half + i] = f(self.0[m][n][2 * half + i]);
            }
        }
    }

    /// Replaces each of this lane's elements by `f(m, half, element)`, and folds those of each row meanwhile, in two chains:
    /// `fold[m][half]`. Said together, so that what folds fills the gaps of a slow `f`.
    #[inline(always)]
    pub fn map_and_fold_rows(
        &mut self,
        f: impl Fn(usize, usize, f32) -> f32,
        combine: impl Fn(f32, f32) -> f32,
    ) -> [[f32; 2]; M] {
        let mut fold = [[0.0; 2]; M];
        for m in 0..M {
            let mut chains = [[0.0; 2]; 2];
            for n in 0..N {
                for half in 0..2 {
                    for i in 0..2 {
                        let x = f(m, half, self.0[m][n][2 * half + i]);
                        self.0[m][n][2 * half + i] = x;
                        chains[half][i] = if n == 0 { x } else { combine(chains[half][i], x) };
                    }
                }
            }
            for half in 0..2 {
                fold[m][half] = combine(chains[half][0], chains[half][1]);
            }
        }
        fold
    }

    /// Replaces this lane's elements of a row, two neighbours at a time, by `f(column of the first, elements)`.
    #[inline(always)]
    #[track_caller]
    pub fn map_pairs(&mut self, m: usize, half: usize, f: impl Fn(u32, [f32; 2]) -> [f32; 2]) {
        for n in 0..N {
            let x = &mut self.0[m][n];
            [x[2 * half], x[2 * half + 1]] = f(Self::column(n, 0), [x[2 * half], x[2 * half + 1]]);
        }
    }

    /// Replaces all elements by `f(row, column, element)`.
    #[inline(always)]
    pub fn map(&mut self, f: impl Fn(u32, u32, f32) -> f32) {
        for m in 0..M {
            for half in 0..2 {
                for n in 0..N {
                    for i in 0..2 {
                        let x = &mut self.0[m][n][2 * half + i];
                        *x = f(Self::row(m, half), Self::column(n, i), *x);
                    }
                }
            }
        }
    }

    /// Replaces each element x by `f(x, y)`, with y the element of `other` at the same place.
    #[inline(always)]
    pub fn zip(&mut self, other: &Self, f: impl Fn(f32, f32) -> f32) {
        for m in 0..M {
            for n in 0..N {
                for i in 0..4 {
                    self.0[m][n][i] = f(self.0[m][n][i], other.0[m][n][i]);
                }
            }
        }
    }

    /// Replaces each element x by `f(x, y)`, with y the value of its row.
    #[inline(always)]
    pub fn zip_rows(&mut self, rows: &RowVector<M>, f: impl Fn(f32, f32) -> f32) {
        for m in 0..M {
            for n in 0..N {
                for i in 0..4 {
                    self.0[m][n][i] = f(self.0[m][n][i], rows.0[m][i / 2]);
                }
            }
        }
    }

    /// Replaces each element x by `f(x, y)`, with y the value of its column.
    #[inline(always)]
    pub fn zip_columns(&mut self, columns: &ColumnVector<N>, f: impl Fn(f32, f32) -> f32) {
        for m in 0..M {
            for n in 0..N {
                for i in 0..4 {
                    self.0[m][n][i] = f(self.0[m][n][i], columns.0[n][i % 2]);
                }
            }
        }
    }

    /// The left operand of a product: columns `step * T::DEPTH` and on of this matrix, rounded to T.
    #[inline(always)]
    #[track_caller]
    pub fn operand<T: MatrixElement>(&self, step: usize) -> LeftOperand<T, M> {
        T::operand(&self.0, step)
    }

    /// `self += A Bᵀ`, one step of the product's depth: B is rows `row` to `row + 8 N` of `tile`, at columns
    /// `step * T::DEPTH` and on.
    #[inline(always)]
    #[track_caller]
    pub fn add_product_transposed<T: MatrixElement, const R: usize, const C: usize>(
        &mut self,
        a: &LeftOperand<T, M>,
        tile: SmemTile<T, R, C>,
        row: u32,
        step: usize,
    ) {
        T::add_product_transposed(&mut self.0, a, tile, row, step);
    }

    /// `self += A B`, one step of the product's depth: B is rows `step * T::DEPTH` and on of `tile`, at columns `column` to
    /// `column + 8 N`.
    #[inline(always)]
    #[track_caller]
    pub fn add_product<T: MatrixElement, const R: usize, const C: usize>(
        &mut self,
        a: &LeftOperand<T, M>,
        tile: SmemTile<T, R, C>,
        step: usize,
        column: u32,
    ) {
        T::add_product(&mut self.0, a, tile, step, column);
    }

    /// Writes the matrix, rounded to T, to the rows `row` to `row + 16 M` of a tile.
    #[inline(always)]
    #[track_caller]
    pub fn store<T: Element, const R: usize, const C: usize>(&self, tile: SmemTile<T, R, C>, row: u32) {
        self.store_at(tile, row, 0);
    }

    /// Writes the matrix, rounded to T, to the rows `row` to `row + 16 M` of a tile, at columns `column` to `column + 8 N`.
    #[inline(always)]
    #[track_caller]
    pub fn store_at<T: Element, const R: usize, const C: usize>(&self, tile: SmemTile<T, R, C>, row: u32, column: u32) {
        for m in 0..M {
            for half in 0..2 {
                for n in 0..N {
                    let pair = T::from_f32_pair([self.0[m][n][2 * half], self.0[m][n][2 * half + 1]]);
                    tile.element(row + Self::row(m, half), column + Self::column(n, 0)).store_vector(0, pair);
                }
            }
        }
    }

    /// Replaces each element x by `f(x, y)`, with y the element that [`store_at`](Self::store_at) puts at the same place.
    #[inline(always)]
    #[track_caller]
    pub fn zip_tile<T: Element, const R: usize, const C: usize>(
        &mut self,
        tile: SmemTile<T, R, C>,
        row: u32,
        column: u32,
        f: impl Fn(f32, f32) -> f32,
    ) {
        for m in 0..M {
            for half in 0..2 {
                for n in 0..N {
                    let at = tile.element(row + Self::row(m, half), column + Self::column(n, 0));
                    let pair = at.load_vector::<2>(0);
                    for i in 0..2 {
                        let x = &mut self.0[m][n][2 * half + i];
                        *x = f(*x, pair[i].to_f32());
                    }
                }
            }
        }
    }

    /// What the matrix takes of a thread's registers.
    pub const REGISTERS: usize = 4 * M * N;

    /// What the matrix takes of memory in the order of the registers, in elements.
    pub const ELEMENTS: usize = 16 * M * 8 * N;

    /// Where [`add_to`](Self::add_to) adds register `i` of block (`m`, `n`), from the lane's first on.
    #[inline(always)]
    const fn place(m: usize, n: usize, i: usize) -> usize {
        32 * (4 * (N * m + n) + i)
    }

    /// Adds the matrix atomically to [`ELEMENTS`](Self::ELEMENTS) elements of global memory in the order of the registers:
    /// each register of all lanes after the other, so that every addition of a warp fills whole sectors.
    #[inline(always)]
    #[track_caller]
    pub fn add_to(&self, to: Global<f32>) {
        let lane = to.offset(thread::lane_id() as usize);
        for m in 0..M {
            for n in 0..N {
                for i in 0..4 {
                    atomic::global_add_f32(lane.offset(Self::place(m, n, i)), self.0[m][n][i]);
                }
            }
        }
    }

    /// Stores the matrix where [`add_to`](Self::add_to) adds it.
    #[inline(always)]
    #[track_caller]
    pub fn store_to(&self, to: Global<f32>) {
        let lane = to.offset(thread::lane_id() as usize);
        for m in 0..M {
            for n in 0..N {
                for i in 0..4 {
                    lane.store(Self::place(m, n, i), self.0[m][n][i]);
                }
            }
        }
    }

    /// Replaces each element x by `f(x, y)`, with y that of the matrix that was summed up by [`add_to`](Self::add_to).
    #[inline(always)]
    #[track_caller]
    pub fn zip_sums(&mut self, from: Global<f32>, f: impl Fn(f32, f32) -> f32) {
        let lane = from.offset(thread::lane_id() as usize);
        for m in 0..M {
            for n in 0..N {
                for i in 0..4 {
                    let x = &mut self.0[m][n][i];
                    *x = f(*x, lane.load(Self::place(m, n, i)));
                }
            }
        }
    }

    /// The matrix that was summed up by [`add_to`](Self::add_to).
    #[inline(always)]
    #[track_caller]
    pub fn load(from: Global<f32>) -> Self {
        let mut sum = Self::zero();
        let lane = from.offset(thread::lane_id() as usize);
        for m in 0..M {
            for n in 0..N {
                for i in 0..4 {
                    sum.0[m][n][i] = lane.load(Self::place(m, n, i));
                }
            }
        }
        sum
    }
}

/// A value for each row of an [`Accumulator`] of `M` row blocks.
#[derive(Clone, Copy)]
pub struct RowVector<const M: usize>([[f32; 2]; M]);

impl<const M: usize> RowVector<M> {
    /// The value `f(row)` of each of this lane's rows.
    #[inline(always)]
    #[track_caller]
    pub fn new(f: impl Fn(u32) -> f32) -> Self {
        let mut rows = [[0.0; 2]; M];
        for m in 0..M {
            for half in 0..2 {
                rows[m][half] = f(Accumulator::<M, 1>::row(m, half));
            }
        }
        RowVector(rows)
    }

    /// Each value replaced by `f` of it.
    #[inline(always)]
    pub fn map(self, f: impl Fn(f32) -> f32) -> Self {
        let mut rows = self.0;
        for m in 0..M {
            for half in 0..2 {
                rows[m][half] = f(rows[m][half]);
            }
        }
        RowVector(rows)
    }
}

/// A value for each column of an [`Accumulator`] of `N` column blocks.
#[derive(Clone, Copy)]
pub struct ColumnVector<const N: usize>([[f32; 2]; N]);

impl<const N: usize> ColumnVector<N> {
    /// From shared memory: `8 N` values from `from` on, aligned to 8 bytes.
    #[inline(always)]
    #[track_caller]
    pub fn load(from: Shared<f32>) -> Self {
        let mut columns = [[0.0; 2]; N];
        for n in 0..N {
            columns[n] = from.load_vector(Accumulator::<1, N>::column(n, 0));
        }
        ColumnVector(columns)
    }
}

/// A lane's part of a left operand: 16 `M` rows, `T::DEPTH` columns.
#[derive(Clone, Copy)]
pub struct LeftOperand<T: MatrixElement, const M: usize>([T::Left; M]);

impl<T: MatrixElement, const M: usize> LeftOperand<T, M> {
    /// What it takes of a thread's registers.
    pub const REGISTERS: usize = M * size_of::<T::Left>() / 4;

    /// Rows `row` to `row + 16 M` of a tile, at columns `step * T::DEPTH` and on.
    #[inline(always)]
    #[track_caller]
    pub fn load<const R: usize, const C: usize>(tile: SmemTile<T, R, C>, row: u32, step: usize) -> Self {
        T::load(tile, row, step)
    }
}

/// An element of the matrices that [`Accumulator`] multiplies.
pub trait MatrixElement: Element {
    /// Columns of A and rows of B in one step of a product.
    const DEPTH: usize;

    /// Whether the tensor cores multiply it.
    const TENSOR_CORES: bool;

    /// Whether products round it to TF32.
    const TF32: bool = false;

    /// How many steps a product takes whose depth is so many columns. Without tensor cores a step is long, and its loop is to
    /// stay one: the instruction cache holds it, and no step is begun before its registers are free.
    #[inline(always)]
    fn steps(columns: usize) -> usize {
        let steps = (columns / Self::DEPTH) as u32;
        (if const { Self::TENSOR_CORES } { steps } else { math::unknown(steps) }) as usize
    }

    /// A lane's part of 16 rows and `DEPTH` columns of a left operand.
    type Left: Copy;

    #[doc(hidden)]
    fn load<const M: usize, const R: usize, const C: usize>(
        tile: SmemTile<Self, R, C>,
        row: u32,
        step: usize,
    ) -> LeftOperand<Self, M>;

    #[doc(hidden)]
    fn operand<const M: usize, const N: usize>(p: &[[[f32; 4]; N]; M], step: usize) -> LeftOperand<Self, M>;

    #[doc(hidden)]
    fn add_product_transposed<const M: usize, const N: usize, const R: usize, const C: usize>(
        d: &mut [[[f32; 4]; N]; M],
        a: &LeftOperand<Self, M>,
        tile: SmemTile<Self, R, C>,
        row: u32,
        step: usize,
    );

    #[doc(hidden)]
    fn add_product<const M: usize, const N: usize, const R: usize, const C: usize>(
        d: &mut [[[f32; 4]; N]; M],
        a: &LeftOperand<Self, M>,
        tile: SmemTile<Self, R, C>,
        step: usize,
        column: u32,
    );

    /// One step of [`Accumulator::add_kept_product`], two column blocks wide; `keep(row, k)` with k counted from the step's
    /// first.
    #[doc(hidden)]
    fn add_kept_product<const M: usize, const R: usize, const C: usize>(
        d: &mut [[[f32; 4]; 2]; M],
        a: &LeftOperand<Self, M>,
        keep: impl Fn(u32, u32) -> bool,
        tile: SmemTile<Self, R, C>,
        step: u32,
        column: u32,
    );
}
