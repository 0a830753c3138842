//! Tensors in host memory: borrowed views, and an owned one.
use std::borrow::Cow;

use cuda_std::DType;

use crate::element::{Buffer, Datum, Slice, SliceMut, Stored, for_each_dtype, with_dtype};
use crate::error::{Error, Result};
use crate::layout::Layout;

/// A view of a tensor in host memory. Attention wants the shape (batch, seqlen, nheads, headdim).
#[derive(Clone, Debug)]
pub struct TensorRef<'a> {
    data: Slice<'a>,
    layout: Layout,
}

impl<'a> TensorRef<'a> {
    /// A contiguous tensor.
    ///
    /// # Errors
    /// [`Error::Length`] if `data` has not as many elements as `shape` says.
    pub fn new<T: Datum>(data: &'a [T], shape: &[usize]) -> Result<Self> {
        Self::exact(T::wrap(data), data.len(), shape)
    }

    /// A tensor whose neighbours along dimension i are `strides[i]` elements apart. Strides may be 0 (broadcast).
    ///
    /// # Errors
    /// [`Error::Rank`] if there are not as many strides as dimensions, [`Error::Length`] if `data` ends before the last
    /// element.
    pub fn with_strides<T: Datum>(data: &'a [T], shape: &[usize], strides: &[usize]) -> Result<Self> {
        let layout = Layout::strided(T::STORED, shape, strides)?;
        layout.check_length("tensor", data.len())?;
        Ok(TensorRef { data: T::wrap(data), layout })
    }

    /// A contiguous tensor from its bytes, in this machine's byte order.
    ///
    /// # Errors
    /// [`Error::Alignment`] if `bytes` are not aligned for `dtype` ([`Tensor::from_bytes`] copies such ones),
    /// [`Error::Length`] if they are not as many as `shape` says.
    pub fn from_bytes(dtype: DType, bytes: &'a [u8], shape: &[usize]) -> Result<Self> {
        with_dtype!(dtype, T => {
            if !(bytes.as_ptr() as usize).is_multiple_of(align_of::<T>()) {
                let found = bytes.as_ptr() as u64;
                return Err(Error::Alignment { argument: "tensor", found, allowed: align_of::<T>() });
            }
            let whole = bytes.len() / size_of::<T>() * size_of::<T>();
            let data: &[T] = bytemuck::cast_slice(&bytes[..whole]);
            // Bytes that make no whole element count as one too many.
            Self::exact(T::wrap(data), bytes.len().div_ceil(size_of::<T>()), shape)
        })
    }

    fn exact(data: Slice<'a>, found: usize, shape: &[usize]) -> Result<Self> {
        let layout = Layout::contiguous(data.dtype(), shape)?;
        if layout.len() != found {
            let (shape, strides) = (shape.to_vec(), layout.strides().to_vec());
            return Err(Error::Length { argument: "tensor", found, shape, strides, needed: layout.len().to_string() });
        }
        Ok(TensorRef { data, layout })
    }

    /// The dtype of the elements.
    pub fn dtype(&self) -> DType {
        self.layout.dtype()
    }

    /// The extent of each dimension.
    pub fn shape(&self) -> &[usize] {
        self.layout.shape()
    }

    /// Dtype, shape and strides.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The elements as they lie in memory, gaps included; `None` if `T` is not the dtype.
    pub fn as_slice<T: Datum>(&self) -> Option<&'a [T]> {
        T::unwrap(self.data)
    }

    /// The same with an extent of 1 where a stride of 0 repeats its elements.
    pub(crate) fn without_repetitions(&self) -> TensorRef<'a> {
        TensorRef { data: self.data, layout: self.layout.without_repetitions() }
    }

    /// The elements in row-major order without gaps: borrowed where they lie so. `None` if `T` is not the dtype.
    pub(crate) fn packed<T: Datum>(&self) -> Option<Cow<'a, [T]>> {
        let data = self.as_slice::<T>()?;
        if self.layout.is_contiguous() {
            return Some(Cow::Borrowed(&data[..self.layout.len()]));
        }
        let mut packed = Vec::with_capacity(self.layout.len());
        gather(data, self.layout.shape(), self.layout.strides(), &mut packed);
        Some(Cow::Owned(packed))
    }

    /// An owned, contiguous copy.
    pub fn to_tensor(&self) -> Tensor {
        with_dtype!(self.dtype(), T => {
            let data = self.packed::<T>().unwrap_or_default().into_owned();
            Tensor { shape: self.shape().to_vec(), data: T::store(data) }
        })
    }
}

/// Appends the elements of the tensor that begins at `data[0]` to `packed`, in row-major order.
fn gather<T: Copy>(data: &[T], shape: &[usize], strides: &[usize], packed: &mut Vec<T>) {
    match (shape, strides) {
        (&[extent], &[1]) => packed.extend_from_slice(&data[..extent]),
        (&[extent, ref shape @ ..], &[stride, ref strides @ ..]) => {
            for i in 0..extent {
                gather(&data[i * stride..], shape, strides, packed);
            }
        }
        _ => packed.push(data[0]),
    }
}

impl<'a> From<&'a Tensor> for TensorRef<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        tensor.view()
    }
}

impl<'a> From<&TensorRef<'a>> for TensorRef<'a> {
    fn from(tensor: &TensorRef<'a>) -> Self {
        tensor.clone()
    }
}

/// A view of a tensor in host memory that is to be written. No two of its elements share memory.
#[derive(Debug)]
pub struct TensorMut<'a> {
    data: SliceMut<'a>,
    layout: Layout,
}

impl<'a> TensorMut<'a> {
    /// A contiguous tensor.
    ///
    /// # Errors
    /// [`Error::Length`] if `data` has fewer elements than `shape` says.
    pub fn new<T: Datum>(data: &'a mut [T], shape: &[usize]) -> Result<Self> {
        let layout = Layout::contiguous(T::STORED, shape)?;
        Self::checked(data, layout)
    }

    /// A tensor whose neighbours along dimension i are `strides[i]` elements apart.
    ///
    /// # Errors
    /// [`Error::Rank`] if there are not as many strides as dimensions, [`Error::Length`] if `data` ends before the last
    /// element, [`Error::Stride`] if elements overlap.
    pub fn with_strides<T: Datum>(data: &'a mut [T], shape: &[usize], strides: &[usize]) -> Result<Self> {
        let layout = Layout::strided(T::STORED, shape, strides)?;
        if !layout.is_distinct() {
            let allowed = "those with which no two elements share memory";
            return Err(Error::Stride { argument: "output", found: strides.to_vec(), allowed });
        }
        Self::checked(data, layout)
    }

    fn checked<T: Datum>(data: &'a mut [T], layout: Layout) -> Result<Self> {
        layout.check_length("output", data.len())?;
        Ok(TensorMut { data: T::wrap_mut(data), layout })
    }

    /// Dtype, shape and strides.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The elements as they lie in memory, gaps included; `None` if `T` is not the dtype.
    pub fn into_slice<T: Datum>(self) -> Option<&'a mut [T]> {
        T::unwrap_mut(self.data)
    }

    /// Copies elements, given in row-major order, to their places.
    pub(crate) fn fill<T: Datum>(self, packed: &[T]) {
        let TensorMut { data, layout } = self;
        if let Some(data) = T::unwrap_mut(data).filter(|_| !layout.is_empty()) {
            scatter(packed, layout.shape(), layout.strides(), data);
        }
    }
}

/// Copies `packed`, in row-major order, to the tensor that begins at `data[0]`. Returns what is left of `packed`.
fn scatter<'p, T: Copy>(packed: &'p [T], shape: &[usize], strides: &[usize], data: &mut [T]) -> &'p [T] {
    match (shape, strides) {
        (&[extent], &[1]) => {
            let (row, rest) = packed.split_at(extent);
            data[..extent].copy_from_slice(row);
            rest
        }
        (&[extent, ref shape @ ..], &[stride, ref strides @ ..]) => {
            (0..extent).fold(packed, |packed, i| scatter(packed, shape, strides, &mut data[i * stride..]))
        }
        _ => {
            data[0] = packed[0];
            &packed[1..]
        }
    }
}

impl<'a> From<&'a mut Tensor> for TensorMut<'a> {
    fn from(tensor: &'a mut Tensor) -> Self {
        tensor.view_mut()
    }
}

/// A contiguous tensor that owns its data, of any rank.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    data: Buffer,
    shape: Vec<usize>,
}

impl Tensor {
    /// Takes the elements, in row-major order.
    ///
    /// # Errors
    /// [`Error::Length`] if they are not as many as `shape` says.
    pub fn from_vec<T: Datum>(data: Vec<T>, shape: &[usize]) -> Result<Self> {
        TensorRef::new(&data, shape)?;
        Ok(Tensor { data: T::store(data), shape: shape.to_vec() })
    }

    /// Copies the elements from their bytes, in this machine's byte order, at any alignment.
    ///
    /// # Errors
    /// [`Error::Length`] if they are not as many as `shape` says.
    pub fn from_bytes(dtype: DType, bytes: &[u8], shape: &[usize]) -> Result<Self> {
        with_dtype!(dtype, T => {
            let elements = bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned::<T>);
            let rest = bytes.len() % size_of::<T>();
            // Bytes that make no whole element count as one too many.
            let data = elements.chain((rest > 0).then(T::default)).collect();
            Self::from_vec::<T>(data, shape)
        })
    }

    /// All elements 0.
    ///
    /// # Errors
    /// [`Error::TooLarge`] if the elements are more than memory can hold.
    pub fn zeros(dtype: DType, shape: &[usize]) -> Result<Self> {
        let len = Layout::contiguous(dtype, shape)?.len();
        with_dtype!(dtype, T => Self::from_vec(vec![T::default(); len], shape))
    }

    /// The dtype of the elements.
    pub fn dtype(&self) -> DType {
        self.slice().dtype()
    }

    /// The extent of each dimension.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The elements in row-major order; `None` if `T` is not the dtype.
    pub fn as_slice<T: Datum>(&self) -> Option<&[T]> {
        T::unwrap(self.slice())
    }

    /// The elements in row-major order, to be written; `None` if `T` is not the dtype.
    pub fn as_mut_slice<T: Datum>(&mut self) -> Option<&mut [T]> {
        T::unwrap_mut(self.slice_mut())
    }

    /// The elements' bytes, in row-major order and this machine's byte order.
    pub fn bytes(&self) -> &[u8] {
        for_each_dtype!(Slice, self.slice(), data => bytemuck::cast_slice(data))
    }

    /// The elements, widened to f32: exact, but for integers beyond 2^24.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut wide = vec![0.0; self.len()];
        for_each_dtype!(Slice, self.slice(), data => Datum::widen(data, &mut wide));
        wide
    }

    /// The elements, rounded to another dtype: to nearest, ties to even.
    pub fn convert(&self, dtype: DType) -> Self {
        let wide = self.to_f32();
        with_dtype!(dtype, T => {
            let mut data = vec![T::default(); wide.len()];
            T::narrow(&wide, &mut data);
            Tensor { data: T::store(data), shape: self.shape.clone() }
        })
    }

    /// A view to be read.
    pub fn view(&self) -> TensorRef<'_> {
        TensorRef { data: self.slice(), layout: self.layout() }
    }

    /// A view to be written.
    pub fn view_mut(&mut self) -> TensorMut<'_> {
        let layout = self.layout();
        TensorMut { data: self.slice_mut(), layout }
    }

    fn layout(&self) -> Layout {
        Layout::contiguous(self.dtype(), &self.shape).expect("the constructors have checked the shape")
    }

    fn slice(&self) -> Slice<'_> {
        for_each_dtype!(Buffer, &self.data, data => Stored::wrap(data.as_slice()))
    }

    fn slice_mut(&mut self) -> SliceMut<'_> {
        for_each_dtype!(Buffer, &mut self.data, data => Stored::wrap_mut(data.as_mut_slice()))
    }
}
