//! Rows of O that a value which they do not see has spoiled, computed again.
//!
//! P V multiplies whole blocks of keys, and 0 · NaN is NaN: a value that is not finite reaches rows that do not see its key.
//! To look for such values before each product costs every attention registers and time. So a kernel multiplies, asks at the
//! end whether its rows are finite, and has what is not computed again by the definition: over the keys that a row sees,
//! with P = e^(S - LSE). What comes from a key that a row does see comes again.
//!
//! HBM traffic, for a spoiled row alone: K and V once, up to the key after which nothing can change.
use crate::attention::Attention;
use crate::mask::Mask;
use crate::online_softmax::OnlineSoftmax;
use crate::schedule::QueryBlock;
use core::ops::Range;
use cuda_std::math::{LOG2_E, fma, unknown};
use cuda_std::thread::{WARP, lane_id};
use cuda_std::warp::{ALL, any, ballot, reduce, shuffle, sync_warp};
use cuda_std::{Element, Global, GlobalMatrix, SmemTile};

/// Elements that a lane loads at once.
const GROUP: usize = 4;

/// A lane's elements of a row: those of columns 4 lane to 4 lane + 4, and 128 further on. Head dimensions are at most 256.
pub(crate) type Elements = [[f32; GROUP]; 2];

/// Keys that are loaded together, so that a row does not wait for each.
const KEYS: usize = 8;

/// The first column of a lane's group of elements.
#[inline(always)]
pub(crate) fn column(group: usize) -> u32 {
    GROUP as u32 * (lane_id() + WARP * group as u32)
}

/// What a lane holds of a row in global memory, of `columns` columns and at most `MOST`; 0 beyond the last.
#[inline(always)]
#[track_caller]
pub(crate) fn load<T: Element, const MOST: usize>(row: Global<T>, columns: u32, aligned: bool) -> Elements {
    let mut x = Elements::default();
    for group in 0..groups(MOST) {
        let first = column(group);
        if aligned {
            if first < columns {
                x[group] = row.load_vector::<GROUP>(first as usize).map(T::to_f32);
            }
        } else {
            for i in 0..GROUP {
                if first + (i as u32) < columns {
                    x[group][i] = row.load(first as usize + i).to_f32();
                }
            }
        }
    }
    x
}

/// How many groups a lane has of rows of so many columns.
pub(crate) const fn groups(columns: usize) -> usize {
    columns.div_ceil(GROUP * WARP as usize)
}

/// Calls `f(group, i)` for each of a lane's elements of a row of `COLUMNS` columns.
#[inline(always)]
pub(crate) fn each<const COLUMNS: usize>(mut f: impl FnMut(usize, usize)) {
    for group in 0..groups(COLUMNS) {
        for i in 0..GROUP {
            f(group, i);
        }
    }
}

/// Where the rows of O are that a warp has stored.
pub trait StoredRows<T> {
    /// Element (`row`, `column`).
    fn load(&self, row: u32, column: u32) -> T;

    /// Replaces element (`row`, `column`).
    fn store(&self, row: u32, column: u32, x: T);

    /// How many columns there are.
    fn columns(&self) -> u32;
}

impl<T: Element, const R: usize, const C: usize> StoredRows<T> for SmemTile<T, R, C> {
    #[inline(always)]
    #[track_caller]
    fn load(&self, row: u32, column: u32) -> T {
        self.element(row, column).load(0)
    }

    #[inline(always)]
    #[track_caller]
    fn store(&self, row: u32, column: u32, x: T) {
        self.element(row, column).store(0, x);
    }

    #[inline(always)]
    fn columns(&self) -> u32 {
        C as u32
    }
}

impl<T: Element> StoredRows<T> for GlobalMatrix<T> {
    #[inline(always)]
    #[track_caller]
    fn load(&self, row: u32, column: u32) -> T {
        self.data.load((row as u64 * self.row_stride + column as u64) as usize)
    }

    #[inline(always)]
    #[track_caller]
    fn store(&self, row: u32, column: u32, x: T) {
        self.data.store((row as u64 * self.row_stride + column as u64) as usize, x);
    }

    #[inline(always)]
    fn columns(&self) -> u32 {
        self.columns
    }
}

/// Computes again what is not finite in `rows` of `o`, which begins with a block of query rows and has at most `HEADDIM_V`
/// columns.
///
/// `weight(row, key, q kᵀ, softmax)` is the element of P at a row and a key of the sequence, or `None` if the row does not
/// see the key; those that `mask` hides it is not asked for. Without cap, bias and dropout that is
/// `Some(softmax.weight(q_k * scale))`, with the softmax scale in log2 units. `aligned`: the rows of all tensors are. Rows of
/// Q and K have at most `HEADDIM` columns.
///
/// Said by a whole warp, which has stored these rows and their LSE. It is slow: for a warp that has met something in its O
/// that is not finite.
#[inline(always)]
#[track_caller]
pub fn attend_spoiled_rows<T: Element, const HEADDIM: usize, const HEADDIM_V: usize>(
    a: &Attention<T>,
    block: &QueryBlock,
    mask: Mask,
    aligned: bool,
    o: impl StoredRows<T> + Copy,
    rows: Range<u32>,
    weight: impl Fn(u32, u32, f32, OnlineSoftmax) -> Option<f32>,
) {
    sync_warp(ALL);
    for row in rows.start..unknown(rows.end.min(block.rows())) {
        attend_row::<T, HEADDIM, HEADDIM_V>(a, block, mask, aligned, o, row, &weight);
    }
    sync_warp(ALL);
}

#[inline(always)]
#[track_caller]
fn attend_row<T: Element, const HEADDIM: usize, const HEADDIM_V: usize>(
    a: &Attention<T>,
    block: &QueryBlock,
    mask: Mask,
    aligned: bool,
    o: impl StoredRows<T>,
    tile_row: u32,
    weight: impl Fn(u32, u32, f32, OnlineSoftmax) -> Option<f32>,
) {
    const { assert!(groups(HEADDIM) <= 2 && groups(HEADDIM_V) <= 2) };
    let QueryBlock { ref sequence, head, first_row } = *block;
    let (row, head_k) = (first_row + tile_row, a.head_k(head));
    let lse = a.softmax_lse.load(a.first_row(sequence, head) + row as usize);
    let softmax = OnlineSoftmax { m: lse * LOG2_E, l: 1.0 };

    // A row whose own scores are NaN is NaN, and stays as it is.
    let mut spoiled = [[false; GROUP]; 2];
    each::<HEADDIM_V>(|group, i| {
        let column = column(group) + i as u32;
        let stored = column < o.columns() && !lse.is_nan();
        spoiled[group][i] = stored && !o.load(tile_row, column).to_f32().is_finite();
    });

    let q = load::<T, HEADDIM>(sequence.queries(&a.q, head, row), a.headdim, aligned);
    let mut sum = Elements::default();
    let (mut key, end) = (mask.begin(row), mask.end(row));
    // NaN stays NaN.
    let is_open = |sum: &Elements| {
        let mut open = false;
        each::<HEADDIM_V>(|group, i| open |= spoiled[group][i] && !sum[group][i].is_nan());
        any(ALL, open)
    };
    while key < end && is_open(&sum) {
        let (mut k, mut v) = ([Elements::default(); KEYS], [Elements::default(); KEYS]);
        for n in 0..KEYS {
            // Beyond the last key the last one's, which then has no weight.
            let key = (key + n as u32).min(end - 1);
            k[n] = load::<T, HEADDIM>(sequence.keys(&a.k, head_k, key), a.headdim, aligned);
            v[n] = load::<T, HEADDIM_V>(sequence.keys(&a.v, head_k, key), a.headdim_v, aligned);
        }
        // Each lane weighs one of the keys.
        let own = lane_id() % KEYS as u32;
        let mut own_q_k = 0.0;
        for n in 0..KEYS {
            let mut q_k = 0.0;
            each::<HEADDIM>(|group, i| q_k = fma(q[group][i], k[n][group][i], q_k));
            let q_k = reduce::<32, f32>(q_k, |x, y| x + y);
            own_q_k = if own == n as u32 { q_k } else { own_q_k };
        }
        let p = if key + own < end { weight(row, key + own, own_q_k, softmax) } else { None };
        let seen = ballot(ALL, p.is_some());
        for n in 0..KEYS {
            let p = shuffle(ALL, p.unwrap_or(0.0), n as u32);
            if seen >> n & 1 != 0 {
                each::<HEADDIM_V>(|group, i| sum[group][i] = fma(p, v[n][group][i], sum[group][i]));
            }
        }
        key += KEYS as u32;
    }
    each::<HEADDIM_V>(|group, i| {
        if spoiled[group][i] {
            o.store(tile_row, column(group) + i as u32, T::from_f32(sum[group][i]));
        }
    });
}
