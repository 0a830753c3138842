//! Causal self-attention that can be trained: by the textbook, with S and P in memory, and by ferroflash, without.
use anyhow::{Context, Result};
use ferroflash::{Attention, AttentionOptions, Session, Tensor, TensorRef};
use ndarray::linalg::general_mat_mul;
use ndarray::{ArrayView2, ArrayViewMut2, Axis, Zip};
use std::time::Instant;

use crate::layers::Matrix;

/// The shape of Q, K, V and O. As matrices they have a row for each token, and a column for each element of its heads:
/// batch · seqlen rows and nheads · headdim columns, which is how (batch, seqlen, nheads, headdim) lies in memory.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub batch: usize,
    pub seqlen: usize,
    pub nheads: usize,
    pub headdim: usize,
}

/// The inputs of attention, or their gradients.
pub struct Qkv {
    pub q: Matrix,
    pub k: Matrix,
    pub v: Matrix,
}

/// O = softmax(Q Kᵀ / √headdim + causal mask) V, and the gradients of Q, K and V.
pub trait CausalAttention {
    /// What the forward pass of a layer keeps for its backward pass, besides Q, K, V and O.
    type Kept;

    /// O, and what is kept.
    fn forward(&mut self, qkv: &Qkv, shape: Shape) -> Result<(Matrix, Self::Kept)>;

    /// dQ, dK and dV from dO.
    fn backward(&mut self, qkv: &Qkv, shape: Shape, out: &Matrix, kept: Self::Kept, dout: &Matrix) -> Result<Qkv>;

    /// What attention has cost so far.
    fn costs(&self) -> &Costs;
}

/// What attention costs.
#[derive(Clone, Debug, Default)]
pub struct Costs {
    /// Wall time.
    pub seconds: f64,
    /// Bytes that all layers together keep for the backward pass, now and at most.
    kept: u64,
    pub most_kept: u64,
    /// Bytes that a call works in besides its inputs and outputs, at most.
    pub workspace: u64,
}

impl Costs {
    fn keep(&mut self, bytes: u64) {
        self.kept += bytes;
        self.most_kept = self.most_kept.max(self.kept);
    }

    fn release(&mut self, bytes: u64) {
        self.kept -= bytes;
    }

    fn called(&mut self, start: Instant, workspace: u64) {
        self.seconds += start.elapsed().as_secs_f64();
        self.workspace = self.workspace.max(workspace);
    }
}

/// Attention as its definition says: S = Q Kᵀ and P = softmax(S) are whole matrices, and P is kept for the backward pass.
/// The heads are shared out among the cores.
#[derive(Default)]
pub struct StandardAttention {
    costs: Costs,
}

impl CausalAttention for StandardAttention {
    /// P, of all batches and heads.
    type Kept = Matrix;

    fn forward(&mut self, qkv: &Qkv, shape: Shape) -> Result<(Matrix, Matrix)> {
        let start = Instant::now();
        let (of_head, of_scores) = (shape.head(), shape.scores());
        let mut s = shape.all_scores();
        Zip::from(s.exact_chunks_mut(of_scores))
            .and(qkv.q.exact_chunks(of_head))
            .and(qkv.k.exact_chunks(of_head))
            .par_for_each(|mut s, q, k| general_mat_mul(shape.softmax_scale(), &q, &k.t(), 0.0, &mut s));
        let mut p = shape.all_scores();
        Zip::from(p.exact_chunks_mut(of_scores)).and(s.exact_chunks(of_scores)).par_for_each(causal_softmax);
        let mut out = Matrix::zeros(qkv.q.raw_dim());
        Zip::from(out.exact_chunks_mut(of_head))
            .and(p.exact_chunks(of_scores))
            .and(qkv.v.exact_chunks(of_head))
            .par_for_each(|mut out, p, v| general_mat_mul(1.0, &p, &v, 0.0, &mut out));
        self.costs.called(start, bytes(&s) + bytes(&p));
        self.costs.keep(bytes(&p));
        Ok((out, p))
    }

    fn backward(&mut self, qkv: &Qkv, shape: Shape, _out: &Matrix, p: Matrix, dout: &Matrix) -> Result<Qkv> {
        let start = Instant::now();
        let (of_head, of_scores) = (shape.head(), shape.scores());
        let [mut dq, mut dk, mut dv] = [&qkv.q, &qkv.k, &qkv.v].map(|x| Matrix::zeros(x.raw_dim()));
        Zip::from(dv.exact_chunks_mut(of_head))
            .and(p.exact_chunks(of_scores))
            .and(dout.exact_chunks(of_head))
            .par_for_each(|mut dv, p, dout| general_mat_mul(1.0, &p.t(), &dout, 0.0, &mut dv));
        let mut dp = shape.all_scores();
        Zip::from(dp.exact_chunks_mut(of_scores))
            .and(dout.exact_chunks(of_head))
            .and(qkv.v.exact_chunks(of_head))
            .par_for_each(|mut dp, dout, v| general_mat_mul(1.0, &dout, &v.t(), 0.0, &mut dp));
        let mut ds = shape.all_scores();
        Zip::from(ds.exact_chunks_mut(of_scores))
            .and(p.exact_chunks(of_scores))
            .and(dp.exact_chunks(of_scores))
            .par_for_each(softmax_backward);
        Zip::from(dq.exact_chunks_mut(of_head))
            .and(ds.exact_chunks(of_scores))
            .and(qkv.k.exact_chunks(of_head))
            .par_for_each(|mut dq, ds, k| general_mat_mul(shape.softmax_scale(), &ds, &k, 0.0, &mut dq));
        Zip::from(dk.exact_chunks_mut(of_head))
            .and(ds.exact_chunks(of_scores))
            .and(qkv.q.exact_chunks(of_head))
            .par_for_each(|mut dk, ds, q| general_mat_mul(shape.softmax_scale(), &ds.t(), &q, 0.0, &mut dk));
        self.costs.called(start, bytes(&dp) + bytes(&ds));
        self.costs.release(bytes(&p));
        Ok(Qkv { q: dq, k: dk, v: dv })
    }

    fn costs(&self) -> &Costs {
        &self.costs
    }
}

impl Shape {
    /// What S is multiplied with.
    fn softmax_scale(self) -> f32 {
        1.0 / (self.headdim as f32).sqrt()
    }

    /// The part of Q, K, V or O that is one head of one sequence.
    fn head(self) -> (usize, usize) {
        (self.seqlen, self.headdim)
    }

    /// The part of S or P that is one head of one sequence.
    fn scores(self) -> (usize, usize) {
        (self.seqlen, self.seqlen)
    }

    /// S, P, dP or dS of all batches and heads.
    fn all_scores(self) -> Matrix {
        Matrix::zeros((self.batch * self.seqlen, self.nheads * self.seqlen))
    }
}

/// P = softmax(S), where query i sees the keys up to i.
fn causal_softmax(mut p: ArrayViewMut2<f32>, s: ArrayView2<f32>) {
    for (i, (mut p, s)) in p.rows_mut().into_iter().zip(s.rows()).enumerate() {
        let (mut p, s) = (p.slice_axis_mut(Axis(0), (..=i).into()), s.slice_axis(Axis(0), (..=i).into()));
        let max = s.fold(f32::NEG_INFINITY, |max, &s| max.max(s));
        p.zip_mut_with(&s, |p, s| *p = (s - max).exp());
        let sum = p.sum();
        p /= sum;
    }
}

/// dS = P ∘ (dP - D), where D is the sum of each row of P ∘ dP.
fn softmax_backward(mut ds: ArrayViewMut2<f32>, p: ArrayView2<f32>, dp: ArrayView2<f32>) {
    for ((mut ds, p), dp) in ds.rows_mut().into_iter().zip(p.rows()).zip(dp.rows()) {
        let d = p.dot(&dp);
        Zip::from(&mut ds).and(p).and(dp).for_each(|ds, p, dp| *ds = p * (dp - d));
    }
}

fn bytes(x: &Matrix) -> u64 {
    (x.len() * size_of::<f32>()) as u64
}

/// ferroflash: a block of P at a time, forward and again backward, where the LSE says how to make it.
pub struct FlashAttention {
    session: Session,
    options: AttentionOptions,
    /// What computed, forward and backward.
    pub algorithms: [&'static str; 2],
    costs: Costs,
}

impl FlashAttention {
    pub fn new(session: Session) -> Self {
        let options = AttentionOptions::new().causal(true);
        FlashAttention { session, options, algorithms: ["nothing yet"; 2], costs: Costs::default() }
    }
}

impl CausalAttention for FlashAttention {
    /// The LSE: (batch, nheads, seqlen).
    type Kept = Tensor;

    fn forward(&mut self, Qkv { q, k, v }: &Qkv, shape: Shape) -> Result<(Matrix, Tensor)> {
        let start = Instant::now();
        let Attention { out, softmax_lse, report, .. } =
            self.session.attention(tensor(q, shape)?, tensor(k, shape)?, tensor(v, shape)?, &self.options)?;
        self.costs.called(start, report.extra_bytes);
        self.costs.keep(softmax_lse.bytes().len() as u64);
        self.algorithms[0] = report.algorithm;
        Ok((matrix(&out, q)?, softmax_lse))
    }

    fn backward(&mut self, qkv: &Qkv, shape: Shape, out: &Matrix, lse: Tensor, dout: &Matrix) -> Result<Qkv> {
        let start = Instant::now();
        let [q, k, v] = [&qkv.q, &qkv.k, &qkv.v].map(|x| tensor(x, shape));
        let (out, dout) = (tensor(out, shape)?, tensor(dout, shape)?);
        let gradients = self.session.attention_backward(q?, k?, v?, out, &lse, dout, &self.options)?;
        self.costs.called(start, gradients.report.extra_bytes);
        self.costs.release(lse.bytes().len() as u64);
        self.algorithms[1] = gradients.report.algorithm;
        let [q, k, v] = [&gradients.dq, &gradients.dk, &gradients.dv].map(|gradient| matrix(gradient, &qkv.q));
        Ok(Qkv { q: q?, k: k?, v: v? })
    }

    fn costs(&self) -> &Costs {
        &self.costs
    }
}

/// A matrix as (batch, seqlen, nheads, headdim), without a copy.
fn tensor(x: &Matrix, Shape { batch, seqlen, nheads, headdim }: Shape) -> Result<TensorRef<'_>> {
    let data = x.as_slice().context("the matrices of this example are contiguous")?;
    Ok(TensorRef::new(data, &[batch, seqlen, nheads, headdim])?)
}

/// A tensor as a matrix of the shape of another.
fn matrix(x: &Tensor, like: &Matrix) -> Result<Matrix> {
    let data = x.as_slice::<f32>().context("f32 in, f32 out")?;
    Ok(Matrix::from_shape_vec(like.raw_dim(), data.to_vec())?)
}
