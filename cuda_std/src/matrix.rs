//! The words of the tensor cores before Hopper: a warp moves 8 x 8 matrices of 16-bit elements between shared memory and
//! registers, and multiplies 16 x 16 by 16 x 8. sm_80; `stmatrix` sm_90.
//!
//! Kernels speak of [`SmemTile`](crate::SmemTile) and [`Accumulator`](crate::fragment::Accumulator), which say these
//! words for whole tiles. Each word takes several matrices, so that one rendezvous of the simulated warp serves them all;
//! the device code is the same.
use crate::element::{bf16, f16, tf32};
use crate::machine;

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

/// What the tensor cores take an operand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// IEEE 754 binary16.
    F16,
    /// bfloat16.
    BF16,
    /// The upper 19 bits of a binary32; the others are ignored.
    TF32,
}

/// The elements that the tensor cores multiply.
pub trait TensorCoreElement: crate::Element {
    /// What the tensor cores take it for.
    const FORMAT: Format;
    /// The bits of 1, in each element of a word of 32 bits.
    const ONES: u32;
}

/// Those of 16 bits: two a register.
pub trait PackedElement: TensorCoreElement {
    /// Two values, rounded to nearest, in one register: `low` in the lower half. PTX ISA: `cvt.rn.f16x2.f32`.
    fn pack(low: f32, high: f32) -> u32;
}

impl TensorCoreElement for f16 {
    const FORMAT: Format = Format::F16;
    const ONES: u32 = 0x3c00_3c00;
}

impl PackedElement for f16 {
    #[inline(always)]
    fn pack(low: f32, high: f32) -> u32 {
        machine::pack_f16(low, high)
    }
}

impl TensorCoreElement for bf16 {
    const FORMAT: Format = Format::BF16;
    const ONES: u32 = 0x3f80_3f80;
}

impl PackedElement for bf16 {
    #[inline(always)]
    fn pack(low: f32, high: f32) -> u32 {
        machine::pack_bf16(low, high)
    }
}

impl TensorCoreElement for tf32 {
    const FORMAT: Format = Format::TF32;
    const ONES: u32 = 0x3f80_0000;
}

/// D += A B for `M` times `N` products of 16 rows and 32 bytes of A by 32 bytes of B and 8 columns, accumulated in f32. With
/// g = lane / 4 and q = lane % 4 a lane holds: of A the rows g and g + 8, of them bytes 4q to 4q + 4 of both chunks of 16
/// bytes; of B the column g, the same bytes; of D the rows g and g + 8 at columns 2q, 2q + 1.
/// PTX ISA: `mma.sync.aligned.m16n8k16.row.col.f32`; for tf32 `m16n8k8`.
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
/// is loaded, so that few registers hold operands; tf32 is rounded before.
#[inline(always)]
#[track_caller]
pub fn mma_shared<T: TensorCoreElement, const M: usize, const N: usize, const TRANS: bool>(
    d: &mut [[[f32; 4]; N]; M],
    a: &[[u32; 4]; M],
    row: impl Fn(u32) -> u32,
) {
    const { assert!(N.is_multiple_of(2), "ldmatrix.x4 loads operands two by two") };
    const { assert!(!TRANS || size_of::<T>() == 2, "ldmatrix transposes elements of 16 bits") };
    let mut rows = [0; N];
    for i in 0..N / 2 {
        rows[i] = row(i as u32);
    }
    machine::mma_shared::<T, M, N, TRANS>(d, a, rows);
}
