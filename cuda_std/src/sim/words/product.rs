//! Products of matrices in the registers of a warp.
use super::super::WARP;
use super::super::block::{Block, here};
use super::super::rendezvous::{Meeting, Word, meet};
use super::math::{f16_to_f32, round_to_tf32};
use super::matrix::{load_matrix, transpose};
use crate::matrix::{Format, TensorCoreElement};

/// What a lane brings to a product: where its parts of D and A are, and `B` of B.
struct Operands<const M: usize, const N: usize, B> {
    d: *mut [[[f32; 4]; N]; M],
    a: *const [[u32; 4]; M],
    b: B,
}

/// 16 rows of `N` times 8 columns.
type Columns<const N: usize> = [[[f32; 8]; 16]; N];

#[inline(always)]
#[track_caller]
pub(crate) fn mma<T: TensorCoreElement, const M: usize, const N: usize>(
    d: &mut [[[f32; 4]; N]; M],
    a: &[[u32; 4]; M],
    b: &[[u32; 2]; N],
) {
    let word = Word::Mma { m: M as u8, n: N as u8, format: T::FORMAT };
    meet(word, u32::MAX, here(), &mut Operands { d, a, b: *b }, |block, meeting| {
        let mut b = [[[0.0; 8]; 16]; N];
        for lane in 0..WARP {
            let (g, q) = (lane / 4, lane % 4);
            let fragments = &meeting.operand(lane).b;
            for (b, fragment) in b.iter_mut().zip(fragments) {
                for (chunk, &register) in fragment.iter().enumerate() {
                    unpack::<T>(register, chunk, q, |k, x| b[k][g] = x);
                }
            }
        }
        multiply::<T, M, N, _>(block, meeting, &b);
        Ok(())
    });
}

#[inline(always)]
#[track_caller]
pub(crate) fn mma_shared<T: TensorCoreElement, const M: usize, const N: usize, const TRANS: bool>(
    d: &mut [[[f32; 4]; N]; M],
    a: &[[u32; 4]; M],
    rows: [u32; N],
) {
    let (word, site) = (Word::MmaShared { m: M as u8, n: N as u8, format: T::FORMAT, trans: TRANS }, here());
    meet(word, u32::MAX, site, &mut Operands { d, a, b: rows }, |block, meeting| {
        let mut b = [[[0.0; 8]; 16]; N];
        for (n, b) in b.iter_mut().enumerate() {
            for (i, rows) in b.chunks_mut(depth::<T>() / 2).take(2).enumerate() {
                let m = n % 2 * 2 + i;
                let addresses = std::array::from_fn(|row| meeting.operand(m * 8 + row).b[n / 2]);
                let matrix = load_matrix(block, meeting.first_thread + m * 8, addresses, site)?;
                if T::FORMAT == Format::TF32 {
                    for (column, row) in matrix.iter().enumerate() {
                        for (k, element) in row.chunks(2).enumerate() {
                            let bits = element[0] as u32 | (element[1] as u32) << 16;
                            rows[k][column] = round_to_tf32(f32::from_bits(bits));
                        }
                    }
                    continue;
                }
                // `ldmatrix` gives a lane pairs of a row where B's fragment has pairs of a column.
                let matrix = if TRANS { matrix } else { transpose(matrix) };
                for (row, elements) in rows.iter_mut().zip(matrix) {
                    *row = elements.map(to_f32::<T>);
                }
            }
        }
        multiply::<T, M, N, _>(block, meeting, &b);
        Ok(())
    });
}

/// Gathers A and D from the lanes, multiplies, and gives each lane its part of the sum.
#[inline(never)]
fn multiply<T: TensorCoreElement, const M: usize, const N: usize, B>(
    block: &mut Block,
    meeting: &mut Meeting<Operands<M, N, B>>,
    b: &Columns<N>,
) {
    for m in 0..M {
        let (mut a, mut sums) = ([[0.0; 16]; 16], [[[0.0; 8]; N]; 16]);
        for lane in 0..WARP {
            let (g, q) = (lane / 4, lane % 4);
            let operands = meeting.operand(lane);
            // SAFETY: the lane waits in its word, where both are borrowed; or it is the one that runs this.
            let (fragments, sum) = unsafe { (&(*operands.a)[m], &(*operands.d)[m]) };
            for (i, &register) in fragments.iter().enumerate() {
                unpack::<T>(register, i / 2, q, |k, x| a[g + 8 * (i % 2)][k] = x);
            }
            each_element::<N>(lane, |n, i, row, column| sums[row][n][column] = sum[n][i]);
        }
        for (a, sums) in a.iter().zip(&mut sums) {
            for (sum, b) in sums.iter_mut().zip(b) {
                for (x, b) in a.iter().zip(b).take(depth::<T>()) {
                    sum.iter_mut().zip(b).for_each(|(sum, y)| *sum += x * y);
                }
            }
        }
        for lane in 0..WARP {
            let operands = meeting.operand(lane);
            // SAFETY: as above; this one is borrowed mutably.
            let sum = unsafe { &mut (*operands.d)[m] };
            each_element::<N>(lane, |n, i, row, column| sum[n][i] = sums[row][n][column]);
        }
    }
    block.traffic.tally.flops.tensor += (2 * 16 * depth::<T>() * 8 * M * N) as u64;
}

/// Calls `element(n, i, row, column)` for what a lane has of `N` accumulators of 16 x 8.
#[inline(always)]
fn each_element<const N: usize>(lane: usize, mut element: impl FnMut(usize, usize, usize, usize)) {
    let (g, q) = (lane / 4, lane % 4);
    for n in 0..N {
        for i in 0..4 {
            element(n, i, g + 8 * (i / 2), 2 * q + i % 2);
        }
    }
}

/// Columns of A and rows of B: 32 bytes.
const fn depth<T: TensorCoreElement>() -> usize {
    32 / size_of::<T>()
}

/// Calls `element(k, x)` for what a register of lane q of a quad holds of one of the two chunks of a column.
#[inline(always)]
fn unpack<T: TensorCoreElement>(register: u32, chunk: usize, q: usize, mut element: impl FnMut(usize, f32)) {
    if T::FORMAT == Format::TF32 {
        element(q + 4 * chunk, f32::from_bits(register & !0x1fff));
    } else {
        element(2 * q + 8 * chunk, to_f32::<T>(register as u16));
        element(2 * q + 8 * chunk + 1, to_f32::<T>((register >> 16) as u16));
    }
}

/// An element of 16 bits.
#[inline(always)]
pub(super) fn to_f32<T: TensorCoreElement>(bits: u16) -> f32 {
    if T::FORMAT == Format::BF16 { f32::from_bits((bits as u32) << 16) } else { f16_to_f32(bits) }
}
