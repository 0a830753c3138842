//! The tensors of a problem in host memory, as those who compute there take them.
use crate::element::Element;
use crate::heads::Heads;
use crate::inputs::Inputs;
use crate::problem::Problem;
use crate::sequences::Sequence;
use crate::tensor::TensorRef;

/// The inputs of a forward pass.
pub(crate) struct Operands<'a, T> {
    pub q: Heads<'a, T>,
    pub k: Heads<'a, T>,
    pub v: Heads<'a, T>,
    /// A row of seqlen_k for each sequence, query and head.
    bias: Option<Heads<'a, T>>,
    /// Likewise.
    mask: Option<Heads<'a, u8>>,
    /// (batch, nheads)
    alibi_slopes: Option<Vec<f32>>,
    /// (nheads)
    sinks: Option<Vec<f32>>,
    nheads: usize,
}

impl<'a, T: Element> Operands<'a, T> {
    /// Those of a problem, which has checked them.
    pub fn new(problem: &Problem, inputs: &Inputs<TensorRef<'a>>) -> Self {
        let Problem { batch, nheads, seqlen_q, .. } = *problem;
        let slopes = inputs.alibi_slopes.as_ref().map(|slopes| {
            let slopes = slopes.packed::<f32>().unwrap_or_default();
            slopes.iter().copied().cycle().take(batch * nheads).collect()
        });
        Operands {
            q: Heads::of(&inputs.q),
            k: Heads::of(&inputs.k),
            v: Heads::of(&inputs.v),
            bias: inputs.bias.as_ref().map(|bias| Heads::broadcast(bias, [batch, nheads, seqlen_q])),
            mask: inputs.mask.as_ref().map(|mask| Heads::broadcast(mask, [batch, nheads, seqlen_q])),
            alibi_slopes: slopes,
            sinks: inputs.sinks.as_ref().map(|sinks| sinks.packed::<f32>().unwrap_or_default().into_owned()),
            nheads,
        }
    }

    /// The bias of a query and all keys of its sequence, in a head of Q.
    pub fn bias(&self, sequence: &Sequence, head: usize, row: usize) -> Option<&'a [T]> {
        self.bias.as_ref().map(|bias| bias.row(sequence.index, row, head))
    }

    /// The mask of a query and all keys of its sequence, in a head of Q: 0 for those that it does not see.
    pub fn mask(&self, sequence: &Sequence, head: usize, row: usize) -> Option<&'a [u8]> {
        self.mask.as_ref().map(|mask| mask.row(sequence.index, row, head))
    }

    /// ALiBi's slope of a head of Q.
    pub fn slope(&self, sequence: &Sequence, head: usize) -> Option<f32> {
        self.alibi_slopes.as_ref().map(|slopes| slopes[sequence.index * self.nheads + head])
    }

    /// The sink of a head of Q.
    pub fn sink(&self, head: usize) -> Option<f32> {
        self.sinks.as_ref().map(|sinks| sinks[head])
    }
}
