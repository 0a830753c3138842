//! The arguments of kernels, from a problem and where its tensors are.
use cuda_std::Global;
use kernels::attention::{Attention, Tensor};
use kernels::dropout::Dropout;
use kernels::flash2_backward::Params;
use kernels::mask::UNBOUNDED;

use crate::inputs::{BackwardInputs, GradientOutputs, Inputs};
use crate::layout::Layout;
use crate::problem::Problem;
use crate::raw::RawTensor;

/// What addresses and strides of tensors are multiples of, in bytes, for the widest accesses of kernels.
pub(crate) const ALIGNMENT: usize = 16;

/// How kernels may access the tensors of a problem.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    /// Eight elements at a time, as [`RawTensor::is_aligned`] says of each.
    pub aligned: bool,
    /// Q, K and V, and in a backward pass dO, by tensor maps, if they are aligned.
    pub mapped: bool,
}

impl Access {
    /// In any way.
    pub const ANY: Access = Access { aligned: true, mapped: true };

    /// Of these tensors and O.
    pub fn of(inputs: &Inputs<RawTensor>, out: &RawTensor) -> Self {
        let Inputs { q, k, v, .. } = inputs;
        Access {
            aligned: [q, k, v, out].into_iter().all(RawTensor::is_aligned),
            ..Self::on_machine(inputs, |x| &x.layout)
        }
    }

    /// Of copies of these tensors, without gaps but for what is repeated by strides of 0.
    pub fn on_machine<X>(inputs: &Inputs<X>, layout: fn(&X) -> &Layout) -> Self {
        let mapped = [&inputs.q, &inputs.k, &inputs.v].into_iter().all(|tensor| is_mapped(layout(tensor)));
        Access { aligned: true, mapped }
    }

    /// Of the tensors of a backward pass.
    pub fn of_backward(inputs: &BackwardInputs<RawTensor>, gradients: &GradientOutputs<RawTensor>) -> Self {
        let Access { aligned, mapped } = Self::of(&inputs.forward, &inputs.out);
        let GradientOutputs { dq, dk, dv, .. } = gradients;
        Access {
            aligned: aligned && [&inputs.dout, dq, dk, dv].into_iter().all(RawTensor::is_aligned),
            mapped: mapped && is_mapped(&inputs.dout.layout),
        }
    }

    /// Of copies of these tensors, as [`on_machine`](Self::on_machine), and of gradients without gaps.
    pub fn of_backward_on_machine<X>(inputs: &BackwardInputs<X>, layout: fn(&X) -> &Layout) -> Self {
        let Access { aligned, mapped } = Self::on_machine(&inputs.forward, layout);
        Access { aligned, mapped: mapped && is_mapped(layout(&inputs.dout)) }
    }
}

/// Whether a tensor map has such strides. The driver does not say that it takes strides of 0.
fn is_mapped(layout: &Layout) -> bool {
    const TOO_LONG: usize = 1 << 40;
    let element = layout.dtype().bytes();
    let is_mapped =
        |(&extent, &stride): (&usize, &usize)| extent <= 1 || (1..TOO_LONG).contains(&stride.saturating_mul(element));
    layout.shape().iter().zip(layout.strides()).all(is_mapped)
}

/// The arguments of a forward pass. `softmax_lse` is an address.
pub(crate) fn attention(problem: &Problem, inputs: &Inputs<RawTensor>, out: &RawTensor, softmax_lse: u64) -> Attention {
    let Inputs { q, k, v, bias, mask, alibi_slopes, sinks, cu_seqlens_q, cu_seqlens_k } = inputs;
    let side = |keys: Option<usize>| keys.map_or(UNBOUNDED, |keys| keys as u32);
    let (lse_batch_stride, lse_head_stride) = match &problem.varlen {
        None => ((problem.nheads * problem.seqlen_q) as u64, problem.seqlen_q as u64),
        Some(varlen) => (0, varlen.total_q as u64),
    };
    let alibi_batch_stride = match alibi_slopes.as_ref().map(|slopes| slopes.layout.strides()) {
        Some(&[batch_stride, _]) => batch_stride as u64,
        _ => 0,
    };
    Attention {
        q: tokens(q),
        k: tokens(k),
        v: tokens(v),
        o: tokens(out),
        bias: bias.as_ref().map_or(nowhere(), scores),
        mask: mask.as_ref().map_or(nowhere(), scores),
        alibi_slopes: optional(alibi_slopes),
        alibi_batch_stride,
        sinks: optional(sinks),
        softmax_lse: global(softmax_lse),
        lse_batch_stride,
        lse_head_stride,
        cu_seqlens_q: optional(cu_seqlens_q),
        cu_seqlens_k: optional(cu_seqlens_k),
        dropout: problem.dropout.map_or(Dropout::NONE, |dropout| Dropout::new(dropout.p, dropout.seed, dropout.offset)),
        batch: problem.batch as u32,
        nheads: problem.nheads as u32,
        nheads_k: problem.nheads_k as u32,
        seqlen_q: problem.seqlen_q as u32,
        seqlen_k: problem.seqlen_k as u32,
        headdim: problem.headdim as u32,
        headdim_v: problem.headdim_v as u32,
        softmax_scale: problem.softmax_scale,
        softcap: problem.softcap.unwrap_or(0.0),
        window_left: side(problem.window.left),
        window_right: side(problem.window.right),
        aligned: u32::from([q, k, v, out].into_iter().all(RawTensor::is_aligned)),
    }
}

/// The arguments of a backward pass, but for the addresses of its workspace.
pub(crate) fn backward(
    problem: &Problem,
    inputs: &BackwardInputs<RawTensor>,
    gradients: &GradientOutputs<RawTensor>,
) -> Params {
    let BackwardInputs { forward, out, softmax_lse, dout, dlse } = inputs;
    let GradientOutputs { dq, dk, dv, dbias, dsinks } = gradients;
    let aligned = u32::from(Access::of_backward(inputs, gradients).aligned);
    let [bias_batch, bias_heads, bias_rows, _] = problem.bias.unwrap_or([1; 4]).map(|extent| extent as u32);
    Params {
        attention: Attention { aligned, ..attention(problem, forward, out, softmax_lse.address) },
        d_o: tokens(dout),
        d_q: tokens(dq),
        d_k: tokens(dk),
        d_v: tokens(dv),
        d_lse: optional(dlse),
        row_sums: Global::NULL,
        d_bias: dbias.as_ref().map_or(nowhere(), scores),
        bias_batch,
        bias_heads,
        bias_rows,
        d_sinks: optional(dsinks),
        statistics: Global::NULL,
        d_q_sums: Global::NULL,
    }
}

impl RawTensor {
    /// Whether all rows begin at multiples of [`ALIGNMENT`], and none ends in the middle of eight elements: what the
    /// accesses of eight elements at a time need.
    pub(crate) fn is_aligned(&self) -> bool {
        let (shape, strides) = (self.layout.shape(), self.layout.strides());
        let Some((&headdim, outer)) = shape.split_last() else { return true };
        let element = self.layout.dtype().bytes();
        let is_aligned = |(&extent, &stride): (&usize, &usize)| {
            extent <= 1 || stride.wrapping_mul(element).is_multiple_of(ALIGNMENT)
        };
        self.layout.is_empty()
            || headdim.is_multiple_of(8)
                && self.address.is_multiple_of(ALIGNMENT as u64)
                && outer.iter().zip(strides).all(is_aligned)
    }
}

/// A tensor of tokens: (batch, seqlen, nheads, headdim), or (total, nheads, headdim).
fn tokens<T>(tensor: &RawTensor) -> Tensor<T> {
    let (batch_stride, row_stride, head_stride) = match *tensor.layout.strides() {
        [batch, row, head, _] => (batch, row, head),
        [row, head, _] => (0, row, head),
        _ => unreachable!("tensors of tokens have three or four dimensions"),
    };
    let [batch_stride, row_stride, head_stride] = [batch_stride, row_stride, head_stride].map(|stride| stride as u64);
    Tensor { data: global(tensor.address), batch_stride, row_stride, head_stride }
}

/// A tensor of scores, (batch, nheads, seqlen_q, seqlen_k), of which the first three may be 1: the same for all.
fn scores<T>(tensor: &RawTensor) -> Tensor<T> {
    let (shape, strides) = (tensor.layout.shape(), tensor.layout.strides());
    let [batch_stride, head_stride, row_stride] = [0, 1, 2].map(|i| if shape[i] == 1 { 0 } else { strides[i] as u64 });
    Tensor { data: global(tensor.address), batch_stride, row_stride, head_stride }
}

fn optional<T>(tensor: &Option<RawTensor>) -> Global<T> {
    tensor.as_ref().map_or(Global::NULL, |tensor| global(tensor.address))
}

/// What kernels take for an address.
pub(crate) fn global<T>(address: u64) -> Global<T> {
    // SAFETY: nothing is accessed before a launch, whose caller answers for the memory that its tensors name.
    unsafe { Global::from_address(address) }
}

/// A tensor that is not there.
fn nowhere<T>() -> Tensor<T> {
    Tensor { data: Global::NULL, batch_stride: 0, row_stride: 0, head_stride: 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Layout;
    use crate::options::AttentionOptions;
    use cuda_std::DType;

    fn strided(address: u64, shape: &[usize], strides: &[usize]) -> RawTensor {
        RawTensor { address, layout: Layout::strided(DType::F16, shape, strides).expect("as many") }
    }

    #[test]
    fn rows_are_aligned_or_not() {
        let shape = [2, 3, 4, 64];
        assert!(strided(0x1000, &shape, &[1024, 256, 64, 1]).is_aligned());
        assert!(!strided(0x1008, &shape, &[1024, 256, 64, 1]).is_aligned());
        assert!(!strided(0x1000, &shape, &[1024, 260, 64, 1]).is_aligned());
        // The stride of an extent of 1 is never taken, nor is the address of a tensor without elements.
        assert!(strided(0x1000, &[1, 3, 4, 64], &[1, 256, 64, 1]).is_aligned());
        assert!(strided(0x1001, &[0, 3, 4, 64], &[1, 1, 1, 1]).is_aligned());
        assert!(!strided(0x1000, &[2, 3, 4, 36], &[1024, 256, 64, 1]).is_aligned());
    }

    #[test]
    fn extents_of_1_broadcast() {
        let q = strided(0x1000, &[2, 3, 4, 64], &[768, 256, 64, 1]);
        let bias = strided(0x2000, &[1, 4, 1, 3], &[12, 3, 3, 1]);
        let inputs = Inputs::new(q.clone(), q.clone(), q.clone()).bias(bias);
        let layouts = inputs.map(|_, tensor: &RawTensor| &tensor.layout);
        let problem = Problem::of(&layouts, None, &AttentionOptions::new()).expect("valid");
        let a = attention(&problem, &inputs, &q, 0x3000);
        assert_eq!((a.bias.batch_stride, a.bias.head_stride, a.bias.row_stride), (0, 3, 0));
        assert_eq!((a.aligned, a.lse_batch_stride, a.lse_head_stride), (1, 12, 3));
        assert!(a.mask.data.is_null() && a.alibi_slopes.is_null() && a.cu_seqlens_q.is_null());
    }
}
