//! Tiles, whose columns are vector lanes, and their products.
use super::isa::Vector;

/// Queries of a tile, and keys: four vectors of AVX-512. S takes 16 KiB, and so does a block of Q, K, V or O for each
/// 64 of its head dim.
pub const BLOCK: usize = 64;

/// One row of a tile.
pub type Lanes = [f32; BLOCK];
/// Rows of lanes.
pub type Tile = Vec<Lanes>;

/// What runs along the lanes of a tile of scores, as a const parameter: queries, and its rows are keys.
pub const QUERIES: bool = true;
/// Keys, and its rows are queries.
pub const KEYS: bool = false;

/// A tile of zeros.
pub fn tile(rows: usize) -> Tile {
    vec![[0.0; BLOCK]; rows]
}

/// `sums[i][lane] = Σ rows(i, x) right[x][lane]`: the product of rows and a transposed block, of as many columns as
/// `right` has rows.
///
/// # Safety
/// The CPU has the instructions of V.
#[inline(always)]
pub unsafe fn multiply<V: Vector, const ROWS: usize>(rows: &[f32], right: &[Lanes], sums: &mut [Lanes]) {
    sums.fill([0.0; BLOCK]);
    let left = Left { data: rows, rows: sums.len(), row_stride: right.len(), step_stride: 1 };
    // SAFETY: as the caller promises.
    unsafe { add_product::<V, ROWS>(left, right, sums) };
}

/// `sums[x][lane] += Σ rows(i, x) weights[i][lane]`: the product of transposed rows, of as many columns as `sums` has
/// rows, and weights. Where something is hidden, `seen[i][lane]` is not 0 for those terms that take part. The others
/// have a weight of 0, which hides all but a NaN or an infinity; these do no harm either.
///
/// # Safety
/// The CPU has the instructions of V.
#[inline(always)]
pub unsafe fn add_weighted<V: Vector, const ROWS: usize>(
    rows: &[f32],
    weights: &[Lanes],
    sums: &mut [Lanes],
    seen: Option<&[[u8; BLOCK]]>,
) {
    let width = sums.len();
    let rows = &rows[..weights.len() * width];
    if let Some(seen) = seen
        && !rows.iter().fold(true, |finite, x| finite & x.is_finite())
    {
        for ((row, weights), seen) in rows.chunks(width).zip(weights).zip(seen) {
            for (x, sums) in row.iter().zip(&mut *sums) {
                for lane in 0..BLOCK {
                    sums[lane] += if seen[lane] != 0 { x * weights[lane] } else { 0.0 };
                }
            }
        }
        return;
    }
    let left = Left { data: rows, rows: width, row_stride: 1, step_stride: width };
    // SAFETY: as the caller promises.
    unsafe { add_product::<V, ROWS>(left, weights, sums) };
}

/// The left factor of a product: element (row, step) is at `row * row_stride + step * step_stride`.
#[derive(Clone, Copy)]
struct Left<'a> {
    data: &'a [f32],
    rows: usize,
    row_stride: usize,
    step_stride: usize,
}

/// Adds a product to sums: `sums[row][lane] += Σ left(row, step) right[step][lane]`.
///
/// # Safety
/// The CPU has the instructions of V.
#[inline(always)]
unsafe fn add_product<V: Vector, const ROWS: usize>(left: Left, right: &[Lanes], sums: &mut [Lanes]) {
    let whole = left.rows / ROWS * ROWS;
    for lane in (0..BLOCK).step_by(2 * V::LANES) {
        for row in (0..whole).step_by(ROWS) {
            // SAFETY: as the caller promises.
            unsafe { add_register_tile::<V, ROWS>(left, right, sums, row, lane) };
        }
        for row in whole..left.rows {
            // SAFETY: as the caller promises.
            unsafe { add_register_tile::<V, 1>(left, right, sums, row, lane) };
        }
    }
}

/// `ROWS` rows by two vectors of the sums, which stay in registers.
///
/// # Safety
/// The CPU has the instructions of V.
#[inline(always)]
unsafe fn add_register_tile<V: Vector, const ROWS: usize>(
    left: Left,
    right: &[Lanes],
    sums: &mut [Lanes],
    row: usize,
    lane: usize,
) {
    if right.is_empty() {
        return;
    }
    let last = (row + ROWS - 1) * left.row_stride + (right.len() - 1) * left.step_stride;
    assert!(last < left.data.len() && row + ROWS <= sums.len() && lane + 2 * V::LANES <= BLOCK);
    let second = lane + V::LANES;

    // Plain loops over constant bounds, so that the tile stays in registers, here and in all of a body: a closure in
    // `map` or `from_fn` is compiled without the instructions of V, and called.
    // SAFETY: the caller promises the instructions; indices into the left factor are at most `last`.
    unsafe {
        let mut tile = [[V::splat(0.0); 2]; ROWS];
        for i in 0..ROWS {
            tile[i] = [V::load(&sums[row + i][lane..]), V::load(&sums[row + i][second..])];
        }
        for (step, right) in right.iter().enumerate() {
            let right = [V::load(&right[lane..]), V::load(&right[second..])];
            for i in 0..ROWS {
                let left = *left.data.get_unchecked((row + i) * left.row_stride + step * left.step_stride);
                let left = V::splat(left);
                tile[i] = [left.mul_add(right[0], tile[i][0]), left.mul_add(right[1], tile[i][1])];
            }
        }
        for i in 0..ROWS {
            tile[i][0].store(&mut sums[row + i][lane..]);
            tile[i][1].store(&mut sums[row + i][second..]);
        }
    }
}
