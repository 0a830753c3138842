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

/// The smaller; NaN if one is. PTX ISA: `min.ftz.NaN.f32`. sm_80.
#[inline(always)]
pub fn min_or_nan(a: f32, b: f32) -> f32 {
    machine::min_or_nan(a, b)
}

/// tanh(x), within 3 · 2^-24 absolute: 1 - 2 / (1 + e^2x), and by its series where that would cancel.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let square = x * x;
    let series = x * fma(square, fma(square, fma(square, -17.0 / 315.0, 2.0 / 15.0), -1.0 / 3.0), 1.0);
    let exponential = 1.0 - 2.0 * rcp(1.0 + ex2(x * (2.0 * LOG2_E)));
    if square < 0.0625 { series } else { exponential }
}

/// tanh(y / 4) of two numbers, within 2^-21 absolute, and within 2^-20 of its value. As [`tanh`], but both share a reciprocal,
/// 1 / (a b): of it b makes 1 / a, and a makes 1 / b. Above 60 / log2(e), where tanh is 1, exponents stay so small that no
/// product overflows. If one is NaN, both are.
#[inline(always)]
pub fn tanh_of_quarters(y: [f32; 2]) -> [f32; 2] {
    let a = y.map(|y| 1.0 + ex2(min_or_nan(y * (LOG2_E / 2.0), 60.0)));
    let both = rcp(a[0] * a[1]);
    let tanh = [fma(-2.0, both * a[1], 1.0), fma(-2.0, both * a[0], 1.0)];
    let small = y.map(tanh_of_small_quarter);
    [if y[0].abs() < 2.0 { small[0] } else { tanh[0] }, if y[1].abs() < 2.0 { small[1] } else { tanh[1] }]
}

/// tanh(y / 4) for |y| up to 2, within 2^-23 of its value: y P(y²), where P meets tanh(x) / x at Chebyshev's points. Half of the
/// time of [`tanh`]: no reciprocal and no exponential. Whether numbers are below 2 a bit of their exponents says.
#[inline(always)]
pub fn tanh_of_small_quarter(y: f32) -> f32 {
    const fn of_quarter(coefficient: f32, power: i32) -> f32 {
        coefficient / (1u32 << (2 * power)) as f32
    }
    let square = y * y;
    let p = fma(square, const { of_quarter(0.017_131_344, 9) }, const { of_quarter(-0.052_984_24, 7) });
    let p = fma(square, p, const { of_quarter(0.133_247_5, 5) });
    let p = fma(square, p, const { of_quarter(-0.333_330_7, 3) });
    y * fma(square, p, 0.25)
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
