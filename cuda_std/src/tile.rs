//! Tiles of matrices in shared memory.
use crate::element::Element;
use crate::shared::Shared;
use crate::{Global, copy, thread};
use core::marker::PhantomData;

/// A `ROWS` x `COLS` tile of T in shared memory.
///
/// Layout: panels of at most 128 bytes of columns, one after the other; in a panel the rows follow each other, and the
/// 16-byte chunks of a row are permuted by an exclusive-or with the row (the swizzles of 128, 64 and 32 bytes that the
/// tensor copy engine and the tensor cores of Hopper use too). So eight rows of one column of chunks, and eight chunks of
/// one row, each lie in different banks: `ldmatrix` and copies by rows meet no bank conflict.
pub struct SmemTile<T, const ROWS: usize, const COLS: usize> {
    base: Shared<T>,
}

impl<T, const ROWS: usize, const COLS: usize> Clone for SmemTile<T, ROWS, COLS> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<T, const ROWS: usize, const COLS: usize> Copy for SmemTile<T, ROWS, COLS> {}

impl<T: Element, const ROWS: usize, const COLS: usize> SmemTile<T, ROWS, COLS> {
    /// Elements in 16 bytes.
    pub const CHUNK: u32 = 16 / size_of::<T>() as u32;
    /// What the tile takes of shared memory.
    pub const BYTES: u32 = (ROWS * COLS * size_of::<T>()) as u32;
    /// Elements of the whole tile.
    pub const ELEMENTS: u32 = (ROWS * COLS) as u32;

    const ROW_CHUNKS: u32 = COLS as u32 / Self::CHUNK;
    const PANEL_CHUNKS: u32 = if Self::ROW_CHUNKS < 8 { Self::ROW_CHUNKS } else { 8 };
    const VALID: () = assert!(
        matches!(Self::PANEL_CHUNKS, 2 | 4 | 8) && Self::ROW_CHUNKS % Self::PANEL_CHUNKS == 0 && ROWS.is_multiple_of(8),
        "rows of 32, 64, 128 or a multiple of 128 bytes, eight by eight"
    );

    /// The tile that begins at `base`, aligned to 1024 bytes.
    #[inline(always)]
    pub fn at(base: Shared<T>) -> Self {
        let () = Self::VALID;
        SmemTile { base }
    }

    /// The tile that follows this one in memory, `index` tiles on: a stage of a pipeline.
    #[inline(always)]
    pub fn stage(self, index: u32) -> Self {
        SmemTile { base: self.base.offset(index * Self::ELEMENTS) }
    }

    /// The first address after the tile.
    #[inline(always)]
    pub fn end<U>(self) -> Shared<U> {
        self.base.offset(Self::ELEMENTS).cast()
    }

    /// The 16-byte chunk `chunk` of row `row`: elements `chunk * CHUNK` and on.
    #[inline(always)]
    pub fn chunk(self, row: u32, chunk: u32) -> Shared<T> {
        let (panel, chunk) = (chunk / Self::PANEL_CHUNKS, chunk % Self::PANEL_CHUNKS);
        let swizzle = row / (8 / Self::PANEL_CHUNKS) % Self::PANEL_CHUNKS;
        let chunks = (panel * ROWS as u32 + row) * Self::PANEL_CHUNKS + (chunk ^ swizzle);
        self.base.offset(chunks * Self::CHUNK)
    }

    /// Element (`row`, `col`).
    #[inline(always)]
    pub fn element(self, row: u32, col: u32) -> Shared<T> {
        self.chunk(row, col / Self::CHUNK).offset(col % Self::CHUNK)
    }

    /// Writes the tile's rows from `row` on, `count` of them, to a matrix whose rows are `row_stride` elements apart, by
    /// one warp. Rows of the tile from `rows` on are left out. `to` is where row 0 of the tile goes.
    #[inline(always)]
    #[track_caller]
    pub fn store_rows(self, row: u32, count: u32, to: Global<T>, row_stride: u64, rows: u32) {
        let rows_at_once = thread::WARP / Self::ROW_CHUNKS;
        assert!(rows_at_once * Self::ROW_CHUNKS == thread::WARP && count.is_multiple_of(rows_at_once));
        let (own_row, chunk) = (thread::lane_id() / Self::ROW_CHUNKS, thread::lane_id() % Self::ROW_CHUNKS);
        for i in 0..count / rows_at_once {
            let row = row + i * rows_at_once + own_row;
            if row < rows {
                let bits = self.chunk(row, chunk).cast::<u32>().load_vector::<4>(0);
                let to = to.offset((row as u64 * row_stride + (chunk * Self::CHUNK) as u64) as usize);
                to.cast::<u32>().store_vector(0, bits);
            }
        }
    }
}

/// A matrix in global memory as a sequence of tiles, each `ROWS` further down, which the threads of a block copy to shared
/// memory together.
pub struct TileStream<T, const ROWS: usize, const COLS: usize> {
    /// What this thread copies next. One running address: an offset for each of its rows would cost two registers each.
    from: Global<T>,
    /// From one of its rows to the next, in elements.
    step: usize,
    /// Rows that are left, counted from this thread's first row of the next tile.
    rows: i32,
    threads: u32,
    of: PhantomData<SmemTile<T, ROWS, COLS>>,
}

impl<T: Element, const ROWS: usize, const COLS: usize> TileStream<T, ROWS, COLS> {
    /// The `rows` rows from `from` on, `row_stride` elements apart, copied by the first `threads` threads of the block (a
    /// constant, when all is inlined). They take whole rows at a time, a chunk each, and `ROWS` is a multiple of these.
    #[inline(always)]
    pub fn new(threads: u32, from: Global<T>, row_stride: u64, rows: u32) -> Self {
        let chunks = SmemTile::<T, ROWS, COLS>::ROW_CHUNKS;
        let (row, chunk) = (thread::thread_idx_x() / chunks, thread::thread_idx_x() % chunks);
        let first = row as u64 * row_stride + (chunk * SmemTile::<T, ROWS, COLS>::CHUNK) as u64;
        TileStream {
            from: from.offset(first as usize),
            step: ((threads / chunks) as u64 * row_stride) as usize,
            rows: rows as i32 - row as i32,
            threads,
            of: PhantomData,
        }
    }

    /// Starts to copy the next tile. Rows beyond the last are filled with zeros, not read. The caller commits and waits
    /// ([`copy::commit`], [`copy::wait`]).
    #[inline(always)]
    #[track_caller]
    pub fn copy_async(&mut self, to: SmemTile<T, ROWS, COLS>) {
        let chunks = SmemTile::<T, ROWS, COLS>::ROW_CHUNKS;
        let (row, chunk) = (thread::thread_idx_x() / chunks, thread::thread_idx_x() % chunks);
        let rows_at_once = self.threads / chunks;
        assert!(rows_at_once * chunks == self.threads && (ROWS as u32).is_multiple_of(rows_at_once));
        for i in 0..ROWS as u32 / rows_at_once {
            let first = i * rows_at_once;
            copy::copy_async(to.chunk(first + row, chunk), self.from, (first as i32) < self.rows);
            self.from = self.from.offset(self.step);
        }
        self.rows -= ROWS as i32;
    }
}
