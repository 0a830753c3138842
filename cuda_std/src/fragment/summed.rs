//! Matrices that [`Accumulator::add_to`](super::Accumulator::add_to) has summed up in global memory, for who takes them by
//! rows.
use crate::Global;

/// 16 rows of such sums: of one matrix, or of several side by side, one after the other in memory.
#[derive(Clone, Copy, Debug)]
pub struct SummedRows(Global<f32>);

impl SummedRows {
    /// Those that begin at `sums`.
    #[inline(always)]
    pub fn at(sums: Global<f32>) -> Self {
        SummedRows(sums)
    }

    /// Eight columns of a row, a multiple of eight from the first. Eight lanes that have rows side by side take whole lines of
    /// the cache.
    #[inline(always)]
    #[track_caller]
    pub fn load_eight(self, row: u32, column: u32) -> [f32; 8] {
        let [even, odd] = self.eight(row, column);
        let (even, odd) = (even.load_vector::<4>(0), odd.load_vector::<4>(0));
        [even[0], odd[0], even[1], odd[1], even[2], odd[2], even[3], odd[3]]
    }

    /// Sets them to 0.
    #[inline(always)]
    #[track_caller]
    pub fn clear_eight(self, row: u32, column: u32) {
        let [even, odd] = self.eight(row, column);
        even.store_vector(0, [0.0; 4]);
        odd.store_vector(0, [0.0; 4]);
    }

    /// Where they are. A register of a row is a column of each lane of a quad: the even columns, and then the odd ones.
    #[inline(always)]
    fn eight(self, row: u32, column: u32) -> [Global<f32>; 2] {
        let even = self.0.offset((16 * column + 64 * (row / 8) + 4 * (row % 8)) as usize);
        [even, even.offset(32)]
    }
}
