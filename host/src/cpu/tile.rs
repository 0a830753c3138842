//! Arithmetic on tiles whose columns are query rows: products, maxima, powers of two.
use super::isa::{Vector, mul_add};

/// The left factor of a product: element (row, step) is at `row * row_stride + step * step_stride`.
#[derive(Clone, Copy)]
pub struct Left<'a> {
    pub data: &'a [f32],
    pub rows: usize,
    pub row_stride: usize,
    pub step_stride: usize,
}

/// Adds a product to sums: `sums[row][column] += Σ left(row, step) right[step][column]`.
///
/// # Safety
/// The CPU has the instructions of V.
#[inline(always)]
pub unsafe fn add_product<V: Vector, const ROWS: usize, const WIDTH: usize>(
    left: Left,
    right: &[[f32; WIDTH]],
    sums: &mut [[f32; WIDTH]],
) {
    let whole = left.rows / ROWS * ROWS;
    for column in (0..WIDTH).step_by(2 * V::LANES) {
        for row in (0..whole).step_by(ROWS) {
            // SAFETY: as the caller promises.
            unsafe { add_register_tile::<V, ROWS, WIDTH>(left, right, sums, row, column) };
        }
        for row in whole..left.rows {
            // SAFETY: as the caller promises.
            unsafe { add_register_tile::<V, 1, WIDTH>(left, right, sums, row, column) };
        }
    }
}

/// `ROWS` rows by two vectors of the sums, which stay in registers.
///
/// # Safety
/// The CPU has the instructions of V.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "constant bounds, so that the tile stays in registers")]
unsafe fn add_register_tile<V: Vector, const ROWS: usize, const WIDTH: usize>(
    left: Left,
    right: &[[f32; WIDTH]],
    sums: &mut [[f32; WIDTH]],
    row: usize,
    column: usize,
) {
    if right.is_empty() {
        return;
    }
    let last = (row + ROWS - 1) * left.row_stride + (right.len() - 1) * left.step_stride;
    assert!(last < left.data.len() && row + ROWS <= sums.len() && column + 2 * V::LANES <= WIDTH);
    let second = column + V::LANES;

    // Plain loops over constant bounds, here and in all of a body: a closure in `map` or `from_fn` is compiled without the
    // instructions of V, and called.
    // SAFETY: the caller promises the instructions; indices into the left factor are at most `last`.
    unsafe {
        let mut tile = [[V::splat(0.0); 2]; ROWS];
        for i in 0..ROWS {
            tile[i] = [V::load(&sums[row + i][column..]), V::load(&sums[row + i][second..])];
        }
        for (step, right) in right.iter().enumerate() {
            let right = [V::load(&right[column..]), V::load(&right[second..])];
            for i in 0..ROWS {
                let left = *left.data.get_unchecked((row + i) * left.row_stride + step * left.step_stride);
                let left = V::splat(left);
                tile[i] = [left.mul_add(right[0], tile[i][0]), left.mul_add(right[1], tile[i][1])];
            }
        }
        for i in 0..ROWS {
            tile[i][0].store(&mut sums[row + i][column..]);
            tile[i][1].store(&mut sums[row + i][second..]);
        }
    }
}

/// The same as [`add_product`], of those terms alone for which `keep(step, column)`: the others do no harm even if they are
/// NaN.
#[inline(always)]
pub fn add_kept_product<const WIDTH: usize>(
    left: Left,
    right: &[[f32; WIDTH]],
    sums: &mut [[f32; WIDTH]],
    keep: impl Fn(usize, usize) -> bool,
) {
    for (step, right) in right.iter().enumerate() {
        for (row, sums) in sums.iter_mut().enumerate() {
            let left = left.data[row * left.row_stride + step * left.step_stride];
            for column in 0..WIDTH {
                sums[column] += if keep(step, column) { left * right[column] } else { 0.0 };
            }
        }
    }
}

/// The larger; `a` if `b` is NaN.
#[inline(always)]
pub fn max(a: f32, b: f32) -> f32 {
    if b > a { b } else { a }
}

/// 2^x for x <= 0, within 2 ulp; 0 below -126, where the result would be subnormal. NaN stays NaN.
///
/// 2^x = 2^n 2^f with n the integer nearest to x; 2^f by the polynomial that meets it at 0 and at six Chebyshev nodes of
/// [-1/2, 1/2], within 5.1e-9.
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

    proptest! {
        #[test]
        fn powers_are_within_two_ulp(x in -126.0f32..=0.0) {
            let exact = f64::from(x).exp2();
            let error = (f64::from(exp2::<Portable>(x)) - exact).abs() / exact;
            prop_assert!(error <= 2.0 * f64::from(f32::EPSILON), "{x}: {error:e}");
        }
    }
}
