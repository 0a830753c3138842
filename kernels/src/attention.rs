//! The problem that every attention kernel solves: O = softmax(softmax_scale · Q Kᵀ + mask) V, a batch and a head at a time.
use cuda_std::{Element, Global};

/// A tensor of shape (batch, seqlen, nheads, headdim), the last dimension contiguous. Strides count elements.
#[repr(C)]
#[derive(Debug)]
pub struct Tensor<T> {
    /// The first element.
    pub data: Global<T>,
    /// From one batch to the next.
    pub batch_stride: u64,
    /// From one token to the next.
    pub row_stride: u64,
    /// From one head to the next.
    pub head_stride: u64,
}

impl<T> Clone for Tensor<T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Tensor<T> {}

/// The element type of a parameter struct: a table holds kernels of several dtypes, so a kernel's own dtype is in its
/// generics, not in the type of its parameters.
#[derive(Debug)]
pub enum Untyped {}

impl<T: Element> Tensor<T> {
    /// The first row of one head of one batch: a matrix (seqlen, headdim) whose rows are `row_stride` apart.
    #[inline(always)]
    pub fn head(&self, batch: u32, head: u32) -> Global<T> {
        self.data.offset((batch as u64 * self.batch_stride + head as u64 * self.head_stride) as usize)
    }

    /// Row `first_row` of one head of one batch: where a block of rows begins.
    #[inline(always)]
    pub fn rows(&self, batch: u32, head: u32, first_row: u32) -> Global<T> {
        self.head(batch, head).offset((first_row as u64 * self.row_stride) as usize)
    }
}

impl<T> Tensor<T> {
    /// The same tensor, as one of another element type. Strides keep counting elements.
    #[inline(always)]
    pub fn cast<U>(self) -> Tensor<U> {
        Tensor {
            data: self.data.cast(),
            batch_stride: self.batch_stride,
            row_stride: self.row_stride,
            head_stride: self.head_stride,
        }
    }
}

/// Arguments common to all attention kernels.
#[repr(C)]
#[derive(Debug)]
pub struct Attention<T = Untyped> {
    /// Queries: (batch, seqlen_q, nheads, headdim).
    pub q: Tensor<T>,
    /// Keys: (batch, seqlen_k, nheads_k, headdim).
    pub k: Tensor<T>,
    /// Values: (batch, seqlen_k, nheads_k, headdim).
    pub v: Tensor<T>,
    /// Output: (batch, seqlen_q, nheads, headdim). A row that sees no key becomes 0.
    pub o: Tensor<T>,
    /// The softmax normalisation: (batch, nheads, seqlen_q), contiguous, natural logarithm; -inf for a row that sees no key.
    pub softmax_lse: Global<f32>,
    /// How many sequences.
    pub batch: u32,
    /// Heads of Q and O.
    pub nheads: u32,
    /// Heads of K and V: a divisor of `nheads`.
    pub nheads_k: u32,
    /// Tokens of Q.
    pub seqlen_q: u32,
    /// Tokens of K and V.
    pub seqlen_k: u32,
    /// Elements of one head's row.
    pub headdim: u32,
    /// What Q Kᵀ is multiplied with before the softmax. Positive and finite.
    pub softmax_scale: f32,
    /// 1 for a causal mask, aligned to the bottom right corner: query i sees keys j <= i + seqlen_k - seqlen_q. Else 0.
    /// Kernels that are built for one of the two ignore it.
    pub causal: u32,
}

impl<T> Clone for Attention<T> {
    #[inline(always)]
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Attention<T> {}

impl Attention {
    /// The same arguments for tensors of T.
    #[inline(always)]
    pub fn of<T: Element>(self) -> Attention<T> {
        Attention {
            q: self.q.cast(),
            k: self.k.cast(),
            v: self.v.cast(),
            o: self.o.cast(),
            softmax_lse: self.softmax_lse,
            batch: self.batch,
            nheads: self.nheads,
            nheads_k: self.nheads_k,
            seqlen_q: self.seqlen_q,
            seqlen_k: self.seqlen_k,
            headdim: self.headdim,
            softmax_scale: self.softmax_scale,
            causal: self.causal,
        }
    }
}

impl<T> Attention<T> {
    /// The head of K and V that `head` of Q reads: with grouped queries, `nheads / nheads_k` heads share one.
    #[inline(always)]
    pub fn head_k(&self, head: u32) -> u32 {
        head / divisor(self.nheads / divisor(self.nheads_k))
    }

    /// Where the LSE of one head of one batch begins, and the rows of S, P, m and l of the kernels that keep these.
    #[inline(always)]
    pub fn first_row(&self, batch: u32, head: u32) -> usize {
        (batch as usize * self.nheads as usize + head as usize) * self.seqlen_q as usize
    }
}

/// `x`, known not to be 0: without this a division keeps a branch to a panic. The host refuses zero heads and lengths.
#[inline(always)]
pub fn divisor(x: u32) -> u32 {
    if x == 0 { 1 } else { x }
}
