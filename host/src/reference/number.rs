//! The arithmetic that the definition is computed in: f64, or the f32 of a plain implementation.
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, Sub};

/// f64, or f32.
pub trait Number:
    Copy
    + Default
    + Send
    + Sync
    + PartialOrd
    + Into<f64>
    + Sum
    + AddAssign
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
{
    /// The nearest to `x`.
    fn of(x: f64) -> Self;
    /// Its magnitude.
    fn abs(self) -> Self;
    /// e^self.
    fn exp(self) -> Self;
    /// The natural logarithm.
    fn ln(self) -> Self;
    /// The hyperbolic tangent.
    fn tanh(self) -> Self;
}

macro_rules! number {
    ($($x:ident),*) => {$(
        impl Number for $x {
            fn of(x: f64) -> Self {
                x as $x
            }
            fn abs(self) -> Self {
                $x::abs(self)
            }
            fn exp(self) -> Self {
                $x::exp(self)
            }
            fn ln(self) -> Self {
                $x::ln(self)
            }
            fn tanh(self) -> Self {
                $x::tanh(self)
            }
        }
    )*};
}
number!(f64, f32);

/// Sums that are independent of each other, so that they vectorise.
const LANES: usize = 8;

/// Σ a b.
pub fn dot<X: Number>(a: &[X], b: &[X]) -> X {
    let mut sums = [X::default(); LANES];
    for (a, b) in a.chunks(LANES).zip(b.chunks(LANES)) {
        for (sum, (&a, &b)) in sums.iter_mut().zip(a.iter().zip(b)) {
            *sum += a * b;
        }
    }
    sums.into_iter().sum()
}

/// sums += weight · row.
pub fn add_scaled<X: Number>(sums: &mut [X], weight: X, row: &[X]) {
    for (sum, &x) in sums.iter_mut().zip(row) {
        *sum += weight * x;
    }
}

/// What makes P of a row of S: its largest score m, and the sum l of e^(S - m).
#[derive(Clone, Copy)]
pub struct Softmax<X> {
    max: X,
    sum: X,
}

impl<X: Number> Softmax<X> {
    /// Of these scores. NaN and +inf make all of P NaN.
    pub fn of(scores: impl Iterator<Item = X> + Clone) -> Self {
        let nothing = X::of(f64::NEG_INFINITY);
        let max = scores.clone().fold(nothing, |max, score| if score > max { score } else { max });
        let max = if max == nothing { X::default() } else { max };
        Softmax { max, sum: scores.map(|score| (score - max).exp()).sum() }
    }

    /// Whether there is no score, or none above -inf.
    pub fn is_empty(&self) -> bool {
        self.sum == X::default()
    }

    /// P of a score.
    pub fn probability(&self, score: X) -> X {
        if self.is_empty() { X::default() } else { (score - self.max).exp() / self.sum }
    }

    /// The LSE: -inf, where all is empty.
    pub fn lse(&self) -> X {
        self.max + self.sum.ln()
    }
}
