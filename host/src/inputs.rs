//! The tensors that attention takes, in host memory, in device memory, or as layouts alone.
use std::convert::Infallible;

use crate::error::Result;

/// Q, K, V, and the tensors that scores and masks may take besides. X is a tensor: a [`TensorRef`](crate::TensorRef) in host
/// memory, a [`RawTensor`](crate::raw::RawTensor) in device memory, a [`Layout`](crate::Layout).
///
/// ```
/// use ferroflash::{Inputs, Tensor, TensorRef};
///
/// # fn main() -> Result<(), ferroflash::Error> {
/// let x = Tensor::from_vec(vec![0.5f32; 128 * 4 * 64], &[1, 128, 4, 64])?;
/// let slopes = Tensor::from_vec(vec![0.5f32, 0.25, 0.125, 0.0625], &[4])?;
/// let inputs: Inputs<TensorRef> = Inputs::new(&x, &x, &x).alibi_slopes(&slopes);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Inputs<X> {
    /// Q: (batch, seqlen_q, nheads, headdim); with `cu_seqlens_q` (total_q, nheads, headdim).
    pub q: X,
    /// K: (batch, seqlen_k, nheads_k, headdim); with `cu_seqlens_k` (total_k, nheads_k, headdim).
    pub k: X,
    /// V: (batch, seqlen_k, nheads_k, headdim_v); with `cu_seqlens_k` (total_k, nheads_k, headdim_v).
    pub v: X,
    /// Added to the scores: (batch, nheads, seqlen_q, seqlen_k) in the dtype of Q. Each of the first three may be 1: the same
    /// for all. With `cu_seqlens_q` the lengths are the longest ones. -inf hides the key, as the mask does.
    pub bias: Option<X>,
    /// Which keys a query sees: u8, 0 for those that it does not, of shape (batch, nheads, seqlen_q, seqlen_k). Each of the
    /// first three may be 1: a key-padding mask is (batch, 1, 1, seqlen_k).
    pub mask: Option<X>,
    /// ALiBi: `-slope · |i + seqlen_k - seqlen_q - j|` is added to the score of query i and key j. f32, of shape (nheads) or
    /// (batch, nheads).
    pub alibi_slopes: Option<X>,
    /// Attention sinks: a logit for each head that takes part in the softmax of every row of it, and has no value. f32, of
    /// shape (nheads). The LSE includes it.
    pub sinks: Option<X>,
    /// Where the sequences of Q begin: i32, of shape (batch + 1), from 0 to total_q, never falling. With `cu_seqlens_k`.
    pub cu_seqlens_q: Option<X>,
    /// Where those of K and V begin. With `cu_seqlens_q`.
    pub cu_seqlens_k: Option<X>,
}

impl<X> Inputs<X> {
    /// Q, K and V, and nothing else.
    pub fn new(q: impl Into<X>, k: impl Into<X>, v: impl Into<X>) -> Self {
        Inputs {
            q: q.into(),
            k: k.into(),
            v: v.into(),
            bias: None,
            mask: None,
            alibi_slopes: None,
            sinks: None,
            cu_seqlens_q: None,
            cu_seqlens_k: None,
        }
    }

    /// With a bias.
    pub fn bias(mut self, bias: impl Into<X>) -> Self {
        self.bias = Some(bias.into());
        self
    }

    /// With a mask.
    pub fn mask(mut self, mask: impl Into<X>) -> Self {
        self.mask = Some(mask.into());
        self
    }

    /// With ALiBi.
    pub fn alibi_slopes(mut self, alibi_slopes: impl Into<X>) -> Self {
        self.alibi_slopes = Some(alibi_slopes.into());
        self
    }

    /// With sinks.
    pub fn sinks(mut self, sinks: impl Into<X>) -> Self {
        self.sinks = Some(sinks.into());
        self
    }

    /// With sequences of different lengths, one after the other.
    pub fn cu_seqlens(mut self, q: impl Into<X>, k: impl Into<X>) -> Self {
        (self.cu_seqlens_q, self.cu_seqlens_k) = (Some(q.into()), Some(k.into()));
        self
    }

    /// The same of another type of tensor; `f` gets each tensor and its name.
    pub fn map<'a, Y>(&'a self, mut f: impl FnMut(&'static str, &'a X) -> Y) -> Inputs<Y> {
        let Ok(mapped) = self.try_map(|name, x| Ok::<_, Infallible>(f(name, x)));
        mapped
    }

    /// The same of another type of tensor, or the first error of `f`, which gets each tensor and its name.
    ///
    /// # Errors
    /// That of `f`.
    pub fn try_map<'a, Y, E>(&'a self, mut f: impl FnMut(&'static str, &'a X) -> Result<Y, E>) -> Result<Inputs<Y>, E> {
        Ok(Inputs {
            q: f("q", &self.q)?,
            k: f("k", &self.k)?,
            v: f("v", &self.v)?,
            bias: self.bias.as_ref().map(|x| f("bias", x)).transpose()?,
            mask: self.mask.as_ref().map(|x| f("mask", x)).transpose()?,
            alibi_slopes: self.alibi_slopes.as_ref().map(|x| f("alibi_slopes", x)).transpose()?,
            sinks: self.sinks.as_ref().map(|x| f("sinks", x)).transpose()?,
            cu_seqlens_q: self.cu_seqlens_q.as_ref().map(|x| f("cu_seqlens_q", x)).transpose()?,
            cu_seqlens_k: self.cu_seqlens_k.as_ref().map(|x| f("cu_seqlens_k", x)).transpose()?,
        })
    }
}

/// What a backward pass takes: the inputs and the results of its forward pass, and the gradients of these.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct BackwardInputs<X> {
    /// The inputs of the forward pass.
    pub forward: Inputs<X>,
    /// O of the forward pass.
    pub out: X,
    /// The LSE of the forward pass.
    pub softmax_lse: X,
    /// dO: shaped like O.
    pub dout: X,
    /// The gradient of the LSE, where the loss depends on it: f32, shaped like the LSE.
    pub dlse: Option<X>,
}

impl<X> BackwardInputs<X> {
    /// Of a loss that depends on O alone.
    pub fn new(forward: Inputs<X>, out: impl Into<X>, softmax_lse: impl Into<X>, dout: impl Into<X>) -> Self {
        BackwardInputs { forward, out: out.into(), softmax_lse: softmax_lse.into(), dout: dout.into(), dlse: None }
    }

    /// Of a loss that depends on the LSE too.
    pub fn dlse(mut self, dlse: impl Into<X>) -> Self {
        self.dlse = Some(dlse.into());
        self
    }

    /// The same of another type of tensor; `f` gets each tensor and its name.
    pub fn map<'a, Y>(&'a self, mut f: impl FnMut(&'static str, &'a X) -> Y) -> BackwardInputs<Y> {
        let Ok(mapped) = self.try_map(|name, x| Ok::<_, Infallible>(f(name, x)));
        mapped
    }

    /// The same of another type of tensor, or the first error of `f`, which gets each tensor and its name.
    ///
    /// # Errors
    /// That of `f`.
    pub fn try_map<'a, Y, E>(
        &'a self,
        mut f: impl FnMut(&'static str, &'a X) -> Result<Y, E>,
    ) -> Result<BackwardInputs<Y>, E> {
        Ok(BackwardInputs {
            forward: self.forward.try_map(&mut f)?,
            out: f("out", &self.out)?,
            softmax_lse: f("softmax_lse", &self.softmax_lse)?,
            dout: f("dout", &self.dout)?,
            dlse: self.dlse.as_ref().map(|x| f("dlse", x)).transpose()?,
        })
    }
}

/// Where a backward pass writes: tensors of the shapes of what they are the gradients of. Those that are `None` are not
/// computed.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct GradientOutputs<X> {
    /// dQ.
    pub dq: X,
    /// dK, summed over the heads of Q that read the head.
    pub dk: X,
    /// dV, summed likewise.
    pub dv: X,
    /// The gradient of the bias, in its dtype, summed over what the bias is broadcast to.
    pub dbias: Option<X>,
    /// The gradient of the sinks: f32, of shape (nheads).
    pub dsinks: Option<X>,
}

impl<X> GradientOutputs<X> {
    /// dQ, dK and dV, and nothing else.
    pub fn new(dq: impl Into<X>, dk: impl Into<X>, dv: impl Into<X>) -> Self {
        GradientOutputs { dq: dq.into(), dk: dk.into(), dv: dv.into(), dbias: None, dsinks: None }
    }

    /// With the gradient of the bias.
    pub fn dbias(mut self, dbias: impl Into<X>) -> Self {
        self.dbias = Some(dbias.into());
        self
    }

    /// With the gradient of the sinks.
    pub fn dsinks(mut self, dsinks: impl Into<X>) -> Self {
        self.dsinks = Some(dsinks.into());
        self
    }

    /// The same of another type of tensor; `f` gets each tensor and its name.
    pub fn map<'a, Y>(&'a self, mut f: impl FnMut(&'static str, &'a X) -> Y) -> GradientOutputs<Y> {
        let Ok(mapped) = self.try_map(|name, x| Ok::<_, Infallible>(f(name, x)));
        mapped
    }

    /// The same of another type of tensor, or the first error of `f`, which gets each tensor and its name.
    ///
    /// # Errors
    /// That of `f`.
    pub fn try_map<'a, Y, E>(
        &'a self,
        mut f: impl FnMut(&'static str, &'a X) -> Result<Y, E>,
    ) -> Result<GradientOutputs<Y>, E> {
        Ok(GradientOutputs {
            dq: f("dq", &self.dq)?,
            dk: f("dk", &self.dk)?,
            dv: f("dv", &self.dv)?,
            dbias: self.dbias.as_ref().map(|x| f("dbias", x)).transpose()?,
            dsinks: self.dsinks.as_ref().map(|x| f("dsinks", x)).transpose()?,
        })
    }

    /// Those that there are, in the order of this struct.
    pub(crate) fn into_each(self) -> impl Iterator<Item = X> {
        let GradientOutputs { dq, dk, dv, dbias, dsinks } = self;
        [dq, dk, dv].into_iter().chain(dbias).chain(dsinks)
    }
}
