//! Functions of one number, in plain arithmetic: in a loop over lanes LLVM vectorises them.
use std::f32::consts::LOG2_E;

use super::isa::{Vector, mul_add};

/// The larger; `a` if `b` is NaN.
#[inline(always)]
pub fn max(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// 2^x for x <= 0, within 2 ulp; 0 below -126, where the result would be subnormal. NaN stays NaN.
///
/// 2^x = 2^n 2^f with n the integer nearest to x; 2^f by the polynomial that meets it at 0 and at six Chebyshev nodes
/// of [-1/2, 1/2], within 5.1e-9.
#[inline(always)]
pub fn exp2<V: Vector>(x: f32) -> f32 {
    /// Adding it rounds to an integer, which then stands in the lowest bits: 1.5 · 2^23.
    const ROUND: f32 = 12_582_912.0;
    const TERMS: [f32; 7] =
        [1.0, std::f32::consts::LN_2, 0.240_226_5, 0.055_503_57, 0.009_618_083, 0.001_339_086_4, 0.000_154_531_63];
    let shifted = x + ROUND;
    let f = x - (shifted - ROUND);
    let mut power = TERMS[6];
    for i in (0..6).rev() {
        power = mul_add::<V>(power, f, TERMS[i]);
    }
    let n = shifted.to_bits().wrapping_sub(ROUND.to_bits());
    let result = f32::from_bits(power.to_bits().wrapping_add(n << 23));
    let result = if x < -126.0 { 0.0 } else { result };
    if x.is_nan() { x } else { result }
}

/// tanh(x), within 2^-22 absolute. NaN stays NaN.
///
/// (1 - e^-2|x|) / (1 + e^-2|x|) with the sign of x, and by its series where that would cancel.
#[inline(always)]
pub fn tanh<V: Vector>(x: f32) -> f32 {
    /// Of x, x³, x⁵, x⁷ and x⁹.
    const TERMS: [f32; 5] = [1.0, -1.0 / 3.0, 2.0 / 15.0, -17.0 / 315.0, 62.0 / 2835.0];
    let square = x * x;
    let mut series = TERMS[4];
    for i in (0..4).rev() {
        series = mul_add::<V>(series, square, TERMS[i]);
    }
    let power = exp2::<V>(x.abs() * (-2.0 * LOG2_E));
    let quotient = ((1.0 - power) / (1.0 + power)).copysign(x);
    if square < 0.0625 { x * series } else { quotient }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Portable = [f32; 8];

    #[test]
    fn powers_at_the_edges() {
        assert_eq!(exp2::<Portable>(0.0), 1.0);
        assert_eq!(exp2::<Portable>(-1.0), 0.5);
        assert_eq!(exp2::<Portable>(-126.0), f32::MIN_POSITIVE);
        assert_eq!(exp2::<Portable>(-126.5), 0.0);
        assert_eq!(exp2::<Portable>(f32::NEG_INFINITY), 0.0);
        assert!(exp2::<Portable>(f32::NAN).is_nan());
    }

    #[test]
    fn hyperbolic_tangents_at_the_edges() {
        assert_eq!(tanh::<Portable>(0.0), 0.0);
        assert_eq!(tanh::<Portable>(f32::INFINITY), 1.0);
        assert_eq!(tanh::<Portable>(f32::NEG_INFINITY), -1.0);
        assert!(tanh::<Portable>(f32::NAN).is_nan());
    }

    proptest! {
        #[test]
        fn powers_are_within_two_ulp(x in -126.0f32..=0.0) {
            let exact = f64::from(x).exp2();
            let error = (f64::from(exp2::<Portable>(x)) - exact).abs() / exact;
            prop_assert!(error <= 2.0 * f64::from(f32::EPSILON), "{x}: {error:e}");
        }

        #[test]
        fn hyperbolic_tangents_are_close(x in -12.0f32..12.0, exponent in -20..=0i32) {
            let x = x * (exponent as f32).exp2();
            let error = (f64::from(tanh::<Portable>(x)) - f64::from(x).tanh()).abs();
            prop_assert!(error <= 2.0 * f64::from(f32::EPSILON), "{x}: {error:e}");
        }
    }
}
