//! Online softmax: the softmax of a row whose elements come block by block.
//!
//! Source: Milakov and Gimelshein, "Online normalizer calculation for softmax", Algorithm 3; FlashAttention, section 3.1.
//! Kernels, reference checks and the merge of partial results all use this one state.
use cuda_std::math::{LN_2, LOG2_E, ex2, lg2, max, rcp};

/// The state of one row's softmax, after some of its elements x: their maximum m, and l = Σ 2^(x - m).
///
/// Elements and m are in log2 units: a score times log2(e), which a kernel has in the factor that scales Q Kᵀ. Where there is
/// no such factor they are `NATURAL`, scores as they are: their differences are scaled, so that no large score is rounded
/// or overflows.
///
/// The state of no elements is [`EMPTY`](Self::EMPTY), and elements of -inf (masked keys) leave it as it is. A NaN or +inf
/// among the elements makes l NaN, as it does the softmax.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct OnlineSoftmax<const NATURAL: bool = false> {
    /// The maximum of the elements so far, or what has taken its place ([`rebase`](Self::rebase)); -inf if there was none
    /// above.
    pub m: f32,
    /// The sum of the weights 2^(x - m) of the elements so far; e^(x - m), if they are natural.
    pub l: f32,
}

impl<const NATURAL: bool> OnlineSoftmax<NATURAL> {
    /// No elements yet.
    pub const EMPTY: Self = OnlineSoftmax { m: f32::NEG_INFINITY, l: 0.0 };

    /// What exponents are taken relative to: m, or 0 while m is -inf, so that a masked element has weight 0 and not NaN.
    #[inline(always)]
    pub fn base(self) -> f32 {
        if self.m == f32::NEG_INFINITY { 0.0 } else { self.m }
    }

    /// Takes notice of a block whose maximum is `block_max`: raises m, and rescales l. Returns alpha = 2^(m_old - m_new),
    /// with which everything that was weighted by the old m is to be multiplied.
    #[inline(always)]
    pub fn raise(&mut self, block_max: f32) -> f32 {
        self.rebase(max(self.m, block_max))
    }

    /// Replaces m, which then need not be the maximum, and rescales l. Returns alpha, as [`raise`](Self::raise) does.
    #[inline(always)]
    pub fn rebase(&mut self, m: f32) -> f32 {
        let old = self.m;
        self.m = m;
        let alpha = Self::exp(old - self.base());
        self.l *= alpha;
        alpha
    }

    /// The weight 2^(x - m) of an element, for an m that [`raise`](Self::raise) has brought to x or more.
    #[inline(always)]
    pub fn weight(self, x: f32) -> f32 {
        Self::exp(x - self.base())
    }

    /// The weight of an element that is `difference` above m.
    #[inline(always)]
    fn exp(difference: f32) -> f32 {
        ex2(if NATURAL { difference * LOG2_E } else { difference })
    }

    /// Takes one element.
    #[inline(always)]
    pub fn push(&mut self, x: f32) {
        self.raise(x);
        self.l += self.weight(x);
    }

    /// The state of the elements of both.
    #[inline(always)]
    pub fn merge(self, other: Self) -> Self {
        let mut merged = OnlineSoftmax { m: max(self.m, other.m), l: 0.0 };
        merged.l = self.l * merged.weight(self.m) + other.l * merged.weight(other.m);
        merged
    }

    /// 1/l, with which weights become probabilities; 0 for a row of no elements, whose output is 0.
    #[inline(always)]
    pub fn inverse(self) -> f32 {
        if self.l == 0.0 { 0.0 } else { rcp(self.l) }
    }

    /// The normalisation log Σ e^score, a natural logarithm; -inf for a row of no elements.
    #[inline(always)]
    pub fn lse(self) -> f32 {
        if NATURAL { self.m + lg2(self.l) * LN_2 } else { (self.m + lg2(self.l)) * LN_2 }
    }
}

impl OnlineSoftmax {
    /// How low m may be set, so that l becomes no larger than 2¹⁴: sums of weights stay far from the largest f32. -inf for
    /// no elements.
    #[inline(always)]
    pub fn lowest(self) -> f32 {
        self.m + lg2(self.l) - 14.0
    }
}
