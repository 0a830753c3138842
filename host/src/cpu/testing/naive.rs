//! Attention by its definition in f64. Sequences are one after the other in every tensor of tokens, whatever its rank.
use kernels::dropout::Dropout;

use super::{Broadcast, Case, Tensors};
use crate::Tensor;
use crate::options::WindowSize;

/// A query of a head of a sequence.
#[derive(Clone, Copy)]
struct Query {
    sequence: usize,
    head: usize,
    row: usize,
    seqlen_q: usize,
    seqlen_k: usize,
    /// Its token in Q.
    token: usize,
    /// The first token of the sequence in K.
    first_k: usize,
    /// Where its LSE is.
    lse: usize,
}

/// A key that a query sees.
struct Pair {
    key: usize,
    score: f64,
    /// The derivative of the score by softmax_scale · q kᵀ.
    cap_gradient: f64,
    /// That of dropout.
    factor: f64,
}

/// A case with all tensors widened.
pub struct Naive<'a> {
    case: &'a Case,
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    dout: Vec<f64>,
    dlse: Vec<f64>,
    bias: Vec<f64>,
    mask: Vec<f64>,
    slopes: Vec<f64>,
    sinks: Vec<f64>,
}

impl<'a> Naive<'a> {
    pub fn new(case: &'a Case, tensors: &Tensors) -> Self {
        let wide = |tensor: &Tensor| tensor.to_f32().into_iter().map(f64::from).collect::<Vec<_>>();
        let or_none = |tensor: &Option<Tensor>| tensor.as_ref().map(wide).unwrap_or_default();
        Naive {
            case,
            q: wide(&tensors.q),
            k: wide(&tensors.k),
            v: wide(&tensors.v),
            dout: wide(&tensors.dout),
            dlse: wide(&tensors.dlse),
            bias: or_none(&tensors.bias),
            mask: or_none(&tensors.mask),
            slopes: or_none(&tensors.slopes),
            sinks: or_none(&tensors.sinks),
        }
    }

    /// O and LSE.
    pub fn forward(&self) -> (Vec<f64>, Vec<f64>) {
        let width = self.case.headdim_v;
        let mut out = vec![0.0; self.dout.len()];
        let mut softmax_lse = vec![f64::NAN; self.dlse.len()];
        for query in self.queries() {
            let pairs = self.pairs(&query);
            let lse = self.lse(&query, &pairs);
            softmax_lse[query.lse] = lse;
            if pairs.iter().all(|pair| pair.score == f64::NEG_INFINITY) {
                continue;
            }
            let out = &mut out[self.of_query(&query, width)..][..width];
            for pair in &pairs {
                let p = (pair.score - lse).exp() * pair.factor;
                let v = &self.v[self.of_key(&query, pair.key, width)..];
                out.iter_mut().zip(v).for_each(|(o, v)| *o += p * v);
            }
        }
        (out, softmax_lse)
    }

    /// dQ, dK, dV, dbias and dsinks; `out` is what the forward pass has left.
    pub fn backward(&self, out: &[f32]) -> [Vec<f64>; 5] {
        let Case { headdim, headdim_v, .. } = *self.case;
        let scale = self.scale();
        let [mut dq, mut dk, mut dv, mut dbias, mut dsinks] =
            [&self.q, &self.k, &self.v, &self.bias, &self.sinks].map(|x| vec![0.0; x.len()]);
        for query in self.queries() {
            let pairs = self.pairs(&query);
            let lse = self.lse(&query, &pairs);
            if lse == f64::NEG_INFINITY {
                continue;
            }
            let (at_q, at_o) = (self.of_query(&query, headdim), self.of_query(&query, headdim_v));
            let d_o = &self.dout[at_o..at_o + headdim_v];
            let sum: f64 = d_o.iter().zip(&out[at_o..]).map(|(d_o, &o)| d_o * f64::from(o)).sum();
            let sum = sum - self.dlse[query.lse];
            for pair in &pairs {
                let (at_k, at_v) = (self.of_key(&query, pair.key, headdim), self.of_key(&query, pair.key, headdim_v));
                let p = (pair.score - lse).exp();
                let dp: f64 = d_o.iter().zip(&self.v[at_v..]).map(|(d_o, v)| d_o * v).sum();
                let ds = p * (dp * pair.factor - sum);
                dv[at_v..].iter_mut().zip(d_o).for_each(|(dv, d_o)| *dv += p * pair.factor * d_o);
                if let Some(broadcast) = self.case.bias {
                    dbias[self.at(broadcast, &query, pair.key)] += ds;
                }
                let ds = ds * pair.cap_gradient * scale;
                for x in 0..headdim {
                    dq[at_q + x] += ds * self.k[at_k + x];
                    dk[at_k + x] += ds * self.q[at_q + x];
                }
            }
            if let Some(&sink) = self.sinks.get(query.head) {
                dsinks[query.head] -= (sink - lse).exp() * sum;
            }
        }
        [dq, dk, dv, dbias, dsinks]
    }

    fn nheads(&self) -> usize {
        self.case.nheads_k * self.case.group
    }

    fn scale(&self) -> f64 {
        self.case.options.softmax_scale.map_or(1.0 / (self.case.headdim as f64).sqrt(), f64::from)
    }

    fn queries(&self) -> Vec<Query> {
        let total_q: usize = self.case.sequences.iter().map(|&(q, _)| q).sum();
        let mut queries = Vec::new();
        let (mut first_q, mut first_k) = (0, 0);
        for (sequence, &(seqlen_q, seqlen_k)) in self.case.sequences.iter().enumerate() {
            for (head, row) in (0..self.nheads()).flat_map(|head| (0..seqlen_q).map(move |row| (head, row))) {
                let token = first_q + row;
                let lse = if self.case.varlen {
                    head * total_q + token
                } else {
                    (sequence * self.nheads() + head) * seqlen_q + row
                };
                queries.push(Query { sequence, head, row, seqlen_q, seqlen_k, token, first_k, lse });
            }
            (first_q, first_k) = (first_q + seqlen_q, first_k + seqlen_k);
        }
        queries
    }

    fn of_query(&self, query: &Query, width: usize) -> usize {
        (query.token * self.nheads() + query.head) * width
    }

    fn of_key(&self, query: &Query, key: usize, width: usize) -> usize {
        ((query.first_k + key) * self.case.nheads_k + query.head / self.case.group) * width
    }

    /// Where a pair is in a tensor of scores.
    fn at(&self, [one_batch, one_head, one_row]: Broadcast, query: &Query, key: usize) -> usize {
        let longest = |of: fn(&(usize, usize)) -> usize| self.case.sequences.iter().map(of).max().unwrap_or(0);
        let (heads, rows) = (if one_head { 1 } else { self.nheads() }, if one_row { 1 } else { longest(|&(q, _)| q) });
        let index = |one, index| if one { 0 } else { index };
        let matrix = index(one_batch, query.sequence) * heads + index(one_head, query.head);
        (matrix * rows + index(one_row, query.row)) * longest(|&(_, k)| k) + key
    }

    fn pairs(&self, query: &Query) -> Vec<Pair> {
        let Case { headdim, ref options, .. } = *self.case;
        let WindowSize { left, right } = options.window_size;
        let right = if options.causal { Some(0) } else { right };
        let dropout = options.dropout.map(|dropout| Dropout::new(dropout.p, dropout.seed, dropout.offset));
        let q = &self.q[self.of_query(query, headdim)..][..headdim];
        let mut pairs = Vec::new();
        for key in 0..query.seqlen_k {
            // From the query's own place to the key.
            let distance = (key + query.seqlen_q) as i64 - (query.row + query.seqlen_k) as i64;
            let too_far =
                left.is_some_and(|left| -distance > left as i64) || right.is_some_and(|right| distance > right as i64);
            if too_far || self.case.mask.is_some_and(|broadcast| self.mask[self.at(broadcast, query, key)] == 0.0) {
                continue;
            }
            let bias = self.case.bias.map_or(0.0, |broadcast| self.bias[self.at(broadcast, query, key)]);
            if bias == f64::NEG_INFINITY {
                continue;
            }
            let k = &self.k[self.of_key(query, key, headdim)..];
            let mut score = self.scale() * q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>();
            let mut cap_gradient = 1.0;
            if let Some(softcap) = options.softcap.map(f64::from) {
                let tanh = (score / softcap).tanh();
                (score, cap_gradient) = (softcap * tanh, 1.0 - tanh * tanh);
            }
            if let Some(each) = self.case.alibi {
                let slope = self.slopes[if each { query.sequence * self.nheads() } else { 0 } + query.head];
                score -= slope * distance.abs() as f64;
            }
            score += bias;
            let head = (query.sequence * self.nheads() + query.head) as u32;
            let factor = dropout.map_or(1.0, |dropout| f64::from(dropout.factor(head, query.row as u32, key as u32)));
            pairs.push(Pair { key, score, cap_gradient, factor });
        }
        pairs
    }

    fn lse(&self, query: &Query, pairs: &[Pair]) -> f64 {
        let logits = || pairs.iter().map(|pair| pair.score).chain(self.sinks.get(query.head).copied());
        let m = logits().fold(f64::NEG_INFINITY, f64::max);
        if m == f64::NEG_INFINITY && logits().all(|x| x == m) {
            return m;
        }
        m + logits().map(|x| (x - m).exp()).sum::<f64>().ln()
    }
}
