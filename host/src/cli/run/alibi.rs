//! ALiBi's slopes.

/// The slopes of `nheads` heads: for a power of two 2^(-8 i / nheads), i from 1 on; for other numbers those of the
/// power of two below, and then every other one of the power above.
///
/// Source: Press, Smith and Lewis, "Train short, test long", 2022, section 3, and its authors' code for other numbers.
pub fn standard_slopes(nheads: usize) -> Vec<f32> {
    let of_power = |power: usize| (1..=power).map(move |i| (-8.0 * i as f32 / power as f32).exp2());
    let below = (nheads + 1).next_power_of_two() / 2;
    of_power(below).chain(of_power(2 * below).step_by(2)).take(nheads).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_of_any_number_of_heads() {
        assert_eq!(standard_slopes(8), [1, 2, 3, 4, 5, 6, 7, 8].map(|i| (-i as f32).exp2()));
        let six = standard_slopes(6);
        assert_eq!(six[..4], standard_slopes(4));
        assert_eq!(six[4..], [(-1f32).exp2(), (-3f32).exp2()]);
        assert!(standard_slopes(0).is_empty());
        assert_eq!(standard_slopes(1), [2f32.powi(-8)]);
    }
}
