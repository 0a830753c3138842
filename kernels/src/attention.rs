//! The problem that every attention kernel solves: O = softmax(softmax_scale · Q Kᵀ + bias + mask) V, a batch and a head at a time.
use crate::dropout::Dropout;
use cuda_std::math::LOG2_E;
use cuda_std::{Element, Global, GlobalMatrix};

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

impl<T> Tensor<T> {
    /// Row `row` of one head of one batch.
    #[inline(always)]
    pub fn row(&self, batch: u32, head: u32, row: u64) -> Global<T> {
        self.data.offset(self.index(batch, head, row) as usize)
    }

    /// How many elements after the first it begins.
    #[inline(always)]
    pub fn index(&self, batch: u32, head: u32, row: u64) -> u64 {
        batch as u64 * self.batch_stride + head as u64 * self.head_stride + row * self.row_stride
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
///
/// Sequences of different lengths follow each other in tensors without a batch dimension (a stride of 0), and `cu_seqlens_q`
/// and `cu_seqlens_k` say where each begins; `seqlen_q` and `seqlen_k` are then those of the longest.
#[repr(C)]
#[derive(Debug)]
pub struct Attention<T = Untyped> {
    /// Queries: (batch, seqlen_q, nheads, headdim).
    pub q: Tensor<T>,
    /// Keys: (batch, seqlen_k, nheads_k, headdim).
    pub k: Tensor<T>,
    /// Values: (batch, seqlen_k, nheads_k, headdim_v).
    pub v: Tensor<T>,
    /// Output: (batch, seqlen_q, nheads, headdim_v). A row that sees no key becomes 0.
    pub o: Tensor<T>,
    /// What is added to the scores: a row of seqlen_k for each batch, query and head; strides of 0 broadcast. Null: nothing.
    pub bias: Tensor<T>,
    /// Which keys a query sees, 0 for those that it does not: a row of seqlen_k for each batch, query and head. Null: all.
    pub mask: Tensor<u8>,
    /// ALiBi's slopes: (batch, nheads). Null: none.
    pub alibi_slopes: Global<f32>,
    /// From the slopes of one batch to the next.
    pub alibi_batch_stride: u64,
    /// A logit a head that takes part in the softmax of its rows: (nheads). Null: none.
    pub sinks: Global<f32>,
    /// The softmax normalisation: (batch, nheads, seqlen_q), natural logarithm; -inf for a row that sees no key.
    pub softmax_lse: Global<f32>,
    /// From the LSE of one batch to the next.
    pub lse_batch_stride: u64,
    /// From the LSE of one head to the next.
    pub lse_head_stride: u64,
    /// Where each sequence of Q begins: (batch + 1). Null: all are `seqlen_q` long.
    pub cu_seqlens_q: Global<i32>,
    /// Where each sequence of K begins: (batch + 1). Null: all are `seqlen_k` long.
    pub cu_seqlens_k: Global<i32>,
    /// Which elements of P are dropped.
    pub dropout: Dropout,
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
    /// Elements of one head's row of Q and K.
    pub headdim: u32,
    /// Elements of one head's row of V and O.
    pub headdim_v: u32,
    /// What Q Kᵀ is multiplied with before the softmax. Finite; positive, but for kernels that are `general`.
    pub softmax_scale: f32,
    /// The scores S become softcap · tanh(S / softcap); 0: they stay.
    pub softcap: f32,
    /// Keys that a query sees to the left of its own place; [`UNBOUNDED`](crate::mask::UNBOUNDED): all.
    pub window_left: u32,
    /// Keys that a query sees to the right of its own place; 0: a causal mask. Kernels that are built for a causal mask, or
    /// for none, ignore the window.
    pub window_right: u32,
    /// 1 if all tensors of T begin at multiples of 16 bytes, and so do their rows; else 0, which only `general` kernels take.
    pub aligned: u32,
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
            bias: self.bias.cast(),
            mask: self.mask,
            alibi_slopes: self.alibi_slopes,
            alibi_batch_stride: self.alibi_batch_stride,
            sinks: self.sinks,
            softmax_lse: self.softmax_lse,
            lse_batch_stride: self.lse_batch_stride,
            lse_head_stride: self.lse_head_stride,
            cu_seqlens_q: self.cu_seqlens_q,
            cu_seqlens_k: self.cu_seqlens_k,
            dropout: self.dropout,
            batch: self.batch,
            nheads: self.nheads,
            nheads_k: self.nheads_k,
            seqlen_q: self.seqlen_q,
            seqlen_k: self.seqlen_k,
            headdim: self.headdim,
            headdim_v: self.headdim_v,
            softmax_scale: self.softmax_scale,
            softcap: self.softcap,
            window_left: self.window_left,
            window_right: self.window_right,
            aligned: self.aligned,
        }
    }
}

impl<T> Attention<T> {
    /// The head of K and V that `head` of Q reads: with grouped queries, `nheads / nheads_k` heads share one.
    #[inline(always)]
    pub fn head_k(&self, head: u32) -> u32 {
        head / divisor(self.nheads / divisor(self.nheads_k))
    }

    /// Sequence `batch`: where it is, and how long.
    #[inline(always)]
    #[track_caller]
    pub fn sequence(&self, batch: u32) -> Sequence {
        let span = |cu_seqlens: Global<i32>, seqlen: u32| {
            if cu_seqlens.is_null() {
                return (0, seqlen);
            }
            let (begin, end) = (cu_seqlens.load(batch as usize), cu_seqlens.load(batch as usize + 1));
            (begin as u32, (end - begin) as u32)
        };
        let (first_q, seqlen_q) = span(self.cu_seqlens_q, self.seqlen_q);
        let (first_k, seqlen_k) = span(self.cu_seqlens_k, self.seqlen_k);
        Sequence { batch, first_q, seqlen_q, first_k, seqlen_k }
    }

    /// The batch that tensor maps know sequence `batch` by: sequences of different lengths lie in one.
    #[inline(always)]
    pub fn batch_of_map(&self, batch: u32) -> u32 {
        if self.cu_seqlens_q.is_null() { batch } else { 0 }
    }

    /// The sink of a head in log2 units; -inf if there is none.
    #[inline(always)]
    #[track_caller]
    pub fn sink(&self, head: u32) -> f32 {
        if self.sinks.is_null() { f32::NEG_INFINITY } else { self.sinks.load(head as usize) * LOG2_E }
    }

    /// Whether the rows of all tensors of T are aligned; kernels that are not `GENERAL` take no others.
    #[inline(always)]
    pub fn is_aligned<const GENERAL: bool>(&self) -> bool {
        !GENERAL || self.aligned != 0
    }

    /// Whether keys may be hidden in a block that the window shows whole: by a mask, or by a bias of -inf.
    #[inline(always)]
    pub fn may_hide<const GENERAL: bool>(&self) -> bool {
        GENERAL && !(self.bias.data.is_null() && self.mask.data.is_null())
    }

    /// Where the LSE of one head of a sequence begins, and whatever else is kept for each row of S in the same order.
    #[inline(always)]
    pub fn first_row(&self, sequence: &Sequence, head: u32) -> usize {
        let head = sequence.batch as u64 * self.lse_batch_stride + head as u64 * self.lse_head_stride;
        (head + sequence.first_q as u64) as usize
    }
}

/// One sequence of a batch: where it is in the tensors, and how long.
#[derive(Clone, Copy, Debug)]
pub struct Sequence {
    /// Its number.
    pub batch: u32,
    /// Its first token in Q and O.
    pub first_q: u32,
    /// Tokens of Q.
    pub seqlen_q: u32,
    /// Its first token in K and V.
    pub first_k: u32,
    /// Tokens of K and V.
    pub seqlen_k: u32,
}

impl Sequence {
    /// Row `row` of one head of a tensor that is shaped like Q.
    #[inline(always)]
    pub fn queries<T>(&self, tensor: &Tensor<T>, head: u32, row: u32) -> Global<T> {
        tensor.row(self.batch, head, self.first_q as u64 + row as u64)
    }

    /// Row `row` of one head of a tensor that is shaped like K.
    #[inline(always)]
    pub fn keys<T>(&self, tensor: &Tensor<T>, head: u32, row: u32) -> Global<T> {
        tensor.row(self.batch, head, self.first_k as u64 + row as u64)
    }

    /// The rows from `row` on of one head of a tensor that is shaped like Q or O.
    #[inline(always)]
    pub fn query_matrix<T>(
        &self,
        tensor: &Tensor<T>,
        head: u32,
        row: u32,
        columns: u32,
        aligned: bool,
    ) -> GlobalMatrix<T> {
        let (data, rows) = (self.queries(tensor, head, row), self.seqlen_q.saturating_sub(row));
        GlobalMatrix { data, row_stride: tensor.row_stride, rows, columns, aligned }
    }

    /// The rows from `row` on of one head of a tensor that is shaped like K or V.
    #[inline(always)]
    pub fn key_matrix<T>(
        &self,
        tensor: &Tensor<T>,
        head: u32,
        row: u32,
        columns: u32,
        aligned: bool,
    ) -> GlobalMatrix<T> {
        let (data, rows) = (self.keys(tensor, head, row), self.seqlen_k.saturating_sub(row));
        GlobalMatrix { data, row_stride: tensor.row_stride, rows, columns, aligned }
    }
}

/// `x`, known not to be 0: without this a division keeps a branch to a panic. The host refuses zero heads and lengths.
#[inline(always)]
pub fn divisor(x: u32) -> u32 {
    if x == 0 { 1 } else { x }
}
