//! Fast arithmetic in f32: one instruction a word. Subnormal inputs and results are 0 (`.ftz`).
use crate::machine;

/// log2(e): what natural exponents are multiplied with to become powers of two.
pub const LOG2_E: f32 = core::f32::consts::LOG2_E;
/// ln(2): what a log2 is multiplied with to become a natural logarithm.
pub const LN_2: f32 = core::f32::consts::LN_2;

/// 2^x, within 2 ulp; 0 for -inf. PTX ISA: `ex2.approx.ftz.f32`.
#[inline(always)]
pub fn ex2(x: f32) -> f32 {
    machine::ex2(x)
}

/// log2(x), within 2^-22 absolute or relative; -inf for 0. PTX ISA: `lg2.approx.ftz.f32`.
#[inline(always)]
pub fn lg2(x: f32) -> f32 {
    machine::lg2(x)
}

/// 1/x, within 1 ulp. PTX ISA: `rcp.approx.ftz.f32`.
#[inline(always)]
pub fn rcp(x: f32) -> f32 {
    machine::rcp(x)
}

/// a·b + c, rounded once. PTX ISA: `fma.rn.ftz.f32`.
#[inline(always)]
pub fn fma(a: f32, b: f32, c: f32) -> f32 {
    machine::fma(a, b, c)
}

/// The larger; the other if one is NaN. PTX ISA: `max.ftz.f32`.
#[inline(always)]
pub fn max(a: f32, b: f32) -> f32 {
    machine::max(a, b)
}

/// tanh(x), within 3 · 2^-24 absolute: 1 - 2 / (1 + e^2x), and by its series where that would cancel.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let square = x * x;
    let series = x * fma(square, fma(square, fma(square, -17.0 / 315.0, 2.0 / 15.0), -1.0 / 3.0), 1.0);
    let exponential = 1.0 - 2.0 * rcp(1.0 + ex2(x * (2.0 * LOG2_E)));
    if square < 0.0625 { series } else { exponential }
}

/// tanh(x) for |x| up to 1/2, within 2^-23 of its value: x P(x²), where P meets tanh(x) / x at Chebyshev's points. Half of the
/// time of [`tanh`]: no reciprocal and no exponential.
#[inline(always)]
pub fn tanh_of_small(x: f32) -> f32 {
    let square = x * x;
    let p = fma(square, fma(square, fma(square, 0.017_131_344, -0.052_984_24), 0.133_247_5), -0.333_330_7);
    x * fma(square, p, 1.0)
}

/// The TF32 number nearest to x, ties away from 0: 10 bits of mantissa, as the tensor cores multiply f32. NaN stays NaN.
/// PTX ISA: `cvt.rna.tf32.f32`. sm_80.
#[inline(always)]
pub fn round_to_tf32(x: f32) -> f32 {
    machine::round_to_tf32(x)
}

/// `n`, which the compiler does not know: a loop that runs so often stays a loop.
#[inline(always)]
pub fn unknown(n: u32) -> u32 {
    machine::unknown(n)
}

/// `n`, which the compiler does not know before it knows `x`: in a loop in which x changes, what follows from n is found
/// anew each time, and takes no register from one time to the next.
#[inline(always)]
pub fn unknown_before(n: u32, x: u32) -> u32 {
    machine::unknown_before(n, x)
}
