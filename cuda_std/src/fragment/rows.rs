//! Accumulators and memory, without a detour: row by row, column by column, or as the registers lie.
use super::Accumulator;
use crate::math::unknown_before;
use crate::matrix::{self, PackedElement};
use crate::thread::lane_id;
use crate::warp::{ALL, shuffle_xor};
use crate::{Global, GlobalMatrix, Shared};

impl<const N: usize> Accumulator<1, N> {
    /// Writes the matrix, rounded to T, to the first 16 rows of an aligned matrix in global memory; what that does not
    /// have is left out.
    #[inline(always)]
    #[track_caller]
    pub fn store_rows<T: PackedElement>(&self, to: GlobalMatrix<T>) {
        self.store_rows_at(to.data, to.columns, |row| (row as u64 * to.row_stride, row < to.rows));
    }

    /// Writes the first `columns` columns of the matrix, rounded to T, to rows in global memory, which begin at multiples of
    /// 16 bytes: `row_of` says of each how many elements from `to` on it begins, and whether it is there. The four lanes of a
    /// quad, which share a row, swap their pairs, so that each has eight columns.
    #[inline(always)]
    #[track_caller]
    pub fn store_rows_at<T: PackedElement>(&self, to: Global<T>, columns: u32, row_of: impl Fn(u32) -> (u64, bool)) {
        self.store_rows_by(lane_id(), to, columns, row_of);
    }

    /// The same, to be said in a loop: what follows from the lane is found anew once `x` is known, and takes no registers from
    /// one time to the next.
    #[inline(always)]
    #[track_caller]
    pub fn store_rows_anew<T: PackedElement>(
        &self,
        x: u32,
        to: Global<T>,
        columns: u32,
        row_of: impl Fn(u32) -> (u64, bool),
    ) {
        self.store_rows_by(unknown_before(lane_id(), x), to, columns, row_of);
    }

    #[inline(always)]
    #[track_caller]
    fn store_rows_by<T: PackedElement>(
        &self,
        lane: u32,
        to: Global<T>,
        columns: u32,
        row_of: impl Fn(u32) -> (u64, bool),
    ) {
        const { assert!(N.is_multiple_of(4), "the lanes of a quad take a block of eight columns each") };
        for half in 0..2 {
            let (row, is_there) = row_of(8 * half as u32 + lane / 4);
            for first in (0..N).step_by(4) {
                let mut words = [0; 4];
                for i in 0..4 {
                    let block = &self.0[0][first + i];
                    words[i] = T::pack(block[2 * half], block[2 * half + 1]);
                }
                let column = 8 * (first as u32 + lane % 4);
                let at: Global<u32> = to.offset((row + column as u64) as usize).cast();
                let words = transposed(words, lane);
                if is_there && column < columns {
                    at.store_vector(0, words);
                }
            }
        }
    }

    /// As [`store_rows_at`](Self::store_rows_at), in f32, with rows that begin at multiples of 8 bytes: each lane has pairs.
    #[inline(always)]
    #[track_caller]
    pub fn store_f32_rows_at(&self, to: Global<f32>, columns: u32, row_of: impl Fn(u32) -> (u64, bool)) {
        for half in 0..2 {
            let (row, is_there) = row_of(Self::row(0, half));
            for n in 0..N {
                let (block, column) = (&self.0[0][n], Self::column(n, 0));
                if is_there && column < columns {
                    to.store_vector((row + column as u64) as usize, [block[2 * half], block[2 * half + 1]]);
                }
            }
        }
    }
}

impl<const N: usize> Accumulator<1, N> {
    /// As [`zip_columns`](Self::zip_columns), with `8 N` values in shared memory from `columns` on, aligned to 8 bytes.
    /// Each is loaded where it is used: where few registers are left, these do not hold all of them at once.
    #[inline(always)]
    #[track_caller]
    pub fn zip_shared_columns(&mut self, columns: Shared<f32>, f: impl Fn(f32, f32) -> f32) {
        for n in 0..N {
            let pair = columns.load_vector::<2>(Self::column(n, 0));
            for i in 0..4 {
                self.0[0][n][i] = f(self.0[0][n][i], pair[i % 2]);
            }
        }
    }

    /// Writes the matrix to [`ELEMENTS`](Self::ELEMENTS) elements of shared memory in the order of the registers, four
    /// of a lane at a time, without a bank conflict.
    #[inline(always)]
    #[track_caller]
    pub fn store_registers(&self, to: Shared<f32>) {
        let lane = to.offset(4 * lane_id());
        for n in 0..N {
            lane.store_vector(128 * n as u32, self.0[0][n]);
        }
    }

    /// Writes the matrix, rounded to T, to shared memory in blocks of 8 x 8, each of which takes 128 bytes: of each eight
    /// columns the upper and the lower block. Rows of a block take 16 bytes each; or its columns, if `TRANSPOSED`. N is
    /// even. PTX ISA for these: `stmatrix.sync.aligned.m8n8.x4.trans`.
    #[inline(always)]
    #[track_caller]
    pub fn store_blocks<T: PackedElement, const TRANSPOSED: bool>(&self, to: Shared<T>) {
        const { assert!(N.is_multiple_of(2), "four blocks at a time") };
        for step in 0..N / 2 {
            let mut words = [0; 4];
            for i in 0..4 {
                let block = &self.0[0][2 * step + i / 2];
                words[i] = T::pack(block[2 * (i % 2)], block[2 * (i % 2) + 1]);
            }
            let blocks = to.offset(256 * step as u32);
            if TRANSPOSED {
                matrix::stmatrix_trans([blocks.offset(8 * lane_id()).address()], [words]);
            } else {
                for i in 0..4 {
                    blocks.cast::<u32>().offset(lane_id()).store(32 * i as u32, words[i]);
                }
            }
        }
    }

    /// Replaces each element by `f` of it and that of the matrix that [`store_registers`](Self::store_registers) wrote.
    #[inline(always)]
    #[track_caller]
    pub fn zip_registers(&mut self, from: Shared<f32>, f: impl Fn(f32, f32) -> f32) {
        let lane = from.offset(4 * lane_id());
        for n in 0..N {
            let other = lane.load_vector::<4>(128 * n as u32);
            for i in 0..4 {
                self.0[0][n][i] = f(self.0[0][n][i], other[i]);
            }
        }
    }

    /// The matrix that [`store_registers`](Self::store_registers) wrote, from global memory.
    #[inline(always)]
    #[track_caller]
    pub fn load_registers(from: Global<f32>) -> Self {
        let mut matrix = Self::zero();
        let lane = from.offset(4 * lane_id() as usize);
        for n in 0..N {
            matrix.0[0][n] = lane.load_vector(128 * n);
        }
        matrix
    }
}

/// The transpose of the 4 x 4 matrix whose columns the lanes of a quad have: word i of lane j becomes word j of lane i. Said by
/// lane `lane`.
#[inline(always)]
#[track_caller]
fn transposed([a, b, c, d]: [u32; 4], lane: u32) -> [u32; 4] {
    let ([a, c], [b, d]) = (swapped([a, c], 2, lane), swapped([b, d], 2, lane));
    let ([a, b], [c, d]) = (swapped([a, b], 1, lane), swapped([c, d], 1, lane));
    [a, b, c, d]
}

/// Of two words, the lanes at this distance swap the lower one's second and the upper one's first.
#[inline(always)]
#[track_caller]
fn swapped([first, second]: [u32; 2], distance: u32, lane: u32) -> [u32; 2] {
    let is_lower = lane & distance == 0;
    let received = shuffle_xor(ALL, if is_lower { second } else { first }, distance);
    if is_lower { [first, received] } else { [received, second] }
}
