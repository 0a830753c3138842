//! A (batch, seqlen, nheads, headdim) tensor in host memory, taken row by row. Without a batch dimension it is one batch.
use std::marker::PhantomData;

use crate::element::Datum;
use crate::layout::Layout;
use crate::tensor::{TensorMut, TensorRef};

/// Where the rows of the heads are, in elements from the first.
#[derive(Clone, Copy, Debug)]
struct Strides {
    batch: usize,
    row: usize,
    head: usize,
    headdim: usize,
}

impl Strides {
    fn new(layout: &Layout) -> Self {
        match (layout.strides(), layout.shape()) {
            (&[batch, row, head, _], &[.., headdim]) => Strides { batch, row, head, headdim },
            (&[row, head, _], &[.., headdim]) => Strides { batch: 0, row, head, headdim },
            _ => unreachable!("tensors of tokens have three or four dimensions"),
        }
    }

    fn offset(&self, batch: usize, row: usize, head: usize) -> usize {
        batch * self.batch + row * self.row + head * self.head
    }
}

/// A tensor to be read.
#[derive(Clone, Copy, Debug)]
pub struct Heads<'a, T> {
    data: &'a [T],
    strides: Strides,
}

impl<'a, T> Heads<'a, T> {
    /// `layout` has four dimensions, of which the last is contiguous, and fits `data`.
    pub fn new(data: &'a [T], layout: &Layout) -> Self {
        Heads { data, strides: Strides::new(layout) }
    }

    /// A tensor of tokens, which has T as its elements.
    pub fn of(tensor: &TensorRef<'a>) -> Self
    where
        T: Datum,
    {
        Heads::new(tensor.as_slice().unwrap_or_default(), tensor.layout())
    }

    /// A tensor of scores, (batch, nheads, seqlen_q, seqlen_k), as one with a row of keys for each batch, query and head;
    /// extents of 1 stand for these.
    pub fn broadcast(tensor: &TensorRef<'a>, [batch, nheads, seqlen_q]: [usize; 3]) -> Self
    where
        T: Datum,
    {
        let (shape, strides) = (tensor.layout().shape(), tensor.layout().strides());
        let stride = |i: usize, extent: usize| if shape[i] == extent { strides[i] } else { 0 };
        let strides =
            Strides { batch: stride(0, batch), row: stride(2, seqlen_q), head: stride(1, nheads), headdim: shape[3] };
        Heads { data: tensor.as_slice().unwrap_or_default(), strides }
    }

    /// The `headdim` elements of one token and head.
    #[inline]
    pub fn row(&self, batch: usize, row: usize, head: usize) -> &'a [T] {
        let offset = self.strides.offset(batch, row, head);
        &self.data[offset..offset + self.strides.headdim]
    }
}

/// A tensor to be written, by several threads at once, each to rows of its own.
pub struct HeadsMut<'a, T> {
    data: *mut T,
    strides: Strides,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: rows are handed out by `row`, whose caller answers for it that no two threads hold the same one.
unsafe impl<T: Send> Sync for HeadsMut<'_, T> {}

impl<'a, T> HeadsMut<'a, T> {
    /// A tensor of tokens, or of scores, which has T as its elements.
    pub fn of(tensor: TensorMut<'a>) -> Self
    where
        T: Datum,
    {
        let layout = tensor.layout().clone();
        HeadsMut::new(tensor.into_slice().unwrap_or_default(), &layout)
    }

    /// `layout` has four dimensions, of which the last is contiguous, and distinct elements.
    ///
    /// # Panics
    /// If `layout` does not fit `data`: the views have checked that.
    pub fn new(data: &'a mut [T], layout: &Layout) -> Self {
        assert!(layout.span().is_some_and(|span| span <= data.len()));
        HeadsMut { data: data.as_mut_ptr(), strides: Strides::new(layout), borrow: PhantomData }
    }

    /// The `headdim` elements of one token and head.
    ///
    /// # Safety
    /// Batch, row and head are below the extents, and nobody else holds this row.
    #[inline]
    #[expect(clippy::mut_from_ref, reason = "the rows are disjoint")]
    pub unsafe fn row(&self, batch: usize, row: usize, head: usize) -> &mut [T] {
        let offset = self.strides.offset(batch, row, head);
        // SAFETY: `new` has checked that the last row ends within the data; that rows do not overlap, and that this one
        // is not aliased, the caller and `TensorMut` promise.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(offset), self.strides.headdim) }
    }
}
