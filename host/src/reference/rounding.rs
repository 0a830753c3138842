//! Where a plain implementation rounds.
use cuda_std::DType;

use crate::element::Element;
use crate::problem::Problem;

/// What becomes of numbers on their way.
#[derive(Clone, Copy)]
pub struct Rounding<X> {
    /// Of one that is written to memory and read again.
    pub store: fn(X) -> X,
    /// Of one that is an operand of a product.
    pub operand: fn(X) -> X,
}

impl Rounding<f64> {
    /// None: the reference.
    pub const NONE: Self = Rounding { store: |x| x, operand: |x| x };
}

impl Rounding<f32> {
    /// That of tensors of T: memory holds T, and products of f32 take tf32 where that is allowed.
    pub fn plain<T: Element>(problem: &Problem) -> Self {
        let tf32 = T::STORED == DType::F32 && problem.allow_tf32;
        Rounding { store: |x| T::from_f32(x).to_f32(), operand: if tf32 { to_tf32 } else { |x| x } }
    }
}

/// Rounds to 10 bits of mantissa, to nearest, ties away from zero. PTX ISA: `cvt.rna.tf32.f32`.
fn to_tf32(x: f32) -> f32 {
    const DROPPED: u32 = 13;
    if x.is_nan() || x.is_infinite() {
        return x;
    }
    f32::from_bits((x.to_bits() + (1 << (DROPPED - 1))) >> DROPPED << DROPPED)
}

#[cfg(test)]
mod tests {
    use super::to_tf32;

    #[test]
    fn tf32_keeps_ten_bits() {
        let ulp = 2f32.powi(-10);
        assert_eq!([1.0, 1.0 + ulp, -1.0 - ulp].map(to_tf32), [1.0, 1.0 + ulp, -1.0 - ulp]);
        assert_eq!([1.0 + 0.5 * ulp, 1.0 + 0.49 * ulp, 1.0 - 0.125 * ulp].map(to_tf32), [1.0 + ulp, 1.0, 1.0]);
        assert!(to_tf32(f32::NAN).is_nan());
        assert_eq!(to_tf32(f32::NEG_INFINITY), f32::NEG_INFINITY);
    }
}
