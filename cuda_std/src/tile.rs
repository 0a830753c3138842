//! Tiles of matrices in shared memory.
use crate::element::Element;
use crate::math::{unknown, unknown_before};
use crate::shared::Shared;
use crate::{Global, GlobalMatrix, copy, thread};
use core::marker::PhantomData;
use core::ops::Range;

/// Columns of a panel of a tile of so many columns, of elements of so many bytes: as many as make 128 bytes, or the largest
/// power of two of 16 bytes that divides a row.
pub(crate) const fn panel_columns(columns: u32, bytes: u32) -> u32 {
    let chunks = columns * bytes / 16;
    let panel = if chunks.trailing_zeros() < 3 { 1 << chunks.trailing_zeros() } else { 8 };
    panel * 16 / bytes
}

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
    const PANEL_CHUNKS: u32 = Self::PANEL_COLUMNS / Self::CHUNK;
    /// Columns of a panel: rows of at most 128 bytes, which the swizzle permutes.
    pub const PANEL_COLUMNS: u32 = panel_columns(COLS as u32, size_of::<T>() as u32);
    /// How many panels the tile has, one after the other.
    pub const PANELS: u32 = Self::ROW_CHUNKS / Self::PANEL_CHUNKS;

    const VALID: () = assert!(
        matches!(Self::PANEL_CHUNKS, 2 | 4 | 8) && ROWS.is_multiple_of(8),
        "rows of a multiple of 32 bytes, eight by eight"
    );

    /// Chunks of a row that as many threads copy at once: narrow rows whole, wide ones a panel after the other, so that
    /// the swizzle is the same for all rows that a thread copies.
    const SLAB_CHUNKS: u32 =
        if matches!(Self::ROW_CHUNKS, 2 | 4 | 8 | 16) { Self::ROW_CHUNKS } else { Self::PANEL_CHUNKS };
    const SLABS: u32 = Self::ROW_CHUNKS / Self::SLAB_CHUNKS;

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

    /// The first address of the tile.
    #[inline(always)]
    pub fn start<U>(self) -> Shared<U> {
        self.base.cast()
    }

    /// The first address after the tile.
    #[inline(always)]
    pub fn end<U>(self) -> Shared<U> {
        self.base.offset(Self::ELEMENTS).cast()
    }

    /// The first address of panel `panel`.
    #[inline(always)]
    pub fn panel(self, panel: u32) -> Shared<T> {
        self.base.offset(panel * ROWS as u32 * Self::PANEL_COLUMNS)
    }

    /// The 16-byte chunk `chunk` of row `row`: elements `chunk * CHUNK` and on.
    #[inline(always)]
    pub fn chunk(self, row: u32, chunk: u32) -> Shared<T> {
        let (panel, chunk) = (chunk / Self::PANEL_CHUNKS, chunk % Self::PANEL_CHUNKS);
        let swizzle = row / (8 / Self::PANEL_CHUNKS) % Self::PANEL_CHUNKS;
        let chunks = (panel * ROWS as u32 + row) * Self::PANEL_CHUNKS + (chunk ^ swizzle);
        self.base.offset(chunks * Self::CHUNK)
    }

    /// The chunk `rows` rows below `first` and `chunks` to the right, where `first` is chunk 0 or 1 of its row, `rows` a
    /// multiple of 8 and `chunks` even. The swizzle stays the same, and what is constant of the way is part of an
    /// instruction: an address of its own for each chunk would take a register each.
    #[inline(always)]
    pub(crate) fn beyond(first: Shared<T>, rows: u32, chunks: u32) -> Shared<T> {
        let (panels, chunks) = (chunks / Self::PANEL_CHUNKS, chunks % Self::PANEL_CHUNKS);
        let turned = Shared::<T>::from_address(first.address() ^ (16 * chunks));
        turned.offset((panels * ROWS as u32 + rows) * Self::PANEL_CHUNKS * Self::CHUNK)
    }

    /// How many elements lie between any chunk and the one `rows` rows down and `chunks` chunks on, if it is the same for
    /// all: whole swizzles down, and whole panels on.
    #[inline(always)]
    fn distance(self, rows: u32, chunks: u32) -> Option<u32> {
        let panels = chunks / Self::PANEL_CHUNKS;
        let is_same = rows.is_multiple_of(8) && chunks.is_multiple_of(Self::PANEL_CHUNKS);
        is_same.then_some((panels * ROWS as u32 + rows) * Self::PANEL_CHUNKS * Self::CHUNK)
    }

    /// Element (`row`, `col`).
    #[inline(always)]
    pub fn element(self, row: u32, col: u32) -> Shared<T> {
        self.chunk(row, col / Self::CHUNK).offset(col % Self::CHUNK)
    }

    /// Writes the tile's rows from `row` on, `count` of them, to a matrix, by one warp. What the matrix does not have is
    /// left out.
    #[inline(always)]
    #[track_caller]
    pub fn store_rows(self, row: u32, count: u32, to: GlobalMatrix<T>) {
        let rows_at_once = thread::WARP / Self::SLAB_CHUNKS;
        assert!(count.is_multiple_of(rows_at_once));
        let times = count / rows_at_once;
        if to.aligned {
            self.each_chunk_of_rows(row, times, to, |from, to, columns| {
                // Loaded by all lanes, so that they load together.
                let bits = from.cast::<u32>().load_vector::<4>(0);
                if columns > 0 {
                    to.cast::<u32>().store_vector(0, bits);
                }
            });
        } else {
            // Rare, and little code as a loop.
            self.each_chunk_of_rows(row, unknown(times), to, store_elements);
        }
    }

    /// Calls `store(from, to, columns)` for each chunk of this lane, of which the matrix has so many columns.
    #[inline(always)]
    #[track_caller]
    fn each_chunk_of_rows(self, row: u32, times: u32, to: GlobalMatrix<T>, store: impl Fn(Shared<T>, Global<T>, u32)) {
        let (own_row, own_chunk) = (thread::lane_id() / Self::SLAB_CHUNKS, thread::lane_id() % Self::SLAB_CHUNKS);
        for i in 0..times {
            let row = row + i * (thread::WARP / Self::SLAB_CHUNKS) + own_row;
            for slab in 0..Self::SLABS {
                let chunk = slab * Self::SLAB_CHUNKS + own_chunk;
                let column = chunk * Self::CHUNK;
                let columns = if row < to.rows { to.columns.saturating_sub(column) } else { 0 };
                let at = to.data.offset((row as u64 * to.row_stride + column as u64) as usize);
                store(self.chunk(row, chunk), at, columns);
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
    /// Rows that are left, counted from this thread's first row of the next tile; none if its columns are not there.
    rows: i32,
    /// Columns that are left, counted from this thread's first.
    columns: i32,
    threads: u32,
    aligned: bool,
    of: PhantomData<SmemTile<T, ROWS, COLS>>,
}

impl<T: Element, const ROWS: usize, const COLS: usize> TileStream<T, ROWS, COLS> {
    const SLAB_CHUNKS: u32 = SmemTile::<T, ROWS, COLS>::SLAB_CHUNKS;
    const SLAB_COLUMNS: u32 = Self::SLAB_CHUNKS * SmemTile::<T, ROWS, COLS>::CHUNK;
    const SLABS: u32 = SmemTile::<T, ROWS, COLS>::SLABS;

    /// A matrix of at most `COLS` columns, copied by the first `threads` threads of the block (a constant, when all is
    /// inlined). They take slabs of whole rows at a time, a chunk each, and `ROWS` is a multiple of these.
    #[inline(always)]
    pub fn new(threads: u32, matrix: GlobalMatrix<T>) -> Self {
        let (row, chunk) = Self::place();
        let column = chunk * SmemTile::<T, ROWS, COLS>::CHUNK;
        let first = row as u64 * matrix.row_stride + column as u64;
        TileStream {
            from: matrix.data.offset(first as usize),
            step: ((threads / Self::SLAB_CHUNKS) as u64 * matrix.row_stride) as usize,
            rows: if column < matrix.columns { matrix.rows as i32 - row as i32 } else { 0 },
            columns: matrix.columns as i32 - column as i32,
            threads,
            aligned: matrix.aligned,
            of: PhantomData,
        }
    }

    /// Goes on `elements` further, which may wrap around to somewhere before.
    #[inline(always)]
    pub fn skip(&mut self, elements: u64) {
        self.from = self.from.offset(elements as usize);
    }

    /// Starts to copy the next tile; a matrix that is not aligned is copied at once. Rows and columns that the matrix does
    /// not have are filled with zeros, not read. The caller commits and waits ([`copy::commit`], [`copy::wait`]).
    #[inline(always)]
    #[track_caller]
    pub fn copy_async(&mut self, to: SmemTile<T, ROWS, COLS>) {
        self.copy_part_async(to, 0, 1);
    }

    /// As [`copy_async`](Self::copy_async) for a matrix of which `rows` are left from the first of this tile on. What follows from
    /// them and from the thread is found anew: from one tile to the next only the address takes registers.
    #[inline(always)]
    #[track_caller]
    pub fn copy_async_anew(&mut self, to: SmemTile<T, ROWS, COLS>, rows: u32, columns: u32) {
        let (own_row, own_chunk) = Self::place_of(unknown_before(thread::thread_idx_x(), rows));
        self.columns = columns as i32 - (own_chunk * SmemTile::<T, ROWS, COLS>::CHUNK) as i32;
        self.rows = if self.columns > 0 { rows as i32 - own_row as i32 } else { 0 };
        self.copy_own_rows(to, (own_row, own_chunk), 0..Self::rows_of_a_thread(self.threads));
    }

    /// One of `parts` parts of [`copy_async`](Self::copy_async), which are all to be called, in their order: so copies
    /// start one by one between other instructions, and none of them waits for another.
    #[inline(always)]
    #[track_caller]
    pub fn copy_part_async(&mut self, to: SmemTile<T, ROWS, COLS>, part: usize, parts: usize) {
        let count = Self::rows_of_a_thread(self.threads);
        let limit = |part| (count as usize * part / parts) as u32;
        self.copy_own_rows(to, Self::place(), limit(part)..limit(part + 1));
        if part + 1 == parts {
            self.rows -= ROWS as i32;
        }
    }

    /// Starts to copy, or copies at once, these rows of this thread, whose first row and chunk are `place`.
    #[inline(always)]
    #[track_caller]
    fn copy_own_rows(&mut self, to: SmemTile<T, ROWS, COLS>, place: (u32, u32), rows: Range<u32>) {
        if self.aligned {
            self.copy_rows(to, place, rows, |to, from, _, valid| copy::copy_async(to, from, valid));
        } else {
            // Rare, and little code as a loop.
            self.copy_rows(to, place, unknown(rows.start)..unknown(rows.end), |to, from, columns, valid| {
                load_elements(from, to, if valid { columns } else { 0 });
            });
        }
    }

    /// Calls `copy(to, from, columns, valid)` for each chunk of these rows of this thread, whose first row and chunk are
    /// `place`: `columns` are there from the chunk's first on, if it is valid.
    #[inline(always)]
    #[track_caller]
    fn copy_rows(
        &mut self,
        to: SmemTile<T, ROWS, COLS>,
        place: (u32, u32),
        rows: Range<u32>,
        copy: impl Fn(Shared<T>, Global<T>, u32, bool),
    ) {
        // Which slabs are there is found anew for each tile: kept, it would take a register a slab.
        let all_columns = unknown_before(self.columns as u32, self.rows as u32) as i32;
        Self::each_chunk(self.threads, to, place, rows, |to, row, slab| {
            let column = slab * Self::SLAB_COLUMNS;
            let columns = all_columns - column as i32;
            let valid = row < self.rows && (slab == 0 || columns > 0);
            copy(to, self.from.offset(column as usize), columns as u32, valid);
            if slab + 1 == Self::SLABS {
                self.from = self.from.offset(self.step);
            }
        });
    }

    /// Whether there is a NaN or an infinity among what this thread has copied to a tile. To be asked after the wait: a
    /// thread sees its own copies without a barrier. Where they are is found anew: from one tile to the next it takes no
    /// registers.
    #[inline(always)]
    #[track_caller]
    pub fn copied_nonfinite(&self, tile: SmemTile<T, ROWS, COLS>) -> bool {
        let mut found = 0;
        let rows = 0..Self::rows_of_a_thread(self.threads);
        let place = Self::place_of(unknown_before(thread::thread_idx_x(), tile.base.address()));
        Self::each_chunk(self.threads, tile, place, rows, |chunk, _, _| {
            for word in chunk.cast::<u32>().load_vector::<4>(0) {
                found |= T::nonfinite(word);
            }
        });
        found != 0
    }

    /// How many rows of a tile each of so many threads copies a chunk of, in each slab.
    #[inline(always)]
    fn rows_of_a_thread(threads: u32) -> u32 {
        let rows_at_once = threads / Self::SLAB_CHUNKS;
        assert!(rows_at_once * Self::SLAB_CHUNKS == threads && (ROWS as u32).is_multiple_of(rows_at_once));
        ROWS as u32 / rows_at_once
    }

    /// Calls `f(chunk, row, slab)` for each chunk of these rows of a thread in a tile; rows count from its first.
    #[inline(always)]
    #[track_caller]
    fn each_chunk(
        threads: u32,
        tile: SmemTile<T, ROWS, COLS>,
        (own_row, own_chunk): (u32, u32),
        rows: Range<u32>,
        mut f: impl FnMut(Shared<T>, i32, u32),
    ) {
        let first = tile.chunk(own_row, own_chunk);
        for i in rows {
            let row = i * (threads / Self::SLAB_CHUNKS);
            for slab in 0..Self::SLABS {
                let chunk = slab * Self::SLAB_CHUNKS;
                let at = match tile.distance(row, chunk) {
                    Some(distance) => first.offset(distance),
                    None => tile.chunk(row + own_row, chunk + own_chunk),
                };
                f(at, row as i32, slab);
            }
        }
    }

    /// This thread's first row and chunk.
    #[inline(always)]
    fn place() -> (u32, u32) {
        Self::place_of(thread::thread_idx_x())
    }

    #[inline(always)]
    fn place_of(thread: u32) -> (u32, u32) {
        (thread / Self::SLAB_CHUNKS, thread % Self::SLAB_CHUNKS)
    }
}

/// Writes a chunk, or as much of it as `columns` are there for, to global memory.
#[inline(always)]
#[track_caller]
fn store_elements<T: Element>(from: Shared<T>, to: Global<T>, columns: u32) {
    for i in 0..16 / size_of::<T>() as u32 {
        if i < columns {
            to.store(i as usize, from.load(i));
        }
    }
}

/// The reverse of [`store_elements`]; the rest of the chunk becomes 0.
#[inline(always)]
#[track_caller]
fn load_elements<T: Element>(from: Global<T>, to: Shared<T>, columns: u32) {
    for i in 0..16 / size_of::<T>() as u32 {
        to.store(i, if i < columns { from.load(i as usize) } else { T::from_f32(0.0) });
    }
}
