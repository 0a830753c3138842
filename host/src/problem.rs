//! The problem that a call poses, checked once, before anything is allocated or launched.
use std::fmt;

use cuda_std::DType;

use crate::error::{Error, Result};
use crate::layout::Layout;
use crate::options::AttentionOptions;

/// The most tokens, heads or sequences there may be: kernels count them in 32 bits, with room to add two of them.
const MOST: usize = i32::MAX as usize;

/// The most elements that a tensor may have: as many as can be addressed in any dtype.
const MOST_ELEMENTS: usize = isize::MAX as usize / size_of::<f64>();

/// An attention problem whose arguments fit together: O = softmax(softmax_scale · Q Kᵀ + mask) V.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Problem {
    /// The dtype of Q, K, V and O.
    pub dtype: DType,
    /// Sequences.
    pub batch: usize,
    /// Tokens of Q and O.
    pub seqlen_q: usize,
    /// Tokens of K and V.
    pub seqlen_k: usize,
    /// Heads of Q and O.
    pub nheads: usize,
    /// Heads of K and V: a divisor of `nheads`.
    pub nheads_k: usize,
    /// Elements of one head's row.
    pub headdim: usize,
    /// What Q Kᵀ is multiplied with before the softmax. Positive and finite.
    pub softmax_scale: f32,
    /// Whether query i sees only the keys j <= i + seqlen_k - seqlen_q.
    pub causal: bool,
}

impl Problem {
    /// The problem that tensors of these layouts pose: Q (batch, seqlen_q, nheads, headdim), K and V (batch, seqlen_k,
    /// nheads_k, headdim).
    ///
    /// # Errors
    /// [`Error::Rank`], [`Error::DType`], [`Error::Shape`], [`Error::HeadGroups`], [`Error::Stride`],
    /// [`Error::SoftmaxScale`] or [`Error::TooLarge`], with the argument that is at fault.
    pub fn new(q: &Layout, k: &Layout, v: &Layout, options: &AttentionOptions) -> Result<Self> {
        let [batch, seqlen_q, nheads, headdim] = dimensions("q", q)?;
        let [_, seqlen_k, nheads_k, _] = dimensions("k", k)?;
        dimensions("v", v)?;
        for (argument, layout) in [("k", k), ("v", v)] {
            same_dtype(argument, layout, q.dtype())?;
            same(argument, layout, 0, "batch", batch, "q")?;
            same(argument, layout, 3, "headdim", headdim, "q")?;
        }
        same("v", v, 1, "seqlen", seqlen_k, "k")?;
        same("v", v, 2, "nheads", nheads_k, "k")?;
        for (argument, dimension, found) in
            [("q", "nheads", nheads), ("k", "nheads", nheads_k), ("q", "headdim", headdim)]
        {
            if found == 0 {
                return Err(Error::Shape { argument, dimension, found, allowed: "1 or more".to_owned() });
            }
        }
        if !nheads.is_multiple_of(nheads_k) {
            return Err(Error::HeadGroups { nheads, nheads_k });
        }
        let counts = [
            ("batch", batch),
            ("seqlen_q", seqlen_q),
            ("seqlen_k", seqlen_k),
            ("nheads", nheads),
            ("headdim", headdim),
        ];
        for (what, found) in counts {
            if found > MOST {
                return Err(Error::TooLarge { what, found: found as u128, limit: MOST as u128 });
            }
        }
        // Views with strides of 0 may claim more elements than memory holds.
        let elements =
            [batch, seqlen_q.max(seqlen_k), nheads, headdim].into_iter().fold(1u128, |n, extent| n * extent as u128);
        if elements > MOST_ELEMENTS as u128 {
            return Err(Error::TooLarge { what: "elements", found: elements, limit: MOST_ELEMENTS as u128 });
        }
        let softmax_scale = options.softmax_scale.unwrap_or_else(|| 1.0 / (headdim as f32).sqrt());
        if !(softmax_scale > 0.0 && softmax_scale.is_finite()) {
            return Err(Error::SoftmaxScale { found: softmax_scale });
        }
        let causal = options.causal;
        Ok(Problem { dtype: q.dtype(), batch, seqlen_q, seqlen_k, nheads, nheads_k, headdim, softmax_scale, causal })
    }

    /// The shape of O: (batch, seqlen_q, nheads, headdim).
    pub fn out_shape(&self) -> [usize; 4] {
        [self.batch, self.seqlen_q, self.nheads, self.headdim]
    }

    /// The shape of the LSE: (batch, nheads, seqlen_q).
    pub fn lse_shape(&self) -> [usize; 3] {
        [self.batch, self.nheads, self.seqlen_q]
    }

    /// The rows of S, of all heads: batch x nheads x seqlen_q.
    pub fn rows(&self) -> usize {
        self.lse_shape().iter().product()
    }

    /// The shape of dK and dV, which is that of K and V: (batch, seqlen_k, nheads_k, headdim).
    pub(crate) fn keys_shape(&self) -> [usize; 4] {
        [self.batch, self.seqlen_k, self.nheads_k, self.headdim]
    }

    /// Checks that a tensor has the dtype of the problem and this shape, which is that of `of`.
    pub(crate) fn check_like(
        &self,
        argument: &'static str,
        layout: &Layout,
        shape: [usize; 4],
        of: &'static str,
    ) -> Result<()> {
        dimensions(argument, layout)?;
        same_dtype(argument, layout, self.dtype)?;
        DIMENSIONS
            .into_iter()
            .zip(shape)
            .enumerate()
            .try_for_each(|(i, (dimension, extent))| same(argument, layout, i, dimension, extent, of))
    }

    /// Checks that a backward pass may begin with these: O, its gradient, and the LSE.
    pub(crate) fn check_backward(&self, out: &Layout, softmax_lse: &Layout, dout: &Layout) -> Result<()> {
        self.check_like("out", out, self.out_shape(), "q")?;
        self.check_like("dout", dout, self.out_shape(), "q")?;
        let argument = "softmax_lse";
        if softmax_lse.dtype() != DType::F32 {
            let allowed = "f32".to_owned();
            return Err(Error::DType { argument, found: softmax_lse.dtype().name(), allowed });
        }
        if softmax_lse.shape().len() != 3 {
            let allowed = "3: (batch, nheads, seqlen_q)";
            return Err(Error::Rank { argument, found: softmax_lse.shape().len(), allowed });
        }
        let dimensions = ["batch", "nheads", "seqlen"];
        dimensions
            .into_iter()
            .zip(self.lse_shape())
            .enumerate()
            .try_for_each(|(i, (dimension, extent))| same(argument, softmax_lse, i, dimension, extent, "q"))
    }

    /// Checks that outputs of these sizes take the result.
    pub(crate) fn check_outputs(&self, out: &Layout, softmax_lse: Option<usize>) -> Result<()> {
        self.check_like("out", out, self.out_shape(), "q")?;
        if let Some(found) = softmax_lse.filter(|&found| found != self.rows()) {
            let layout = Layout::contiguous(DType::F32, &self.lse_shape())?;
            let (shape, strides) = (layout.shape().to_vec(), layout.strides().to_vec());
            return Err(Error::Length {
                argument: "softmax_lse",
                found,
                shape,
                strides,
                needed: self.rows().to_string(),
            });
        }
        Ok(())
    }

    /// How many keys query `row` sees: the first so many.
    pub(crate) fn visible(&self, row: usize) -> usize {
        if self.causal {
            (row + 1 + self.seqlen_k).saturating_sub(self.seqlen_q).min(self.seqlen_k)
        } else {
            self.seqlen_k
        }
    }

    /// Floating-point operations of the two products: 4 b h sq sk d, half of it when causal, as the field counts.
    pub fn flops(&self) -> u64 {
        let products = ((self.rows() * self.headdim) as u64).saturating_mul(4 * self.seqlen_k as u64);
        if self.causal { products / 2 } else { products }
    }

    /// Floating-point operations of the backward pass: its five products are 2.5 times the two of the forward pass.
    pub fn backward_flops(&self) -> u64 {
        self.flops().saturating_mul(5) / 2
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Problem { batch, seqlen_q, seqlen_k, nheads, nheads_k, headdim, .. } = self;
        write!(f, "batch {batch}, seqlen_q {seqlen_q}, seqlen_k {seqlen_k}, ")?;
        write!(f, "nheads {nheads}, nheads_k {nheads_k}, headdim {headdim}")?;
        if self.causal { write!(f, ", causal") } else { Ok(()) }
    }
}

const DIMENSIONS: [&str; 4] = ["batch", "seqlen", "nheads", "headdim"];

fn dimensions(argument: &'static str, layout: &Layout) -> Result<[usize; 4]> {
    let allowed = "4: (batch, seqlen, nheads, headdim)";
    let shape = layout.shape();
    let shape = shape.try_into().map_err(|_| Error::Rank { argument, found: shape.len(), allowed })?;
    if !layout.has_contiguous_rows() {
        let allowed = "a last stride of 1: headdim is contiguous";
        return Err(Error::Stride { argument, found: layout.strides().to_vec(), allowed });
    }
    Ok(shape)
}

fn same_dtype(argument: &'static str, layout: &Layout, q: DType) -> Result<()> {
    if layout.dtype() == q {
        return Ok(());
    }
    Err(Error::DType { argument, found: layout.dtype().name(), allowed: format!("{}, as of q", q.name()) })
}

fn same(
    argument: &'static str,
    layout: &Layout,
    index: usize,
    dimension: &'static str,
    extent: usize,
    of: &str,
) -> Result<()> {
    let found = layout.shape()[index];
    if found == extent {
        return Ok(());
    }
    Err(Error::Shape { argument, dimension, found, allowed: format!("{extent}, as of {of}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(shape: &[usize]) -> Layout {
        Layout::contiguous(DType::F32, shape).expect("small")
    }

    fn problem(q: &[usize], k: &[usize], options: &AttentionOptions) -> Result<Problem> {
        Problem::new(&layout(q), &layout(k), &layout(k), options)
    }

    #[test]
    fn the_causal_mask_is_aligned_to_the_bottom_right_corner() {
        let causal = AttentionOptions::new().causal(true);
        let long_q = problem(&[1, 5, 1, 8], &[1, 2, 1, 8], &causal).expect("valid");
        assert_eq!([0, 1, 2, 3, 4].map(|row| long_q.visible(row)), [0, 0, 0, 1, 2]);
        let long_k = problem(&[1, 2, 1, 8], &[1, 5, 1, 8], &causal).expect("valid");
        assert_eq!([0, 1].map(|row| long_k.visible(row)), [4, 5]);
    }

    #[test]
    fn each_bad_argument_is_named() {
        let options = AttentionOptions::new();
        let refused = |q: &[usize], k: &[usize]| problem(q, k, &options).expect_err("bad").to_string();
        assert_eq!(refused(&[1, 2, 8], &[1, 2, 1, 8]), "q: 3 dimensions; allowed: 4: (batch, seqlen, nheads, headdim)");
        assert_eq!(refused(&[2, 2, 1, 8], &[1, 2, 1, 8]), "k: batch is 1; allowed: 2, as of q");
        assert_eq!(refused(&[1, 2, 1, 8], &[1, 2, 1, 16]), "k: headdim is 16; allowed: 8, as of q");
        assert_eq!(refused(&[1, 2, 1, 0], &[1, 2, 1, 0]), "q: headdim is 0; allowed: 1 or more");
        assert!(refused(&[1, 2, 3, 8], &[1, 2, 2, 8]).starts_with("nheads is 3, which is no multiple of nheads_k = 2"));
        for scale in [f32::NAN, f32::INFINITY, 0.0, -1.0] {
            let options = AttentionOptions::new().softmax_scale(scale);
            let refused = problem(&[1, 2, 1, 8], &[1, 2, 1, 8], &options).expect_err("bad").to_string();
            assert_eq!(refused, format!("softmax_scale: {scale}; allowed: positive and finite"));
        }
    }
}
