//! Rows of tensors on their way into tiles, and back.
use super::tile::{BLOCK, Lanes};
use crate::element::Element;
use crate::heads::{Heads, HeadsMut};
use crate::layout::Layout;
use crate::problem::Problem;
use cuda_std::DType;

/// `len` tokens of one head of a tensor, from `first` on.
#[derive(Clone, Copy)]
pub struct Rows {
    pub batch: usize,
    pub head: usize,
    pub first: usize,
    pub len: usize,
}

/// Rows as they lie: (len, width).
#[inline(always)]
pub fn load<T: Element>(from: &Heads<T>, rows: Rows, width: usize, to: &mut [f32]) {
    for (i, to) in to.chunks_mut(width).enumerate().take(rows.len) {
        T::widen(from.row(rows.batch, rows.first + i, rows.head), to);
    }
}

/// Transposed rows, multiplied with `scale`: (width, `BLOCK`). Lanes beyond the last row are 0. `row` is as long as a
/// row, or longer.
#[inline(always)]
pub fn load_transposed<T: Element>(from: &Heads<T>, rows: Rows, scale: f32, tile: &mut [Lanes], row: &mut [f32]) {
    tile.fill([0.0; BLOCK]);
    for i in 0..rows.len {
        T::widen(from.row(rows.batch, rows.first + i, rows.head), row);
        for (lanes, x) in tile.iter_mut().zip(&*row) {
            lanes[i] = x * scale;
        }
    }
}

/// Writes rows, which stand transposed in a tile.
///
/// # Safety
/// Nobody else holds these rows.
#[inline(always)]
pub unsafe fn write<T: Element>(tile: &[Lanes], rows: Rows, row: &mut [f32], to: &HeadsMut<T>) {
    let row = &mut row[..tile.len()];
    for i in 0..rows.len {
        for (x, lanes) in row.iter_mut().zip(tile) {
            *x = lanes[i];
        }
        // SAFETY: as the caller promises.
        T::narrow(row, unsafe { to.row(rows.batch, rows.first + i, rows.head) });
    }
}

/// The LSE as a tensor of rows, of one element each.
pub fn lse_rows<'a>(problem: &Problem, softmax_lse: &'a mut [f32]) -> HeadsMut<'a, f32> {
    let Problem { batch, nheads, seqlen_q, .. } = *problem;
    let layout = match &problem.varlen {
        None => Layout::strided(DType::F32, &[batch, seqlen_q, nheads, 1], &[nheads * seqlen_q, 1, seqlen_q, 1]),
        Some(varlen) => Layout::strided(DType::F32, &[varlen.total_q, nheads, 1], &[1, varlen.total_q, 1]),
    };
    HeadsMut::new(softmax_lse, &layout.expect("as many strides as dimensions"))
}
