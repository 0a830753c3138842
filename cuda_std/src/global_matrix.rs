//! Matrices in global memory.
use crate::Global;

/// A matrix in global memory, as tiles are copied from and to it.
pub struct GlobalMatrix<T> {
    /// Its first element.
    pub data: Global<T>,
    /// From one row to the next, in elements.
    pub row_stride: u64,
    /// How many rows.
    pub rows: u32,
    /// Elements of a row, which follow each other.
    pub columns: u32,
    /// Whether each row begins at a multiple of 16 bytes and is a multiple of 16 bytes long. One that is not is copied
    /// element by element; where this is known to be true when a kernel is built, that costs nothing.
    pub aligned: bool,
}

impl<T> Clone for GlobalMatrix<T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for GlobalMatrix<T> {}
