//! The words of the tensor cores before Hopper: a warp moves 8 x 8 matrices of 16-bit elements between shared memory and
//! registers, and multiplies 16 x 16 by 16 x 8. sm_80; `stmatrix` sm_90.
//!
//! Kernels speak of [`SmemTile`](crate::SmemTile) and [`Accumulator`](crate::fragment::Accumulator), which say these
//! words for whole tiles. Each word takes several matrices, so that one rendezvous of the simulated warp serves them all;
//! the device code is the same.
use crate::machine;
use half::{bf16, f16};

/// Loads `N` times four 8 x 8 matrices: lane `l` gives the address of row `l % 8` of matrix `l / 8`, aligned to 16
/// bytes, and gets the elements 2(l%4) and 2(l%4)+1 of row l/4 of each. PTX ISA: `ldmatrix.sync.aligned.m8n8.x4`.
#[inline(always)]
#[track_caller]
pub fn ldmatrix<const N: usize>(rows: [u32; N]) -> [[u32; 4]; N] {
    machine::ldmatrix::<N, false>(rows)
}

/// As [`ldmatrix`], each matrix transposed. PTX ISA: `ldmatrix.sync.aligned.m8n8.x4.trans`.
#[inline(always)]
#[track_caller]
pub fn ldmatrix_trans<const N: usize>(rows: [u32; N]) -> [[u32; 4]; N] {
    machine::ldmatrix::<N, true>(rows)
}

/// Stores `N` times four 8 x 8 matrices: the reverse of [`ldmatrix`]. PTX ISA: `stmatrix.sync.aligned.m8n8.x4`. sm_90.
#[inline(always)]
#[track_caller]
pub fn stmatrix<const N: usize>(rows: [u32; N], matrices: [[u32; 4]; N]) {
    machine::stmatrix::<N, false>(rows, matrices);
}

/// As [`stmatrix`], each matrix transposed. PTX ISA: `stmatrix.sync.aligned.m8n8.x4.trans`. sm_90.
#[inline(always)]
#[track_caller]
pub fn stmatrix_trans<const N: usize>(rows: [u32; N], matrices: [[u32; 4]; N]) {
    machine::stmatrix::<N, true>(rows, matrices);
}

/// The 16-bit dtypes that the tensor cores multiply.
pub trait TensorCoreElement: crate::Element<Bits = u16> {
    /// Whether it is bfloat16 (else binary16).
    const BF16: bool;

    /// Two values, rounded to nearest, in one register: `low` in the lower half. PTX ISA: `cvt.rn.f16x2.f32`.
    fn pack(low: f32, high: f32) -> u32;
}

impl TensorCoreElement for f16 {
    const BF16: bool = false;
    #[inline(always)]
    fn pack(low: f32, high: f32) -> u32 {
        machine::pack_f16(low, high)
    }
}

impl TensorCoreElement for bf16 {
    const BF16: bool = true;
    #[inline(always)]
    fn pack(low: f32, high: f32) -> u32 {
        machine::pack_bf16(low, high)
    }
}

/// D += A B for `M` times `N` products of 16 x 16 by 16 x 8, accumulated in f32. With g = lane / 4 and q = lane % 4 a lane
/// holds: of A the rows g and g + 8 at columns 2q, 2q+1 and 2q+8, 2q+9; of B the column g at rows 2q, 2q+1 and 2q+8, 2q+9;
/// of D the rows g and g + 8 at columns 2q, 2q+1. PTX ISA: `mma.sync.aligned.m16n8k16.row.col.f32`.
#[inline(always)]
#[track_caller]
pub fn mma<T: TensorCoreElement, const M: usize, const N: usize>(
    d: &mut [[[f32; 4]; N]; M],
    a: &[[u32; 4]; M],
    b: &[[u32; 2]; N],
) {
    machine::mma::<T, M, N>(d, a, b);
}

/// [`mma`] with the right operands from shared memory, two a `ldmatrix.x4`: `row(i)` is the address that this lane gives
/// for operands 2i and 2i + 1 (`N` is even), with `TRANS` as for [`ldmatrix_trans`]. Each pair is multiplied as soon as it
/// is loaded, so that few registers hold operands.
#[inline(always)]
#[track_caller]
pub fn mma_shared<T: TensorCoreElement, const M: usize, const N: usize, const TRANS: bool>(
    d: &mut [[[f32; 4]; N]; M],
    a: &[[u32; 4]; M],
    row: impl Fn(u32) -> u32,
) {
    const { assert!(N.is_multiple_of(2), "ldmatrix.x4 loads operands two by two") };
    let mut rows = [0; N];
    for i in 0..N / 2 {
        rows[i] = row(i as u32);
    }
    machine::mma_shared::<T, M, N, TRANS>(d, a, rows);
}
