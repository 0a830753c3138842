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
use cuda_std::math::{LOG2_E, fma, unknown};
use cuda_std::thread::{WARP, lane_id};
use cuda_std::warp::{ALL, any, reduce, sync_warp};
use cuda_std::{Element, Global, SmemTile};

/// A lane's elements of a row: of columns lane, lane + 32 and so on. Head dimensions are at most 256.
type Elements = [f32; 8];

/// The column of a lane's element `i`.
#[inline(always)]
fn column(i: usize) -> u32 {
    lane_id() + WARP * i as u32
}

/// What a lane holds of a row in global memory; 0 beyond the last of its columns.
#[inline(always)]
#[track_caller]
fn load<T: Element>(row: Global<T>, columns: u32) -> Elements {
    let mut x = Elements::default();
    for i in 0..x.len() {
        if column(i) < columns {
            x[i] = row.load(column(i) as usize).to_f32();
        }
    }
    x
}

/// Computes again what is not finite in `count` rows from `row` on of `o`, the tile of a block of query rows.
///
/// `weight(row, key, q kᵀ, softmax)` is the element of P at a row and a key of the sequence, or `None` if the row does not
/// see the key; those that `mask` hides it is not asked for. Without cap, bias and dropout that is
/// `Some(softmax.weight(q_k * scale))`, with the softmax scale in log2 units.
///
/// Said by a whole warp, which has stored these rows and their LSE. It is slow, and little code: for a warp that has met
/// something in its O that is not finite.
#[inline(always)]
#[track_caller]
pub fn attend_spoiled_rows<T: Element, const R: usize, const C: usize>(
    a: &Attention<T>,
    block: &QueryBlock,
    mask: Mask,
    o: SmemTile<T, R, C>,
    row: u32,
    count: u32,
    weight: impl Fn(u32, u32, f32, OnlineSoftmax) -> Option<f32>,
) {
    let rows = block.rows().saturating_sub(row).min(count);
    sync_warp(ALL);
    for i in 0..unknown(rows) {
        attend_row(a, block, mask, o, row + i, &weight);
    }
    sync_warp(ALL);
}

#[inline(always)]
#[track_caller]
fn attend_row<T: Element, const R: usize, const C: usize>(
    a: &Attention<T>,
    block: &QueryBlock,
    mask: Mask,
    o: SmemTile<T, R, C>,
    tile_row: u32,
    weight: impl Fn(u32, u32, f32, OnlineSoftmax) -> Option<f32>,
) {
    const { assert!(C <= size_of::<Elements>() / size_of::<f32>() * WARP as usize) };
    let QueryBlock { ref sequence, head, first_row } = *block;
    let (row, head_k) = (first_row + tile_row, a.head_k(head));
    let lse = a.softmax_lse.load(a.first_row(sequence, head) + row as usize);
    let softmax = OnlineSoftmax { m: lse * LOG2_E, l: 1.0 };

    // A row whose own scores are NaN is NaN, and stays as it is.
    let mut spoiled = [false; 8];
    for i in 0..spoiled.len() {
        let stored = column(i) < C as u32 && !lse.is_nan();
        spoiled[i] = stored && !o.element(tile_row, column(i)).load(0).to_f32().is_finite();
    }

    let q = load(sequence.queries(&a.q, head, row), a.headdim);
    let mut sum = Elements::default();
    let (mut key, end) = (mask.begin(row), mask.end(row));
    // NaN stays NaN.
    let is_open = |sum: &Elements| {
        let mut open = false;
        for i in 0..sum.len() {
            open |= spoiled[i] && !sum[i].is_nan();
        }
        any(ALL, open)
    };
    while key < end && is_open(&sum) {
        let k = load(sequence.keys(&a.k, head_k, key), a.headdim);
        let mut s = 0.0;
        for i in 0..q.len() {
            s = fma(q[i], k[i], s);
        }
        if let Some(p) = weight(row, key, reduce::<32, f32>(s, |x, y| x + y), softmax) {
            let v = load(sequence.keys(&a.v, head_k, key), a.headdim_v);
            for i in 0..sum.len() {
                sum[i] = fma(p, v[i], sum[i]);
            }
        }
        key += 1;
    }
    for i in 0..sum.len() {
        if spoiled[i] {
            o.element(tile_row, column(i)).store(0, T::from_f32(sum[i]));
        }
    }
}
