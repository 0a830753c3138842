//! What gradients are compared with: those of attention by its definition, and those of a plain implementation.
//!
//! With dP = dropout ∘ (dO Vᵀ), where dropout is 0 or 1 / (1 - p), and D = rowsum(P ∘ dP), which equals rowsum(dO ∘ O),
//!
//! ```text
//! dV = (P ∘ dropout)ᵀ dO,   dS = P ∘ (dP - D + dLSE),   dbias = dS, summed over what the bias is the same for,
//! dC = dS ∘ (1 - (C / softcap)²) of capped scores C, else dS,
//! dK = softmax_scale · dCᵀ Q,   dQ = softmax_scale · dC K,
//! dsink = Σ e^(sink - LSE) (dLSE - D), over the rows of the head.
//! ```
//!
//! A row of dQ takes a row of dS, a row of dK and dV a column of dS and P, an element of dbias one of dS or several:
//! each is computed where it is needed, so that memory stays linear in the lengths, but for dbias itself.
use rayon::prelude::*;

use super::definition::{Definition, Key, Query, Seen, Tokens};
use super::number::{Number, Softmax, add_scaled, dot};
use super::problem;
use super::rounding::Rounding;
use crate::element::{Element, with_element};
use crate::error::Result;
use crate::inputs::Inputs;
use crate::options::AttentionOptions;
use crate::problem::Problem;
use crate::tensor::TensorRef;

/// Gradients of attention, in row-major order: f64 of the reference, f32 of a plain implementation.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Gradients<X> {
    /// dQ: (batch, seqlen_q, nheads, headdim), or (total_q, nheads, headdim).
    pub dq: Vec<X>,
    /// dK: (batch, seqlen_k, nheads_k, headdim), or (total_k, nheads_k, headdim).
    pub dk: Vec<X>,
    /// dV: (batch, seqlen_k, nheads_k, headdim_v), or (total_k, nheads_k, headdim_v).
    pub dv: Vec<X>,
    /// The gradient of the bias, if there is one, in its shape.
    pub dbias: Option<Vec<X>>,
    /// That of the sinks, if there are any: (nheads).
    pub dsinks: Option<Vec<X>>,
    /// What the elements of `dbias` are sums of.
    pub(crate) dbias_terms: Terms,
    /// What those of `dsinks` are sums of.
    pub(crate) dsinks_terms: Terms,
}

/// How large the terms are whose sums the elements of a gradient are: rounding errors are in proportion to these, and
/// not to what is left of them.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Terms {
    /// The largest Σ |term|.
    pub sum: f64,
    /// The largest Σ of the squares of the numbers that are rounded on the way to a term.
    pub squares: f64,
}

/// The gradients of attention of Q, K and V alone, as [`attention_backward_with`].
///
/// # Errors
/// As [`Problem::new`]; [`Error::Shape`](crate::Error::Shape) and others for a `dout` that is not like O.
pub fn attention_backward<'a>(
    q: impl Into<TensorRef<'a>>,
    k: impl Into<TensorRef<'a>>,
    v: impl Into<TensorRef<'a>>,
    dout: impl Into<TensorRef<'a>>,
    options: &AttentionOptions,
) -> Result<Gradients<f64>> {
    attention_backward_with(&Inputs::new(q, k, v), &dout.into(), None, options)
}

/// The gradients of attention by their definition, in f64, of a loss whose gradients are `dout` with respect to O, and
/// `dlse`, or 0, with respect to the LSE. A row that sees no key, or only keys whose scores are -inf, has no part in
/// them, but for the gradient of the sink that is its LSE.
///
/// # Errors
/// As [`attention_with`](super::attention_with); [`Error::Shape`](crate::Error::Shape) and others for a `dout` that is
/// not like O, or a `dlse` that is not like the LSE.
pub fn attention_backward_with(
    inputs: &Inputs<TensorRef>,
    dout: &TensorRef,
    dlse: Option<&TensorRef>,
    options: &AttentionOptions,
) -> Result<Gradients<f64>> {
    let problem = check(inputs, dout, dlse, options)?;
    with_element!("q", problem.dtype, T => {
        Ok(Backward::new(Definition::<T, f64>::new(&problem, inputs, Rounding::NONE), dout, dlse).gradients())
    })
}

/// The gradients of attention of Q, K and V alone, as [`plain_backward_with`].
///
/// # Errors
/// As [`attention_backward`].
pub fn plain_backward<'a>(
    q: impl Into<TensorRef<'a>>,
    k: impl Into<TensorRef<'a>>,
    v: impl Into<TensorRef<'a>>,
    dout: impl Into<TensorRef<'a>>,
    options: &AttentionOptions,
) -> Result<Gradients<f32>> {
    plain_backward_with(&Inputs::new(q, k, v), &dout.into(), None, options)
}

/// The gradients as a program without fused kernels computes them in the dtype of the inputs: the scores, P, dP and dS
/// are rounded to the dtype, each again after dropout or the cap, and so are the gradients, but for those of the sinks,
/// which are f32 as the sinks; sums are in f32. What the error of any other implementation is measured against.
///
/// # Errors
/// As [`attention_backward_with`].
pub fn plain_backward_with(
    inputs: &Inputs<TensorRef>,
    dout: &TensorRef,
    dlse: Option<&TensorRef>,
    options: &AttentionOptions,
) -> Result<Gradients<f32>> {
    let problem = check(inputs, dout, dlse, options)?;
    with_element!("q", problem.dtype, T => {
        Ok(Backward::new(Definition::<T, f32>::new(&problem, inputs, Rounding::plain::<T>(&problem)), dout, dlse).gradients())
    })
}

fn check(
    inputs: &Inputs<TensorRef>,
    dout: &TensorRef,
    dlse: Option<&TensorRef>,
    options: &AttentionOptions,
) -> Result<Problem> {
    let problem = problem(inputs, options)?;
    problem.check_like("dout", dout.layout(), &problem.out_shape(), "q")?;
    dlse.map_or(Ok(()), |dlse| problem.check_rows("dlse", dlse.layout()))?;
    Ok(problem)
}

/// The definition, and the gradients of the loss.
struct Backward<'a, T, X> {
    definition: Definition<'a, T, X>,
    dout: Tokens<X>,
    /// As the LSE lies.
    dlse: Option<Vec<X>>,
}

/// What a row of S needs to become one of P and of dS.
#[derive(Clone, Copy)]
struct Row<X> {
    softmax: Softmax<X>,
    d: X,
    dlse: X,
    /// Σ (P dP)².
    squares: f64,
}

impl<'a, T: Element, X: Number> Backward<'a, T, X> {
    fn new(definition: Definition<'a, T, X>, dout: &TensorRef, dlse: Option<&TensorRef>) -> Self {
        let dlse = dlse.map(|dlse| {
            let dlse = dlse.packed::<f32>().unwrap_or_default();
            dlse.iter().map(|&dlse| X::of(dlse.into())).collect()
        });
        let dout = Tokens::of::<T>(dout, definition.rounding.operand);
        Backward { definition, dout, dlse }
    }

    fn gradients(&self) -> Gradients<X> {
        let problem = self.definition.problem;
        let (queries, keys) = (self.definition.queries(), self.definition.keys());
        let mut dq = vec![X::default(); queries.len() * problem.headdim];
        let of_queries = dq.par_chunks_mut(problem.headdim).zip(&queries);
        let rows: Vec<Row<X>> = of_queries.map(|(dq, query)| self.of_query(query, dq)).collect();

        let mut dk = vec![X::default(); keys.len() * problem.headdim];
        let mut dv = vec![X::default(); keys.len() * problem.headdim_v];
        let of_keys = dk.par_chunks_mut(problem.headdim).zip(dv.par_chunks_mut(problem.headdim_v)).zip(&keys);
        of_keys.for_each(|((dk, dv), key)| self.of_key(key, &rows, dk, dv));

        let (dbias, dbias_terms) = problem.bias.map(|shape| self.of_bias(shape, &rows)).unzip();
        let (dsinks, dsinks_terms) = problem.sinks.then(|| self.of_sinks(&rows)).unzip();
        let (dbias_terms, dsinks_terms) = (dbias_terms.unwrap_or_default(), dsinks_terms.unwrap_or_default());
        Gradients { dq, dk, dv, dbias, dsinks, dbias_terms, dsinks_terms }
    }

    /// A row of dQ.
    fn of_query(&self, query: &Query, dq: &mut [X]) -> Row<X> {
        let Backward { definition, dlse, .. } = self;
        let problem = definition.problem;
        let seen = definition.seen(query);
        let softmax = definition.softmax(query, &seen);
        let dlse = dlse.as_ref().map_or(X::default(), |dlse| dlse[query.lse_index(problem)]);
        let nothing = Row { softmax, d: X::default(), dlse, squares: 0.0 };
        if softmax.is_empty() {
            return nothing;
        }
        let d_p: Vec<X> = seen.iter().map(|seen| self.d_p(query, seen.key)).collect();
        let products = || seen.iter().zip(&d_p).map(|(seen, &d_p)| definition.p(&softmax, seen.score) * d_p);
        let d = self.d_of_out(query, &seen, &softmax);
        let squares = products().map(|product| product.into().powi(2)).sum();
        let row = Row { d, squares, ..nothing };
        for (seen, d_p) in seen.iter().zip(d_p) {
            let d_c = self.through_cap(seen, self.d_s(seen, d_p, &row));
            add_scaled(dq, (definition.rounding.operand)(d_c), query.key(seen.key, problem).of(&definition.k, problem));
        }
        self.scale(dq);
        row
    }

    /// A row of dK and one of dV.
    fn of_key(&self, key: &Key, rows: &[Row<X>], dk: &mut [X], dv: &mut [X]) {
        let Backward { definition, dout, .. } = self;
        let problem = definition.problem;
        let group = problem.nheads / problem.nheads_k;
        for head in key.head_k * group..(key.head_k + 1) * group {
            for row in 0..key.sequence.seqlen_q {
                let query = Query { sequence: key.sequence, row, head };
                let Some((seen, row)) = self.pair(&query, key.key, rows) else { continue };
                let d_c = self.through_cap(&seen, self.d_s(&seen, self.d_p(&query, key.key), row));
                add_scaled(dk, (definition.rounding.operand)(d_c), query.of(&definition.q, problem));
                let p = definition.drop(&query, key.key, definition.p(&row.softmax, seen.score));
                add_scaled(dv, (definition.rounding.operand)(p), query.of(dout, problem));
            }
        }
        self.scale(dk);
        dv.iter_mut().for_each(|dv| *dv = (definition.rounding.store)(*dv));
    }

    /// dbias, of the bias's shape.
    fn of_bias(&self, shape: [usize; 4], rows: &[Row<X>]) -> (Vec<X>, Terms) {
        let problem = self.definition.problem;
        let sequences = problem.sequences();
        let [_, nheads, seqlen_q, seqlen_k] = shape;
        // What an index of the bias is for: itself, or, where the bias has an extent of 1, all.
        let of = |index: usize, extent: usize, all: usize| if extent == all { index..index + 1 } else { 0..all };
        let element = |i: usize| {
            let (key, row, head) = (i % seqlen_k, i / seqlen_k % seqlen_q, i / (seqlen_k * seqlen_q) % nheads);
            let batch = i / (seqlen_k * seqlen_q * nheads);
            let (mut sum, mut terms) = (X::default(), Terms::default());
            for &sequence in &sequences[of(batch, shape[0], problem.batch)] {
                for head in of(head, nheads, problem.nheads) {
                    for row in of(row, seqlen_q, problem.seqlen_q).filter(|&row| row < sequence.seqlen_q) {
                        let query = Query { sequence, row, head };
                        let Some((seen, row)) = self.pair(&query, key, rows) else { continue };
                        let d_p = self.d_p(&query, key);
                        sum += self.d_s(&seen, d_p, row);
                        let p = row.softmax.probability(seen.score);
                        terms.add(p * (d_p.abs() + row.d.abs() + row.dlse.abs()));
                    }
                }
            }
            ((self.definition.rounding.store)(sum), terms)
        };
        let mut dbias = vec![X::default(); shape.iter().product()];
        let terms = dbias.par_iter_mut().enumerate().map(|(i, dbias)| {
            let (sum, terms) = element(i);
            *dbias = sum;
            terms
        });
        let terms = terms.reduce(Terms::default, Terms::larger);
        (dbias, terms)
    }

    /// dsinks.
    fn of_sinks(&self, rows: &[Row<X>]) -> (Vec<X>, Terms) {
        let Definition { problem, rounding: Rounding { store, .. }, .. } = self.definition;
        let of_head = |head: usize| {
            let (mut sum, mut terms) = (X::default(), Terms::default());
            let sink = self.definition.sink(head).unwrap_or_default();
            for row in rows.iter().skip(head).step_by(problem.nheads).filter(|row| !row.softmax.is_empty()) {
                let p = self.definition.p(&row.softmax, sink);
                sum += store(p * (row.dlse - row.d));
                terms.sum += (p * (row.dlse.abs() + row.d.abs())).into();
                // D takes the roundings of P, and those of O.
                terms.squares += (2.0 * p.into()).powi(2) * row.squares;
            }
            (sum, terms)
        };
        let (dsinks, terms): (Vec<X>, Vec<Terms>) = (0..problem.nheads).map(of_head).unzip();
        (dsinks, terms.into_iter().fold(Terms::default(), Terms::larger))
    }

    /// A key as a query sees it, and what the row of the query needs; `None` where the one has no part in the other.
    fn pair<'r>(&self, query: &Query, key: usize, rows: &'r [Row<X>]) -> Option<(Seen<X>, &'r Row<X>)> {
        let row = &rows[query.index(self.definition.problem)];
        let seen = self.definition.see(query, key)?;
        (!row.softmax.is_empty()).then_some((seen, row))
    }

    /// An element of dP.
    fn d_p(&self, query: &Query, key: usize) -> X {
        let Definition { problem, v, rounding, .. } = &self.definition;
        let d_p = dot(query.of(&self.dout, problem), query.key(key, problem).of(v, problem));
        self.definition.drop(query, key, (rounding.store)(d_p))
    }

    /// D from O, as whoever does not keep P must compute it. A plain implementation then shares the errors that this has
    /// where a row sees a single key: P = 1, and dP - D would be 0, but for the rounding of O.
    fn d_of_out(&self, query: &Query, seen: &[Seen<X>], softmax: &Softmax<X>) -> X {
        let problem = self.definition.problem;
        let mut out = vec![X::default(); problem.headdim_v];
        self.definition.out(query, seen, softmax, &mut out);
        dot(query.of(&self.dout, problem), &out)
    }

    /// An element of dS.
    fn d_s(&self, seen: &Seen<X>, d_p: X, row: &Row<X>) -> X {
        (self.definition.rounding.store)(self.definition.p(&row.softmax, seen.score) * (d_p - row.d + row.dlse))
    }

    /// The gradient of a score before its cap, but for the scale.
    fn through_cap(&self, seen: &Seen<X>, d_s: X) -> X {
        self.definition.softcap().map_or(d_s, |softcap| {
            let tanh = seen.capped / softcap;
            (self.definition.rounding.store)(d_s * (X::of(1.0) - tanh * tanh))
        })
    }

    /// Multiplies a row of dQ or dK with the scale.
    fn scale(&self, row: &mut [X]) {
        let Definition { problem, rounding: Rounding { store, .. }, .. } = self.definition;
        let scale = X::of(problem.softmax_scale.into());
        row.iter_mut().for_each(|x| *x = store(*x * scale));
    }
}

impl Terms {
    fn add<X: Number>(&mut self, term: X) {
        let term = term.into();
        self.sum += term;
        self.squares += term * term;
    }

    /// The larger of each, of those that are finite.
    fn larger(self, other: Self) -> Self {
        let larger = |a: f64, b: f64| if b.is_finite() { a.max(b) } else { a };
        Terms { sum: larger(self.sum, other.sum), squares: larger(self.squares, other.squares) }
    }
}

#[cfg(test)]
mod tests;
