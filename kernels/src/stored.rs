//! What is in memory for each score of a head, a row a query and a column a key: a bias, or a mask.
use crate::attention::Tensor;
use crate::mask::Mask;
use core::array::from_fn;
use cuda_std::Global;
use cuda_std::element::Scalar;
use cuda_std::fragment::Accumulator;
use cuda_std::math::unknown_before;
use cuda_std::warp::{ALL, sync_warp};

/// A matrix of an element a score. Rows may be the same one, with a stride of 0.
pub struct Stored<E> {
    /// That of query 0 and key 0; null: there is no such matrix.
    first: Global<E>,
    row_stride: u64,
}

impl<E> Clone for Stored<E> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<E> Copy for Stored<E> {}

impl<E: Scalar> Stored<E> {
    /// That of one head of one batch.
    #[inline(always)]
    pub fn of(tensor: &Tensor<E>, batch: u32, head: u32) -> Self {
        let first = if tensor.data.is_null() { Global::NULL } else { tensor.row(batch, head, 0) };
        Stored { first, row_stride: tensor.row_stride }
    }

    /// Whether there is none.
    #[inline(always)]
    pub fn is_null(self) -> bool {
        self.first.is_null()
    }

    /// That of a query and a key.
    #[inline(always)]
    #[track_caller]
    pub fn load(self, row: u32, key: u32) -> E {
        self.row(row).load(key as usize)
    }

    #[inline(always)]
    fn row(self, row: u32) -> Global<E> {
        self.first.offset((row as u64 * self.row_stride) as usize)
    }

    /// Whether two neighbours, the first with an even key, are one access in every row. Found anew once `x` is known: before a loop it
    /// would take registers in it.
    #[inline(always)]
    fn has_pairs(self, x: u32) -> bool {
        let pair = 2 * size_of::<E>() as u32;
        (unknown_before(self.first.address() as u32, x) | (self.row_stride as u32 * size_of::<E>() as u32))
            .is_multiple_of(pair)
    }

    /// Replaces each score by `f` of it and of what is here for it. The scores begin at row `first_row` and key `first_key`, which
    /// is even. `inside`: all their rows are queries, and all their columns keys. A warp says this together.
    #[inline(always)]
    #[track_caller]
    pub fn zip<const M: usize, const N: usize>(
        self,
        s: &mut Accumulator<M, N>,
        (first_row, first_key): (u32, u32),
        inside: bool,
        mask: &Mask,
        f: impl Fn(f32, E) -> f32,
    ) {
        let in_pairs = inside && self.has_pairs(s.element_mut(0, 0, 0, 0).to_bits());
        for m in 0..M {
            let row = |half| first_row + Accumulator::<M, N>::row(m, half);
            let key = |n, i| first_key + Accumulator::<M, N>::column(n, i);
            let stored: [[[E; 2]; N]; 2] = if in_pairs {
                from_fn(|half| {
                    let row = self.row(row(half));
                    from_fn(|n| row.load_vector(key(n, 0) as usize))
                })
            } else {
                from_fn(|half| from_fn(|n| from_fn(|i| self.load_nearest(row(half), key(n, i), mask))))
            };
            all_loaded();
            for half in 0..2 {
                for n in 0..N {
                    for i in 0..2 {
                        let s = s.element_mut(m, n, half, i);
                        *s = f(*s, stored[half][n][i]);
                    }
                }
            }
        }
    }

    /// As [`zip`](Self::zip) for transposed scores, whose rows are keys and whose columns are queries.
    #[inline(always)]
    #[track_caller]
    pub fn zip_transposed<const M: usize, const N: usize>(
        self,
        s: &mut Accumulator<M, N>,
        (first_key, first_row): (u32, u32),
        inside: bool,
        mask: &Mask,
        f: impl Fn(f32, E) -> f32,
    ) {
        let row = |n, i| first_row + Accumulator::<M, N>::column(n, i);
        let stored: [[[[E; 2]; M]; 2]; N] = if inside {
            let first_key = (first_key + Accumulator::<M, N>::row(0, 0)) as usize;
            from_fn(|n| {
                from_fn(|i| {
                    // What lies further in the row is a constant further.
                    let row = self.row(row(n, i)).offset(first_key);
                    from_fn(|m| from_fn(|half| row.load(16 * m + 8 * half)))
                })
            })
        } else {
            let key = |m, half| first_key + Accumulator::<M, N>::row(m, half);
            from_fn(|n| from_fn(|i| from_fn(|m| from_fn(|half| self.load_nearest(row(n, i), key(m, half), mask)))))
        };
        all_loaded();
        for n in 0..N {
            for i in 0..2 {
                for m in 0..M {
                    for half in 0..2 {
                        let s = s.element_mut(m, n, half, i);
                        *s = f(*s, stored[n][i][m][half]);
                    }
                }
            }
        }
    }

    /// Beyond the last query and the last key nothing is in memory: there that of the last ones, since a branch would make each load
    /// wait for the one before.
    #[inline(always)]
    #[track_caller]
    fn load_nearest(self, row: u32, key: u32, mask: &Mask) -> E {
        let last = |x: u32, count: u32| if x < count { x } else { count - 1 };
        self.load(last(row, mask.seqlen_q), last(key, mask.seqlen_k))
    }
}

/// What was loaded is used from here on: so all loads are under way at once, and none waits for the use of another.
#[inline(always)]
#[track_caller]
fn all_loaded() {
    sync_warp(ALL);
}
