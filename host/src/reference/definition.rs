//! Attention by its definition: which keys a query sees, with which scores, and what their softmax makes of V.
use kernels::dropout::Dropout;
use rayon::prelude::*;

use super::number::{Number, Softmax, add_scaled, dot};
use super::rounding::Rounding;
use crate::element::Element;
use crate::inputs::Inputs;
use crate::operands::Operands;
use crate::problem::Problem;
use crate::sequences::Sequence;
use crate::tensor::TensorRef;

/// A problem and its tensors, in the arithmetic of X.
pub struct Definition<'a, T, X> {
    pub problem: &'a Problem,
    /// What scores and masks take; Q, K and V are beside it, widened.
    operands: Operands<'a, T>,
    pub q: Tokens<X>,
    pub k: Tokens<X>,
    pub v: Tokens<X>,
    dropout: Option<Dropout>,
    pub rounding: Rounding<X>,
}

/// A row of S: a query, in one head of Q.
#[derive(Clone, Copy)]
pub struct Query {
    pub sequence: Sequence,
    /// Counted from the first of the sequence.
    pub row: usize,
    pub head: usize,
}

/// A key, in one head of K and V.
#[derive(Clone, Copy)]
pub struct Key {
    pub sequence: Sequence,
    /// Counted from the first of the sequence.
    pub key: usize,
    pub head_k: usize,
}

/// A key that a query sees.
#[derive(Clone, Copy)]
pub struct Seen<X> {
    /// Counted from the first of the sequence.
    pub key: usize,
    /// softcap · tanh(s / softcap), or s without a cap.
    pub capped: X,
    /// What the softmax takes.
    pub score: X,
}

impl<'a, T: Element, X: Number> Definition<'a, T, X> {
    /// Of inputs that `problem` has checked.
    pub fn new(problem: &'a Problem, inputs: &Inputs<TensorRef<'a>>, rounding: Rounding<X>) -> Self {
        Definition {
            problem,
            operands: Operands::new(problem, inputs),
            q: Tokens::of::<T>(&inputs.q, rounding.operand),
            k: Tokens::of::<T>(&inputs.k, rounding.operand),
            v: Tokens::of::<T>(&inputs.v, rounding.operand),
            dropout: problem.dropout.map(|dropout| Dropout::new(dropout.p, dropout.seed, dropout.offset)),
            rounding,
        }
    }

    /// O and the LSE.
    pub fn forward(&self) -> (Vec<X>, Vec<X>) {
        let (problem, queries) = (self.problem, self.queries());
        let mut out = vec![X::default(); queries.len() * problem.headdim_v];
        let rows = out.par_chunks_mut(problem.headdim_v).zip(&queries);
        let lse: Vec<X> = rows
            .map(|(out, query)| {
                let seen = self.seen(query);
                let softmax = self.softmax(query, &seen);
                self.out(query, &seen, &softmax, out);
                softmax.lse()
            })
            .collect();
        let mut softmax_lse = vec![X::default(); queries.len()];
        for (query, lse) in queries.iter().zip(lse) {
            softmax_lse[query.lse_index(problem)] = lse;
        }
        (out, softmax_lse)
    }

    /// The rows of S, in the order of those of O.
    pub fn queries(&self) -> Vec<Query> {
        let nheads = self.problem.nheads;
        let heads = move |sequence, row| (0..nheads).map(move |head| Query { sequence, row, head });
        let tokens = |sequence: Sequence| (0..sequence.seqlen_q).flat_map(move |row| heads(sequence, row));
        self.problem.sequences().into_iter().flat_map(tokens).collect()
    }

    /// The rows of K and V, in their order.
    pub fn keys(&self) -> Vec<Key> {
        let nheads_k = self.problem.nheads_k;
        let heads = move |sequence, key| (0..nheads_k).map(move |head_k| Key { sequence, key, head_k });
        let tokens = |sequence: Sequence| (0..sequence.seqlen_k).flat_map(move |key| heads(sequence, key));
        self.problem.sequences().into_iter().flat_map(tokens).collect()
    }

    /// The keys that a query sees.
    pub fn seen(&self, query: &Query) -> Vec<Seen<X>> {
        let Query { sequence, row, .. } = *query;
        sequence.visible(self.problem.window, row).filter_map(|key| self.see(query, key)).collect()
    }

    /// A key as a query sees it; `None`: it does not.
    pub fn see(&self, query: &Query, key: usize) -> Option<Seen<X>> {
        let Query { sequence, row, head } = *query;
        let in_window = sequence.visible(self.problem.window, row).contains(&key);
        if !in_window || self.operands.mask(&sequence, head, row).is_some_and(|mask| mask[key] == 0) {
            return None;
        }
        // A bias of -inf is a mask: what lies at the key, be it NaN, does not matter.
        let bias = self.operands.bias(&sequence, head, row).map(|bias| bias[key].to_f32());
        if bias == Some(f32::NEG_INFINITY) {
            return None;
        }
        let scale = X::of(self.problem.softmax_scale.into());
        let s = scale * dot(query.of(&self.q, self.problem), query.key(key, self.problem).of(&self.k, self.problem));
        let capped = self.softcap().map_or(s, |softcap| softcap * (s / softcap).tanh());
        let mut score = capped;
        if let Some(slope) = self.operands.slope(&sequence, head) {
            let distance = (row + sequence.seqlen_k).abs_diff(sequence.seqlen_q + key);
            score = score - X::of(slope.into()) * X::of(distance as f64);
        }
        if let Some(bias) = bias {
            score += X::of(bias.into());
        }
        Some(Seen { key, capped, score: (self.rounding.store)(score) })
    }

    /// The cap of the scores.
    pub fn softcap(&self) -> Option<X> {
        self.problem.softcap.map(|softcap| X::of(softcap.into()))
    }

    /// The sink of a head.
    pub fn sink(&self, head: usize) -> Option<X> {
        self.operands.sink(head).map(|sink| X::of(sink.into()))
    }

    /// The softmax of a row, in which a sink takes part as the score of a key would.
    pub fn softmax(&self, query: &Query, seen: &[Seen<X>]) -> Softmax<X> {
        Softmax::of(seen.iter().map(|seen| seen.score).chain(self.sink(query.head)))
    }

    /// An element of P, before dropout.
    pub fn p(&self, softmax: &Softmax<X>, score: X) -> X {
        (self.rounding.store)(softmax.probability(score))
    }

    /// What dropout makes of an element of P, or of dP.
    pub fn drop(&self, query: &Query, key: usize, p: X) -> X {
        let Some(dropout) = self.dropout else { return p };
        let head = query.sequence.index * self.problem.nheads + query.head;
        let factor = dropout.factor(head as u32, query.row as u32, key as u32);
        (self.rounding.store)(p * X::of(factor.into()))
    }

    /// A row of O, added to the zeros that it is given. Without a score above -inf no V takes part, be it NaN.
    pub fn out(&self, query: &Query, seen: &[Seen<X>], softmax: &Softmax<X>, out: &mut [X]) {
        if softmax.is_empty() {
            return;
        }
        for &Seen { key, score, .. } in seen {
            let p = self.drop(query, key, self.p(softmax, score));
            add_scaled(out, (self.rounding.operand)(p), query.key(key, self.problem).of(&self.v, self.problem));
        }
        out.iter_mut().for_each(|out| *out = (self.rounding.store)(*out));
    }
}

impl Query {
    /// Its row of Q, or of another tensor that is like it.
    pub fn of<'x, X>(&self, tensor: &'x Tokens<X>, problem: &Problem) -> &'x [X] {
        tensor.row(self.index(problem))
    }

    /// Which row of O it has.
    pub fn index(&self, problem: &Problem) -> usize {
        let Sequence { batch, first_q, .. } = self.sequence;
        (batch * problem.seqlen_q + first_q + self.row) * problem.nheads + self.head
    }

    /// Where its LSE is.
    pub fn lse_index(&self, problem: &Problem) -> usize {
        problem.lse_index(&self.sequence, self.head, self.row)
    }

    /// A key of its sequence, in the head that it reads.
    pub fn key(&self, key: usize, problem: &Problem) -> Key {
        Key { sequence: self.sequence, key, head_k: self.head / (problem.nheads / problem.nheads_k) }
    }
}

impl Key {
    /// Its row of K or V.
    pub fn of<'x, X>(&self, tensor: &'x Tokens<X>, problem: &Problem) -> &'x [X] {
        let Sequence { batch, first_k, .. } = self.sequence;
        tensor.row((batch * problem.seqlen_k + first_k + self.key) * problem.nheads_k + self.head_k)
    }
}

/// A tensor as rows of headdim elements: of each token, those of its heads.
pub struct Tokens<X> {
    data: Vec<X>,
    headdim: usize,
}

impl<X: Number> Tokens<X> {
    /// Of a tensor whose dtype is T, each element as an operand of products.
    pub fn of<T: Element>(tensor: &TensorRef, operand: fn(X) -> X) -> Self {
        let data = tensor.packed::<T>().unwrap_or_default();
        let headdim = tensor.shape().last().copied().unwrap_or_default();
        Tokens { data: data.iter().map(|x| operand(X::of(x.to_f32().into()))).collect(), headdim }
    }
}

impl<X> Tokens<X> {
    fn row(&self, index: usize) -> &[X] {
        &self.data[index * self.headdim..(index + 1) * self.headdim]
    }
}
