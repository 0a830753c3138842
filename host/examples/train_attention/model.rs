//! A small transformer: pre-norm blocks of causal self-attention and an MLP, its gradients written by hand.
use anyhow::Result;
use ndarray::{Array1, Axis};
use rand::Rng;

use crate::attention::{CausalAttention, Qkv, Shape};
use crate::layers::{Matrix, Prediction, cross_entropy, rms_norm, rms_norm_backward, silu, silu_backward};
use crate::task::Batch;

/// How large a model is.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    pub vocabulary: usize,
    pub blocks: usize,
    pub nheads: usize,
    pub headdim: usize,
}

/// The weights, or their gradients.
#[derive(Clone)]
pub struct Parameters {
    /// (vocabulary, width)
    embedding: Matrix,
    blocks: Vec<Block>,
    /// (1, width), as that of the blocks
    norm: Matrix,
    /// (width, vocabulary)
    unembedding: Matrix,
}

#[derive(Clone)]
struct Block {
    attention_norm: Matrix,
    /// (width, width), as the next three
    query: Matrix,
    key: Matrix,
    value: Matrix,
    output: Matrix,
    mlp_norm: Matrix,
    /// (width, 4 width)
    up: Matrix,
    /// (4 width, width)
    down: Matrix,
}

impl Parameters {
    /// All of them, always in the same order.
    pub fn all(&self) -> impl Iterator<Item = &Matrix> {
        let blocks = self.blocks.iter().flat_map(|block| {
            let Block { attention_norm, query, key, value, output, mlp_norm, up, down } = block;
            [attention_norm, query, key, value, output, mlp_norm, up, down]
        });
        [&self.embedding, &self.norm, &self.unembedding].into_iter().chain(blocks)
    }

    /// The same, to change them.
    pub fn all_mut(&mut self) -> impl Iterator<Item = &mut Matrix> {
        let blocks = self.blocks.iter_mut().flat_map(|block| {
            let Block { attention_norm, query, key, value, output, mlp_norm, up, down } = block;
            [attention_norm, query, key, value, output, mlp_norm, up, down]
        });
        [&mut self.embedding, &mut self.norm, &mut self.unembedding].into_iter().chain(blocks)
    }

    /// As many zeros.
    pub fn zeros(&self) -> Self {
        let mut zeros = self.clone();
        zeros.all_mut().for_each(|x| x.fill(0.0));
        zeros
    }
}

/// The model.
#[derive(Clone)]
pub struct Transformer {
    size: Size,
    pub parameters: Parameters,
}

/// What the forward pass of a block keeps for the backward pass.
struct Activations<K> {
    /// What came in.
    x: Matrix,
    attention_norm: Normed,
    qkv: Qkv,
    out: Matrix,
    kept: K,
    /// With attention added.
    attended: Matrix,
    mlp_norm: Normed,
    /// Before and after SiLU.
    hidden: Matrix,
    activated: Matrix,
}

/// A result of RMSNorm.
struct Normed {
    y: Matrix,
    inverse: Array1<f32>,
}

impl Normed {
    fn of(x: &Matrix, gain: &Matrix) -> Self {
        let (y, inverse) = rms_norm(x, gain);
        Normed { y, inverse }
    }
}

impl Transformer {
    /// Random weights, uniform, of variance 1 / rows, so that products keep the variance of what they multiply.
    pub fn new(size: Size, random: &mut impl Rng) -> Self {
        let width = size.nheads * size.headdim;
        let mut uniform = |rows: usize, columns: usize| {
            let bound = (3.0 / rows as f32).sqrt();
            Matrix::from_shape_simple_fn((rows, columns), || random.random_range(-bound..bound))
        };
        let mut block = || Block {
            attention_norm: Matrix::ones((1, width)),
            query: uniform(width, width),
            key: uniform(width, width),
            value: uniform(width, width),
            output: uniform(width, width),
            mlp_norm: Matrix::ones((1, width)),
            up: uniform(width, 4 * width),
            down: uniform(4 * width, width),
        };
        let blocks = (0..size.blocks).map(|_| block()).collect();
        // Rows of tokens are not summed: each has a variance of 1.
        let embedding = uniform(1, size.vocabulary * width);
        let parameters = Parameters {
            embedding: embedding.into_shape_with_order((size.vocabulary, width)).expect("as many elements"),
            blocks,
            norm: Matrix::ones((1, width)),
            unembedding: uniform(width, size.vocabulary),
        };
        Transformer { size, parameters }
    }

    /// The loss on a batch and its gradients.
    pub fn gradients<A: CausalAttention>(&self, attention: &mut A, batch: &Batch) -> Result<(Prediction, Parameters)> {
        let Parameters { norm, unembedding, .. } = &self.parameters;
        let mut gradients = self.parameters.zeros();

        let mut x = self.embed(batch);
        let mut activations = Vec::with_capacity(self.size.blocks);
        for block in &self.parameters.blocks {
            let (y, kept) = block.forward(x, attention, self.shape(batch))?;
            activations.push(kept);
            x = y;
        }
        let normed = Normed::of(&x, norm);
        let prediction = cross_entropy(&normed.y.dot(unembedding), &batch.targets);

        gradients.unembedding = normed.y.t().dot(&prediction.dlogits);
        let dnormed = prediction.dlogits.dot(&unembedding.t());
        let (mut dx, dnorm) = rms_norm_backward(&x, norm, &normed.inverse, &dnormed);
        gradients.norm = dnorm;
        let blocks = self.parameters.blocks.iter().zip(&mut gradients.blocks).zip(activations);
        for ((block, gradients), kept) in blocks.rev() {
            dx = block.backward(kept, dx, attention, self.shape(batch), gradients)?;
        }
        for (&token, dx) in batch.tokens.iter().zip(dx.rows()) {
            gradients.embedding.row_mut(token).scaled_add(1.0, &dx);
        }
        Ok((prediction, gradients))
    }

    fn shape(&self, batch: &Batch) -> Shape {
        let Size { nheads, headdim, .. } = self.size;
        Shape { batch: batch.tokens.len() / batch.seqlen, seqlen: batch.seqlen, nheads, headdim }
    }

    /// The embedding of each token, and of where it is: sines and cosines, as in "Attention Is All You Need".
    fn embed(&self, batch: &Batch) -> Matrix {
        let mut x = self.parameters.embedding.select(Axis(0), &batch.tokens);
        let width = x.ncols();
        let waves = (width / 2) as f32;
        let position = Matrix::from_shape_fn((batch.seqlen, width), |(place, column)| {
            let angle = place as f32 * 10_000_f32.powf(-((column / 2) as f32) / waves);
            if column % 2 == 0 { angle.sin() } else { angle.cos() }
        });
        x.exact_chunks_mut((batch.seqlen, width)).into_iter().for_each(|mut x| x += &position);
        x
    }
}

impl Block {
    /// x + attention(norm(x)), and to that mlp(norm(..)).
    fn forward<A: CausalAttention>(
        &self,
        x: Matrix,
        attention: &mut A,
        shape: Shape,
    ) -> Result<(Matrix, Activations<A::Kept>)> {
        let attention_norm = Normed::of(&x, &self.attention_norm);
        let [q, k, v] = [&self.query, &self.key, &self.value].map(|weights| attention_norm.y.dot(weights));
        let qkv = Qkv { q, k, v };
        let (out, kept) = attention.forward(&qkv, shape)?;
        let attended = &x + &out.dot(&self.output);
        let mlp_norm = Normed::of(&attended, &self.mlp_norm);
        let hidden = mlp_norm.y.dot(&self.up);
        let activated = silu(&hidden);
        let y = &attended + &activated.dot(&self.down);
        Ok((y, Activations { x, attention_norm, qkv, out, kept, attended, mlp_norm, hidden, activated }))
    }

    /// The gradient of x from that of the result; those of the weights go to `gradients`.
    fn backward<A: CausalAttention>(
        &self,
        activations: Activations<A::Kept>,
        dy: Matrix,
        attention: &mut A,
        shape: Shape,
        gradients: &mut Block,
    ) -> Result<Matrix> {
        let Activations { x, attention_norm, qkv, out, kept, attended, mlp_norm, hidden, activated } = activations;

        gradients.down = activated.t().dot(&dy);
        let dhidden = silu_backward(&hidden, &dy.dot(&self.down.t()));
        gradients.up = mlp_norm.y.t().dot(&dhidden);
        let (dnormed, dgain) =
            rms_norm_backward(&attended, &self.mlp_norm, &mlp_norm.inverse, &dhidden.dot(&self.up.t()));
        gradients.mlp_norm = dgain;
        let dattended = dy + dnormed;

        gradients.output = out.t().dot(&dattended);
        let dout = dattended.dot(&self.output.t());
        let Qkv { q: dq, k: dk, v: dv } = attention.backward(&qkv, shape, &out, kept, &dout)?;
        [gradients.query, gradients.key, gradients.value] =
            [&dq, &dk, &dv].map(|gradient| attention_norm.y.t().dot(gradient));
        let dnormed = dq.dot(&self.query.t()) + dk.dot(&self.key.t()) + dv.dot(&self.value.t());
        let (dnormed, dgain) = rms_norm_backward(&x, &self.attention_norm, &attention_norm.inverse, &dnormed);
        gradients.attention_norm = dgain;
        Ok(dattended + dnormed)
    }
}
