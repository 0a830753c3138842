//! Matrices of a warp. PTX ISA: `ldmatrix`, `stmatrix`, `mma`.
use super::round_to_tf32;
use crate::matrix::{Format, TensorCoreElement};
use core::arch::asm;

macro_rules! load_four {
    ($ptx:literal, $row:expr) => {{
        let (a, b, c, d);
        // SAFETY: the launch promised the memory (crate documentation).
        unsafe {
            asm!(concat!($ptx, " {{{0}, {1}, {2}, {3}}}, [{4}];"),
                out(reg32) a, out(reg32) b, out(reg32) c, out(reg32) d, in(reg32) $row, options(readonly, nostack))
        };
        [a, b, c, d]
    }};
}

#[inline(always)]
fn load_four<const TRANS: bool>(row: u32) -> [u32; 4] {
    if TRANS {
        load_four!("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16", row)
    } else {
        load_four!("ldmatrix.sync.aligned.m8n8.x4.shared.b16", row)
    }
}

#[inline(always)]
pub fn ldmatrix<const N: usize, const TRANS: bool>(rows: [u32; N]) -> [[u32; 4]; N] {
    let mut matrices = [[0; 4]; N];
    for i in 0..N {
        matrices[i] = load_four::<TRANS>(rows[i]);
    }
    matrices
}

macro_rules! store_four {
    ($ptx:literal, $row:expr, $m:expr) => {
        // SAFETY: the launch promised the memory (crate documentation).
        unsafe {
            asm!(concat!($ptx, " [{4}], {{{0}, {1}, {2}, {3}}};"),
                in(reg32) $m[0], in(reg32) $m[1], in(reg32) $m[2], in(reg32) $m[3], in(reg32) $row, options(nostack))
        }
    };
}

#[inline(always)]
pub fn stmatrix<const N: usize, const TRANS: bool>(rows: [u32; N], matrices: [[u32; 4]; N]) {
    for i in 0..N {
        if TRANS {
            store_four!("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16", rows[i], matrices[i]);
        } else {
            store_four!("stmatrix.sync.aligned.m8n8.x4.shared.b16", rows[i], matrices[i]);
        }
    }
}

macro_rules! multiply {
    ($shape:literal, $dtype:literal, $d:expr, $a:expr, $b:expr) => {
        // SAFETY: arithmetic on registers. Not `pure`: the warp says it together, so it must stay where it is.
        unsafe {
            asm!(concat!("mma.sync.aligned.", $shape, ".row.col.f32.", $dtype, ".", $dtype, ".f32 ",
                "{{{0}, {1}, {2}, {3}}}, {{{4}, {5}, {6}, {7}}}, {{{8}, {9}}}, {{{0}, {1}, {2}, {3}}};"),
                inout(reg32) $d[0], inout(reg32) $d[1], inout(reg32) $d[2], inout(reg32) $d[3],
                in(reg32) $a[0], in(reg32) $a[1], in(reg32) $a[2], in(reg32) $a[3],
                in(reg32) $b[0], in(reg32) $b[1], options(nomem, nostack))
        }
    };
}

#[inline(always)]
fn multiply<T: TensorCoreElement>(d: &mut [f32; 4], a: &[u32; 4], b: [u32; 2]) {
    match T::FORMAT {
        Format::F16 => multiply!("m16n8k16", "f16", d, a, b),
        Format::BF16 => multiply!("m16n8k16", "bf16", d, a, b),
        Format::TF32 => multiply!("m16n8k8", "tf32", d, a, b),
    }
}

#[inline(always)]
fn rounded<T: TensorCoreElement>(register: u32) -> u32 {
    match T::FORMAT {
        Format::TF32 => round_to_tf32(f32::from_bits(register)).to_bits(),
        _ => register,
    }
}

#[inline(always)]
pub fn mma<T: TensorCoreElement, const M: usize, const N: usize>(
    d: &mut [[[f32; 4]; N]; M],
    a: &[[u32; 4]; M],
    b: &[[u32; 2]; N],
) {
    for n in 0..N {
        for m in 0..M {
            multiply::<T>(&mut d[m][n], &a[m], b[n]);
        }
    }
}

#[inline(always)]
pub fn mma_shared<T: TensorCoreElement, const M: usize, const N: usize, const TRANS: bool>(
    d: &mut [[[f32; 4]; N]; M],
    a: &[[u32; 4]; M],
    rows: [u32; N],
) {
    for i in 0..N / 2 {
        let [x, y, z, w] = load_four::<TRANS>(rows[i]).map(rounded::<T>);
        for m in 0..M {
            multiply::<T>(&mut d[m][2 * i], &a[m], [x, y]);
            multiply::<T>(&mut d[m][2 * i + 1], &a[m], [z, w]);
        }
    }
}
